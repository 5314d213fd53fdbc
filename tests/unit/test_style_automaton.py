"""The automaton of a style, compared with string matching and known probabilities; and the effect
of its factors on a Markov chain whose rates can be computed."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.styles.automaton import build, completions, count_harms
from dftserve.styles.profile import ProfileError, with_log_ratios
from tests.styles import pattern, profile, stored

V = 4
_tokens = st.integers(0, V - 1)
_patterns = st.lists(
    st.tuples(st.integers(0, 2), st.lists(_tokens, min_size=1, max_size=4)), min_size=1, max_size=6
)


def automaton_of(spelled):
    return build([pattern(phrase, *tokens) for phrase, tokens in spelled], vocabulary=V)


def longest_pattern_start(spelled, text):
    """The longest suffix of a text that begins a pattern, by trying each."""
    prefixes = {tuple(tokens[:n]) for _, tokens in spelled for n in range(len(tokens) + 1)}
    return next(suffix for n in range(len(text) + 1) if (suffix := tuple(text[n:])) in prefixes)


@settings(max_examples=100, deadline=None)
@given(_patterns, st.lists(_tokens, max_size=30))
def test_a_state_is_the_longest_suffix_that_begins_a_pattern(spelled, text):
    automaton = automaton_of(spelled)
    path = automaton.walk(text)
    suffixes = [longest_pattern_start(spelled, text[: n + 1]) for n in range(len(text))]
    assert [automaton.depth_A[state] for state in path] == list(map(len, suffixes))
    # States and suffixes correspond one to one.
    assert len({*zip(path, suffixes, strict=True)}) == len(set(path)) == len(set(suffixes))


@settings(max_examples=100, deadline=None)
@given(_patterns, st.lists(_tokens, max_size=30))
def test_completions_equal_those_of_string_matching(spelled, text):
    first_of = {}
    for phrase, tokens in spelled:
        for first in range(len(text) - len(tokens) + 1):
            if text[first : first + len(tokens)] == tokens:
                last = first + len(tokens) - 1
                key = phrase, last
                first_of[key] = min(first, first_of.get(key, first))
    found = completions(automaton_of(spelled), text)
    assert sorted(found) == sorted((p, first, last) for (p, last), first in first_of.items())


@settings(max_examples=50, deadline=None)
@given(_patterns, st.lists(_tokens, min_size=1, max_size=30))
def test_the_steps_of_a_profile_are_those_of_its_automaton(spelled, text):
    automaton = automaton_of(spelled)
    harms = count_harms(automaton, [text])
    style = profile(automaton, harms, [1.0, 2.0, 3.0])
    factor_A = harms.log_factors(np.array([1.0, 2.0, 3.0]))
    state = 0
    for token, expected in zip(text, automaton.walk(text), strict=True):
        state, factor = style.step(state, token)
        assert (state, factor) == (expected, factor_A[expected])
    # Rows contain only the transitions that differ from those of the root.
    assert (automaton.row_next_N != automaton.root_next_V[automaton.row_token_N]).all()


def test_a_token_beyond_the_vocabulary_leads_to_the_root():
    small = stored().profile
    state, _ = small.step(0, 1)
    assert state
    assert small.step(state, small.vocabulary + 3) == (0, 0.0)


def test_harms_are_the_probabilities_of_a_completion():
    """For independent tokens, h is the probability of a phrase's remaining tokens. Six standard
    errors: false alarms below 1e-7 over all states."""
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    automaton = build([pattern(0, 0, 1, 2), pattern(1, 3, 3)], vocabulary=V)
    text = np.random.default_rng(5).choice(V, 200_000, p=chances).tolist()
    harms = count_harms(automaton, [text])
    for prefix, rest, phrase in (((0,), (1, 2), 0), ((0, 1), (2,), 0), ((3,), (3,), 1)):
        state = automaton.walk(prefix)[-1]
        expected = math.prod(chances[token] for token in rest)
        visits = automaton.walk(text).count(state)
        assert completion_probability(harms, state, phrase) == pytest.approx(
            expected, abs=6 * math.sqrt(expected / visits)
        )
    assert completion_probability(harms, automaton.walk((0, 1, 2))[-1], 0) == 1


def test_an_unseen_spelling_has_the_probability_of_the_others():
    automaton = build([pattern(0, 0, 1), pattern(0, 2, 1)], vocabulary=V)
    harms = count_harms(automaton, [[0, 1] * 300 + [0, 3] * 100])
    seen, unseen = (automaton.walk([token])[-1] for token in (0, 2))
    assert completion_probability(harms, unseen, 0) == pytest.approx(0.75, abs=0.01)
    assert completion_probability(harms, seen, 0) == pytest.approx(0.75, abs=0.01)


def test_factors_are_products_over_phrases():
    small = stored()
    log_ratio_P = np.array([1.5, 0.5])
    factor_A = small.harms.log_factors(log_ratio_P)
    for state in range(small.profile.states):
        begin, end = small.harms.start_A[state : state + 2]
        expected = 1.0
        for pair in range(begin, end):
            ratio = math.exp(-log_ratio_P[small.harms.phrase_H[pair]])
            expected *= 1 - (1 - ratio) * float(small.harms.chance_H[pair])
        assert factor_A[state] == pytest.approx(math.log(expected), abs=1e-6)
    assert factor_A[0] == 0


def test_replacing_log_ratios_equals_building_with_them():
    replaced = with_log_ratios(stored(), np.array([0.25, 4.0]))
    expected = stored(log_ratio_P=(0.25, 4.0)).profile
    assert replaced.phrases == expected.phrases
    np.testing.assert_array_equal(replaced.root_log_factor_V, expected.root_log_factor_V)
    np.testing.assert_array_equal(replaced.row_log_factor_N, expected.row_log_factor_N)


@pytest.mark.parametrize("ratio", [2.0, 5.0, 20.0])
def test_the_rate_of_a_rare_phrase_falls_by_its_log_ratio(ratio):
    """On a chain of order 1, with rates from its stationary distribution. As far as the phrase is
    rare, its rate is multiplied by e^−λ; its first token stays as frequent as before."""
    chain_VV = np.array(
        [[0.3, 0.1, 0.3, 0.3], [0.4, 0.3, 0.05, 0.25], [0.3, 0.3, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]]
    )
    automaton = build([pattern(0, 0, 1, 2)], vocabulary=V)
    rng, text = np.random.default_rng(3), [0]
    for draw in rng.random(200_000):
        text.append(int(np.searchsorted(chain_VV[text[-1]].cumsum(), draw)))
    harms = count_harms(automaton, [text])
    before, after = (
        stationary(chain_VV, profile(automaton, harms, [log_ratio]))
        for log_ratio in (0.0, math.log(ratio))
    )
    assert after["phrase"] / before["phrase"] == pytest.approx(1 / ratio, rel=0.04)
    assert after["first"] / before["first"] == pytest.approx(1, rel=0.01)


def stationary(chain_VV, style):
    """The stationary rates of the phrase and of its first token."""
    pairs = [(token, state) for token in range(V) for state in range(style.states)]
    index = {pair: n for n, pair in enumerate(pairs)}
    moves = np.zeros((len(pairs), len(pairs)))
    for (token, state), n in index.items():
        steps = [style.step(state, following) for following in range(V)]
        weight = chain_VV[token] * np.exp([factor for _, factor in steps])
        for following, (reached, _) in enumerate(steps):
            moves[n, index[following, reached]] += weight[following] / weight.sum()
    share = np.full(len(pairs), 1 / len(pairs))
    for _ in range(500):
        share = share @ moves
    deepest = style.states - 1
    return {
        "phrase": sum(share[n] for (_, state), n in index.items() if state == deepest),
        "first": sum(share[n] for (token, _), n in index.items() if token == 0),
    }


def test_a_pattern_of_another_vocabulary_is_refused():
    with pytest.raises(ProfileError, match=r"accepted: one token or more, each from 0 to 3"):
        build([pattern(0, 1, 4)], vocabulary=V)
    with pytest.raises(ProfileError, match="got the tokens"):
        build([pattern(0)], vocabulary=V)


def completion_probability(harms, state, phrase):
    begin, end = harms.start_A[state : state + 2]
    probabilities = dict(zip(harms.phrase_H[begin:end], harms.chance_H[begin:end], strict=True))
    return float(probabilities[phrase])
