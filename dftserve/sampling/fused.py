"""The one entry point, and the one place that chooses how the law is computed on a device.

    cpu     fused_numba.py   one kernel    } where the compiler is installed, as it is wherever
    cuda    fused_triton.py  three kernels } vLLM is, and the kernels pass a check
    other   transform.py     plain torch

Every adapter calls this (transformers, vLLM's V1 and V2 runners); none repeats the maths.
"""

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from dftserve.sampling.laws import Controls, control_row
from dftserve.sampling.transform import Statistics
from dftserve.sampling.transform import transform as plain
from dftserve.spec import parse

logger = logging.getLogger(__name__)

Way = Callable[[Tensor, Controls, Tensor | None], Statistics]
"""`transform.transform`, or what does the same faster with buffers of its own."""


def fastest(device: torch.device) -> Way:
    """The fastest way on a device. It owns its buffers: one for each engine and thread."""
    made = _kernels(device)
    return made() if made else plain


def transform(
    logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None, way: Way | None = None
) -> Statistics:
    """Rewrite rows of logits, in place, so that sampling from them follows each row's law.

    A row comes as L/divided and leaves as y·T/divided, where softmax(y) is the distribution to
    sample from: whoever divided by T before, or does so afterwards, draws from softmax(y). The
    former argmax still attains the maximum, -inf stays -inf, other rows keep their bits.

    Args:
        logits_XV: float32, each row contiguous, changed in place. An engine that pads its
            vocabulary gives a part of wider rows.
        controls: one row of controls for each row to change.
        rows_R: int64, the rows to change, each once; None for all of them, in order.
        way: what `fastest` gave for the device, kept from call to call; None for one call.

    Returns:
        What was done; valid until the next call of the same `way`. All computation precedes the
        write: if this raises, nothing was changed.

    Raises:
        ValueError: the logits are not a float32 matrix of contiguous rows.
    """
    if logits_XV.dtype != torch.float32 or logits_XV.dim() != 2 or logits_XV.stride(1) != 1:
        raise ValueError(
            f"logits: got {logits_XV.dtype}, shape {tuple(logits_XV.shape)}, strides "
            f"{logits_XV.stride()}; accepted: a float32 matrix whose rows are contiguous."
        )
    return (way or fastest(logits_XV.device))(logits_XV, controls, rows_R)


@cache
def _kernels(device: torch.device) -> Callable[[], Way] | None:
    """What makes the kernels' way, where they compile and give what the plain way gives. Engines
    start with this, so no request waits for a compiler, and no wrong kernel meets one."""
    try:
        if device.type == "cpu":
            from dftserve.sampling.fused_numba import NumbaTransform

            made = NumbaTransform
        elif device.type == "cuda":
            from dftserve.sampling.fused_triton import TritonTransform

            made = partial(TritonTransform, device)
        else:
            return None
        agree = all(_same(made(), _probe(vocabulary, device)) for vocabulary in (257, 4096))
    except Exception as error:  # No compiler, one that fails, a driver that does not load.
        is_missing = isinstance(error, ModuleNotFoundError)
        logger.warning(
            "diversity: no kernels (%s); plain torch instead.", error, exc_info=not is_missing
        )
        return None
    if not agree:
        logger.warning("diversity: the kernels disagree with plain torch, which is used instead.")
        return None
    return made


def _probe(vocabulary: int, device: torch.device) -> Tensor:
    """A peaked row, a flat one, one with a grammar's mask; quarters, so that none is at a floor."""
    steps_V = torch.arange(vocabulary, device=device) * 37 % 101
    masked_V = torch.where(steps_V < 9, -0.25 * steps_V, -torch.inf)
    return torch.stack((-0.25 * steps_V, 0.0 * steps_V, masked_V)).float()


def _same(way: Way, logits_RV: Tensor) -> bool:
    diversity = parse({"level": 0.5})
    row = control_row(diversity, temperature=0.8, divided=1.0, stop_ids=frozenset({3}))
    controls = Controls.stack([row] * len(logits_RV), logits_RV.device)
    expected_RV, got_RV = logits_RV.clone(), logits_RV.clone()
    expected = plain(expected_RV, controls)
    got = way(got_RV, controls, None)
    pairs = zip((expected_RV, *expected.figures()), (got_RV, *got.figures()), strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
