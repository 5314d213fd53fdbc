"""How far a row may be tilted: the largest strength whose divergence is within its allowance.

    q_s ∝ p·exp(s·δ),   K(s) = KL(q_s‖p) = s·E_q[δ] − ln E_p[e^{sδ}],   K′(s) = s·Var_q(δ) ≥ 0

K rises with s, and √K is nearly a line through 0, K being nearly ½·s²·Var_p(δ). So the s at which
√K meets the root of the allowance is found between 0 and the strength that was asked for by false
position, Illinois' way. The K that was really reached is what the request pays.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 6


def largest_strength(
    divergence: Callable[[Tensor], Tensor], asked_R: Tensor, allowance_R: Tensor
) -> Tensor:
    """The strength of each row.

    Args:
        divergence: K of each row at each row's strength, nats.
        asked_R: the most it may be.
        allowance_R: the most that K may be, ≥ 0.
    """
    goal_R = allowance_R.sqrt()
    low_R, high_R = torch.zeros_like(asked_R), asked_R
    at_low_R, at_high_R = -goal_R, divergence(asked_R).sqrt() - goal_R
    fits_R = at_high_R <= 0
    strength_R, side_R = asked_R, torch.zeros_like(asked_R)
    for _ in range(STEPS):
        rise_R = torch.where(fits_R, 1.0, at_high_R - at_low_R)
        strength_R = high_R - at_high_R * (high_R - low_R) / rise_R
        at_R = divergence(torch.where(fits_R, asked_R, strength_R)).sqrt() - goal_R
        above_R = at_R > 0
        # The end that stays for the second time counts half: else it would stay for ever.
        at_low_R = torch.where(above_R & (side_R > 0), 0.5 * at_low_R, at_low_R)
        at_high_R = torch.where(~above_R & (side_R < 0), 0.5 * at_high_R, at_high_R)
        side_R = torch.where(above_R, 1.0, -1.0)
        high_R = torch.where(above_R, strength_R, high_R)
        at_high_R = torch.where(above_R, at_R, at_high_R)
        low_R = torch.where(above_R, low_R, strength_R)
        at_low_R = torch.where(above_R, at_low_R, at_R)
    return torch.where(fits_R, asked_R, strength_R)
