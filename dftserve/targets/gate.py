"""Where a mixture may stand in for the text itself: where it predicts unseen text better.

    found = gate(nll_T, {"model": …, "text": …}, groups_T, bins_T, bins=36)

The share g_b of a bin's rows that is not the text's own token. With D the least, over the
baselines, of the lower ends of the intervals of how many nats a token the mixture gains on them,

    g_b = 1 − exp(−D_b) where D_b > 0 and D of all positions together > 0, else 0

so g is the share by which the mixture is sure to lower the baselines' perplexity. Intervals are
by a bootstrap over documents, paired: gains of tokens of one document are not independent. Those
of the bins hold together (Bonferroni), and a bin in few documents has g = 0.

Shapes: T positions, S documents, X resamples, B bins.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.05
"""Two-sided."""
LEAST_DOCUMENTS = 8
"""That a bin needs, or all positions together: of fewer a bootstrap is sure too soon."""
SEED = 20


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over tokens, in nats, and its bootstrap interval over documents."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Gate:
    share_B: np.ndarray
    """float64: g."""
    gain_B: np.ndarray
    """D, nats a token; −inf where a bin is in too few documents."""
    gains: Mapping[str, Interval]
    """On each baseline, of all positions."""


def interval(values_T: np.ndarray, groups_T: np.ndarray) -> Interval:
    """Of the mean of `values_T`; `groups_T` says which document each is of."""
    sums_SB, counts_SB = _sums(values_T, groups_T, np.zeros(len(values_T), np.int64), 1)
    low_B, high_B = _ends(sums_SB, counts_SB, LEVEL)
    return Interval(mean=float(values_T.mean()), low=float(low_B[0]), high=float(high_B[0]))


def gate(
    nll_T: np.ndarray,
    baselines: Mapping[str, np.ndarray],
    groups_T: np.ndarray,
    bins_T: np.ndarray,
    *,
    bins: int,
) -> Gate:
    """The share of each bin, from −ln of the observed tokens.

    Args:
        nll_T: of the mixture, with weights that were not fitted on that document.
        baselines: the same of what it must beat.
    """
    gains = {name: each_T - nll_T for name, each_T in baselines.items()}
    overall = {name: interval(each_T, groups_T) for name, each_T in gains.items()}
    used = max(len(np.unique(bins_T)), 1)
    gain_B = np.full(bins, np.inf)
    for each_T in gains.values():
        sums_SB, counts_SB = _sums(each_T, groups_T, bins_T, bins)
        low_B, _ = _ends(sums_SB, counts_SB, LEVEL / used)
        enough_B = (counts_SB > 0).sum(axis=0) >= LEAST_DOCUMENTS
        gain_B = np.minimum(gain_B, np.where(enough_B, low_B, -np.inf))
    passes = min(each.low for each in overall.values()) > 0
    share_B = np.where(gain_B > 0, -np.expm1(-np.maximum(gain_B, 0)), 0.0)
    return Gate(share_B if passes else np.zeros(bins), gain_B, overall)


def _sums(
    values_T: np.ndarray, groups_T: np.ndarray, bins_T: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """[S, B]: Σ of the values, and how many they are."""
    _, group_T = np.unique(groups_T, return_inverse=True)
    shape = int(group_T.max()) + 1, bins
    cell_T = group_T * bins + bins_T
    sums = np.bincount(cell_T, values_T, minlength=shape[0] * bins)
    counts = np.bincount(cell_T, minlength=shape[0] * bins)
    return sums.reshape(shape), counts.reshape(shape)


def _ends(
    sums_SB: np.ndarray, counts_SB: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of each bin's mean. Where a resample misses a bin it says nothing."""
    documents, bins = sums_SB.shape
    random = np.random.default_rng(SEED)
    times_XS = random.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    total_XB, count_XB = times_XS @ sums_SB, times_XS @ counts_SB
    low_B, high_B = np.full(bins, -np.inf), np.full(bins, np.inf)
    for place in range(bins):
        there_X = count_XB[:, place] > 0
        if there_X.any():
            mean_X = total_XB[there_X, place] / count_XB[there_X, place]
            low_B[place], high_B[place] = np.quantile(mean_X, [level / 2, 1 - level / 2])
    return low_B, high_B
