"""bench/phrases.py: its counts, and the methods that it compares."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from dftserve.styles.profile import Phrase


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("phrases")


def test_phrases_orphans_and_first_words_are_counted_separately(bench):
    counter = bench.PhraseCounter(["a testament to", "tale of"])
    for text, counts in (
        ("It is a testament to her.", (6, 1, 0, 0)),
        ("It is a testament, they said.", (6, 0, 1, 1)),
        ("A tale of a tale.", (5, 1, 0, 3)),
        ("Nothing here.", (2, 0, 0, 0)),
    ):
        assert counter.in_text(text).tolist() == list(counts), text


def test_a_ratio_compares_rates_and_is_1_for_equal_counts(bench):
    base_P4 = np.array([[100, 4, 2, 8], [50, 2, 2, 4]], float)
    same = bench.ratios(base_P4, base_P4)
    assert {name: ratio.value for name, ratio in same.items()} == {
        "target_ratio": 1,
        "orphans_ratio": 1,
        "firsts_ratio": 1,
    }
    longer_P4 = base_P4 * [2, 1, 1, 1]
    assert bench.ratios(base_P4, longer_P4)["target_ratio"].value == pytest.approx(0.5)


def test_just_enough_phrases_are_banned_to_reach_the_human_rate(bench):
    phrases = [Phrase("b c", 1, 1.0, 0.5), Phrase("a b", 2, 4.0, 0.5), Phrase("c d", 1, 0.5, 0.0)]
    assert bench.banned(phrases) == ["a b", "b c"]
    many = [Phrase(f"a b{n}", 1, 1.0, 0.0) for n in range(bench.MOST_BAD_WORDS)]
    assert 2 * len(bench.banned(many)) == bench.MOST_BAD_WORDS


def test_a_bias_applies_to_the_word_that_people_use_least(bench, monkeypatch):
    human = [SimpleNamespace(text="a a a to to testament")]
    monkeypatch.setattr(bench.tasks, "load", lambda name: SimpleNamespace(human=human))
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [len(text), 7])
    biases = bench.biases([Phrase("a testament to", 1.5, 1, 0)], tokenizer)
    assert biases == {"9": -1.5, "10": -1.5}


def test_only_the_style_reaches_the_human_rate_on_the_chain(bench):
    """And it leaves the beginnings of phrases as frequent as before."""
    rows = {row["way"]: row for row in bench.on_the_chain()}
    before, style = rows["as is"], rows["style, strength 1"]
    assert style["phrase"] == pytest.approx(style["people"], rel=0.1)
    for key in ("orphan", "innocent"):
        assert style[key] == pytest.approx(before[key], rel=0.05)
    others = [row for name, row in rows.items() if name.startswith("the ")]
    assert all(style["kl"] < row["kl"] for row in others)
    assert before["kl"] == 0
