"""Witten-Bell against its definition in exact fractions; random word order gains nothing."""

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


def unigram(texts, word):
    """p(w): Witten-Bell over a uniform vocabulary with one entry for unknown words."""
    tokens = [each for text in texts for each in text]
    kinds = len(set(tokens))
    return (tokens.count(word) + kinds * Fraction(1, kinds + 1)) / Fraction(len(tokens) + kinds)


def bigram(texts, first, word):
    pairs = [pair for text in texts for pair in pairwise(text)]
    seconds = [second for one, second in pairs if one == first]
    kinds = len(set(seconds))
    if not seconds:
        return unigram(texts, word)
    return (seconds.count(word) + kinds * unigram(texts, word)) / Fraction(len(seconds) + kinds)


@pytest.mark.parametrize("seed", range(40))
def test_the_gain_equals_that_in_fractions(seed):
    texts, draw = corpus(seed), random.Random(seed + 1000)
    bigrams = Bigrams(texts)
    if not any(len(text) > 1 for text in texts):
        assert bigrams.gain("abc") == 0
        return
    for _ in range(10):
        tokens = draw.choices("abcdefg?!", k=draw.randrange(2, 12))
        pairs = list(pairwise(tokens))
        ratios = [bigram(texts, *pair) / unigram(texts, pair[1]) for pair in pairs]
        expected = math.fsum(math.log(ratio) for ratio in ratios) / len(pairs)
        assert bigrams.gain(tokens) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("seed", range(40))
def test_probabilities_sum_to_one(seed):
    texts = [*corpus(seed), ["a", "b"]]
    bigrams = Bigrams(texts)
    vocabulary = [*{word for text in texts for word in text}, UNKNOWN]
    assert sum(unigram(texts, word) for word in vocabulary) == 1
    for first in vocabulary:
        total = math.fsum(
            float(unigram(texts, word)) * math.exp(bigrams.gain([first, word]))
            for word in vocabulary
        )
        assert total == pytest.approx(1, abs=1e-12)


def test_too_few_words_gain_nothing():
    bigrams = Bigrams([list("abab")])
    assert bigrams.gain([]) == bigrams.gain(["a"]) == bigrams.gain(["x", "a"]) == 0
    assert Bigrams([]).gain(["a", "b"]) == 0


@pytest.fixture(scope="module")
def human_words():
    return [words(normalise(text)) for text in human_like(160)]


@pytest.fixture(scope="module")
def gate(human_words):
    return CoherenceFilter.fit(human_words[:80], human_words[80:120])


def test_word_order_has_a_gain(gate):
    assert gate.human > gate.shuffled + 0.1


def test_human_text_passes_and_random_word_order_does_not(gate, human_words):
    human = [gate.coherence(each) for each in human_words[120:]]
    shuffled = [gate.coherence(soup(" ".join(each)).split()) for each in human_words[120:]]
    assert sum(human) / len(human) == pytest.approx(1, abs=0.1)
    assert sum(shuffled) / len(shuffled) == pytest.approx(0, abs=0.1)
    assert min(human) > PASS > max(shuffled)


def test_random_words_do_not_pass(gate, human_words):
    draw = random.Random(0)
    vocabulary = sorted({word for each in human_words for word in each})
    assert gate.coherence(draw.choices(vocabulary, k=120)) < PASS
    assert gate.coherence([f"unheard{i}" for i in range(120)]) < PASS


def test_fitting_the_gate_is_deterministic(gate, human_words):
    again = CoherenceFilter.fit(human_words[:80], human_words[80:120])
    assert (again.human, again.shuffled) == (gate.human, gate.shuffled)


@pytest.mark.parametrize("texts", [[["a"] * 100] * 9, [["a"]], [[]]])
def test_texts_without_order_are_refused(texts):
    with pytest.raises(ValueError, match="accepted: prose"):
        CoherenceFilter.fit(texts, texts)
