"""bench/long_texts.py: the counts of each fifth of a text."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.evaluate.metrics import errors
from dftserve.evaluate.text.tokenize import word_starts

long_texts = importlib.import_module("long_texts")
LINTER = errors.linter()
SENTENCE = "The old man walked along the river and looked at the water. "


def test_an_error_is_counted_in_its_part():
    sentences = 10 * [SENTENCE]
    sentences[9] = SENTENCE.replace("river", "rivver")
    found = long_texts.counts("".join(sentences), LINTER)
    assert found.unknown_K.tolist() == [0, 0, 0, 0, 1]
    assert found.words_K.tolist() == [24, 24, 24, 24, 24]


def test_a_repeated_text_repeats_all_but_its_first_runs():
    found = long_texts.counts(10 * SENTENCE, LINTER)
    assert found.runs_K.sum() - found.repeated_K.sum() == 12  # One for each word of the sentence.
    assert (found.repeated_K[1:] == found.runs_K[1:]).all()


PIECES = ["one", "Two", "thre", "four.", "\n", "it's", "don’t", "—", "a…b", "x--y"]


@given(st.lists(st.sampled_from(PIECES), max_size=80))
def test_the_parts_add_up_to_the_whole(pieces):
    text = " ".join(pieces)
    found, whole = long_texts.counts(text, LINTER), errors.check(text, LINTER)
    assert found.words_K.sum() == len(word_starts(text))
    if len(word_starts(text)):
        assert (found.marks_K.sum(), found.unknown_K.sum()) == (whole.marks, whole.unknown)
    assert np.ptp(found.words_K) <= 1


def test_the_change_is_of_the_same_texts():
    worse = "".join(9 * [SENTENCE] + [SENTENCE.replace("river", "rivver")])
    found = long_texts.changes([long_texts.counts(worse, LINTER)] * 20)
    assert found["change"]["unknown"].value == found["5"]["unknown"].value > 0
    assert found["change"]["unknown"].low == pytest.approx(found["change"]["unknown"].high)
