"""The guard against the implausible tail: which tokens of a row stay.

A token is plausible when z >= max + ln a (`laws.log_guard`), at temperature 1: min-p (arXiv
2407.01082) before any heat, so that what is kept does not depend on the temperature. Stop tokens
always stay: diversity changes what is said, not when it ends.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dftserve.sampling.entropy import ABSENT

# An allowed stop token is never further below the maximum than this: present, at probability 0.
FARTHEST = -1e19


@dataclass(frozen=True)
class Support:
    """What the guard leaves of R rows, as log-weights at temperature 1 below the row's maximum.

    content_RV: float32, the plausible tokens that do not stop the text; `ABSENT` elsewhere.
    stop_RE: float32, the stop tokens; `ABSENT` where the row has none or the grammar forbids it.
    is_plausible_stop_RE: bool, those that the guard would keep if they were content.
    """

    content_RV: Tensor
    stop_RE: Tensor
    is_plausible_stop_RE: Tensor

    def plausible(self) -> Tensor:
        """The plausible tokens, stop tokens counted where plausible: [R, V + E]."""
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
        logits_divisor_R: the temperature that the rows were divided by; 1 for raw logits.
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
        _forget(kept_RV, stop_ids_RE)
    below_RV = (logits_RV - peak_R[:, None]) * logits_divisor_R[:, None]
    content_RV = torch.where(kept_RV, below_RV, ABSENT)
    return Support(content_RV, stop_RE, is_plausible_RE), valid_R


def _forget(kept_RV: Tensor, stop_ids_RE: Tensor) -> None:
    """Take the stop tokens out of the mask; a pad leaves column 0 as it is."""
    known_RE = _known(stop_ids_RE, kept_RV)
    ids_RE = torch.where(known_RE, stop_ids_RE, 0)
    kept_RV.view(torch.uint8).scatter_reduce_(1, ids_RE, (~known_RE).view(torch.uint8), "amin")


def _known(stop_ids_RE: Tensor, logits_RV: Tensor) -> Tensor:
    return (stop_ids_RE >= 0) & (stop_ids_RE < logits_RV.shape[1])
