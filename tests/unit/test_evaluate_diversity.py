"""Diversity measures against closed forms, brute force and sacrebleu."""

import gzip
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.evaluate.metrics import lexical
from tests.cpu_time import least_seconds

SEEDS = range(100)
some_texts = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), min_size=2, max_size=6
)


def random_texts(seed: int, count: int = 6, longest: int = 14) -> list[list[str]]:
    """Texts of few distinct words, so that they overlap; one is a copy, some may be empty."""
    chosen = random.Random(seed)
    texts = [chosen.choices("abcde", k=chosen.randint(0, longest)) for _ in range(count - 1)]
    texts.append(list(chosen.choice(texts)))
    return texts if any(texts) else [["a"], *texts[1:]]


def grams(text: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]


def random_kernel(seed: int, count: int = 7) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 3))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


# distinct-n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_the_share_of_distinct_ngrams(n):
    for seed in SEEDS:
        texts = random_texts(seed)
        every = [gram for text in texts for gram in grams(text, n)]
        if every:
            assert lexical.distinct_n(texts, n) == len(set(every)) / len(every)
        else:
            with pytest.raises(ValueError, match="no text with"):
                lexical.distinct_n(texts, n)


@given(some_texts, st.integers(2, 5))
def test_distinct_n_is_divided_by_the_number_of_copies(texts, copies):
    once = lexical.distinct_n(texts, 1)
    assert 0 < once <= 1
    assert lexical.distinct_n(texts * copies, 1) == pytest.approx(once / copies)


# self-BLEU


def by_sacrebleu(texts: list[list[str]], order: int) -> float:
    bleu = sacrebleu.BLEU(tokenize="none", effective_order=True, max_ngram_order=order)
    joined = [" ".join(text) for text in texts]
    return float(
        np.mean(
            [
                bleu.sentence_score(joined[i], joined[:i] + joined[i + 1 :]).score
                for i in range(len(joined))
            ]
        )
    )


@pytest.mark.parametrize("order", [1, 2, 4, 5])
def test_self_bleu_matches_sacrebleu(order):
    for seed in SEEDS:
        texts = random_texts(seed, count=2 + seed % 5)
        assert lexical.self_bleu(texts, order) == pytest.approx(
            by_sacrebleu(texts, order), abs=1e-9
        )


def test_self_bleu_matches_sacrebleu_on_twenty_long_texts():
    words = [f"w{rank}" for rank in range(200)]
    chosen = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(200)]
    texts = [chosen.choices(words, weights, k=chosen.randint(80, 160)) for _ in range(20)]
    wanted = by_sacrebleu(texts, 4)
    assert 1 < wanted < 99
    assert lexical.self_bleu(texts) == pytest.approx(wanted, abs=1e-9)


@given(some_texts, st.randoms(use_true_random=False))
def test_self_bleu_ignores_order_and_is_100_for_copies(texts, rng):
    once = lexical.self_bleu(texts)
    mixed = list(texts)
    rng.shuffle(mixed)
    assert 0 <= once <= 100 + 1e-9
    assert lexical.self_bleu(mixed) == pytest.approx(once, abs=1e-9)
    assert lexical.self_bleu(texts * 2) == pytest.approx(100)


def test_self_bleu_of_disjoint_texts_is_0():
    assert lexical.self_bleu([["a", "b"], ["c", "d"], ["e"]]) == 0


def test_self_bleu_of_a_thousand_texts_takes_seconds():
    ranks = np.random.default_rng(0).zipf(1.3, size=(1000, 500)) % 20_000
    texts = [[str(rank) for rank in row] for row in ranks.tolist()]
    assert least_seconds(lambda: lexical.self_bleu(texts)) < 5


# Compression and self-repetition


def test_compression_ratio_is_that_of_one_gzip_stream():
    text = "".join(random.Random(0).choices("abcdefgh \n", k=4000))
    assert lexical.compression_ratio([text]) == 4000 / len(gzip.compress(text.encode()))
    assert lexical.compression_ratio(["ab", "c"]) == lexical.compression_ratio(["ab\nc"])


def test_compression_of_repeated_text_approaches_gzips_limit():
    """Deflate writes 258 bytes in at least two bits: no ratio is above 1032."""
    assert 500 < lexical.compression_ratio(["a" * 1_000_000]) <= 1032


@given(st.text("abcdef ", min_size=200, max_size=400), st.integers(2, 4))
def test_compression_ratio_rises_with_copies(text, copies):
    ratios = [lexical.compression_ratio([text] * count) for count in (1, copies, 2 * copies)]
    assert ratios[0] < ratios[1] < ratios[2]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_repetition_counts_the_other_texts(n):
    for seed in SEEDS:
        texts = random_texts(seed)
        logs = []
        for i, text in enumerate(texts):
            others = texts[:i] + texts[i + 1 :]
            found = sum(gram in grams(other, n) for gram in set(grams(text, n)) for other in others)
            logs.append(math.log(1 + found))
        assert lexical.self_repetition(texts, n) == pytest.approx(np.mean(logs))


@given(st.integers(5, 30), st.integers(2, 6))
def test_self_repetition_of_copies_in_closed_form(length, copies):
    text = [str(place) for place in range(length)]
    wanted = math.log(1 + (copies - 1) * (length - 3))
    assert lexical.self_repetition([text] * copies) == pytest.approx(wanted)
    assert lexical.self_repetition([text, [f"other {word}" for word in text]]) == 0


# Vendi


@pytest.mark.parametrize("q", [0.5, 1.0, 1.7, 2.0, 3.0, 50.0, math.inf])
def test_vendi_of_all_different_is_n_and_of_all_equal_is_1(q):
    assert lexical.vendi(np.eye(9), q) == pytest.approx(9)
    assert lexical.vendi(np.ones((9, 9)), q) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("q", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_vendi_of_classes_is_their_hill_number(q):
    """Texts are equal within a class and unrelated between them: eigenvalues are class shares."""
    for seed in SEEDS:
        labels = np.random.default_rng(seed).integers(4, size=9)
        shares = np.array([count / 9 for count in Counter(labels.tolist()).values()])
        if q == 1:
            wanted = math.prod(share**-share for share in shares)
        elif q == math.inf:
            wanted = 1 / shares.max()
        else:
            wanted = (shares**q).sum() ** (1 / (1 - q))
        same = (labels[:, None] == labels).astype(float)
        assert lexical.vendi(same, q) == pytest.approx(wanted, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_vendi_is_bounded_falls_with_the_order_and_ignores_copies(seed, copies):
    K = random_kernel(seed)
    orders = [0.5, 0.9999999, 1.0, 1.5, 2.0, 4.0, math.inf]
    values = [lexical.vendi(K, q) for q in orders]
    order = np.random.default_rng(seed).permutation(len(K))
    assert all(1 - 1e-9 <= value <= 3 + 1e-6 for value in values[1:]), "three dimensions"
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(values)), "falls with the order"
    assert values[1] == pytest.approx(values[2], rel=1e-5)
    for q, value in zip(orders[2:], values[2:], strict=True):
        assert lexical.vendi(K[np.ix_(order, order)], q) == pytest.approx(value)
        assert lexical.vendi(np.kron(K, np.ones((copies, copies))), q) == pytest.approx(value)


def test_vendi_of_order_2_matches_the_eigenvalues():
    for seed in SEEDS:
        K = random_kernel(seed)
        eigenvalues = np.linalg.eigvals(K / len(K)).real
        assert lexical.vendi(K, 2) == pytest.approx(1 / (eigenvalues**2).sum())


def test_vendi_accepts_a_float32_kernel():
    K = random_kernel(3).astype(np.float32)
    assert lexical.vendi(K) == pytest.approx(lexical.vendi(random_kernel(3)), rel=1e-3)


@pytest.mark.parametrize(
    ("K", "message"),
    [
        (np.ones((2, 3)), "shape"),
        (np.zeros((0, 0)), "shape"),
        (2 * np.eye(2), "diagonal"),
        ([[1, 0.5], [0.4, 1]], "transpose"),
        ([[1, math.nan], [math.nan, 1]], "transpose"),
        ([[1, 2], [2, 1]], "eigenvalue"),
    ],
)
def test_vendi_refuses_matrices_that_are_not_kernels(K, message):
    with pytest.raises(ValueError, match=message):
        lexical.vendi(K)


@pytest.mark.parametrize("q", [0, -1, math.nan])
def test_vendi_refuses_invalid_orders(q):
    with pytest.raises(ValueError, match="q:"):
        lexical.vendi(np.eye(2), q)


# Zipf and burstiness


def zipf_slope(texts):
    return lexical.zipf_slope(np.array(list(Counter(itertools.chain(*texts)).values())))


@pytest.mark.parametrize("power", [1, 2])
def test_zipf_slope_of_a_power_law_is_its_exponent(power):
    scale = math.lcm(*range(1, 9)) ** power
    texts = [[str(rank)] * (scale // rank**power) for rank in range(1, 9 if power == 1 else 5)]
    assert zipf_slope(texts) == pytest.approx(-power)


def test_zipf_slope_is_least_squares():
    for seed in SEEDS:
        texts = random_texts(seed)
        counts = sorted(Counter(itertools.chain(*texts)).values(), reverse=True)
        if len(counts) < 2:
            continue
        ranks = np.log(range(1, len(counts) + 1))
        wanted = np.polyfit(ranks, np.log(counts), 1)[0]
        assert zipf_slope(texts) == pytest.approx(wanted, abs=1e-9)
        assert zipf_slope(texts * 3) == pytest.approx(wanted, abs=1e-9)


def test_zipf_slope_leaves_out_rare_words():
    common = [[str(rank)] * 2 for rank in range(lexical.ZIPF_RANKS)]
    assert zipf_slope(common) == pytest.approx(0, abs=1e-12)
    assert zipf_slope([*common, ["once"]]) == pytest.approx(0, abs=1e-12)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 9))
def test_burstiness_is_scale_free_and_bounded(lengths, scale):
    if not any(lengths):
        with pytest.raises(ValueError, match="only zeros"):
            lexical.burstiness(lengths)
        return
    value = lexical.burstiness(lengths)
    σ = math.sqrt(sum((x - sum(lengths) / len(lengths)) ** 2 for x in lengths) / len(lengths))
    μ = sum(lengths) / len(lengths)
    assert -1 <= value < 1
    assert value == pytest.approx((σ - μ) / (σ + μ))
    assert lexical.burstiness([scale * length for length in lengths]) == pytest.approx(value)
    assert lexical.burstiness([7] * len(lengths)) == -1


# Classes


def test_classes_match_a_plain_loop():
    for seed in SEEDS:
        K = random_kernel(seed, count=12)
        firsts, wanted = [], []
        for i in range(12):
            for label, first in enumerate(firsts):
                if K[i][first] >= 0.6:
                    wanted.append(label)
                    break
            else:
                wanted.append(len(firsts))
                firsts.append(i)
        assert lexical.classes(K, 0.6).tolist() == wanted


def test_classes_at_extreme_thresholds():
    assert lexical.classes(np.eye(4), 1).tolist() == [0, 1, 2, 3]
    assert lexical.classes([[1, 0.5], [0.5, 1]], 0.5).tolist() == [0, 0]
    assert lexical.classes(random_kernel(0), -2).tolist() == [0] * 7
    with pytest.raises(ValueError, match="threshold"):
        lexical.classes(np.eye(4), 1.1)


def test_distinct_k_is_the_mean_over_all_draws():
    for seed in SEEDS:
        labels = np.random.default_rng(seed).integers(4, size=7)
        for k in (1, 2, 4, 7):
            drawn = [len(set(some)) for some in itertools.combinations(labels.tolist(), k)]
            assert lexical.distinct_k(labels, k) == pytest.approx(np.mean(drawn))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
@settings(max_examples=50)
def test_distinct_k_rises_from_1_to_the_number_of_classes(labels):
    values = [lexical.distinct_k(labels, k) for k in range(1, len(labels) + 1)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(len(set(labels)))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
    for k in (0, len(labels) + 1):
        with pytest.raises(ValueError, match="k:"):
            lexical.distinct_k(labels, k)


# Errors


@pytest.mark.parametrize(
    "call",
    [
        lambda: lexical.distinct_n([["a"]], 0),
        lambda: lexical.distinct_n([], 1),
        lambda: lexical.self_bleu([["a"]]),
        lambda: lexical.self_bleu([["a"], ["b"]], 0),
        lambda: lexical.compression_ratio([]),
        lambda: lexical.compression_ratio([""]),
        lambda: lexical.self_repetition([["a"]]),
        lambda: lexical.self_repetition([["a"], ["b"]], 0),
        lambda: lexical.zipf_slope(np.array([2])),
        lambda: lexical.burstiness([]),
        lambda: lexical.burstiness([3, -1]),
    ],
)
def test_invalid_inputs_are_refused(call):
    with pytest.raises(ValueError, match=r"got .*; accepted: "):
        call()
