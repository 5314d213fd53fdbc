"""Confidence intervals and significance tests that the metrics share."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dftserve.digest import text_digest

DRAWS = 2000
LEVEL = 0.95
PARTS_DIGITS = 16
"""Hexadecimal digits of `parts_of`."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval at `LEVEL`; the ends are None if the interval is unknown."""

    value: float
    low: float | None
    high: float | None
    left_out: tuple[float, ...] = field(default=(), repr=False)
    """The value without each tenth of the texts, if the interval was computed from these."""
    parts: str = field(default="", repr=False)
    """`parts_of` the texts behind `left_out`, by which pairs are recognised; "": the caller ensures
    that estimates are paired."""

    def render(self, digits: int = 2) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values_N: ArrayLike, *, groups: Sequence[str] = ()) -> Estimate:
    """The mean and its percentile bootstrap interval over the N units, or their groups (`summed`).

    Raises:
        ValueError: no values, or not one group per value.
    """
    values_N = np.asarray(values_N, float)
    sums_G2 = summed(np.column_stack([values_N, np.ones_like(values_N)]), groups)

    def ratio(weights_G: NDArray, sums_G2: NDArray) -> float:
        total, count = weights_G @ sums_G2
        return total / count

    return over_units(sums_G2, ratio)


def summed(rows_NC: NDArray, groups: Sequence[str]) -> NDArray:
    """Sum the rows of each group. A bootstrap resamples the sums, because the answers to one prompt
    are not independent.

    Args:
        rows_NC: counts or sums of N texts, of which the statistic is a ratio.
        groups: the group of each text, such as the prompt that it answers. A row with the group ""
            is a group of its own; so is every row if no groups are given or there is only one,
            which would leave nothing to resample.

    Raises:
        ValueError: not one group per row.
    """
    if not groups or (len(set(groups)) == 1 and groups[0]):
        return rows_NC
    if len(groups) != len(rows_NC):
        raise ValueError(f"groups: got {len(groups)}; accepted: one for each of {len(rows_NC)}.")
    group_N = group_numbers(groups)
    sums_GC = np.zeros((group_N.max() + 1, *rows_NC.shape[1:]))
    np.add.at(sums_GC, group_N, rows_NC)
    return sums_GC


def group_numbers(groups: Sequence[str]) -> NDArray[np.intp]:
    """The number of each text's group, from 0 in order of appearance; each "" is its own group."""
    numbers: dict[object, int] = {}
    return np.array(
        [numbers.setdefault(name or index, len(numbers)) for index, name in enumerate(groups)],
        dtype=np.intp,
    )


def paired_difference(a_N: ArrayLike, b_N: ArrayLike) -> Estimate:
    """mean(b) − mean(a) over the same N units, resampled as pairs.

    Raises:
        ValueError: not the same number of values, or none.
    """
    a_N, b_N = np.asarray(a_N, float), np.asarray(b_N, float)
    if a_N.shape != b_N.shape:
        raise ValueError(f"pairs: got {len(a_N)} and {len(b_N)} values; accepted: equal numbers.")
    return mean(b_N - a_N)


def over_units(units: NDArray, statistic: Callable[[NDArray, NDArray], float]) -> Estimate:
    """`statistic(weights_N, units)` at weights of one, and its bootstrap interval.

    The weights of a resample are how often each unit was drawn, so that a statistic over pairs can
    leave out the pairs of a unit with its own copies. Draws without a finite value are left out.

    Raises:
        ValueError: no units.
    """
    count = len(units)
    if count == 0:
        raise ValueError("values: got none; accepted: at least one.")
    value = float(statistic(np.ones(count), units))
    if count == 1:
        return Estimate(value, None, None)
    drawn_D = np.array([statistic(weights_N, units) for weights_N in resamples(count)])
    return estimate(value, drawn_D)


def resamples(count: int) -> NDArray[np.float64]:
    """float64 [D, N]: how often each of N units was drawn in each of D bootstrap resamples. They
    depend on N alone, so that figures of the same units have the same draws."""
    shares = np.full(count, 1 / count)
    return np.random.default_rng(0).multinomial(count, shares, size=DRAWS).astype(float)


def estimate(value: float, drawn_D: NDArray) -> Estimate:
    """The percentile interval of a statistic's resamples, those without a finite value left out."""
    drawn_D = drawn_D[np.isfinite(drawn_D)]
    if not len(drawn_D):
        return Estimate(value, None, None)
    low, high = np.quantile(drawn_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def mcnemar(right_a_N: ArrayLike, right_b_N: ArrayLike) -> float:
    """The exact two-sided p of "a and b are right equally often", over the same N questions:
    a binomial test on the questions where they differ (McNemar 1947)."""
    a_N, b_N = np.asarray(right_a_N, bool), np.asarray(right_b_N, bool)
    only_a, only_b = int((a_N & ~b_N).sum()), int((~a_N & b_N).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def wilson(right: int, count: int) -> Estimate:
    """A share and its Wilson interval.

    Raises:
        ValueError: a count below 1, or `right` outside it.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"share: got {right} of {count}; accepted: 0 to the count, at least 1.")
    ends = stats.binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return Estimate(right / count, float(ends.low), float(ends.high))


GROUPS = 10
"""Parts into which the jackknife divides a set."""


def jackknife(count: int, statistic: Callable[[NDArray[np.intp]], float]) -> Estimate:
    """`statistic(indices)` of all N texts, and its interval by leaving out a tenth at a time
    (Tukey 1958), with Student's quantiles.

    For statistics of a whole set: a bootstrap resample would contain a text twice, which measures
    of repetition count as repetition. A tenth is a run of consecutive texts, so that the answers to
    one prompt are left out together.

    Raises:
        ValueError: fewer than two texts.
    """
    tenth_N = tenths(count)
    groups = range(tenth_N[-1] + 1)
    value = float(statistic(np.arange(count)))
    left_out = [float(statistic(np.flatnonzero(tenth_N != group))) for group in groups]
    return from_left_out(value, left_out)


def tenths(count: int) -> NDArray[np.intp]:
    """The tenth that each of N texts is in, from 0; with fewer than ten, each is its own part."""
    if count < 2:
        raise ValueError(f"texts: got {count}; accepted: at least 2.")
    return np.arange(count) * min(GROUPS, count) // count


def parts_of(prompts: Sequence[str]) -> str:
    """A digest of the tenth and the prompt of each text of a set. The jackknife leaves out the
    answers to the same prompts in all sets with the same digest."""
    tenth_N = tenths(len(prompts)).tolist()
    return text_digest(json.dumps(list(zip(tenth_N, prompts, strict=True))))[:PARTS_DIGITS]


def from_left_out(value: float, left_out: Sequence[float]) -> Estimate:
    """The interval from the value without each tenth."""
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(left_out) - 1) * standard_error(left_out))
    return Estimate(value, value - reach, value + reach, tuple(left_out))


def standard_error(left_out: Sequence[float]) -> float:
    """The standard error of a value, from the value without each tenth (Tukey 1958)."""
    return float(np.sqrt((len(left_out) - 1) * np.var(left_out)))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a of two runs.

    Paired if both come from `jackknife` with the answers to the same prompts left out (`parts`);
    otherwise treated as independent, which widens the interval. The interval is unknown if one of
    them has none.
    """
    value = b.value - a.value
    if a.left_out and len(a.left_out) == len(b.left_out) and a.parts == b.parts:
        return from_left_out(value, [y - x for x, y in zip(a.left_out, b.left_out, strict=True)])
    if None in (a.low, a.high, b.low, b.high):
        return Estimate(value, None, None)
    reach = float(np.hypot(*((each.high - each.low) / 2 for each in (a, b))))  # type: ignore[operator]
    return Estimate(value, value - reach, value + reach)
