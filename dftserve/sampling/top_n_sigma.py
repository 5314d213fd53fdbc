"""The law `top_n_sigma` (arXiv 2411.07641): a token stays when z >= max − n·σ.

σ is the population standard deviation of the row's finite logits at temperature 1, including stop
tokens, before any guard but after the grammar and penalties. Dividing the logits by a temperature
divides σ too, so the set of kept tokens does not depend on it.
"""

import torch
from torch import Tensor

from dftserve.sampling.controls import LAW_CODES, Controls


def is_top_n_sigma(controls: Controls) -> Tensor:
    """bool [R]."""
    return controls.law_R == LAW_CODES["top_n_sigma"]


def log_guard(logits_RV: Tensor, controls: Controls) -> Tensor:
    """−n·σ in nats, used in place of ln a; 0 for invalid rows."""
    deviation_R = _deviation(logits_RV) * controls.logits_divisor_R
    return torch.where(deviation_R.isfinite(), -controls.n_sigma_R * deviation_R, 0.0)


def _deviation(logits_RV: Tensor) -> Tensor:
    """σ of each row, not multiplied by the divisor; float32, summed in float64."""
    finite_RV = logits_RV > -torch.inf
    below_RV = torch.where(finite_RV, logits_RV - logits_RV.amax(dim=1, keepdim=True), 0.0).double()
    count_R1 = finite_RV.sum(dim=1, keepdim=True)
    from_mean_RV = below_RV - below_RV.sum(dim=1, keepdim=True) / count_R1
    squares_RV = torch.where(finite_RV, from_mean_RV.square(), 0.0)
    return (squares_RV.sum(dim=1) / count_R1[:, 0]).sqrt().float()
