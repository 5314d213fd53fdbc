"""Fits the weights of a mixture by expectation maximisation: pooled, and for each bin.

    fitted = fit(logprobs_TC, bins_T, bins=36, shrinkage=200.0)
    nll_T = nll(logprobs_TC, fitted.bins_BC[bins_T])

A component enters only by the probability it gave each observed token. Pooled weights maximise Σ_t
ln Σ_c w_c p_c(t). Those of a bin maximise the same over its positions, plus a Dirichlet prior at
the pooled weights that counts as `shrinkage` positions,

    w_c ← (Σ_t r_tc + s·w_c^pooled) / (n + s),   r_tc = w_c p_c(t) / Σ_k w_k p_k(t)

so a bin of few positions stays close to the pooled weights, and an empty one has exactly these. No
step lowers the objective (Dempster, Laird and Rubin 1977).

Shapes: T positions, C components, B bins.
"""

from dataclasses import dataclass

import numpy as np

MOST_STEPS = 1000
"""Maximum steps of expectation maximisation."""
LEAST_GAIN = 1e-7
"""Fitting stops when a step raises the objective by less than this, in nats per position."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """Fitted weights; each row sums to 1."""

    pooled_C: np.ndarray
    bins_BC: np.ndarray
    trace: tuple[float, ...]
    """The objective of the pooled fit before each step and after the last, nats per position."""
    bins_trace: tuple[float, ...]
    """The same for all bins together, including their priors."""


def fit(logprobs_TC: np.ndarray, bins_T: np.ndarray, *, bins: int, shrinkage: float) -> Fitted:
    """Fit weights to the log-probabilities of the observed tokens.

    Args:
        logprobs_TC: nats; −inf if a component gave the token probability 0.
        bins_T: int, 0 to `bins` − 1.
        shrinkage: s, in positions; 0 fits each bin by itself.

    Raises:
        ValueError: no positions, a token of probability 0 in every component, or a NaN.
    """
    ratio_TC, scale_T = _ratios(logprobs_TC)
    uniform_1C = np.full((1, logprobs_TC.shape[1]), 1 / logprobs_TC.shape[1])
    together_T = np.zeros(len(bins_T), dtype=np.int64)
    pooled_1C, trace = _maximised(ratio_TC, scale_T, together_T, uniform_1C, 0.0)
    start_BC = np.repeat(pooled_1C, bins, axis=0)
    bins_BC, bins_trace = _maximised(ratio_TC, scale_T, bins_T, start_BC, shrinkage)
    return Fitted(pooled_1C[0], bins_BC, trace, bins_trace)


def nll(logprobs_TC: np.ndarray, weights_TC: np.ndarray) -> np.ndarray:
    """float64 [T]: −ln Σ_c w_tc p_c(t), in nats."""
    ratio_TC, scale_T = _ratios(logprobs_TC)
    return -(scale_T + np.log((ratio_TC * weights_TC).sum(axis=1)))


def _ratios(logprobs_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p_c(t) divided by the largest at its position, and the logarithm of the largest."""
    if not len(logprobs_TC):
        raise ValueError("got no positions; accepted: one or more to fit weights on.")
    scale_T = logprobs_TC.max(axis=1).astype(np.float64)
    if not np.isfinite(scale_T).all():
        raise ValueError(
            "no component gives some observed token a positive probability; accepted: for each "
            "token at least one component that does, as an n-gram model."
        )
    return np.exp(logprobs_TC - scale_T[:, None]), scale_T


def _maximised(
    ratio_TC: np.ndarray,
    scale_T: np.ndarray,
    bins_T: np.ndarray,
    start_BC: np.ndarray,
    shrinkage: float,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Iterate until a step gains almost nothing; the prior is at `start_BC`."""
    weights_BC, trace = start_BC, []
    bins, components = start_BC.shape
    for _ in range(MOST_STEPS):
        joint_TC = ratio_TC * weights_BC[bins_T]
        total_T = joint_TC.sum(axis=1)
        value = float((scale_T + np.log(total_T)).sum())
        if shrinkage:  # Without a prior a weight may become 0, whose log is infinite.
            value += shrinkage * _prior(start_BC, weights_BC)
        trace.append(value / len(bins_T))
        if len(trace) > 1 and trace[-1] - trace[-2] < LEAST_GAIN:
            break
        joint_TC /= total_T[:, None]
        taken_BC = np.stack(
            [np.bincount(bins_T, joint_TC[:, c], minlength=bins) for c in range(components)], axis=1
        )
        taken_BC += shrinkage * start_BC
        count_B = taken_BC.sum(axis=1, keepdims=True)
        weights_BC = np.where(count_B > 0, taken_BC / np.where(count_B > 0, count_B, 1), start_BC)
    return weights_BC, tuple(trace)


def _prior(at_BC: np.ndarray, weights_BC: np.ndarray) -> float:
    """Σ a ln w over a > 0, where w is above 0 too."""
    is_there_BC = at_BC > 0
    return float((at_BC[is_there_BC] * np.log(weights_BC[is_there_BC])).sum())
