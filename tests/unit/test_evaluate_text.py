"""Splitting of texts: normalising is idempotent, nothing is lost, and the time is linear on hostile
text."""

import unicodedata
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.evaluate.text.tokenize import (
    ngrams,
    normalise,
    paragraphs,
    sentences,
    tokens,
    window,
    without_echo,
    words,
)
from tests.cpu_time import least_seconds

ANYTHING = st.text(st.characters())
PROSE = st.text("aBé İß1_.!?,-–—―‑'’‘`´\"“…()*\u00ad\u200b\u0301\r\n\t\u2028 ", max_size=60)
TEXTS = st.one_of(ANYTHING, PROSE)


def unspaced(text):
    return "".join(text.split())


@settings(deadline=None)
@given(TEXTS)
def test_normalising_is_idempotent(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert set("\u00ad\u200b\ufeff\r\t“”‘’–") & set(once) == set()
    assert "  " not in once
    assert not {"\n"} & set(once.replace("\n\n", "")), "line breaks come in pairs"


@settings(deadline=None)
@given(TEXTS)
def test_normalising_changes_no_word_character(text):
    def word_characters(value):
        return [c for c in unicodedata.normalize("NFC", value) if c.isalnum()]

    visible = text.translate(dict.fromkeys(map(ord, "\u00ad\u200b\ufeff")))
    assert word_characters(normalise(text)) == word_characters(visible)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["He left.", "-- No", "But--", "—", "---", "a--b"]), max_size=6))
def test_paragraphs_survive_any_leading_and_trailing_marks(blocks):
    assert len(paragraphs(normalise("\n \n".join(blocks)))) == len(blocks)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("“Don’t”", '"Don\'t"'),
        ("``Don't''", '"Don\'t"'),
        ("one–two", "one — two"),
        ("one — two", "one — two"),
        ("one--two", "one — two"),
        ("one -- two", "one — two"),
        ("well-known", "well-known"),
        ("wait…", "wait..."),
        ("one\r\ntwo\r\n\r\nthree", "one two\n\nthree"),
        ("cafe\u0301", "café"),
        ("co\u00adoperate", "cooperate"),
        ("", ""),
        (" \n \n ", ""),
    ],
)
def test_typographic_variants_are_normalised(text, plain):
    assert normalise(text) == plain


@settings(deadline=None)
@given(TEXTS, st.integers(0, 9), st.integers(0, 9))
def test_a_window_has_the_words_of_its_range(text, start, length):
    text = normalise(text)
    all_words = words(text)
    assert words(window(text, start, start + length)) == all_words[start : start + length]
    assert len(words(window(text, start, start + length))) == max(
        0, min(start + length, len(all_words)) - start
    )


@settings(deadline=None)
@given(TEXTS, st.integers(1, 5))
def test_windows_tile_a_text_from_its_first_word(text, length):
    text = normalise(text)
    count = len(words(text))
    tiles = [window(text, start, start + length) for start in range(0, count, length)]
    assert unspaced(text).endswith(unspaced("".join(tiles)))
    assert [word for tile in tiles for word in words(tile)] == words(text)


@settings(deadline=None)
@given(TEXTS)
def test_tokens_are_all_words_and_marks_in_order(text):
    text = normalise(text)
    found = tokens(text)
    assert [token for token in found if token[0].isalnum()] == words(text)
    # `ß` and `İ` have no single lower-case character: each is compared as `lower` writes it.
    assert "".join(found) == "".join(c.lower() for c in unspaced(text) if c != "_") or "Σ" in text


def test_tokens_of_a_sentence():
    assert tokens("Well-known... he didn't -- (B.2)!") == [
        *("well-known", "...", "he", "didn't", "-", "-", "(", "b", ".", "2", ")", "!")
    ]


@settings(deadline=None)
@given(TEXTS)
def test_sentences_join_to_the_text(text):
    text = normalise(text)
    found = sentences(text)
    assert unspaced("".join(found)) == unspaced(text)
    assert all(each == each.strip() != "" for each in found)
    assert [word for each in found for word in words(each)] == words(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He left. She stayed.", ["He left.", "She stayed."]),
        ('He said "go." Then he went.', ['He said "go."', "Then he went."]),
        ('"Go!" he said. (She knew.) "Yes?"', ['"Go!" he said.', "(She knew.)", '"Yes?"']),
        ("It cost 3.50 dollars... and more", ["It cost 3.50 dollars... and more"]),
        ("A title\n\nthe text", ["A title", "the text"]),
        ("", []),
    ],
)
def test_sentence_boundaries(text, expected):
    assert sentences(text) == expected


PROMPT = "Tell me the story of a man who lost his only key"


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [
        (f"{PROMPT}. It was late.", PROMPT, "It was late."),
        (PROMPT, PROMPT, ""),
        ("TELL me the story of a man who fled.", PROMPT, "fled."),
        ("Tell me the story of a dog.", PROMPT, "Tell me the story of a dog."),
        ("Once upon a time", "Once upon", "a time"),
        ("Once more", "Once upon", "Once more"),
        ("It was late.", "", "It was late."),
        ("", PROMPT, ""),
        ("İstanbul is a town", "İstanbul", "is a town"),
    ],
)
def test_an_echo_of_the_prompt_is_removed(text, prompt, rest):
    assert without_echo(text, prompt) == rest


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_removing_an_echo_leaves_the_end_of_the_text(text, prompt):
    text = normalise(text)
    assert text.endswith(without_echo(text, prompt))


@settings(deadline=None)
@given(TEXTS)
def test_no_words_are_left_of_a_text_equal_to_its_prompt(text):
    assert words(without_echo(normalise(text), text)) == []


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=1), max_size=9), st.integers(1, 5))
def test_ngrams_are_all_runs(items, size):
    runs = ngrams(items, size)
    assert len(runs) == max(0, len(items) - size + 1)
    assert all(run == tuple(items[start : start + size]) for start, run in enumerate(runs))


HOSTILE = [*"\"'-— \n.`_a", "\n ", ". ", '."', ' "', " --", "a-", "\u00a0", ". \n(", "….\t"]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("measure", [normalise, words, tokens, sentences])
def test_the_time_is_linear_on_hostile_text(measure, pattern):
    """In CPU seconds; the smallest size stops a quadratic implementation early."""
    spent = {}
    for size in (16_000, 250_000, 500_000):
        text = "a." + pattern * (size // len(pattern)) + "A"
        spent[size] = least_seconds(partial(measure, text))
        assert spent[size] < 0.3 + 3e-6 * size, spent
    assert spent[500_000] < 4 * spent[250_000] + 0.3, spent
