"""A GPU kernel for a chunk's rows: loss, entropy, and the gradient, which overwrites the logits.

    gradient_j = f·p_j + Σ_e a_e·[j is the token of entry e]

holds for every divergence that reads a few tokens of a row: f is one number per row, and the a_e
follow from the entries' probabilities (`divergences` is the reference). So a row is read twice and
written once, in the dtype of the head's product, and no other [R, V] is allocated; sums are
float32.

Shapes: R rows, V vocabulary, E entries of a row.
"""

# Triton kernels are not ordinary Python to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.train.divergences import (
    FLOOR,
    JSD,
    SFT,
    Divergence,
    ForwardKL,
    LumpedDivergence,
    ReverseKL,
    SkewKL,
    TargetRows,
    mixed_entropy,
)

BLOCK = 4096
"""Logits that a program processes at a time."""
POINTS, REVERSE_KL, SKEW_KL, JENSEN_SHANNON = range(4)
"""Kinds of entries: point masses of the target, whose tokens may repeat; or, for the others, cells
of one token each."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The kernel's inputs from a target."""

    kind: int
    parameter: float
    """α of SkewKL, π of JSD."""
    ids_RE: Tensor
    """int64; −1: no entry."""
    mass_RE: Tensor
    """float32: q' of the entry."""
    rest_R: Tensor
    """float32: for cells, q' of the rest; for points, H(q')."""

    @staticmethod
    def of(divergence: Divergence, target: TargetRows) -> "Entries | None":
        """None if the divergence has no kernel, because it reads whole rows."""
        match divergence:
            case SFT():
                return Entries._points(ForwardKL(weight=0.0), target)
            case ForwardKL():
                return Entries._points(divergence, target)
            case ReverseKL():
                return Entries._cells(REVERSE_KL, 0.0, divergence, target)
            case SkewKL():
                return Entries._cells(SKEW_KL, divergence.skew, divergence, target)
            case JSD():
                return Entries._cells(JENSEN_SHANNON, divergence.share, divergence, target)
        return None

    @staticmethod
    def _points(divergence: ForwardKL, target: TargetRows) -> "Entries":
        ids_RE, mass_RE = divergence.entries(target)
        entropy_R = mixed_entropy(target, divergence.weight)
        return Entries(POINTS, 0.0, ids_RE.contiguous(), mass_RE.float(), entropy_R.float())

    @staticmethod
    def _cells(
        kind: int, parameter: float, divergence: LumpedDivergence, target: TargetRows
    ) -> "Entries":
        ids_RE, single_RE, mass_RC = (each.contiguous() for each in divergence.cells(target))
        ids_RE = torch.where(single_RE > 0, ids_RE, -1)
        mass_RE, rest_R = mass_RC[:, :-1].float(), mass_RC[:, -1].float()
        return Entries(kind, parameter, ids_RE, mass_RE.contiguous(), rest_R.contiguous())

    def __getitem__(self, index: slice) -> "Entries":
        parts = (self.ids_RE[index], self.mass_RE[index], self.rest_R[index])
        return Entries(self.kind, self.parameter, *parts)


def rewrite(
    raw_RV: Tensor, entries: Entries, *, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Overwrite raw logits with d loss / d raw.

    Args:
        raw_RV: the output of the head's product, float32, bfloat16 or float16, rows contiguous; the
            logits are scale·raw, or cap·tanh(scale·raw/cap).

    Returns:
        loss_R and the model's entropy_R, float32, nats.
    """
    rows, vocabulary = raw_RV.shape
    loss_R, entropy_R = torch.empty((2, rows), dtype=torch.float32, device=raw_RV.device)
    count = entries.ids_RE.shape[1]
    with torch.cuda.device_of(raw_RV):  # Triton launches on the current device.
        _row_pass[(rows,)](
            raw_RV,
            entries.ids_RE,
            entries.mass_RE,
            entries.rest_R,
            loss_R,
            entropy_R,
            raw_RV.stride(0),
            vocabulary,
            count,
            scale,
            1.0 if cap is None else cap,
            entries.parameter,
            KIND=entries.kind,
            CAPPED=cap is not None,
            BLOCK=BLOCK,
            ENTRIES=triton.next_power_of_2(count),
            num_warps=8,
            enable_fp_fusion=True,
        )
    return loss_R, entropy_R


# Globals that a kernel reads must be constexpr.
_POINTS, _REVERSE_KL = tl.constexpr(POINTS), tl.constexpr(REVERSE_KL)
_SKEW_KL = tl.constexpr(SKEW_KL)
_FLOOR, _TINY = tl.constexpr(FLOOR), tl.constexpr(torch.finfo(torch.float32).tiny)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# Do not recompile for these: a chunk's part of a target may have any alignment. The size of the
# vocabulary is constant for a model, and specialising on it decides how wide loads are.
@triton.jit(
    do_not_specialize=["count", "scale", "cap", "parameter"],
    do_not_specialize_on_alignment=["ids", "masses", "rests", "losses", "entropies"],
)
def _row_pass(
    raw,
    ids,
    masses,
    rests,
    losses,
    entropies,
    stride,
    vocabulary,
    count,
    scale,
    cap,
    parameter,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One program per row."""
    r = tl.program_id(0).to(tl.int64)
    raw += r * stride
    v = tl.arange(0, BLOCK)
    # 1. ln Z and the entropy, by Σ e^(z − peak) and Σ e^(z − peak)·(z − peak) below a running peak.
    peak = _LOWEST
    sum_B, weighted_B = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logit_B, _ = _logits(raw, start + v, start + v < vocabulary, scale, cap, CAPPED)
        higher = tl.maximum(peak, tl.max(logit_B))
        shrunk, below_B = tl.exp(peak - higher), logit_B - higher
        share_B = tl.exp(below_B)
        weighted_B = (weighted_B + sum_B * (peak - higher)) * shrunk
        weighted_B += share_B * tl.where(share_B > 0, below_B, 0.0)
        sum_B = sum_B * shrunk + share_B
        peak = higher
    total = tl.sum(sum_B)
    log_z = peak + tl.log(total)
    tl.store(entropies + r, tl.log(total) - tl.sum(weighted_B) / total)
    # 2. The entries: their probabilities, and from these the loss, f and a_E.
    e = tl.arange(0, ENTRIES)
    id_E = tl.load(ids + r * count + e, mask=e < count, other=-1)
    mass_E = tl.load(masses + r * count + e, mask=e < count, other=0.0)
    rest = tl.load(rests + r)
    logit_E, bend_E = _logits(raw, id_E, id_E >= 0, scale, cap, CAPPED)
    p_E = tl.exp(logit_E - log_z)
    if KIND == _POINTS:
        # Several points may have the same token: each of them gets the sum of all.
        added_E = tl.zeros((ENTRIES,), tl.float32)
        for other in range(count):
            is_same_E = id_E == tl.load(ids + r * count + other)
            added_E -= tl.where(is_same_E, tl.load(masses + r * count + other), 0.0)
        loss = log_z - tl.sum(tl.where(mass_E > 0, mass_E * logit_E, 0.0)) - rest
        factor = 1.0
    else:
        p_rest = tl.maximum(1 - tl.sum(p_E), 0.0)
        value_E, slope_E = _cell(p_E, mass_E, parameter, KIND)
        value, slope = _cell(p_rest, rest, parameter, KIND)
        loss = tl.sum(value_E) + value
        factor = slope - (tl.sum(p_E * slope_E) + p_rest * slope)
        added_E = p_E * (slope_E - slope)
    tl.store(losses + r, loss)
    # 3. The gradient of all tokens, then again of the entries' tokens.
    tl.debug_barrier()  # Every thread has read the entries' logits.
    for start in range(0, vocabulary, BLOCK):
        is_there_B = start + v < vocabulary
        logit_B, bend_B = _logits(raw, start + v, is_there_B, scale, cap, CAPPED)
        gradient_B = factor * tl.exp(logit_B - log_z) * bend_B
        tl.store(raw + start + v, gradient_B.to(raw.dtype.element_ty), mask=is_there_B)
    tl.debug_barrier()  # The loop has also written the entries' positions.
    gradient_E = (factor * p_E + added_E) * bend_E
    tl.store(raw + id_E, gradient_E.to(raw.dtype.element_ty), mask=id_E >= 0)


@triton.jit
def _logits(raw, place, is_there, scale, cap, CAPPED: tl.constexpr):
    """The logits in float32, −inf outside the mask, and d logit / d raw."""
    logit = tl.load(raw + place, mask=is_there, other=0.0).to(tl.float32) * scale
    bend = tl.zeros_like(logit) + scale
    if CAPPED:
        share = 2 * tl.sigmoid(2 * logit / cap) - 1  # tanh
        logit, bend = share * cap, (1 - share * share) * scale
    return tl.where(is_there, logit, float("-inf")), bend


@triton.jit
def _cell(p, t, parameter, KIND: tl.constexpr):
    """A cell's term of the divergence, and its derivative by p, up to one constant per row."""
    if KIND == _REVERSE_KL:
        slope = _log(p) - tl.log(tl.maximum(t, _FLOOR))
        value = p * slope
    elif KIND == _SKEW_KL:
        between = parameter * t + (1 - parameter) * p
        value = t * (_log(t) - _log(between))
        slope = -(1 - parameter) * t / tl.maximum(between, _TINY)
    else:
        log_mean = _log(parameter * t + (1 - parameter) * p)
        slope = (1 - parameter) * (_log(p) - log_mean)
        value = parameter * t * (_log(t) - log_mean) + p * slope
    return value, slope


@triton.jit
def _log(p):
    return tl.log(tl.maximum(p, _TINY))
