"""Every text is measured over the same number of words."""

import random

import pytest

from dftserve.evaluate.text.tokenize import normalise, words
from dftserve.evaluate.text.windows import LEAST_TEXTS, LEAST_WORDS, Sample, Windows, pieces
from tests.texts import human_like

TEXTS = human_like(12)


@pytest.mark.parametrize("length", [LEAST_WORDS, 101, 120])
def test_windows_and_halves_have_the_first_words_of_their_texts(length):
    windows = Windows.of([Sample(text) for text in TEXTS], length)
    assert windows.short == 0
    assert len(windows) == len(TEXTS)
    for text, cut in zip(TEXTS, windows.texts, strict=True):
        assert words(cut) == words(text)[:length]
    first, second = windows.halves()
    for cut, a, b in zip(windows.texts, first, second, strict=True):
        assert len(words(a)) == len(words(b)) == length // 2
        assert words(a) + words(b) == words(cut)[: 2 * (length // 2)]


def test_a_text_with_exactly_the_words_of_a_window_is_not_short():
    just = "the river was deep " * 30
    assert Windows.of([Sample(just)], 120).short == 0
    assert Windows.of([Sample(just)], 121).short == 1


def test_a_window_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=rf"got {LEAST_WORDS - 1}; accepted: {LEAST_WORDS}"):
        Windows.of([Sample(TEXTS[0])], LEAST_WORDS - 1)


def test_short_texts_are_empty_and_counted():
    windows = Windows.of([Sample(TEXTS[0], "a", "x"), Sample("Too short."), Sample(TEXTS[1], "b")])
    assert windows.short == 1
    assert windows.texts[1] == ""
    whole = windows.whole()
    assert (len(whole), whole.short) == (2, 0)
    assert (whole.prompts, whole.sources) == (("a", "b"), ("x", ""))


def test_an_echo_of_the_prompt_is_not_measured():
    prompt = "Write me a very long story about a beekeeper, please."
    windows = Windows.of([Sample(f"{prompt}\n\n{TEXTS[0]}", prompt), Sample(TEXTS[0])])
    assert words(windows.texts[0]) == words(windows.texts[1])


def test_only_prompts_with_enough_texts_are_grouped():
    prompts = ["a"] * LEAST_TEXTS + ["b"] * (LEAST_TEXTS - 1) + [""] * (LEAST_TEXTS + 1) + ["a"]
    windows = Windows.of([Sample(TEXTS[0], prompt) for prompt in prompts])
    assert windows.indices_by_prompt() == {
        "a": [i for i, prompt in enumerate(prompts) if prompt == "a"]
    }


def test_picked_windows_keep_their_prompts_and_sources():
    windows = Windows.of([Sample(text, f"p{i}", f"s{i}") for i, text in enumerate(TEXTS)])
    picked = windows.pick(iter((3, 1, 3)))
    assert picked.texts == tuple(windows.texts[i] for i in (3, 1, 3))
    assert picked.prompts == ("p3", "p1", "p3")
    assert picked.sources == ("s3", "s1", "s3")
    assert len(windows.pick([])) == 0


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (5, 5), (99, 13)])
def test_a_long_work_is_cut_into_pieces_without_overlap(most, expected):
    work = Sample(" ".join(f"word{i}." for i in range(1310)), "asked")
    cut = pieces(work, 100, most)
    assert len(cut) == expected
    if expected > 1:
        piece_words = [words(piece.text) for piece in cut]
        assert all(len(each) == 100 for each in piece_words)
        assert len({word for each in piece_words for word in each}) == 100 * expected, "no overlap"
        assert {piece.source for piece in cut} == {work.text[:200]}
        assert {piece.prompt for piece in cut} == {"asked"}


def test_a_work_of_less_than_two_pieces_is_returned_whole():
    work = Sample("word " * 199, source="a book")
    assert pieces(work, 100, 9) == [work]
    assert {piece.source for piece in pieces(Sample("word " * 200, source="a book"), 100, 9)} == {
        "a book"
    }


def test_a_piece_is_a_part_of_the_work_as_it_was_written_and_has_as_many_normalised_words():
    """Typesetting must not tell pieces of long works from whole texts."""
    rng = random.Random(0)
    marks = ["’", "‘", "“", "-", "‑", "—", "–", "--", "...", "…", "''", "\u00ad", "\u200b", "_"]
    written = ["a", "B", "é", "e\u0301", "1", *marks, *["", ".", ",", "\n"], " ", " ", "\n\n"]
    cut = 0
    for _ in range(1000):
        work = "".join(rng.choices(written, k=90))
        found = pieces(Sample(work), 5, 9)
        if len(found) > 1:
            cut += 1
            assert all(piece.text in work for piece in found)
            assert {len(words(normalise(piece.text))) for piece in found} == {5}, repr(work)
    assert cut > 900
