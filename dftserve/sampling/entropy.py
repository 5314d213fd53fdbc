"""Log-probabilities, log Z and entropy, in nats, of rows given as log-weights on their support.

Tokens outside the support have the weight `ABSENT`: its probability underflows to exactly zero, and
unlike -inf it can be multiplied by that zero without giving NaN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = -1e30


def is_present(weights: Tensor) -> Tensor:
    """Which log-weights are not `ABSENT`, also after division by a temperature."""
    return weights > -1e20


def exp(weights: Tensor) -> Tensor:
    """e^w computed as 2^x: torch.exp is twenty times slower for results that underflow."""
    return torch.exp2(weights * math.log2(math.e))


@dataclass(frozen=True)
class Distribution:
    """log_p_RK = w − log_z_R: finite everywhere, with exp(log_p) = 0 for absent tokens.

    `is_present(log_z_R)` is False for rows without any token.
    """

    log_p_RK: Tensor
    log_z_R: Tensor

    def peak(self) -> Tensor:
        """ln max p for each row."""
        return self.log_p_RK.amax(dim=1)

    def entropy(self) -> Tensor:
        """H = −Σ p·ln p for each row, in nats; zero for a row without any token."""
        entropy_R = -(exp(self.log_p_RK) * self.log_p_RK).sum(dim=1)
        return entropy_R * is_present(self.log_z_R)


def normalise(weights_RK: Tensor) -> Distribution:
    """The distribution of rows of log-weights; stable for any finite weights."""
    log_p_RK = torch.log_softmax(weights_RK, dim=1)
    return Distribution(log_p_RK, weights_RK.amax(dim=1) - log_p_RK.amax(dim=1))
