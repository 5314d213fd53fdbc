"""Intervals and tests against closed forms, and the coverage of the intervals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dftserve.evaluate.metrics import intervals
from dftserve.evaluate.metrics.intervals import (
    Estimate,
    difference,
    jackknife,
    mcnemar,
    mean,
    over_units,
    paired_difference,
    wilson,
)

SEEDS = range(100)
numbers = st.floats(-100, 100)
samples = st.lists(numbers, min_size=2, max_size=30)


def normal(seed: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, count)


def times_covered(estimates: list[Estimate], truth: float) -> int:
    return sum(each.low <= truth <= each.high for each in estimates)


# The bootstrap


@given(samples)
def test_mean_is_within_its_interval_and_the_values(values):
    found = mean(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert mean(values) == found, "the same seed draws the same"


@given(samples, st.sampled_from([0.5, 2.0, 4.0]), numbers)
def test_mean_follows_the_scale_and_shift_of_its_values(values, scale, shift):
    once = mean(values)
    moved = mean(scale * np.array(values) + shift)
    for end in ("value", "low", "high"):
        wanted = scale * getattr(once, end) + shift
        assert getattr(moved, end) == pytest.approx(wanted, abs=1e-6)


def test_bootstrap_width_matches_the_standard_error():
    """A quantile of 2,000 draws has an error of 3 %; the bound is five times that."""
    values = normal(0, 400)
    found = mean(values)
    wanted = 2 * 1.96 * values.std() / math.sqrt(400)
    assert found.high - found.low == pytest.approx(wanted, rel=0.15)


def test_bootstrap_intervals_cover_the_truth():
    """Coverage with 40 values is 93.6 %: of 300 samples fewer than 250 are covered with a
    probability below 1e-7."""
    assert 250 <= times_covered([mean(normal(seed)) for seed in range(300)], 3) < 300


@pytest.mark.parametrize(("units", "coverage"), [(5, 0.90), (10, 0.93)])
def test_bootstrap_intervals_of_few_units_cover_the_truth(units, coverage):
    """Of 4,000 samples, 92.9 and 94.9 % are covered (percentiles: 85 and 91 %); fewer than the
    bound are with a probability below 1e-7."""
    values_SN = np.random.default_rng(0).normal(size=(4000, units))
    means_DS = intervals.resamples(units) @ values_SN.T / units
    found = [intervals.estimate(0.0, means_D, units) for means_D in means_DS.T]
    assert times_covered(found, 0.0) >= coverage * len(found)


def test_shares_that_are_all_0_or_all_1_have_the_interval_of_wilson():
    assert intervals.mean_share([1.0] * 20) == wilson(20, 20)
    assert intervals.mean_share([0.0] * 20) == wilson(0, 20)
    assert intervals.mean_share([0.0, 0.5, 1.0]) == mean([0.0, 0.5, 1.0])
    assert intervals.mean_share([1.0]) == Estimate(1.0, None, None)


def test_units_are_resampled_whole():
    """A ratio that is the same in every unit is the same in every draw; weights count units."""
    units = np.array([[1, 2], [10, 20], [5, 10], [0, 0]])
    seen = []

    def ratio(weights, units):
        seen.append(weights)
        found, counted = weights @ units
        return found / counted if counted else math.nan

    assert over_units(units, ratio) == Estimate(0.5, 0.5, 0.5)
    assert seen[0].tolist() == [1] * 4
    assert {weights.sum() for weights in seen} == {4}
    assert len({tuple(weights) for weights in seen}) > 30


def test_estimates_without_an_interval():
    assert mean([2.5]) == Estimate(2.5, None, None)
    never = over_units(np.zeros(3), lambda weights, _: 1.0 if (weights == 1).all() else math.nan)
    assert (never.value, never.low, never.high) == (1, 1, 1)
    assert over_units(np.zeros(3), lambda *_: math.inf).low is None
    with pytest.raises(ValueError, match="none"):
        mean([])


@given(samples, numbers)
def test_pairs_that_differ_by_a_constant_have_an_interval_of_width_0(values, constant):
    a = np.array(values)
    found = paired_difference(a, a + constant)
    for end in (found.value, found.low, found.high):
        assert end == pytest.approx(constant, abs=1e-9)


def test_paired_difference_is_antisymmetric_and_requires_pairs():
    a, b = normal(0), normal(1)
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([1, 2], [1, 2, 3])


def test_estimates_are_shown_with_their_interval():
    assert Estimate(1.234, 1, 2).render() == "1.23 [1.00, 2.00]"
    assert Estimate(1.234, None, None).render(1) == "1.2"


# The jackknife


@given(st.lists(numbers, min_size=2, max_size=10))
def test_jackknife_of_a_mean_is_its_standard_error(values):
    """With one value left out at a time it is the classic s/√n."""
    found = jackknife(len(values), lambda at: np.mean(np.array(values)[at]))
    quantile = stats.t.ppf(0.975, len(values) - 1)
    reach = quantile * np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert (found.low, found.high) == pytest.approx(
        (found.value - reach, found.value + reach), abs=1e-4
    )


@pytest.mark.parametrize("count", [2, 9, 10, 37])
def test_jackknife_leaves_each_out_once(count):
    seen = []
    jackknife(count, lambda at: seen.append(at.tolist()) or 0.0)
    everything = set(range(count))
    left_out = [everything - set(at) for at in seen[1:]]
    assert seen[0] == list(range(count))
    assert sorted(place for some in left_out for place in some) == list(range(count))
    assert len(left_out) == min(10, count)
    assert max(map(len, left_out)) - min(map(len, left_out)) <= 1


def test_jackknife_intervals_cover_the_truth():
    """Coverage with Student's quantiles is 95 %: of 300 samples fewer than 262 are covered with a
    probability below 1e-6."""
    samples = [normal(seed) for seed in range(300)]
    found = [jackknife(40, lambda at, values=values: values[at].mean()) for values in samples]
    assert 262 <= times_covered(found, 3) < 300


def test_jackknife_needs_two_texts():
    with pytest.raises(ValueError, match="at least 2"):
        jackknife(1, lambda at: 0.0)


def test_difference_of_jackknives_is_the_jackknife_of_the_difference():
    for seed in SEEDS:
        a, b = normal(seed, 23), normal(seed + 1000, 23)
        found = difference(
            jackknife(23, lambda at, v=a: v[at].mean()), jackknife(23, lambda at, v=b: v[at].mean())
        )
        wanted = jackknife(23, lambda at, v=b - a: v[at].mean())
        assert (found.value, found.low, found.high) == pytest.approx(
            (wanted.value, wanted.low, wanted.high)
        )


def test_difference_of_an_estimate_to_itself_is_0():
    each = jackknife(23, lambda at: normal(0, 23)[at].mean())
    nothing = difference(each, each)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_difference_of_unpaired_estimates_adds_their_errors():
    assert difference(Estimate(1, -2, 4), Estimate(5, 1, 9)) == Estimate(4, -1, 9)
    assert difference(Estimate(1, None, None), Estimate(5, 1, 9)) == Estimate(4, None, None)


@pytest.mark.parametrize(("a", "b"), [((0, 0, 3), (5, 1, 7)), ((9, 2, 10), (4, 4, 6))])
def test_each_end_of_an_unpaired_difference_depends_on_the_ends_on_its_side(a, b):
    a, b = Estimate(*a), Estimate(*b)
    found = difference(a, b)
    assert found.value - found.low == pytest.approx(math.hypot(b.value - b.low, a.high - a.value))
    back = difference(b, a)
    assert (back.value, back.low, back.high) == (-found.value, -found.high, -found.low)


# Shares


def test_mcnemar_is_the_exact_binomial_test():
    """The sum over all assignments of the d questions that differ, each of probability 2^−d, whose
    count is no likelier than the observed one."""
    for seed in SEEDS:
        a, b = np.random.default_rng(seed).integers(2, size=(2, 12)).astype(bool)
        only_a, differ = int((a & ~b).sum()), int((a ^ b).sum())
        counts = [math.comb(differ, k) for k in range(differ + 1)]
        wanted = sum(count for count in counts if count <= counts[only_a]) / 2**differ
        assert mcnemar(a, b) == pytest.approx(wanted)
        assert mcnemar(b, a) == pytest.approx(wanted)


def test_mcnemar_uses_only_the_answers_that_differ():
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1
    assert mcnemar([1] * 10 + [0] * 90, [0] * 100) == pytest.approx(2 / 2**10)


@pytest.mark.parametrize("count", [1, 7, 164, 10_000])
def test_wilson_matches_its_formula(count):
    z = 1.959963984540054
    for right in {0, 1, count // 3, count}:
        share = right / count
        middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
        reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
        reach /= 1 + z**2 / count
        found = wilson(right, count)
        assert found.value == share
        assert found.low == pytest.approx(middle - reach, abs=1e-12)
        assert found.high == pytest.approx(middle + reach, abs=1e-12)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_invalid_counts(right, count):
    with pytest.raises(ValueError, match="share"):
        wilson(right, count)


# ── Groups ───────────────────────────────────────────────────────────────────────────────────────


def test_answers_to_one_prompt_are_one_unit():
    """The same answer eight times has the interval of one; as eight texts it would be narrower."""
    values = np.random.default_rng(0).exponential(size=20)
    groups = [f"prompt {number}" for number in range(20) for _ in range(8)]
    one = intervals.mean(values)
    eight = intervals.mean(np.repeat(values, 8), groups=groups)
    assert (eight.value, eight.low, eight.high) == pytest.approx((one.value, one.low, one.high))
    as_texts = intervals.mean(np.repeat(values, 8))
    assert as_texts.high - as_texts.low < 0.5 * (one.high - one.low)


def test_groups_of_no_prompt_of_one_or_of_one_text_each_are_resampled_by_text():
    values = np.random.default_rng(1).normal(size=12)
    alone = intervals.mean(values)
    for groups in ([""] * 12, ["one prompt"] * 12, [f"{number}" for number in range(12)]):
        assert intervals.mean(values, groups=groups) == alone
    with pytest.raises(ValueError, match="got 3; accepted: one for each of 12"):
        intervals.mean(values, groups=["a", "b", "c"])


def test_differences_are_paired_only_if_the_same_prompts_are_left_out():
    rng = np.random.default_rng(2)
    a_N = rng.normal(size=40)
    b_N = a_N + 0.01 * rng.normal(size=40)
    prompts = [f"prompt {number}" for number in range(40)]
    a, b = (intervals.jackknife(40, lambda at, v=v: float(v[at].mean())) for v in (a_N, b_N))
    of_prompts, moved = (
        intervals.parts_digest(prompts),
        intervals.parts_digest([*prompts[1:], "another"]),
    )
    assert of_prompts == intervals.parts_digest(list(prompts)) != moved
    paired = intervals.difference(replace(a, parts=of_prompts), replace(b, parts=of_prompts))
    unpaired = intervals.difference(replace(a, parts=of_prompts), replace(b, parts=moved))
    assert paired == intervals.difference(a, b)
    assert paired.value == unpaired.value
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(("prompts", "answers"), [(2, 8), (5, 8), (10, 3), (12, 8), (32, 5)])
def test_the_jackknife_leaves_out_whole_prompts(prompts, answers):
    """The same answer several times has the interval of one."""
    values = np.random.default_rng(3).normal(size=prompts)
    repeated = np.repeat(values, answers)
    groups = [f"prompt {number}" for number in range(prompts) for _ in range(answers)]
    one = jackknife(prompts, lambda at: values[at].mean())
    found = jackknife(len(repeated), lambda at: repeated[at].mean(), groups=groups)
    assert (found.value, found.low, found.high) == pytest.approx((one.value, one.low, one.high))
    shown = {name: set() for name in groups}
    for name, part in zip(groups, intervals.part_numbers(len(groups), groups), strict=True):
        shown[name].add(int(part))
    assert all(len(parts) == 1 for parts in shown.values())


def test_texts_of_no_prompt_or_of_one_are_left_out_by_text():
    for groups in ([""] * 23, ["one prompt"] * 23, [f"{number}" for number in range(23)]):
        assert intervals.part_numbers(23, groups).tolist() == intervals.part_numbers(23).tolist()
    with pytest.raises(ValueError, match="got 3; accepted: one for each of 23"):
        intervals.part_numbers(23, ["a", "b", "c"])


def test_a_part_with_more_texts_is_no_variation():
    """The share of different words falls with the number of texts: here it depends on nothing else,
    for prompts with 1 to 8 long answers."""
    counts = np.random.default_rng(4).integers(1, 9, size=32)
    groups = [f"prompt {number}" for number, count in enumerate(counts) for _ in range(count)]
    found = jackknife(len(groups), lambda at: len(at) ** -0.4, groups=groups)
    assert found.high - found.low < 0.02 * found.value


def test_two_texts_remain_whichever_part_is_left_out():
    """As when all answers but one to the second of two prompts are too short."""
    seen = []
    jackknife(8, lambda at: seen.append(len(at)) or 0.0, groups=["first"] * 7 + ["second"])
    assert min(seen) == 7
    jackknife(8, lambda at: seen.append(len(at)) or 0.0, groups=["first"] * 6 + ["second"] * 2)
    assert sorted(seen[-2:]) == [2, 6]
