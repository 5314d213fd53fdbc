"""Distances between two sets of texts, against closed forms and brute force.

Statistical bounds are at six standard errors (false alarms below 1e-6) unless stated otherwise.
"""

import itertools
import json
import math
import os
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dftserve.evaluate.metrics import two_sample
from dftserve.evaluate.metrics.intervals import jackknife
from dftserve.evaluate.text.tokenize import normalise, tokens, window

SEEDS = range(100)
some_texts = st.lists(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), min_size=1, max_size=6
)


def normal(seed: int, rows: int, width: int = 3, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (rows, width))


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.random.default_rng(seed).integers(2, 9, size=2)
    return normal(seed, sizes[0]), normal(seed + 1000, sizes[1], shift=seed % 3 / 2)


def within_six_errors(values: list[float], truth: float) -> bool:
    return abs(np.mean(values) - truth) < 6 * np.std(values, ddof=1) / math.sqrt(len(values))


# MMD


def test_median_distance_is_over_pairs():
    for seed in SEEDS:
        x, _ = pair(seed)
        wanted = np.median([math.dist(a, b) for a, b in itertools.combinations(x, 2)])
        assert two_sample.median_distance(x) == pytest.approx(wanted)


def test_mmd2_matches_its_definition():
    for seed in SEEDS:
        x, y = pair(seed)

        def k(a, b):
            return math.exp(-(math.dist(a, b) ** 2) / (2 * 1.3**2))

        within_x = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
        within_y = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
        between = np.mean([k(a, b) for a in x for b in y])
        wanted = within_x + within_y - 2 * between
        assert two_sample.mmd2(x, y, 1.3) == pytest.approx(wanted, abs=1e-12)


def test_mmd2_is_bounded_symmetric_and_scale_invariant():
    for seed in SEEDS:
        x, y = pair(seed)
        once = two_sample.mmd2(x, y, 1.3)
        assert once <= 2
        assert two_sample.mmd2(y, x, 1.3) == pytest.approx(once, abs=1e-12)
        assert two_sample.mmd2(x[::-1], y, 1.3) == pytest.approx(once, abs=1e-12)
        assert two_sample.mmd2(5 * x + 1, 5 * y + 1, 5 * 1.3) == pytest.approx(once, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_mmd2_of_shifted_gaussians_in_closed_form(shift):
    """E k = (σ²/(σ²+2))^{d/2}·exp(−‖Δ‖²/2(σ²+2)) for unit Gaussians; unbiased at 0 as well."""
    σ, width = 1.5, 3
    near = (σ**2 / (σ**2 + 2)) ** (width / 2)
    truth = 2 * near * (1 - math.exp(-width * shift**2 / (2 * (σ**2 + 2))))
    values = [
        two_sample.mmd2(normal(seed, 50), normal(seed + 1000, 40, shift=shift), σ)
        for seed in range(200)
    ]
    assert within_six_errors(values, truth)


def test_mmd2_of_distant_constant_sets_is_2():
    x, y = np.zeros((4, 2)), np.full((5, 2), 1e6)
    assert two_sample.mmd2(x, y, 1.0) == 2
    test = two_sample.mmd_test(x, y, 1.0)
    assert test.value == math.sqrt(2)
    assert test.mmd2 == 2


def test_permutation_p_approximates_the_share_over_all_splits():
    """3 + 3 rows have 20 splits; a share of 20,000 random ones has a standard error below .0036."""
    for seed in range(5):
        x, y = normal(seed, 3), normal(seed + 1000, 3, shift=0.5)
        rows = np.concatenate([x, y])
        every = [
            two_sample.mmd2(rows[list(chosen)], np.delete(rows, chosen, axis=0), 1.3)
            for chosen in itertools.combinations(range(6), 3)
        ]
        test = two_sample.mmd_test(x, y, 1.3, permutations=20_000, seed=seed)
        assert test.mmd2 == pytest.approx(every[0])
        assert test.p == pytest.approx(np.mean(np.array(every) >= every[0] - 1e-9), abs=0.022)


def test_permutation_p_of_two_halves_of_a_sample_is_uniform():
    """200 splits of one sample; the KS test has p < 1e-6 once in a million runs."""
    rows = normal(0, 60, width=8)
    σ = two_sample.median_distance(rows)
    values = []
    for seed in range(200):
        order = np.random.default_rng(seed + 5000).permutation(60)
        halves = rows[order[:30]], rows[order[30:]]
        values.append(two_sample.mmd_test(*halves, σ, permutations=499, seed=seed).p)
    assert stats.kstest(values, "uniform").pvalue > 1e-6


def test_permutation_p_of_different_sources_is_the_smallest_possible():
    x, y = normal(0, 40), normal(1, 30, shift=2)
    test = two_sample.mmd_test(x, y, 1.5, permutations=499)
    assert test.p == 1 / 500
    assert test.value == math.sqrt(test.mmd2)
    assert test == two_sample.mmd_test(x, y, 1.5, permutations=499)


# C2ST


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_c2st_approaches_the_best_classifier(shift):
    """For unit Gaussians shifted in one of two dimensions the best AUC is Φ(shift/√2). Fitting two
    weights on 480 rows costs far less than the standard error of one AUC, .021 at most."""
    move = np.array([shift, 0])
    found = two_sample.c2st(normal(0, 300, width=2), normal(1, 300, width=2) + move)
    best = stats.norm.cdf(shift / math.sqrt(2))
    assert abs(found.value - best) < 6 * 0.024
    assert found.low < found.value < found.high


def test_c2st_of_one_source_is_a_half_on_average():
    values = [two_sample.c2st(normal(s, 25), normal(s + 500, 20), seed=s).value for s in range(40)]
    assert within_six_errors(values, 0.5)


def test_c2st_of_linearly_separable_sets_is_1_with_an_interval():
    found = two_sample.c2st(normal(0, 30), normal(1, 20, shift=50))
    assert found.value == found.high == 1
    assert 0.8 < found.low < 1


def test_c2st_is_not_tested_on_groups_that_it_was_trained_on():
    """Both sets are of one source, but each group has features of its own on each side: a
    classifier that was trained on a part of a group recognises the rest."""
    rng = np.random.default_rng(0)
    own_GS = rng.normal(0, 3, (12, 2, 40))
    x, y = (
        np.repeat(own_GS[:, side], 10, axis=0) + rng.normal(0, 0.1, (120, 40)) for side in (0, 1)
    )
    groups = [f"prompt {i // 10}" for i in range(120)] * 2
    assert two_sample.c2st(x, y).value > 0.99
    grouped = two_sample.c2st(x, y, groups=groups).value
    assert abs(grouped - 0.5) < 0.35, "the mean over 12 groups; .99 if they were split"


def test_c2st_of_groups_on_one_side_each_is_a_half_on_average():
    def value(seed: int) -> float:
        groups = [f"{side} {i // 8}" for side in "xy" for i in range(40)]
        return two_sample.c2st(normal(seed, 40), normal(seed + 500, 40), groups=groups).value

    assert within_six_errors([value(seed) for seed in range(30)], 0.5)


def test_c2st_is_invariant_to_the_scale_of_the_features():
    x, y = normal(0, 30), normal(1, 20, shift=0.5)
    scales = np.array([4.0, 0.5, 64.0])
    assert two_sample.c2st(x * scales, y * scales) == two_sample.c2st(x, y)
    constant = np.ones((1, 2)).repeat
    with_constant = [np.hstack([rows, constant(len(rows), 0)]) for rows in (x, y)]
    assert two_sample.c2st(*with_constant).value == pytest.approx(
        two_sample.c2st(x, y).value, abs=0.01
    )


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.97])
def test_the_auc_interval_covers_the_truth(truth):
    """Of 1,000 intervals at 95 %, fewer than 900 cover it with a probability below 1e-9."""
    shift = math.sqrt(2) * stats.norm.ppf(truth)
    covered = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scores = np.concatenate([rng.normal(0, 1, 40), rng.normal(shift, 1, 60)])
        auc = (stats.rankdata(scores)[40:].sum() - 60 * 61 / 2) / (40 * 60)  # Mann-Whitney.
        low, high = two_sample._auc_interval(auc, 40, 60)
        assert 0 <= low <= auc <= high <= 1
        covered += low <= truth <= high
    assert covered >= 900


# Tokens


def test_token_distances_match_their_definitions():
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        a, b = (
            [rng.choice(list("abcdefgh")[: 8 - seed % 3], size=5).tolist() for _ in range(3)]
            for _ in range(2)
        )
        f, g = (Counter(itertools.chain(*texts)) for texts in (a, b))
        l2 = math.sqrt(sum((f[t] / 15 - g[t] / 15) ** 2 for t in "abcdefgh"))
        js = 0.0
        for own, other in ((f, g), (g, f)):
            for t, count in own.items():
                js += count / 15 * math.log(2 * count / (count + other[t])) / 2
        assert two_sample.token_distances(a, b) == pytest.approx((l2, js))


@given(some_texts, some_texts, st.integers(2, 4))
def test_token_distances_are_bounded_symmetric_and_ignore_copies(a, b, copies):
    l2, js = two_sample.token_distances(a, b)
    assert 0 <= l2 <= math.sqrt(2) + 1e-12
    assert 0 <= js <= math.log(2) + 1e-12
    assert two_sample.token_distances(b, a) == pytest.approx((l2, js))
    assert two_sample.token_distances(a[::-1] * copies, b) == pytest.approx((l2, js))
    assert two_sample.token_distances(a, a * copies) == pytest.approx((0, 0), abs=1e-12)


@given(st.integers(1, 20), st.integers(1, 20))
def test_token_distances_of_disjoint_texts(m, n):
    a, b = [[f"a{i}" for i in range(m)]], [[f"b{i}" for i in range(n)]]
    wanted = math.sqrt(1 / m + 1 / n), math.log(2)
    assert two_sample.token_distances(a, b) == pytest.approx(wanted)


def test_model_tokens_are_further_from_human_text_than_other_human_text_is():
    folder = os.environ.get("DFTSERVE_DATA")
    if not folder:
        pytest.skip("DFTSERVE_DATA names no folder of real texts")
    sets = Path(folder) / "human_ai"
    human = json.loads((sets / "fdg_writing_gpt2-xl.json").read_text())["original"]
    (model,) = json.loads((sets / "slopscore_gemma-3-27b-it.json").read_text()).values()
    token_sets = [
        [tokens(window(normalise(text), 0, 100)) for text in texts]
        for texts in (
            human[:200],
            human[200:400],
            [row["output"] for row in model["samples"]][:200],
        )
    ]
    others = two_sample.token_distances(token_sets[1], token_sets[0])
    models = two_sample.token_distances(token_sets[2], token_sets[0])
    assert models[0] > 1.5 * others[0]
    assert models[1] > 1.5 * others[1]


# Errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: two_sample.median_distance([[1.0]]),
        lambda: two_sample.median_distance(np.ones((5, 2))),
        lambda: two_sample.median_distance([[1.0], [math.nan]]),
        lambda: two_sample.mmd2(normal(0, 1), normal(1, 5), 1),
        lambda: two_sample.mmd2(normal(0, 5), normal(1, 5, width=4), 1),
        lambda: two_sample.mmd2(normal(0, 5), normal(1, 5), 0),
        lambda: two_sample.mmd2(normal(0, 5), normal(1, 5), math.nan),
        lambda: two_sample.mmd2([1.0, 2.0], normal(1, 5), 1),
        lambda: two_sample.mmd_test(normal(0, 5), normal(1, 5), 1, permutations=0),
        lambda: two_sample.c2st(normal(0, 4), normal(1, 50)),
        lambda: two_sample.c2st(normal(0, 50), normal(1, 50), folds=1),
        lambda: two_sample.c2st(normal(0, 5), normal(1, 5), groups=["a"] * 10),
        lambda: two_sample.c2st(normal(0, 5), normal(1, 5), groups=["a", "b", "b"]),
        lambda: two_sample.token_distances([["a"]], [[]]),
    ],
)
def test_invalid_inputs_are_refused(call):
    with pytest.raises(ValueError, match=r"got .*; accepted: "):
        call()


def of_prompts(rng, prompts: int, texts: int):
    """`texts` answers to each prompt; prompts differ more than the answers to one prompt do."""
    centres = rng.normal(size=(prompts, 3))
    return (centres[:, None] + 0.3 * rng.normal(size=(prompts, texts, 3))).reshape(-1, 3)


def test_answers_to_few_prompts_are_not_mistaken_for_another_source():
    """Two sides of one source, eight prompts with six answers each. Permuting groups gives an exact
    p: more than 10 of 60 tests are at or below .05 with a chance of 1e-4. Permuting texts puts
    most of them there."""
    groups = [f"{side} {prompt}" for side in "xy" for prompt in range(8) for _ in range(6)]
    rng = np.random.default_rng(0)
    by_prompt, by_text = [], []
    for seed in range(60):
        x, y = (of_prompts(rng, 8, 6) for _ in range(2))
        given = {"permutations": 99, "seed": seed}
        by_prompt.append(two_sample.mmd_test(x, y, 1.5, groups=groups, **given).p)
        by_text.append(two_sample.mmd_test(x, y, 1.5, **given).p)
    assert sum(p <= 0.05 for p in by_prompt) <= 10
    assert sum(p <= 0.05 for p in by_text) > 30


def test_groups_of_another_source_are_detected():
    """p is the smallest possible with 99 permutations, unless one of them repeats the observed
    split."""
    rng = np.random.default_rng(1)
    groups = [f"{side} {prompt}" for side in "xy" for prompt in range(8) for _ in range(6)]
    x, y = of_prompts(rng, 8, 6), of_prompts(rng, 8, 6) + 5.0
    assert two_sample.mmd_test(x, y, 1.5, groups=groups, permutations=99).p <= 0.02


def test_groups_of_one_text_are_equal_to_no_groups():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(9, 3))
    alone = two_sample.mmd_test(x, y, 1.0, permutations=50)
    same = [*"abcdefg", *"abcdefg", "", ""]
    for groups in ([""] * 16, [f"{number}" for number in range(16)], same):
        found = two_sample.mmd_test(x, y, 1.0, groups=groups, permutations=50)
        assert astuple(found) == pytest.approx(astuple(alone))


@pytest.mark.parametrize(
    ("groups", "message"),
    [(["a"] * 3, "accepted: one for each"), (["a"] * 5 + [""] * 5, "got 1 on")],
)
def test_groups_that_cannot_be_permuted_are_refused(groups, message):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match=message):
        two_sample.mmd_test(x, y, 1.0, groups=groups)


def test_a_distance_of_0_has_an_interval():
    """The roots of numbers below 0 are all 0, and their jackknife would be [0, 0]."""
    x, y = normal(3, 40), normal(4, 40)
    squared = jackknife(40, lambda at: two_sample.mmd2(x[at], y, 1.3))
    found = two_sample.mmd_from_squared(squared)
    assert squared.value < 0 < squared.high
    assert max(squared.left_out) < 0.01
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(math.sqrt(squared.high))
    apart = two_sample.mmd_from_squared(
        jackknife(40, lambda at: two_sample.mmd2(x[at], y + 2, 1.3))
    )
    assert 0 < apart.low < apart.value < apart.high
    assert len(apart.left_out) == 10
