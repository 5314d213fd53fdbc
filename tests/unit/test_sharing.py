"""Shared phrases, compared with sets of strings."""

import random

import numpy as np
import pytest

from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.stylometry import FUNCTION_WORDS
from dftserve.evaluate.text.tokenize import tokens
from tests.texts import human_like

WORDS = ["the", "and", "of", "he", ",", ".", "...", "river", "singing", "ringing", "1999", "x", '"']


def by_sets(a, b):
    """½ of the shared 4-grams + ½ of the shared masked 6-grams, relative to the smaller set."""

    def runs(text, size):
        return {" ".join(text[i : i + size]) for i in range(len(text)) if i + size <= len(text)}

    def masked(text):
        plain = [*FUNCTION_WORDS, ",", ".", "...", '"']
        return [each if each in plain else "#" + each[max(0, len(each) - 2) :] for each in text]

    def overlap(one, two):
        return len(one & two) / min(len(one), len(two)) if one and two else 0.0

    phrases = overlap(runs(a, 4), runs(b, 4))
    return phrases / 2 + overlap(runs(masked(a), 6), runs(masked(b), 6)) / 2


def drawn(seed):
    """Texts that share phrases, some of them short or empty."""
    draw = random.Random(seed)
    phrases = [draw.choices(WORDS, k=draw.randrange(1, 9)) for _ in range(5)]
    return [
        [token for _ in range(draw.randrange(8)) for token in draw.choice(phrases)]
        for _ in range(draw.randrange(1, 9))
    ]


@pytest.mark.parametrize("seed", range(100))
def test_the_overlap_is_that_of_sets_of_strings(seed):
    texts = drawn(seed)
    o_TT = ngram_overlap(texts)
    assert o_TT.shape == (len(texts), len(texts))
    assert o_TT == pytest.approx(np.array([[by_sets(a, b) for b in texts] for a in texts]))
    assert (o_TT == o_TT.T).all()
    assert ((o_TT >= 0) & (o_TT <= 1)).all()
    longer = [len(text) >= 6 for text in texts]
    assert (o_TT.diagonal()[longer] == 1).all()


def test_copies_share_everything_and_unrelated_texts_nothing():
    text = tokens(human_like(1)[0])
    assert (ngram_overlap([text] * 5) == 1).all()
    others = [f"w{i}{i % 26:02d}" for i in range(200)], list("abcdefghi")
    assert ngram_overlap(others)[0, 1] == 0


def test_a_repeated_pattern_counts_even_if_its_nouns_change():
    a = tokens("the old singer walked to the burning river and")
    b = tokens("the old ranger talked to the morning clover and")
    assert ngram_overlap([a, b])[0, 1] == pytest.approx(by_sets(a, b))
    assert ngram_overlap([a, b])[0, 1] >= 0.25


@pytest.mark.parametrize("texts", [[[]], [[], []], [["a"], ["a"]], []])
def test_texts_too_short_for_a_phrase_share_nothing(texts):
    assert not ngram_overlap(texts).any()
