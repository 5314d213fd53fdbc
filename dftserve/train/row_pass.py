"""From a chunk's raw logits to losses, entropies and the gradient: in plain torch, which is the
reference, or in one GPU kernel if a check at the start shows that it gives the same results.

Shapes: R rows of a chunk, V vocabulary.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from dftserve.train.divergences import (
    JSD,
    SFT,
    Divergence,
    ForwardKL,
    LogitRows,
    ReverseKL,
    SkewKL,
    TargetRows,
)

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULED_OUT = 5
"""The token whose logit is −inf in the check at the start, in cases with capped logits."""


class RowPass(Protocol):
    """The computation on the rows of one chunk."""

    def __call__(self, raw_RV: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """loss_R, entropy_R in nats, and d loss / d raw [R, V]; `raw_RV` may be overwritten.
        `part`: the target's rows that belong to this chunk."""
        ...


def row_pass(
    divergence: Divergence,
    target: TargetRows,
    *,
    scale: float,
    cap: float | None,
    dtype: torch.dtype,
) -> RowPass:
    """The fastest implementation for raw logits of this dtype. The logits are scale·raw, or
    cap·tanh(scale·raw/cap)."""
    if dtype in KERNEL_DTYPES and has_kernel(target.labels_R.device):
        fused = _fused(divergence, target, scale, cap)
        if fused is not None:
            return fused
    return PlainPass(divergence, target, scale, cap)


@dataclass(frozen=True, eq=False)
class PlainPass:
    """`Divergence.loss_and_gradient`, in the target's own precision."""

    divergence: Divergence
    target: TargetRows
    scale: float
    cap: float | None

    def __call__(self, raw_RV: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        wide_RV = raw_RV.to(self.target.token_logprob_R.dtype)
        logits_RV, slope_RV = _scale_and_cap(wide_RV, self.scale, self.cap)
        rows = LogitRows.of(logits_RV)
        entropy_R = rows.entropy_R
        loss_R, gradient_RV = self.divergence.loss_and_gradient(rows, self.target[part])
        return loss_R, entropy_R, gradient_RV if slope_RV is None else gradient_RV.mul_(slope_RV)


def _scale_and_cap(raw_RV: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits, and d logits / d raw, or None if that is 1; `raw_RV` is overwritten."""
    if scale != 1.0:
        raw_RV.mul_(scale)
    if cap is None:
        return raw_RV, None if scale == 1.0 else raw_RV.new_tensor(scale)
    share_RV = raw_RV.div_(cap).tanh_()
    return share_RV * cap, share_RV.square_().neg_().add_(1.0).mul_(scale)


def _fused(
    divergence: Divergence, target: TargetRows, scale: float, cap: float | None
) -> RowPass | None:
    """The kernel; None if the divergence has none."""
    from dftserve.train.row_kernel import Entries, rewrite

    entries = Entries.of(divergence, target)
    if entries is None:
        return None

    def fused(raw_RV: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        return *rewrite(raw_RV, entries[part], scale=scale, cap=cap), raw_RV

    return fused


# ── The check at the start ───────────────────────────────────────────────────────────────────────


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether this device uses the kernel: it is a GPU, and the kernel compiles there and agrees
    with plain torch. Logs a warning once if it does not."""
    if device.type != "cuda":
        return False
    try:
        agrees = self_check(device)
    except ModuleNotFoundError as error:
        logger.warning("training: no kernel (%s); plain torch instead, which is slower.", error)
        return False
    except Exception:  # A compiler that fails, a driver that does not load.
        logger.warning("training: the kernel fails; plain torch instead.", exc_info=True)
        return False
    if not agrees:
        logger.warning("training: the kernel disagrees with plain torch, which is used instead.")
    return agrees


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs on which the kernel is checked."""

    divergence: Divergence
    dtype: torch.dtype
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None


def self_check(device: torch.device) -> bool:
    """Whether the kernel agrees with plain torch, for every divergence that has one."""
    # A list, not a generator: all cases must be compiled, even after one that disagrees.
    return all([_agrees(case, device) for case in cases()])


def cases() -> Iterator[Case]:
    """Each divergence in each dtype, with different scales and caps of a model's head."""
    for divergence in (SFT(), ForwardKL(), ReverseKL(), SkewKL(), JSD()):
        yield Case(divergence=divergence, dtype=torch.float32, vocabulary=4999)
        yield Case(divergence=divergence, dtype=torch.bfloat16, vocabulary=8192, scale=0.5)
        yield Case(divergence=divergence, dtype=torch.float16, vocabulary=8192, scale=2.0, cap=5.0)


def _agrees(case: Case, device: torch.device) -> bool:
    target = _targets(device)
    raw_RV = _logits(len(target), case.vocabulary, device).to(case.dtype)
    if case.cap is not None:  # Without a cap, plain torch's entropy of such a row is NaN.
        raw_RV[:, RULED_OUT] = -torch.inf
    plain = PlainPass(case.divergence, target, case.scale, case.cap)
    fused = _fused(case.divergence, target, case.scale, case.cap)
    assert fused is not None
    pairs: list[tuple[Tensor, Tensor]] = []
    for part in (slice(0, 3), slice(3, 6)):
        expected, got = (compute(raw_RV[part].clone(), part) for compute in (plain, fused))
        pairs += zip((each.to(case.dtype) for each in expected), got, strict=True)
    # In bfloat16 the last bit may differ.
    relative = 1e-4 if case.dtype is torch.float32 else 1e-2
    return all(torch.allclose(a, b.to(case.dtype), rtol=relative, atol=1e-5) for a, b in pairs)


def _logits(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Flat rows and peaked ones."""
    steps_V = torch.arange(vocabulary, device=device) * 37 % 101
    return -0.0625 * steps_V * torch.arange(rows, device=device)[:, None]


def _targets(device: torch.device) -> TargetRows:
    """Six rows of three top entries and four draws, with and without the text's own token among the
    top, and with a repeated draw."""
    row_R1 = torch.arange(6, device=device)[:, None]
    top_RK = torch.tensor([0.4, 0.2, 0.1], device=device).log().expand(6, 3).contiguous()
    own_R = torch.where(row_R1[:, 0] % 2 == 0, 0.2, 0.01)
    return TargetRows(
        labels_R=torch.where(row_R1[:, 0] % 2 == 0, 12 + row_R1[:, 0], 99),
        top_ids_RK=11 + row_R1 + torch.arange(3, device=device),
        top_logprobs_RK=top_RK,
        tail_ids_RM=torch.tensor([60, 61, 60, 4000], device=device).expand(6, 4).contiguous(),
        tail_logprob_R=torch.full((6,), 0.3, device=device).log(),
        token_logprob_R=own_R.log(),
        entropy_R=torch.full((6,), 1.9, device=device),
    )
