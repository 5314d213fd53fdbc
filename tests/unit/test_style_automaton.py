"""The automaton of a style: against string matching, against chances that are known, and what its
factors make of a chain whose rates can be computed."""

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


def made(spelled):
    return build([pattern(phrase, *tokens) for phrase, tokens in spelled], vocabulary=V)


def standing(spelled, text):
    """The longest end of a text that begins a pattern, by trying each."""
    begins = {tuple(tokens[:n]) for _, tokens in spelled for n in range(len(tokens) + 1)}
    return next(end for n in range(len(text) + 1) if (end := tuple(text[n:])) in begins)


@settings(max_examples=100, deadline=None)
@given(_patterns, st.lists(_tokens, max_size=30))
def test_a_state_is_the_longest_end_that_begins_a_pattern(spelled, text):
    automaton = made(spelled)
    path = automaton.walk(text)
    ends = [standing(spelled, text[: n + 1]) for n in range(len(text))]
    assert [automaton.depth_A[state] for state in path] == list(map(len, ends))
    # One state for one end: none stands for two.
    assert len({*zip(path, ends, strict=True)}) == len(set(path)) == len(set(ends))


@settings(max_examples=100, deadline=None)
@given(_patterns, st.lists(_tokens, max_size=30))
def test_completions_are_those_of_string_matching(spelled, text):
    wanted = {}
    for phrase, tokens in spelled:
        for first in range(len(text) - len(tokens) + 1):
            if text[first : first + len(tokens)] == tokens:
                last = first + len(tokens) - 1
                key = phrase, last
                wanted[key] = min(first, wanted.get(key, first))
    found = completions(made(spelled), text)
    assert sorted(found) == sorted((p, first, last) for (p, last), first in wanted.items())


@settings(max_examples=50, deadline=None)
@given(_patterns, st.lists(_tokens, min_size=1, max_size=30))
def test_a_profiles_steps_are_the_automatons(spelled, text):
    automaton = made(spelled)
    harms = count_harms(automaton, [text])
    made_of = profile(automaton, harms, [1.0, 2.0, 3.0])
    factor_A = harms.log_factors(np.array([1.0, 2.0, 3.0]))
    state = 0
    for token, wanted in zip(text, automaton.walk(text), strict=True):
        state, factor = made_of.step(state, token)
        assert (state, factor) == (wanted, factor_A[wanted])
    # Every entry of a row leads elsewhere than from the root.
    assert (automaton.row_next_N != automaton.root_next_V[automaton.row_token_N]).all()


def test_a_token_beyond_the_vocabulary_leads_to_the_root():
    small = stored().profile
    state, _ = small.step(0, 1)
    assert state
    assert small.step(state, small.vocabulary + 3) == (0, 0.0)


def test_harms_are_the_chances_of_a_completion():
    """Of independent tokens, h is the chance of those that a phrase still lacks. Six standard
    errors: false alarms below 1e-7 over all states."""
    chances = np.array([0.4, 0.3, 0.2, 0.1])
    automaton = build([pattern(0, 0, 1, 2), pattern(1, 3, 3)], vocabulary=V)
    text = np.random.default_rng(5).choice(V, 200_000, p=chances).tolist()
    harms = count_harms(automaton, [text])
    for begun, lacking, phrase in (((0,), (1, 2), 0), ((0, 1), (2,), 0), ((3,), (3,), 1)):
        state = automaton.walk(begun)[-1]
        wanted = math.prod(chances[token] for token in lacking)
        visits = automaton.walk(text).count(state)
        assert chance(harms, state, phrase) == pytest.approx(
            wanted, abs=6 * math.sqrt(wanted / visits)
        )
    assert chance(harms, automaton.walk((0, 1, 2))[-1], 0) == 1


def test_a_spelling_that_no_text_has_borrows_from_the_others():
    automaton = build([pattern(0, 0, 1), pattern(0, 2, 1)], vocabulary=V)
    harms = count_harms(automaton, [[0, 1] * 300 + [0, 3] * 100])
    seen, unseen = (automaton.walk([token])[-1] for token in (0, 2))
    assert chance(harms, unseen, 0) == pytest.approx(0.75, abs=0.01)
    assert chance(harms, seen, 0) == pytest.approx(0.75, abs=0.01)


def test_factors_are_the_product_over_phrases():
    small = stored()
    log_ratio_P = np.array([1.5, 0.5])
    factor_A = small.harms.log_factors(log_ratio_P)
    for state in range(small.profile.states):
        begin, end = small.harms.start_A[state : state + 2]
        wanted = 1.0
        for pair in range(begin, end):
            ratio = math.exp(-log_ratio_P[small.harms.phrase_H[pair]])
            wanted *= 1 - (1 - ratio) * float(small.harms.chance_H[pair])
        assert factor_A[state] == pytest.approx(math.log(wanted), abs=1e-6)
    assert factor_A[0] == 0


def test_other_log_ratios_make_the_same_profile_as_building_with_them():
    anew = with_log_ratios(stored(), np.array([0.25, 4.0]))
    wanted = stored(log_ratio_P=(0.25, 4.0)).profile
    assert anew.phrases == wanted.phrases
    np.testing.assert_array_equal(anew.root_log_factor_V, wanted.root_log_factor_V)
    np.testing.assert_array_equal(anew.row_log_factor_N, wanted.row_log_factor_N)


@pytest.mark.parametrize("ratio", [2.0, 5.0, 20.0])
def test_a_rare_phrase_comes_as_much_less_often_as_its_log_ratio_says(ratio):
    """On a chain of order 1 with the chances as they are: rates from the stationary distribution,
    no drawing. The rate is e^−λ times what it was, as far as the phrase is rare; its first token
    stays as common as it was."""
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


def stationary(chain_VV, made_of):
    """How often the phrase ends, and how often its first token comes, in the long run."""
    pairs = [(token, state) for token in range(V) for state in range(made_of.states)]
    place = {pair: n for n, pair in enumerate(pairs)}
    moves = np.zeros((len(pairs), len(pairs)))
    for (token, state), n in place.items():
        steps = [made_of.step(state, following) for following in range(V)]
        weight = chain_VV[token] * np.exp([factor for _, factor in steps])
        for following, (reached, _) in enumerate(steps):
            moves[n, place[following, reached]] += weight[following] / weight.sum()
    share = np.full(len(pairs), 1 / len(pairs))
    for _ in range(500):
        share = share @ moves
    deepest = made_of.states - 1
    return {
        "phrase": sum(share[n] for (_, state), n in place.items() if state == deepest),
        "first": sum(share[n] for (token, _), n in place.items() if token == 0),
    }


def test_a_pattern_of_another_vocabulary_is_refused():
    with pytest.raises(ProfileError, match=r"accepted: one token or more, each from 0 to 3"):
        build([pattern(0, 1, 4)], vocabulary=V)
    with pytest.raises(ProfileError, match="got the tokens"):
        build([pattern(0)], vocabulary=V)


def chance(harms, state, phrase):
    begin, end = harms.start_A[state : state + 2]
    found = dict(zip(harms.phrase_H[begin:end], harms.chance_H[begin:end], strict=True))
    return float(found[phrase])
