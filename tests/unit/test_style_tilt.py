"""The tilt of word choice: its rates and variances, and the tokens and bigrams that it keeps."""

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.styles import tilt

V = 5
_texts = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=6)


def counted(texts, groups=None, marks=None):
    return tilt.count(
        [np.array(text, np.int64) for text in texts],
        [np.ones(len(text), bool) for text in texts] if marks is None else marks,
        list(range(len(texts))) if groups is None else groups,
        vocabulary=V,
    )


@settings(max_examples=50, deadline=None)
@given(_texts)
def test_rates_sum_to_1(texts):
    counts = counted(texts)
    assert tilt.token_rates(counts).sum() == pytest.approx(1, abs=1e-12)
    for context in range(V):
        rates = tilt.pair_rates(counts, context * V + np.arange(V))
        assert rates.sum() == pytest.approx(1, abs=1e-12)
        assert (rates > 0).all()


@settings(max_examples=50, deadline=None)
@given(_texts)
def test_rates_equal_those_of_witten_and_bell(texts):
    counts = counted(texts)
    tokens = Counter(token for text in texts for token in text)
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    for u in range(V):
        followers = {v: n for (context, v), n in pairs.items() if context == u}
        for v in range(V):
            token_rate = (tokens[v] + len(tokens) / V) / (tokens.total() + len(tokens))
            weight = sum(followers.values()) + len(followers)
            expected = (
                (followers.get(v, 0) + len(followers) * token_rate) / weight
                if weight
                else token_rate
            )
            found = tilt.pair_rates(counts, np.array([u * V + v]))[0]
            assert found == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(_texts, st.integers(1, 3))
def test_variances_equal_those_of_ratios_over_groups(texts, size):
    groups = [n // size for n in range(len(texts))]
    counts = counted(texts, groups)
    texts_of = [
        [t for t, g in zip(texts, groups, strict=True) if g == n] for n in range(max(groups) + 1)
    ]
    n_D = np.array([sum(map(len, members)) for members in texts_of], float)
    for v in range(V):
        c_D = np.array([sum(text.count(v) for text in members) for members in texts_of], float)
        c = c_D.sum()
        if not c:
            continue
        expected = max(((c_D - c / n_D.sum() * n_D) ** 2).sum() / c**2, 1 / c)
        assert counts.token_variance_V[v] == pytest.approx(expected, rel=1e-9)
        assert counts.token_groups_V[v] == np.count_nonzero(c_D)
    for pair, variance in zip(counts.pair_P, counts.pair_variance_P, strict=True):
        u, v = divmod(int(pair), V)
        pairs_of = [[list(pairwise(t)) for t in members] for members in texts_of]
        c_D = np.array([sum(t.count((u, v)) for t in members) for members in pairs_of], float)
        n_D = np.array([sum(a == u for t in members for a, _ in t) for members in pairs_of], float)
        c = c_D.sum()
        expected = max(((c_D - c / n_D.sum() * n_D) ** 2).sum() / c**2, 1 / c)
        assert variance == pytest.approx(expected, rel=1e-9)


def test_a_token_that_is_not_counted_is_still_a_context():
    marks = [np.array([True, False, True])]
    counts = counted([[0, 1, 2]], marks=marks)
    assert counts.token_V.tolist() == [1, 0, 1, 0, 0]
    assert counts.pair_P.tolist() == [1 * V + 2]


def drawn(chances, texts, seed, length=100):
    rng = np.random.default_rng(seed)
    return [rng.choice(V, length, p=chances).tolist() for _ in range(texts)]


def test_the_tilt_of_a_token_is_its_log_rate_ratio():
    """δ of the token whose rate is doubled is ln 2, shrunk; the rates of the others differ by the
    mass that it takes. Tokens are independent, so bigrams have no δ of their own."""
    human = counted(drawn([0.2, 0.2, 0.2, 0.2, 0.2], 200, 1))
    model = counted(drawn([0.1, 0.225, 0.225, 0.225, 0.225], 200, 2))
    found = tilt.fit(human, model, np.ones(V, bool))
    assert found.unigram_V[0] == pytest.approx(np.log(2), abs=0.05)
    np.testing.assert_allclose(found.unigram_V[1:], np.log(0.2 / 0.225), atol=0.03)
    assert len(found.token_M) <= 1  # By chance: 25 bigrams at 3 standard errors.


def test_a_topic_is_not_tilted():
    """A token that is frequent in all answers to one prompt and absent elsewhere."""
    plain = [0.25, 0.25, 0.25, 0.25, 0.0]
    topic = drawn([0.1, 0.1, 0.1, 0.1, 0.6], 8, 3)
    texts = drawn(plain, 72, 4) + topic
    human = counted(drawn(plain, 80, 5))
    by_prompt = counted(texts, [n // 8 for n in range(80)])
    assert tilt.fit(human, by_prompt, np.ones(V, bool)).unigram_V[4] == 0
    chances = [0.235, 0.235, 0.235, 0.235, 0.06]
    scattered = counted(drawn(chances, 80, 6), [n // 8 for n in range(80)])
    assert tilt.fit(human, scattered, np.ones(V, bool)).unigram_V[4] < -0.5


def test_a_bigram_that_differs_from_its_unigram_is_kept():
    rng = np.random.default_rng(7)
    human_pairs = [[0, 1] if draw < 0.5 else [1, 0] for draw in rng.random(4000)]
    human = counted([list(chain(*human_pairs[n : n + 50])) for n in range(0, 4000, 50)])
    model_pairs = [[0, 1] if draw < 0.05 else [1, 0] for draw in rng.random(4000)]
    model = counted([list(chain(*model_pairs[n : n + 50])) for n in range(0, 4000, 50)])
    found = tilt.fit(human, model, np.ones(V, bool))
    assert found.unigram_V.tolist() == [0] * V
    assert found.context_C.tolist() == [0, 1]
    doubled = dict(zip(found.token_M[: found.start_C[1]], found.delta_M, strict=False))
    assert doubled[0] > 1


def test_tokens_that_are_not_allowed_are_not_tilted():
    human = counted(drawn([0.2] * 5, 100, 1))
    model = counted(drawn([0.6, 0.1, 0.1, 0.1, 0.1], 100, 2))
    allowed = np.ones(V, bool)
    allowed[0] = False
    found = tilt.fit(human, model, allowed)
    assert found.unigram_V[0] == 0
    assert (found.unigram_V[1:] > 0.5).all()
    assert 0 not in found.token_M.tolist()
