"""Control laws: compute the temperature from a request's parameters and the row's entropy.

    gated     T·exp(c·level·g(H0)),  g(H) = (H/(H+1))²
    budget    the same; `level` is steered, step by step, toward the target entropy
    dynatemp  T ± range·level, by (H0/ln n)^exponent   (llama.cpp's formula)
    guard     T: equals `gated` at level 0, with the request's own min_p
    top_n_sigma, xtc   T; their cuts are in top_n_sigma.py and xtc.py

This is the reference; the kernels of `backends/` implement the same formulas and must be kept in
sync. H0 is the entropy of the plausible tokens at temperature 1, in nats, and n their number; c is
`LawConstants.strength`. g heats high-entropy steps, and hardly changes near-certain ones or even
two-way choices: docs/maths.md has the derivation, docs/log.md the measurements behind the
constants.
"""

import torch
from torch import Tensor

from dftserve.sampling.controls import LAW_CODES, Controls, LawConstants


def log_guard(controls: Controls, constants: LawConstants) -> Tensor:
    """ln a for each row: ln of the request's min_p if it has one, else interpolated between the
    guard's start and end by the level (geometrically in a)."""
    step_R = constants.log_guard_step * controls.level_R.clamp(0.0, 1.0)
    follows_R = constants.log_guard_start + step_R
    return torch.where(controls.log_min_p_R.isnan(), follows_R, controls.log_min_p_R)


def temperature(
    controls: Controls, entropy_R: Tensor, plausible_R: Tensor, constants: LawConstants
) -> Tensor:
    """The temperature of each row's content.

    Args:
        entropy_R: H0, nats.
        plausible_R: n, the number of plausible tokens.
    """
    gated_R = gated(controls, entropy_R, constants)
    is_dynatemp_R = controls.law_R == LAW_CODES["dynatemp"]
    dynatemp_R = _dynatemp(controls, entropy_R, plausible_R, constants)
    return torch.where(is_dynatemp_R, dynatemp_R, gated_R)


def gated(controls: Controls, entropy_R: Tensor, constants: LawConstants) -> Tensor:
    """The temperature under every law except `dynatemp`."""
    gate_R = (entropy_R / (entropy_R + 1.0)) ** constants.gate_power
    wanted_R = controls.temperature_R * torch.exp(constants.strength * controls.level_R * gate_R)
    ceiling_R = torch.maximum(controls.temperature_R, controls.max_temperature_R)
    return torch.minimum(wanted_R, ceiling_R)


def _dynatemp(
    controls: Controls, entropy_R: Tensor, plausible_R: Tensor, constants: LawConstants
) -> Tensor:
    half_width_R = controls.dynatemp_range_R * controls.level_R
    coolest_R = (controls.temperature_R - half_width_R).clamp_min(0.0)
    hottest_R = controls.temperature_R + half_width_R
    share_R = (entropy_R / plausible_R.clamp_min(2.0).log()).clamp(0.0, 1.0)
    share_R = share_R**controls.dynatemp_exponent_R
    wanted_R = coolest_R + (hottest_R - coolest_R) * share_R
    wanted_R = wanted_R.clamp_min(constants.lowest_temperature)
    return torch.where(plausible_R > 1, wanted_R, controls.temperature_R)


def steer(level_R: Tensor, target_R: Tensor, entropy_R: Tensor, constants: LawConstants) -> Tensor:
    """The budget law's next level after a token sampled at entropy `entropy_R` (nats).

    An integral controller: level += (rate/c)·(target − H)/max(target, .1), clamped to the budget
    law's range of levels. The division by c makes `rate` the rate of s = c·level.
    """
    error_R = (target_R - entropy_R) / target_R.clamp_min(0.1)
    next_R = level_R + constants.budget_gain * error_R
    return next_R.clamp(constants.budget_lowest_level, constants.budget_highest_level)
