"""The largest strength of a row's tilt whose divergence is within its allowance.

    q_s ∝ p·exp(s·δ),   K(s) = KL(q_s‖p) = s·E_q[δ] − ln E_p[e^{sδ}],   K′(s) = s·Var_q(δ) ≥ 0

K rises with s, and √K is nearly linear through 0, since K ≈ ½·s²·Var_p(δ). The s at which √K equals
the square root of the allowance is therefore found by false position (the Illinois variant),
between 0 and the requested strength. The K actually reached is charged to the request's allowance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 6
"""Steps of the search for the strength."""


def largest_strength(
    divergence: Callable[[Tensor], Tensor], requested_R: Tensor, allowance_R: Tensor
) -> Tensor:
    """The strength of each row.

    Args:
        divergence: K of each row at each row's strength, nats.
        requested_R: the requested strength, which is the upper limit.
        allowance_R: the upper limit of K, ≥ 0.
    """
    goal_R = allowance_R.sqrt()
    low_R, high_R = torch.zeros_like(requested_R), requested_R
    at_low_R, at_high_R = -goal_R, divergence(requested_R).sqrt() - goal_R
    fits_R = at_high_R <= 0
    strength_R, side_R = requested_R, torch.zeros_like(requested_R)
    for _ in range(STEPS):
        rise_R = torch.where(fits_R, 1.0, at_high_R - at_low_R)
        strength_R = high_R - at_high_R * (high_R - low_R) / rise_R
        at_R = divergence(torch.where(fits_R, requested_R, strength_R)).sqrt() - goal_R
        above_R = at_R > 0
        # Illinois: halve the value at an end that is retained twice in a row, which otherwise might
        # never move.
        at_low_R = torch.where(above_R & (side_R > 0), 0.5 * at_low_R, at_low_R)
        at_high_R = torch.where(~above_R & (side_R < 0), 0.5 * at_high_R, at_high_R)
        side_R = torch.where(above_R, 1.0, -1.0)
        high_R = torch.where(above_R, strength_R, high_R)
        at_high_R = torch.where(above_R, at_R, at_high_R)
        low_R = torch.where(above_R, low_R, strength_R)
        at_low_R = torch.where(above_R, at_low_R, at_R)
    return torch.where(fits_R, requested_R, strength_R)
