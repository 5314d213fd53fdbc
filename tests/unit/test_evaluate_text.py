"""What is counted: normalised text is a fixed point, nothing is lost, hostile text costs time
in proportion to its length."""

import time
import unicodedata

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

ANYTHING = st.text(st.characters())
PROSE = st.text("aBé İß1_.!?,-–—―‑'’‘`´\"“…()*\u00ad\u200b\u0301\r\n\t\u2028 ", max_size=60)
TEXTS = st.one_of(ANYTHING, PROSE)


def unspaced(text):
    return "".join(text.split())


@settings(deadline=None)
@given(TEXTS)
def test_normalised_text_is_a_fixed_point(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip()
    assert set("\u00ad\u200b\ufeff\r\t“”‘’–") & set(once) == set()
    assert "  " not in once
    assert not {"\n"} & set(once.replace("\n\n", "")), "a line break is half an empty line"


@settings(deadline=None)
@given(TEXTS)
def test_normalising_changes_no_word_character(text):
    def kept(said):
        return [c for c in unicodedata.normalize("NFC", said) if c.isalnum()]

    visible = text.translate(dict.fromkeys(map(ord, "\u00ad\u200b\ufeff")))
    assert kept(normalise(text)) == kept(visible)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["He left.", "-- No", "But--", "—", "---", "a--b"]), max_size=6))
def test_paragraphs_survive_whatever_marks_they_begin_and_end_with(blocks):
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
def test_typesetting_is_not_style(text, plain):
    assert normalise(text) == plain


@settings(deadline=None)
@given(TEXTS, st.integers(0, 9), st.integers(0, 9))
def test_a_window_has_its_words(text, start, length):
    text = normalise(text)
    said = words(text)
    assert words(window(text, start, start + length)) == said[start : start + length]
    assert len(words(window(text, start, start + length))) == max(
        0, min(start + length, len(said)) - start
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
def test_tokens_are_words_and_marks_in_order_and_nothing_else_is_left_out(text):
    text = normalise(text)
    said = tokens(text)
    assert [token for token in said if token[0].isalnum()] == words(text)
    # `ß` and `İ` have no lower case of one character: compared as `lower` writes each.
    assert "".join(said) == "".join(c.lower() for c in unspaced(text) if c != "_") or "Σ" in text


def test_tokens():
    assert tokens("Well-known... he didn't -- (B.2)!") == [
        *("well-known", "...", "he", "didn't", "-", "-", "(", "b", ".", "2", ")", "!")
    ]


@settings(deadline=None)
@given(TEXTS)
def test_sentences_join_back(text):
    text = normalise(text)
    said = sentences(text)
    assert unspaced("".join(said)) == unspaced(text)
    assert all(each == each.strip() != "" for each in said)
    assert [word for each in said for word in words(each)] == words(text)


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
def test_sentences(text, expected):
    assert sentences(text) == expected


ASKED = "Tell me the story of a man who lost his only key"


@pytest.mark.parametrize(
    ("text", "prompt", "rest"),
    [
        (f"{ASKED}. It was late.", ASKED, "It was late."),
        (ASKED, ASKED, ""),
        ("TELL me the story of a man who fled.", ASKED, "fled."),
        ("Tell me the story of a dog.", ASKED, "Tell me the story of a dog."),
        ("Once upon a time", "Once upon", "a time"),
        ("Once more", "Once upon", "Once more"),
        ("It was late.", "", "It was late."),
        ("", ASKED, ""),
        ("İstanbul is a town", "İstanbul", "is a town"),
    ],
)
def test_an_echo_of_the_prompt_is_no_text(text, prompt, rest):
    assert without_echo(text, prompt) == rest


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_what_is_left_of_an_echo_is_the_end_of_the_text(text, prompt):
    text = normalise(text)
    assert text.endswith(without_echo(text, prompt))


@settings(deadline=None)
@given(TEXTS)
def test_a_text_that_is_its_prompt_says_nothing(text):
    assert words(without_echo(normalise(text), text)) == []


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=1), max_size=9), st.integers(1, 5))
def test_ngrams_are_every_run(items, size):
    runs = ngrams(items, size)
    assert len(runs) == max(0, len(items) - size + 1)
    assert all(run == tuple(items[start : start + size]) for start, run in enumerate(runs))


HOSTILE = [*"\"'-— \n.`_a", "\n ", ". ", '."', ' "', " --", "a-", "\u00a0", ". \n(", "….\t"]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("measure", [normalise, words, tokens, sentences])
def test_the_time_is_linear_on_hostile_text(measure, pattern):
    """In seconds of CPU, not of the clock; the first size stops a quadratic one early."""
    spent = {}
    for size in (16_000, 250_000, 500_000):
        text = "a." + pattern * (size // len(pattern)) + "A"
        start = time.process_time()
        measure(text)
        spent[size] = time.process_time() - start
        assert spent[size] < 0.3 + 3e-6 * size, spent
    assert spent[500_000] < 4 * spent[250_000] + 0.3, spent
