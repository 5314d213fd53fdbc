"""Plain texts as files have them: wrapped lines, HTML, comments, front matter, code."""

import os
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.corpus.filters import Filters, cleaned
from dftserve.corpus.prepare import prepare
from dftserve.corpus.text import Text
from dftserve.corpus.tidy import joined, tidied
from tests.unit.test_corpus import prose

VERSE = "The river runs below the hill,\nAnd all the stones lie deep and still,\nA lantern\nburns."
OTHERS = [
    VERSE,
    "- an item that is long enough to be wrapped at the end\n- and another one of some length",
    "    indented = code(that, is, as, long, as, a, line, of, prose)\n    more = code(of, it)",
    "| a table | with cells that are as wide as lines of prose |\n|---|---|\n| a | b |",
    "```\nfenced code that is as long as a line of prose would be here\nand some more\n```",
    "A heading of some length that is underlined from end to end\n============",
]


@given(st.integers(0, 10**6), st.integers(50, 100))
def test_wrapped_prose_is_joined_as_it_was(seed, width):
    paragraphs = [each.replace("\n", " ") for each in prose(200, seed).strip().split("\n\n")]
    wrapped = "\n\n".join(textwrap.fill(each, width) for each in paragraphs)
    assert joined(wrapped) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_prose_stays(other):
    wrapped = textwrap.fill(prose(120, 1).replace("\n", " "), 70)
    assert other in joined(f"{wrapped}\n\n{other}\n\n{wrapped}")


def test_unwrapped_texts_stay():
    for content in (prose(300), VERSE, "", "one line", "a\nb\nc\nd\ne"):
        assert joined(content) == content


MARKUP = """---
title: x
---
<p>One &amp; <b>two</b>.</p>
<!-- hidden
twice -->
```python
code()
```
End."""


@pytest.mark.parametrize(
    ("strip", "gone", "left"),
    [
        ("front_matter", "title: x", "<p>"),
        ("comments", "hidden", "title: x"),
        ("code", "code()", "hidden"),
        ("html", "<b>", "One & two."),
    ],
)
def test_markup_is_taken_out_by_choice(strip, gone, left):
    assert tidied(MARKUP, join_lines=True, strip=()) == MARKUP
    found = tidied(MARKUP, join_lines=True, strip=(strip,))
    assert gone not in found
    assert left in found
    assert found.endswith("End.")


def test_filters_ask_for_it():
    wrapped = Text(textwrap.fill(prose(100, 3).replace("\n", " "), 60), None, "a.txt")
    assert "\n" not in cleaned(wrapped, Filters()).content
    assert cleaned(wrapped, Filters(join_lines=False)) == wrapped
    with pytest.raises(ValueError, match="did you mean 'comments'"):
        Filters(strip=("comment",))


def test_languages_are_told():
    german = "Der alte Fluss fließt unter der Mauer des Gartens und niemand weiß warum. " * 5
    english = "The old river runs under the wall of the garden and nobody knows why. " * 5
    texts = [Text(f"{each} {n}", None, f"{n}") for n, each in enumerate([german, english, english])]
    loose = Filters(duplicate_threshold=None, max_repeated_grams=1, family_threshold=None)
    report = prepare(texts, loose, heldout=0).report
    assert report.as_dict()["languages"] == {"en": 2, "de": 1}


def test_real_prose_loses_its_wrapping():
    place = Path(os.environ.get("DFTSERVE_DATA", "")) / "books"
    files = sorted(place.rglob("*.txt"))[:3] if "DFTSERVE_DATA" in os.environ else []
    if not files:
        pytest.skip("DFTSERVE_DATA has no books")
    for path in files:
        content = path.read_text(errors="replace").replace("\r\n", "\n")[:200_000]
        assert joined(content).split() == content.split()
