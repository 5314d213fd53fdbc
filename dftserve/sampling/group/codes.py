"""Arithmetic codes: one number determines a text, and n evenly spaced numbers give n texts that
differ as early as possible (arXiv 2210.15458).

A step's survivors, in token order, partition [0, 1) into intervals whose lengths are their
probabilities. The token is the one whose interval contains the number u, and the relative position
of u in that interval is the next step's number:

    v = min {v: CDF(v) > u},   u ← (u − CDF(v − 1))/p_v,   bits ← bits − log₂ p_v

Choice i of a group of n begins with u = frac(u₀ + i/n). u₀ is uniform, so each u is, and each
choice by itself is an exact sample from the model's distribution. Jointly the choices are spread
out: ⌊n·p⌋ or ⌈n·p⌉ of the n choices begin with a given text of probability p, since that text
corresponds to one interval.

After log₂ n bits no other choice shares a text's beginning, so the rest of u would not spread the
choices any further. With equal probabilities that rest is even the same for all choices, which
would then continue identically. The engine's own sampler therefore takes over from there.

All of it is float64, on the rows' device. Shapes: R rows, K survivors.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CODE_BITS = 53
"""Bits of u₀: the precision of a float64."""


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One request of a group, on the host."""

    code: float
    """The number u before the first token: see `first_code`."""
    bits: float
    """How many bits of the code are used: log₂ of the group's size."""
    scale: float
    """Logits divisor / temperature; multiplied by it, a row written by the law is a row of
    log-probabilities."""
    top_k: int = 0
    """The request's own cuts, which the engine would apply only after the token is drawn. 0 keeps
    all tokens."""
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def first_code(name: str, index: int, size: int) -> float:
    """frac(u₀ + index/size); u₀ is the BLAKE2 hash of the group's name."""
    digest = hashlib.blake2b(repr(("group", name)).encode(), digest_size=8).digest()
    first = (int.from_bytes(digest, "big") >> (64 - CODE_BITS)) * 2.0**-CODE_BITS
    return (first + index / size) % 1.0


@dataclass(frozen=True)
class Cdf:
    """The cumulative distribution of a step's survivors, one row for each row of logits."""

    token_RK: Tensor
    """int64, survivors in ascending order, then padding."""
    weight_RK: Tensor
    """float64, unnormalised probabilities; 0 for tokens that are not survivors."""
    end_RK: Tensor
    """float64, the end of each token's interval, unnormalised; non-decreasing, and repeated for
    tokens that are not survivors."""
    total_R: Tensor
    last_R1: Tensor
    """int64, the index of the last survivor."""
    is_valid_R: Tensor
    """bool, False for a row with NaN or +inf, or without any finite value."""

    @classmethod
    def of(cls, log_p_RK: Tensor, token_RK: Tensor) -> "Cdf":
        """`log_p_RK`: float64, up to a constant for each row; -inf for tokens that are not
        survivors."""
        weight_RK = torch.exp(log_p_RK - log_p_RK.amax(dim=1, keepdim=True))
        is_token_RK = weight_RK > 0
        # A parallel cumsum may round equal ends differently. Copying the end of the previous
        # survivor ensures that no token without weight is picked.
        end_RK = torch.where(is_token_RK, weight_RK.cumsum(dim=1), -1.0).cummax(dim=1).values
        index_K = torch.arange(weight_RK.shape[1], device=weight_RK.device)
        last_R1 = torch.where(is_token_RK, index_K, 0).amax(dim=1, keepdim=True)
        total_R = end_RK[:, -1]
        is_valid_R = torch.isfinite(total_R) & (total_R > 0)
        return cls(token_RK, weight_RK, end_RK, total_R, last_R1, is_valid_R)

    def pick(self, code_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The token of each code, the code within the token's interval, and the bits used; one
        binary search per row."""
        wanted_R1 = (code_R * self.total_R)[:, None]
        index_R1 = torch.searchsorted(self.end_RK, wanted_R1, right=True)
        index_R1 = torch.minimum(index_R1, self.last_R1)
        width_R1 = self.weight_RK.gather(1, index_R1)
        begin_R1 = self.end_RK.gather(1, index_R1) - width_R1
        inside_R = ((wanted_R1 - begin_R1) / width_R1)[:, 0].clamp(0.0, 1.0 - 2.0**-CODE_BITS)
        bits_R = torch.log2(self.total_R / width_R1[:, 0])
        return self.token_RK.gather(1, index_R1)[:, 0], inside_R, bits_R


def survivors(logits_XV: Tensor, row_N: Tensor) -> tuple[Tensor, Tensor]:
    """The finite logits of some rows as float64 [N, K], and their tokens, int64.

    On a CPU, K is the largest number of survivors in a row, and other rows are padded with -inf and
    their first token. On other devices, determining that number would block, and K is V.
    """
    if logits_XV.device.type != "cpu":
        tokens_V = torch.arange(logits_XV.shape[1], device=logits_XV.device)
        return logits_XV[row_N].double(), tokens_V.expand(len(row_N), -1)
    rows = [logits_XV[row].numpy() for row in row_N.tolist()]
    kept = [np.flatnonzero(row_V != -np.inf) for row_V in rows]
    shape = (len(rows), max(1, *map(len, kept)))
    value_NK, token_NK = np.full(shape, -np.inf), np.zeros(shape, np.int64)
    for row_V, token_K, values_K, tokens_K in zip(rows, kept, value_NK, token_NK, strict=True):
        values_K[: len(token_K)] = row_V[token_K]
        tokens_K[:] = token_K[0] if len(token_K) else 0
        tokens_K[: len(token_K)] = token_K
    return torch.from_numpy(value_NK), torch.from_numpy(token_NK)


def cut(log_p_RK: Tensor, min_p_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Apply min_p, then top_k, then top_p, each to the tokens kept by the one before, in vLLM's
    order. Tokens that tie with the last of the top_k are kept; top_p removes tokens from the least
    probable on, up to a total of 1 − top_p.

    Args:
        log_p_RK: float64; -inf for tokens that are not survivors.
        min_p_R, top_k_R, top_p_R: float64; 0, 0 and 1 disable a cut.
    """
    floor_R1 = log_p_RK.amax(dim=1, keepdim=True) + min_p_R.log()[:, None]
    rising_RK, order_RK = log_p_RK.sort(dim=1, stable=True)
    width = rising_RK.shape[1]
    top_k_R = torch.where(top_k_R > 0, top_k_R, width)
    kth_R1 = (width - top_k_R).clamp(0, width - 1).long()[:, None]
    floor_R1 = torch.maximum(floor_R1, rising_RK.gather(1, kth_R1))
    rising_RK = torch.where(rising_RK < floor_R1, -torch.inf, rising_RK)
    gone_RK = rising_RK.softmax(dim=1).cumsum(dim=1) <= (1.0 - top_p_R)[:, None]
    gone_RK[:, -1] = False
    return rising_RK.masked_fill(gone_RK, -torch.inf).gather(1, order_RK.argsort(dim=1))
