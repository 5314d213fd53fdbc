"""The guard removes the implausible tail of a row.

A token is plausible when z >= max + ln a (`laws.log_guard`), at temperature 1: this is min-p (arXiv
2407.01082) applied before heating, so that the kept set does not depend on the temperature. Stop
tokens are always kept: diversity changes the content of a text, not when it ends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dftserve.sampling.entropy import ABSENT

# Lower bound of an allowed stop token's log-weight: probability 0, but still present.
FARTHEST = -1e19


@dataclass(frozen=True)
class Support:
    """The tokens of R rows that the guard keeps, as log-weights at temperature 1 relative to the
    row's maximum.

    content_RV: float32, the plausible tokens that are not stop tokens; `ABSENT` elsewhere.
    stop_RE: float32, the stop tokens; `ABSENT` for padding and for tokens that the grammar forbids.
    is_plausible_stop_RE: bool, the stop tokens that the guard would keep if they were content.
    """

    content_RV: Tensor
    stop_RE: Tensor
    is_plausible_stop_RE: Tensor

    def plausible(self) -> Tensor:
        """All plausible tokens, including plausible stop tokens: [R, V + E]."""
        stop_RE = torch.where(self.is_plausible_stop_RE, self.stop_RE, ABSENT)
        return torch.cat((self.content_RV, stop_RE), dim=1)


def guard(
    logits_RV: Tensor,
    *,
    log_guard_R: Tensor,
    logits_divisor_R: Tensor,
    stop_ids_RE: Tensor,
) -> tuple[Support, Tensor]:
    """The support of each row, and which rows have one.

    Args:
        logits_RV: float32, already divided by `logits_divisor_R`; -inf where a token is forbidden.
        log_guard_R: ln a, in nats; -inf keeps every finite token.
        logits_divisor_R: the temperature by which the rows were divided; 1 for raw logits.
        stop_ids_RE: int64, each row's distinct stop tokens, padded with -1.

    Returns:
        The support, and valid_R: bool, False for a row with NaN, +inf or no finite logit.
    """
    peak_R = logits_RV.amax(dim=1)
    valid_R = torch.isfinite(peak_R)
    peak_R = torch.where(valid_R, peak_R, 0.0)
    floor_R = (peak_R + log_guard_R / logits_divisor_R).clamp_min(torch.finfo(torch.float32).min)
    kept_RV = logits_RV >= floor_R[:, None]
    known_RE = _known(stop_ids_RE, logits_RV)
    logits_RE = logits_RV.gather(1, torch.where(known_RE, stop_ids_RE, 0))
    below_RE = (logits_RE - peak_R[:, None]) * logits_divisor_R[:, None]
    allowed_RE = known_RE & torch.isfinite(logits_RE)
    stop_RE = torch.where(allowed_RE, below_RE.clamp_min(FARTHEST), ABSENT)
    is_plausible_RE = allowed_RE & (logits_RE >= floor_R[:, None])
    if stop_ids_RE.shape[1]:
        _remove_stops(kept_RV, stop_ids_RE)
    below_RV = (logits_RV - peak_R[:, None]) * logits_divisor_R[:, None]
    content_RV = torch.where(kept_RV, below_RV, ABSENT)
    return Support(content_RV, stop_RE, is_plausible_RE), valid_R


def _remove_stops(kept_RV: Tensor, stop_ids_RE: Tensor) -> None:
    """Remove the stop tokens from the mask; padding leaves column 0 unchanged."""
    known_RE = _known(stop_ids_RE, kept_RV)
    ids_RE = torch.where(known_RE, stop_ids_RE, 0)
    kept_RV.view(torch.uint8).scatter_reduce_(1, ids_RE, (~known_RE).view(torch.uint8), "amin")


def _known(stop_ids_RE: Tensor, logits_RV: Tensor) -> Tensor:
    return (stop_ids_RE >= 0) & (stop_ids_RE < logits_RV.shape[1])
