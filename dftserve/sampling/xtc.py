"""The law `xtc`, exclude top choices: p-e-w's sampler, at temperature 1 and without stop tokens.

The top choices are the content tokens with a probability of at least `xtc_threshold`, among all
plausible tokens at temperature 1. With probability `xtc_probability`, decided at each step
(`draws.py`), all of them are excluded but the least probable and those that tie with it. At least
one top choice therefore remains, and the excluded tokens are exactly those above a ceiling.

Stop tokens are never excluded and keep their probability at the request's T: the excluded
probability is redistributed over the remaining content.
"""

import torch
from torch import Tensor

from dftserve.sampling.controls import LAW_CODES, Controls
from dftserve.sampling.draws import uniform
from dftserve.sampling.entropy import ABSENT, Distribution, is_present, normalise
from dftserve.sampling.guard import Support


def is_xtc(controls: Controls) -> Tensor:
    """bool [R]."""
    return controls.law_R == LAW_CODES["xtc"]


def without_top_choices(
    support: Support, controls: Controls, cool: Distribution
) -> tuple[Distribution, tuple[Tensor, Tensor]]:
    """The remaining content at T, and the log-weights of it and of the stop tokens.

    `cool` is the content at T before the exclusion.
    """
    ceiling_R1 = ceilings(support, controls)[:, None]
    remaining_RV = torch.where(support.content_RV <= ceiling_R1, support.content_RV, ABSENT)
    hot = normalise(remaining_RV / controls.temperature_R[:, None])
    shift_R = torch.where(is_present(cool.log_z_R), hot.log_z_R - cool.log_z_R, 0.0)
    stop_RE = support.stop_RE / controls.temperature_R[:, None] + shift_R[:, None]
    return hot, (hot.log_p_RK + hot.log_z_R[:, None], stop_RE)


def ceilings(support: Support, controls: Controls) -> Tensor:
    """The log-weight at temperature 1 above which content is excluded: that of the least probable
    top choice, or inf in steps whose random number excludes nothing."""
    log_z_R = normalise(support.plausible()).log_z_R
    lowest_R1 = (log_z_R + controls.log_xtc_threshold_R)[:, None]
    is_top_RV = support.content_RV >= lowest_R1
    least_R = torch.where(is_top_RV, support.content_RV, torch.inf).amin(dim=1)
    position_R = controls.position_R
    if position_R is None:
        position_R = torch.zeros_like(least_R, dtype=torch.int64)
    draw_R = uniform(controls.draw_key_high_R, controls.draw_key_low_R, position_R)
    return torch.where(draw_R < controls.xtc_probability_R, least_R, torch.inf)
