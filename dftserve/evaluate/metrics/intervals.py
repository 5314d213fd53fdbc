"""Confidence intervals and significance tests that the metrics share."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dftserve.digest import text_digest

DRAWS = 2000
"""Bootstrap resamples of an interval."""
LEVEL = 0.95
"""Confidence level of every interval."""
PARTS_DIGITS = 16
"""Hexadecimal digits of `parts_digest`."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval at `LEVEL`; the ends are None if the interval is unknown."""

    value: float
    low: float | None
    high: float | None
    left_out: tuple[float, ...] = field(default=(), repr=False)
    """The value without each part of the texts (`as_if_equal_parts`), if the interval was computed
    from these."""
    parts: str = field(default="", repr=False)
    """`parts_digest` of the texts behind `left_out`, by which pairs are recognised; "": the caller
    ensures that estimates are paired."""

    def render(self, digits: int = 2) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values_N: ArrayLike, *, groups: Sequence[str] = ()) -> Estimate:
    """The mean and its bootstrap interval (`estimate`) over N units or groups (`sum_by_group`).

    Raises:
        ValueError: no values, or not one group per value.
    """
    values_N = np.asarray(values_N, float)
    sums_G2 = sum_by_group(np.column_stack([values_N, np.ones_like(values_N)]), groups)

    def ratio(weights_G: NDArray, sums_G2: NDArray) -> float:
        total, count = weights_G @ sums_G2
        return total / count

    return over_units(sums_G2, ratio)


def sum_by_group(rows_NC: NDArray, groups: Sequence[str]) -> NDArray:
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
    if not has_several(groups):
        return rows_NC
    if len(groups) != len(rows_NC):
        raise ValueError(f"groups: got {len(groups)}; accepted: one for each of {len(rows_NC)}.")
    group_N = group_numbers(groups)
    sums_GC = np.zeros((group_N.max() + 1, *rows_NC.shape[1:]))
    np.add.at(sums_GC, group_N, rows_NC)
    return sums_GC


def has_several(groups: Sequence[str]) -> bool:
    """Whether there are two groups or more, of which each "" is one."""
    return "" in groups or len(set(groups)) > 1


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
    return estimate(value, drawn_D, count)


def resamples(count: int) -> NDArray[np.float64]:
    """float64 [D, N]: how often each of N units was drawn in each of D bootstrap resamples. They
    depend on N alone, so that measures of the same units have the same draws."""
    shares = np.full(count, 1 / count)
    return np.random.default_rng(0).multinomial(count, shares, size=DRAWS).astype(float)


def estimate(value: float, drawn_D: NDArray, units: int) -> Estimate:
    """The expanded percentile interval of a statistic's resamples of `units` units, two or more;
    those without a finite value are left out.

    The variance of a resample is (n − 1)/n of what it estimates, and the normal distribution has
    shorter tails than Student's; the quantiles are further out by both (Hesterberg 2015, The
    American Statistician 69, section 5.2). Of the intervals of a mean of 5 normal values, 93 %
    contain the truth (85 % without), of 10, 95 % (91 %).
    """
    drawn_D = drawn_D[np.isfinite(drawn_D)]
    if not len(drawn_D):
        return Estimate(value, None, None)
    outside = stats.t.ppf((1 - LEVEL) / 2, units - 1) * np.sqrt(units / (units - 1))
    tail = float(stats.norm.cdf(outside))
    low, high = np.quantile(drawn_D, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def mcnemar(right_a_N: ArrayLike, right_b_N: ArrayLike) -> float:
    """The exact two-sided p of "a and b are right equally often", over the same N questions:
    a binomial test on the questions where they differ (McNemar 1947)."""
    a_N, b_N = np.asarray(right_a_N, bool), np.asarray(right_b_N, bool)
    only_a, only_b = int((a_N & ~b_N).sum()), int((~a_N & b_N).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


NONE_SEEN = -math.log((1 - LEVEL) / 2)
"""The upper end of the interval of a Poisson mean if the count is 0 (Garwood 1936): 3.69. No
resample of such counts has another mean than 0."""


def mean_share(values_N: ArrayLike) -> Estimate:
    """The `mean` of N shares (`wilson_if_constant`)."""
    return wilson_if_constant(mean(values_N), np.size(values_N))


def wilson_if_constant(share: Estimate, units: int) -> Estimate:
    """The mean of the shares of some units; if all are 0 or all are 1, with Wilson's interval, in
    which each unit counts once: no resample differs from the mean, whose interval has no width."""
    if share.value in (0, 1) and units > 1:
        return wilson(int(share.value) * units, units)
    return share


def wilson(right: int, count: int) -> Estimate:
    """A share and its Wilson interval.

    Raises:
        ValueError: a count below 1, or `right` outside it.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"share: got {right} of {count}; accepted: 0 to the count, at least 1.")
    ends = stats.binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return Estimate(right / count, float(ends.low), float(ends.high))


PARTS = 10
"""Parts into which the jackknife divides a set."""


def jackknife(
    count: int, statistic: Callable[[NDArray[np.intp]], float], *, groups: Sequence[str] = ()
) -> Estimate:
    """`statistic(indices)` of all N texts, and its interval by leaving out a part at a time
    (Tukey 1958), with Student's quantiles.

    For statistics of a whole set: a bootstrap resample would contain a text twice, which measures
    of repetition count as repetition. `statistic` must depend on no text that is left out.

    Args:
        groups: as in `part_numbers`.

    Raises:
        ValueError: fewer than two texts, or not one group per text.
    """
    part_N = part_numbers(count, groups)
    value = float(statistic(np.arange(count)))
    sizes_P = np.bincount(part_N)
    left_out_P = [statistic(np.flatnonzero(part_N != part)) for part in range(len(sizes_P))]
    return from_left_out(value, as_if_equal_parts(value, np.array(left_out_P, float), sizes_P))


def as_if_equal_parts(value: float, left_out_P: NDArray, sizes_P: NDArray) -> list[float]:
    """The value without each part as if the parts were equally large, so that the pseudo-values are
    those of a jackknife with unequal parts (Busing, Meijer and van der Leeden 1999, Statistics and
    Computing 9). Otherwise a statistic that depends on the number of texts, as the share of
    different words does, would seem to vary because more texts are left out with one part than with
    another."""
    times_P = (sizes_P.sum() / sizes_P - 1) / (len(sizes_P) - 1)
    return (value + times_P * (left_out_P - value)).tolist()


def part_numbers(count: int, groups: Sequence[str] = ()) -> NDArray[np.intp]:
    """The part, of `PARTS`, that each of N texts is in, from 0; fewer texts have a part each.

    Args:
        groups: the group of each text, such as the prompt that it answers. Its texts, which are not
            independent, are in one part, and with fewer than ten groups each group is a part. A
            text with the group "" is a group of its own; so is every text if no groups are given,
            or there is only one, or one has all texts but one.
    """
    if count < 2:
        raise ValueError(f"texts: got {count}; accepted: at least 2.")
    if groups and len(groups) != count:
        raise ValueError(f"groups: got {len(groups)}; accepted: one for each of {count}.")
    group_N = group_numbers(groups) if has_several(groups) else np.arange(count)
    if count - np.bincount(group_N).max() < 2:  # Without that group, no two texts are left.
        group_N = np.arange(count)
    several = int(group_N.max()) + 1
    return group_N * min(PARTS, several) // several


def parts_digest(prompts: Sequence[str]) -> str:
    """A digest of the part and the prompt of each text of a set. The jackknife leaves out the
    answers to the same prompts in all sets with the same digest."""
    part_N = part_numbers(len(prompts), prompts).tolist()
    return text_digest(json.dumps(list(zip(part_N, prompts, strict=True))))[:PARTS_DIGITS]


def from_left_out(value: float, left_out: Sequence[float]) -> Estimate:
    """The interval from the value without each part."""
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(left_out) - 1) * standard_error(left_out))
    return Estimate(value, value - reach, value + reach, tuple(left_out))


def standard_error(left_out: Sequence[float]) -> float:
    """The standard error of a value, from the value without each part (Tukey 1958)."""
    return float(np.sqrt((len(left_out) - 1) * np.var(left_out)))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """b − a of two runs.

    Paired if both come from `jackknife` with the answers to the same prompts left out (`parts`);
    otherwise treated as independent, which widens the interval. Each end of it is then as far away
    as the ends that it depends on are from their values together, since an interval can be longer
    on one side (Zou and Donner 2008, Statistics in Medicine 27). The interval is unknown if one of
    them has none.
    """
    value = b.value - a.value
    if a.left_out and len(a.left_out) == len(b.left_out) and a.parts == b.parts:
        return from_left_out(value, [y - x for x, y in zip(a.left_out, b.left_out, strict=True)])
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value, None, None)
    below = float(np.hypot(b.value - b.low, a.high - a.value))
    above = float(np.hypot(b.high - b.value, a.value - a.low))
    return Estimate(value, value - below, value + above)
