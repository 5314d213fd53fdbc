"""A model's head and a divergence as one function that never stores the logits of a whole batch.

Rows are processed in chunks: logits, loss, the closed-form gradient of the logits (`row_pass`), and
from it the gradients of hidden states and head, all in the forward pass. Backward only scales them.

Shapes: N trained positions of a batch, R of them in a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dftserve.lm import Head, never_compiled
from dftserve.train.divergences import Divergence, TargetRows
from dftserve.train.row_pass import row_pass

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of one chunk's logits: few enough for a CPU's cache, enough to keep a GPU busy."""


@dataclass(frozen=True, eq=False)
class HeadLoss:
    """Sums over the N positions."""

    loss: Tensor
    """Σ of the divergence in nats; has a gradient."""
    model_entropy: Tensor
    """Σ of the model's next-token entropy in nats."""


@never_compiled
def head_loss(
    head: Head,
    hidden_ND: Tensor,
    target: TargetRows,
    divergence: Divergence,
    weights_N: Tensor | None = None,
) -> HeadLoss:
    """The divergence summed over the positions.

    Args:
        weights_N: factor of each position's divergence; None: 1.
    """
    weight_VD, bias_V = head.weight_VD, head.bias_V
    if not torch.is_grad_enabled():
        # A Function computes the gradients of all parameters, even where none is recorded.
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    loss, entropy = _ChunkedHead.apply(  # type: ignore[misc]
        hidden_ND, weight_VD, bias_V, head.scale, head.cap, target, divergence, weights_N
    )
    return HeadLoss(loss, entropy)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, scale, cap, target, divergence, weights_N):
        device = hidden_ND.device.type
        compute = torch.get_autocast_dtype(device) if _autocasts(device) else hidden_ND.dtype
        wide = torch.float64 if compute is torch.float64 else torch.float32
        hidden_ND, matrix_VD = hidden_ND.to(compute), weight_VD.to(compute)
        offset_V = None if bias_V is None else bias_V.to(compute)
        gradients = _Gradients.empty(hidden_ND, matrix_VD, ctx.needs_input_grad[:3], wide)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        entropy = torch.zeros_like(loss)
        rows = row_pass(divergence, target.to(wide), scale=scale, cap=cap, dtype=compute)
        with torch.autocast(device, enabled=False):
            for part in chunks(len(hidden_ND), len(matrix_VD), device):
                raw_RV = nn.functional.linear(hidden_ND[part], matrix_VD, offset_V)
                loss_R, entropy_R, gradient_RV = rows(raw_RV, part)
                if weights_N is not None:
                    loss_R = loss_R * weights_N[part]
                    gradient_RV = gradient_RV.mul_(weights_N[part, None])
                loss += loss_R.sum()
                entropy += entropy_R.sum()
                gradients.add(part, gradient_RV, hidden_ND[part], matrix_VD)
        gradients.save(ctx)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx, *outputs):
        saved = iter(ctx.saved_tensors)
        scaled = [
            (next(saved) * outputs[0]).to(dtype) if need else None
            for need, dtype in zip(ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of the hidden states, the head's weight and its bias; None if not needed."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None

    @staticmethod
    def empty(hidden_ND, weight_VD, needs, wide) -> "_Gradients":
        # The weight's gradient is a sum over all chunks, for which bfloat16 is too coarse.
        return _Gradients(
            torch.empty_like(hidden_ND) if needs[0] else None,
            torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None,
            torch.zeros_like(weight_VD[:, 0], dtype=wide) if needs[2] else None,
        )

    def add(self, part: slice, gradient_RV: Tensor, hidden_RD: Tensor, weight_VD: Tensor) -> None:
        if self.bias_V is not None:
            self.bias_V.add_(gradient_RV.sum(dim=0, dtype=self.bias_V.dtype))
        gradient_RV = gradient_RV.to(hidden_RD.dtype)
        if self.hidden_ND is not None:
            torch.mm(gradient_RV, weight_VD, out=self.hidden_ND[part])
        if self.weight_VD is not None and self.weight_VD.dtype == gradient_RV.dtype:
            self.weight_VD.addmm_(gradient_RV.T, hidden_RD)
        elif self.weight_VD is not None:
            self.weight_VD.add_(gradient_RV.T @ hidden_RD)

    def save(self, ctx: Any) -> None:
        all_three = (self.hidden_ND, self.weight_VD, self.bias_V)
        ctx.save_for_backward(*(each for each in all_three if each is not None))


def chunks(rows: int, vocabulary: int, device: str) -> Iterator[slice]:
    """Slices of rows whose logits have at most CHUNK_ELEMENTS elements."""
    size = max(1, CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]) // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def _autocasts(device: str) -> bool:
    return torch.is_autocast_enabled(device)
