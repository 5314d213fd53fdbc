"""Embeddings: rows of unit length from any embedder, and the measures that use them."""

import importlib.util
import zlib

import numpy as np
import pytest

from dftserve.evaluate.metrics.slop import read_phrases
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.metrics.suite import MEASURES, Instruments, measure
from dftserve.evaluate.text.embeddings import INSTALL, Embedder, embedder
from dftserve.evaluate.text.windows import Sample, Windows
from tests.texts import human_like


def bag_of_words(texts: list[str]) -> np.ndarray:
    """Word counts, hashed by a checksum: texts with the same words have equal embeddings."""
    rows = np.zeros((len(texts), 64))
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 64] += 1
    return rows


def test_rows_have_length_one():
    rows_TF = Embedder("bag", bag_of_words)(human_like(5))
    assert rows_TF.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows_TF, axis=1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        Embedder("bag", bag_of_words)([])


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is not None, reason="it is installed"
)
def test_without_the_extra_the_error_says_what_to_install():
    with pytest.raises(ValueError, match=INSTALL):
        embedder()


def test_measures_of_meaning_need_an_embedder():
    people = Windows.of([Sample(text) for text in human_like(48)])
    frame = StyleSpace.fit(people)
    answers = human_like(8, seed=2)
    same = [Sample(text, "Q1") for text in answers[:1] * 8]
    others = [Sample(text, "Q2") for text in answers]
    system = Windows.of([*same, *others])
    human = people.pick(range(16))
    without = measure(system, human, Instruments(frame, read_phrases(), None))
    found = measure(
        system, human, Instruments(frame, read_phrases(), Embedder("bag", bag_of_words))
    )
    added = {"mmd_meaning", "c2st_meaning", "vendi_meaning", "distinct_8"}
    assert set(found) - set(without) == added <= set(MEASURES)
    # One class for eight copies of one text, at most eight for eight texts.
    assert 1 <= found["distinct_8"].value <= (1 + 8) / 2
    assert 1 <= found["vendi_meaning"].value <= 9 + 1e-6
