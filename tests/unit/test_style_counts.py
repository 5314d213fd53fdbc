"""Over-used phrases: the statistics, compared with scipy and brute force, and the phrases chosen
from generated texts with a known answer."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dftserve.evaluate.text.windows import Sample
from dftserve.styles import counts
from dftserve.styles.counts import Choice, Side, g_statistic, over_used, p_value, shrunk_log_ratio
from dftserve.styles.profile import LONGEST_PHRASE

_count = st.integers(0, 60)


@settings(max_examples=100, deadline=None)
@given(_count, _count, st.integers(100, 9000), st.integers(100, 9000))
def test_g_equals_that_of_scipy(a, b, a_words, b_words):
    if a + b == 0:
        assert g_statistic([a], a_words, [b], b_words)[0] == 0
        return
    table = [[a, a_words - a], [b, b_words - b]]
    expected = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
    found = g_statistic([a], a_words, [b], b_words)[0]
    assert found == pytest.approx(expected.statistic, rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(_count, _count, st.integers(100, 9000), st.integers(100, 9000))
def test_p_equals_that_of_the_exact_conditional_test(a, b, a_words, b_words):
    share = a_words / (a_words + b_words)
    expected = stats.binomtest(a, a + b, share, alternative="greater").pvalue if a + b else 1.0
    assert p_value([a], a_words, [b], b_words)[0] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.5))
def test_discoveries_are_those_of_benjamini_and_hochberg(p_values, share):
    """All p up to p_(k), for the largest k with p_(k) ≤ k·q/m."""
    m = len(p_values)
    ranked = sorted(p_values)
    passing = [p for k, p in enumerate(ranked, 1) if p <= k * share / m * (1 + 1e-12)]
    expected = [bool(passing) and p <= passing[-1] for p in p_values]
    found = counts.discoveries(np.array(p_values), share * (1 + 1e-12))
    assert found.tolist() == expected


def test_log_ratios_of_small_counts_are_shrunk_towards_0():
    assert shrunk_log_ratio(0, 1000, 0, 1000) == 0
    few, many = shrunk_log_ratio(5, 10_000, 1, 10_000), shrunk_log_ratio(5000, 1e7, 1000, 1e7)
    assert 0 < few < many < np.log(5)
    assert many == pytest.approx(np.log(5), abs=0.01)
    assert shrunk_log_ratio(5, 1e4, 5, 1e4) == pytest.approx(0)


VOWELS = ["a", "e", "i", "u", "ou", "ai", "an", "el", "in"]
PLAIN = [f"{a}{b}o" for a in "bdfgklmnprst" for b in VOWELS]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PROMPTS = [f"Ask number {word}." for word in NUMBERS]


def text(rng, *inserted):
    """Thirty plain words with phrases inserted at random positions."""
    words = rng.choices(PLAIN, k=30)
    for phrase in inserted:
        words.insert(rng.randrange(1, len(words)), phrase)
    return " ".join(words)


def sides(inserted, answers=96, human=192, every=3):
    """Answers to eight prompts, and human texts. `inserted` maps each phrase to the prompts whose
    answers have it, every third by default."""
    rng = random.Random(1)
    model = []
    for n in range(answers):
        prompt = PROMPTS[n % 8]
        phrases = [p for p, prompts in inserted.items() if n // 8 % every == 0 and n % 8 in prompts]
        model.append(Sample(text(rng, *phrases), prompt))
    return Side(model), Side([Sample(text(rng), f"human {n}") for n in range(human)])


ALL = range(8)


def found(inserted, known=(), choice=None, **sizes):
    tallies = over_used(*sides(inserted, **sizes), choice or Choice(), known)
    return {tally.text: tally for tally in tallies}


def test_only_the_whole_over_used_phrase_is_found():
    tallies = found({"a testament to": ALL})
    assert list(tallies) == ["a testament to"]
    tally = tallies["a testament to"]
    assert (tally.model_texts, tally.human_texts, tally.prompts) == (32, 0, 8)
    assert tally.log_ratio > 3


def test_a_run_with_an_endless_word_is_no_phrase():
    """A profile accepts no phrase of its length."""
    longest = f"velvet {'ha' * 96}h"
    assert len(longest) == LONGEST_PHRASE
    assert list(found({longest: ALL})) == [longest]
    assert found({f"{longest}a": ALL}) == {}


def test_other_repeated_phrases_are_excluded():
    assert found({"velvet shadows": range(2)}) == {}, "under two prompts"
    refrain = ". ".join(["velvet shadows"] * 3)
    assert found({refrain: ALL}) == {}, "a refrain"
    assert found({"Elara Voss": ALL}) == {}, "a name"
    assert found({"of chapter 12": ALL}) == {}, "a number"
    assert found({"the number": ALL}) == {}, "a word of the prompts"
    assert found({"to the bao": ALL}) == {}, "common words"
    assert found({"velvet shadows": ALL}, choice=Choice(least_texts=40)) == {}, "too few"


def test_a_shorter_phrase_is_kept_if_the_longer_one_does_not_explain_it():
    both = found({"tapestry of": ALL, "rich tapestry of": range(1)})
    assert list(both) == ["tapestry of"]


def test_phrases_explained_by_one_over_used_word_are_excluded():
    rng = random.Random(4)
    pairs = ["blurry rivers", "blurry clocks", "blurry lamps", "blurry doors", "blurry bells"]
    model = [Sample(text(rng, pairs[n % 5], pairs[n // 5 % 5]), PROMPTS[n % 8]) for n in range(120)]
    human = [
        Sample(text(rng, *(pair.split()[1] for pair in rng.sample(pairs, 2))), f"human {n}")
        for n in range(240)
    ]
    assert over_used(Side(model), Side(human), Choice()) == []


def test_a_known_phrase_needs_less_evidence():
    inserted = {"delve": range(2)}
    assert found(inserted, every=6) == {}
    known = found(inserted, known=["Delve", "never said"], every=6)
    assert list(known) == ["delve"]
    assert known["delve"].known


def test_a_phrase_has_the_spelling_of_the_model():
    assert "I'm not entirely sure" in found({"I’m not entirely sure": ALL})
    assert "let me be clear" in found({". Let me be clear": ALL})


def test_a_phrase_that_people_use_as_often_is_no_discovery():
    rng = random.Random(2)
    model, _ = sides({"velvet shadows": ALL})
    human = Side(
        [Sample(text(rng, *(["velvet shadows"] * (n % 3 == 0))), f"h {n}") for n in range(192)]
    )
    assert over_used(model, human, Choice()) == []


def test_texts_of_one_distribution_give_few_discoveries():
    """Fewer than 2 discoveries in total over 8 seeds."""
    hits = 0
    for seed in range(8):
        rng = random.Random(seed)
        words = [f"w{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60)]

        def some(n, rng=rng, words=words):
            return Side(
                [Sample(" ".join(rng.choices(words, k=40)), f"prompt {i % 8}") for i in range(n)]
            )

        hits += len(over_used(some(24), some(48), Choice()))
    assert hits < 2


def test_a_side_without_words_is_refused():
    with pytest.raises(ValueError, match="the corpus: got no words"):
        over_used(Side([Sample("some words")]), Side([Sample("…")]), Choice())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"false_discoveries": 1.5}, "false_discoveries: got 1.5; accepted: 0 to 1"),
        ({"least_texts": 0}, "least_texts: got 0"),
        ({"most": 100_001}, "most: got 100001; accepted: 1 to 100,000"),
    ],
)
def test_settings_out_of_bounds_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Choice(**changed)
