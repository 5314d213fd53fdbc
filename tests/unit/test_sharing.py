"""Shared phrases against sets of strings."""

import random

import numpy as np
import pytest

from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.stylometry import FUNCTION_WORDS
from dftserve.evaluate.text.tokenize import tokens
from tests.texts import human_like

SAID = ["the", "and", "of", "he", ",", ".", "...", "river", "singing", "ringing", "1999", "x", '"']


def by_sets(a, b):
    """½ of 4-grams, ½ of masked 6-grams, over the smaller set."""

    def runs(said, size):
        return {" ".join(said[i : i + size]) for i in range(len(said)) if i + size <= len(said)}

    def masked(said):
        plain = [*FUNCTION_WORDS, ",", ".", "...", '"']
        return [each if each in plain else "#" + each[max(0, len(each) - 2) :] for each in said]

    def overlap(one, two):
        return len(one & two) / min(len(one), len(two)) if one and two else 0.0

    phrases = overlap(runs(a, 4), runs(b, 4))
    return phrases / 2 + overlap(runs(masked(a), 6), runs(masked(b), 6)) / 2


def drawn(seed):
    """Texts that borrow from each other, some of them short or empty."""
    draw = random.Random(seed)
    phrases = [draw.choices(SAID, k=draw.randrange(1, 9)) for _ in range(5)]
    return [
        [token for _ in range(draw.randrange(8)) for token in draw.choice(phrases)]
        for _ in range(draw.randrange(1, 9))
    ]


@pytest.mark.parametrize("seed", range(100))
def test_against_sets(seed):
    texts = drawn(seed)
    o_TT = ngram_overlap(texts)
    assert o_TT.shape == (len(texts), len(texts))
    assert o_TT == pytest.approx(np.array([[by_sets(a, b) for b in texts] for a in texts]))
    assert (o_TT == o_TT.T).all()
    assert ((o_TT >= 0) & (o_TT <= 1)).all()
    longer = [len(text) >= 6 for text in texts]
    assert (o_TT.diagonal()[longer] == 1).all()


def test_copies_share_everything_and_strangers_nothing():
    said = tokens(human_like(1)[0])
    assert (ngram_overlap([said] * 5) == 1).all()
    others = [f"w{i}{i % 26:02d}" for i in range(200)], list("abcdefghi")
    assert ngram_overlap(others)[0, 1] == 0


def test_a_pattern_counts_though_its_nouns_change():
    a = tokens("the old singer walked to the burning river and")
    b = tokens("the old ranger talked to the morning clover and")
    assert ngram_overlap([a, b])[0, 1] == pytest.approx(by_sets(a, b))
    assert ngram_overlap([a, b])[0, 1] >= 0.25


@pytest.mark.parametrize("texts", [[[]], [[], []], [["a"], ["a"]], []])
def test_texts_too_short_for_a_phrase_share_nothing(texts):
    assert not ngram_overlap(texts).any()
