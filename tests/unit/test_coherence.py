"""Witten-Bell against its definition in exact fractions; soup gains nothing."""

import math
import random
from fractions import Fraction
from itertools import pairwise

import pytest

from dftserve.evaluate.metrics.coherence import PASS, Bigrams, CoherenceFilter
from dftserve.evaluate.text.tokenize import normalise, words
from tests.texts import human_like, soup

UNKNOWN = "?"


def corpus(seed):
    draw = random.Random(seed)
    return [draw.choices("abcdefg", k=draw.randrange(30)) for _ in range(draw.randrange(1, 8))]


def alone(texts, word):
    """p(w): Witten-Bell over a uniform vocabulary with a place for unknown words."""
    said = [each for text in texts for each in text]
    kinds = len(set(said))
    return (said.count(word) + kinds * Fraction(1, kinds + 1)) / Fraction(len(said) + kinds)


def after(texts, first, word):
    pairs = [pair for text in texts for pair in pairwise(text)]
    seconds = [second for one, second in pairs if one == first]
    kinds = len(set(seconds))
    if not seconds:
        return alone(texts, word)
    return (seconds.count(word) + kinds * alone(texts, word)) / Fraction(len(seconds) + kinds)


@pytest.mark.parametrize("seed", range(40))
def test_gain_against_fractions(seed):
    texts, draw = corpus(seed), random.Random(seed + 1000)
    bigrams = Bigrams(texts)
    if not any(len(text) > 1 for text in texts):
        assert bigrams.gain("abc") == 0
        return
    for _ in range(10):
        said = draw.choices("abcdefg?!", k=draw.randrange(2, 12))
        pairs = list(pairwise(said))
        ratios = [after(texts, *pair) / alone(texts, pair[1]) for pair in pairs]
        expected = math.fsum(math.log(ratio) for ratio in ratios) / len(pairs)
        assert bigrams.gain(said) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("seed", range(40))
def test_probabilities_sum_to_one(seed):
    texts = [*corpus(seed), ["a", "b"]]
    bigrams = Bigrams(texts)
    vocabulary = [*{word for text in texts for word in text}, UNKNOWN]
    assert sum(alone(texts, word) for word in vocabulary) == 1
    for first in vocabulary:
        total = math.fsum(
            float(alone(texts, word)) * math.exp(bigrams.gain([first, word])) for word in vocabulary
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_too_few_words_gain_nothing():
    bigrams = Bigrams([list("abab")])
    assert bigrams.gain([]) == bigrams.gain(["a"]) == bigrams.gain(["x", "a"]) == 0
    assert Bigrams([]).gain(["a", "b"]) == 0


@pytest.fixture(scope="module")
def said():
    return [words(normalise(text)) for text in human_like(160)]


@pytest.fixture(scope="module")
def gate(said):
    return CoherenceFilter.fit(said[:80], said[80:120])


def test_order_is_worth_something(gate):
    assert gate.human > gate.shuffled + 0.1


def test_human_text_passes_and_soup_does_not(gate, said):
    human = [gate.coherence(each) for each in said[120:]]
    soups = [gate.coherence(soup(" ".join(each)).split()) for each in said[120:]]
    assert sum(human) / len(human) == pytest.approx(1, abs=0.1)
    assert sum(soups) / len(soups) == pytest.approx(0, abs=0.1)
    assert min(human) > PASS > max(soups)


def test_any_soup_is_found_out(gate, said):
    draw = random.Random(0)
    vocabulary = sorted({word for each in said for word in each})
    assert gate.coherence(draw.choices(vocabulary, k=120)) < PASS
    assert gate.coherence([f"unheard{i}" for i in range(120)]) < PASS


def test_the_gate_is_the_same_every_time(gate, said):
    again = CoherenceFilter.fit(said[:80], said[80:120])
    assert (again.human, again.shuffled) == (gate.human, gate.shuffled)


@pytest.mark.parametrize("texts", [[["a"] * 100] * 9, [["a"]], [[]]])
def test_texts_without_order_are_refused(texts):
    with pytest.raises(ValueError, match="accepted: prose"):
        CoherenceFilter.fit(texts, texts)
