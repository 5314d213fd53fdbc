"""Keeps the probabilities of stop tokens, and the argmax of the row.

A stop token e keeps p_e = softmax over the guarded support at T. When the content is heated to T',
its log-weight is therefore shifted to w_e/T + ln Z(T') − ln Z(T), with Z over the content. Heating
lowers the probability of the most likely content token while p_e stays, so their order could
reverse; the temperature is limited to where the two are equal.
"""

import torch
from torch import Tensor

from dftserve.sampling.entropy import Distribution, exp, is_present, normalise
from dftserve.sampling.guard import Support

NEWTON_STEPS = 16
"""Steps of the root finder for the temperature that keeps the stop tokens' probability."""
NEARLY = 1e-5
"""Relative tolerance at which a temperature counts as equal to T: the root finder returns T only up
to rounding."""


def apply_temperature(
    support: Support, temperature_R: Tensor, wanted_R: Tensor, cool: Distribution
) -> tuple[Tensor, Distribution]:
    """The content at the wanted temperature, or at the nearest one that keeps the argmax.

    `cool` is the content at T. D(T') = −ln max p(T') over the content rises with T'; content leads
    while D(T') <= B = ln Z(T) − w_stop/T; at D(T') = B it ties with the most likely stop token.

    Returns:
        The temperature reached and the content at it.
    """
    stop_R = support.stop_RE.amax(dim=1) / temperature_R
    argmax_bound_R = cool.log_z_R - stop_R
    hot = normalise(support.content_RV / wanted_R[:, None])
    leads_R = support.content_RV.amax(dim=1) >= support.stop_RE.amax(dim=1)
    passes_R = leads_R != (-hot.peak() <= argmax_bound_R)
    passes_R &= is_present(cool.log_z_R) & is_present(stop_R)
    if not bool(passes_R.any()):
        return wanted_R, hot
    reached_R = temperature_at_bound(support.content_RV, temperature_R, wanted_R, argmax_bound_R)
    reached_R = torch.where(passes_R, reached_R, wanted_R)
    return reached_R, normalise(support.content_RV / reached_R[:, None])


def temperature_at_bound(
    content_RK: Tensor, one_R: Tensor, other_R: Tensor, argmax_bound_R: Tensor
) -> Tensor:
    """The root of D(T') = B between two temperatures, by Newton's method on β = 1/T'.

    D(β) = ln Σ exp(β(w − w_max)) is convex and decreasing, with D' = E[w − w_max]: started at the
    hotter end, where D > B, the iterates increase towards the root without overshooting.
    """
    low_R, high_R = 1 / torch.maximum(one_R, other_R), 1 / torch.minimum(one_R, other_R)
    below_RK = content_RK - content_RK.amax(dim=1, keepdim=True)
    beta_R = low_R
    for _ in range(NEWTON_STEPS):
        distribution = normalise(below_RK * beta_R[:, None])
        slope_R = (exp(distribution.log_p_RK) * below_RK).sum(dim=1).clamp_max(-1e-12)
        step_R = (argmax_bound_R - distribution.log_z_R) / slope_R
        beta_R = torch.minimum(torch.maximum(beta_R + step_R, low_R), high_R)
    return 1 / beta_R


def rescale_stop_tokens(
    support: Support,
    temperature_R: Tensor,
    reached_R: Tensor,
    cool: Distribution,
    hot: Distribution,
) -> tuple[Tensor, Tensor]:
    """Log-weights of the content at `reached_R` and of the stop tokens, on the same scale.

    Rounding must not reverse their order by an ulp: the lower maximum is clamped to the higher one,
    and tokens that tied at T still tie, unless the temperature has changed.
    """
    shift_R = torch.where(is_present(cool.log_z_R), hot.log_z_R - cool.log_z_R, 0.0)
    content_RK = hot.log_p_RK + hot.log_z_R[:, None]
    stop_RE = support.stop_RE / temperature_R[:, None] + shift_R[:, None]
    leads_R1 = support.content_RV.amax(1, keepdim=True) >= support.stop_RE.amax(1, keepdim=True)
    held_RE = stop_RE.minimum(content_RK.amax(1, keepdim=True))
    tied_RE = support.stop_RE == support.content_RV.amax(1, keepdim=True)
    tied_RE &= is_present(support.stop_RE)
    tied_RE &= ((reached_R / temperature_R - 1).abs() < NEARLY)[:, None]
    held_RE = torch.where(tied_RE, content_RK.amax(1, keepdim=True), held_RE)
    held_RK = content_RK.minimum(stop_RE.amax(1, keepdim=True))
    return torch.where(leads_R1, content_RK, held_RK), torch.where(leads_R1, held_RE, stop_RE)
