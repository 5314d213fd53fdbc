"""Cleaning texts from files: wrapped lines, HTML, comments, front matter, code."""

import ast
import calendar
import fileinput
import getopt
import re
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dftserve.corpus.filters import Filters, cleaned
from dftserve.corpus.prepare import prepare
from dftserve.corpus.text import Text
from dftserve.corpus.tidy import tidied
from dftserve.corpus.wrapping import joined
from tests.unit.test_corpus import prose

VERSE = "The river runs below the hill,\nAnd all the stones lie deep and still,\nA lantern\nburns."
NOT_PROSE = [
    VERSE,
    "- an item that is long enough to be wrapped at the end\n- and another one of some length",
    "    indented = code(that, is, as, long, as, a, line, of, prose)\n    more = code(of, it)",
    "| a table | with cells that are as wide as lines of prose |\n|---|---|\n| a | b |",
    "```\nfenced code that is as long as a line of prose would be here\nand some more\n```",
    "A heading of some length that is underlined from end to end\n============",
]


VERSES = re.compile(r"[^\n]*(\n[A-Z][^\n]*)+|([^\n]*[^\w\s-]\n)+[^\n]*")


@given(st.integers(0, 10**6), st.integers(50, 100))
def test_joining_restores_wrapped_prose(seed, width):
    paragraphs = [each.replace("\n", " ") for each in prose(200, seed).strip().split("\n\n")]
    paragraphs[0] = paragraphs[0].replace("river", "half-hidden river--a brook")
    filled = [textwrap.fill(each, width) for each in paragraphs]
    wrapped = "\n\n".join(filled)
    # By chance a line may begin as a list item does, or all lines of a paragraph with a capital or
    # after punctuation, as verses do.
    assume(not re.search("^--", wrapped, re.MULTILINE))
    assume(not any(each.count("\n") > 2 and VERSES.fullmatch(each) for each in filled))
    assert joined(wrapped) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("block", NOT_PROSE)
def test_what_is_not_prose_is_unchanged(block):
    wrapped = textwrap.fill(prose(120, 1).replace("\n", " "), 70)
    assert block in joined(f"{wrapped}\n\n{block}\n\n{wrapped}")


def test_unwrapped_texts_are_unchanged():
    for content in (prose(300), VERSE, "", "one line", "a\nb\nc\nd\ne"):
        assert joined(content) == content


def repeated(*lines: str) -> str:
    """The lines three times: judged by their lengths they could be wrapped prose."""
    return "\n".join(lines * 3)


@pytest.mark.parametrize(
    "content",
    [
        repeated(
            "result_alpha = compute_the_weighted_average(values_alpha)",
            "result_betas = compute_the_weighted_average(values_betas)",
        ),
        repeated(
            "import alpha_component from the_other_module",
            "import betas_component from this_same_module",
        ),
        repeated(
            "INSERT INTO users VALUES ('anna', 'berlin', 'engineer');",
            "INSERT INTO users VALUES ('bert', 'munich', 'optician');",
        ),
        repeated(
            "x = f(the_first_one, and_more_of_these) {", "y = f(the_second_one, and_the_others) {"
        ),
        repeated(
            "1001,Anna Smith,Berlin,30,engineer,50000,2024-01-01,active",
            "1002,Bert Jones,Munich,31,optician,51000,2024-01-02,absent",
        ),
        repeated(
            "Anna Smith,Berlin am Wannsee,senior engineer,active since May",
            "Bert Jones,Munich near the Isar,junior cook,active since June",
        ),
        repeated(
            "2026-01-01T12:00:01Z worker took the item and said that it is ok",
            "2026-01-01T12:00:02Z worker left the item and said that it isn't",
        ),
        repeated(
            "INFO the worker took the next item and went home",
            "INFO the worker left the last item and went away",
        ),
        repeated(
            "name: the worker who took the item and went home",
            "place: the garden behind the wall of his kitchen",
        ),
        repeated(
            "And when the lanterns by the harbour burned with steady golden glow,",
            "extraordinarily long-remembered voices whispered of the falling snow,",
        ),
        repeated(
            "And when the lanterns by the harbour burned with steady golden glow",
            "Extraordinarily long-remembered voices whispered of the falling snow",
        ),
        repeated(
            "那天早晨，河水很静，母亲在厨房里点着灯笼，等父亲从港口回来，院子里的石榴树落了一地的花，谁也没说话。",
            "远处传来钟声，孩子们跑过石桥，把纸船一只一只放进水里，看它们慢慢漂向城外，谁也不知道它们会去哪里呢。",
        ),
        repeated(
            "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いて",
            "いた事だけは記憶している。吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは書生という",
        ),
        "the river runs slow and the lanterns burn\nbelow\n\na stone\nlies\nin the grass\n\n" * 6,
    ],
)
def test_lines_that_only_have_the_lengths_of_wrapped_prose_are_unchanged(content):
    assert joined(content) == content


def test_lines_of_a_script_without_spaces_are_joined_without_a_space():
    line = "河水 is a word in the midst of a text that is English but for 早晨"
    assert joined("\n".join([line] * 2 + [line.replace("河水", "河流")] * 2)).count("早晨河") == 3


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


INNER = st.text("ab <>-`~!\n", max_size=12)
SPANS = {
    "comments": INNER.filter(lambda t: "-->" not in f"{t}-->"[:-1]).map("<!--{}-->".format),
    "html": st.one_of(
        INNER.map("<script x>{}</script >".format), INNER.map("<STYLE>{}</style>".format)
    ),
    "code": INNER.filter(lambda t: "```" not in t).map("\n```py\n{}\n  ````\n".format),
}


@pytest.mark.parametrize("strip", SPANS)
@given(st.data())
def test_what_is_closed_is_removed_and_all_else_is_kept(strip, data):
    texts = data.draw(st.lists(st.sampled_from(["one", "two-", "x - y"]), min_size=2))
    spans = [data.draw(SPANS[strip]) for _ in texts[1:]]
    content = texts[0] + "".join(
        f"{span}{text}" for span, text in zip(spans, texts[1:], strict=True)
    )
    between = "\n" if strip == "code" else ""
    assert tidied(content, [strip]) == between.join(texts)


@pytest.mark.parametrize(
    ("strip", "left_open"),
    [
        ("comments", "<!-- a\n"),
        ("html", "&lt;script "),
        ("html", "<script "),
        ("html", "<style </script>"),
        ("code", "```\nx ```y\n"),
        ("code", "~" * 9 + "x\n"),
    ],
)
def test_what_is_left_open_takes_time_in_proportion(strip, left_open):
    """In quadratic time each of these would take hours."""
    content = left_open * 200_000
    assert tidied(content, [strip])
    assert tidied(content.replace("\n", ""), [strip])


def test_a_fence_is_closed_by_the_next_one_of_its_length():
    assert tidied("a\n````\n```\nb\n````\nc\n```\nd", ["code"]) == "a\nc\n```\nd"
    assert tidied("a\n`````\nb\n```\nc", ["code"]) == "a\nc"  # None is as long.
    assert tidied("a\n```\nb\n~~~\nc", ["code"]) == "a\n```\nb\n~~~\nc"


@pytest.mark.parametrize(
    ("strip", "removed", "kept"),
    [
        ("front_matter", "title: x", "<p>"),
        ("comments", "hidden", "title: x"),
        ("code", "code()", "hidden"),
        ("html", "<b>", "One & two."),
    ],
)
def test_only_the_chosen_markup_is_removed(strip, removed, kept):
    assert tidied(MARKUP, ()) == MARKUP
    tidy_text = tidied(MARKUP, (strip,))
    assert removed not in tidy_text
    assert kept in tidy_text
    assert tidy_text.endswith("End.")


def test_filters_join_lines_by_default_and_check_the_names_in_strip():
    wrapped = Text(textwrap.fill(prose(100, 3).replace("\n", " "), 60), None, "a.txt")
    assert "\n" not in cleaned(wrapped, Filters()).content
    assert cleaned(wrapped, Filters(join_lines=False)) == wrapped
    with pytest.raises(ValueError, match="did you mean 'comments'"):
        Filters(strip=("comment",))


def test_joined_and_stripped_texts_are_counted_separately():
    wrapped = textwrap.fill(prose(100, 3).replace("\n", " "), 60)
    contents = [wrapped, f"We use cookies.\n\n{prose(100, 4)}", prose(100, 5)]
    report = prepare([Text(each, None, each[:20]) for each in contents], Filters()).report.as_dict()
    assert (report["stripped"], report["joined"], report["kept"]) == (1, 1, 3)


def test_the_report_counts_languages():
    german = "Der alte Fluss fließt unter der Mauer des Gartens und niemand weiß warum. " * 5
    english = "The old river runs under the wall of the garden and nobody knows why. " * 5
    texts = [Text(f"{each} {n}", None, f"{n}") for n, each in enumerate([german, english, english])]
    loose = Filters(duplicate_threshold=None, max_repeated_grams=1, family_threshold=None)
    report = prepare(texts, loose, heldout=0).report
    assert report.as_dict()["languages"] == {"en": 2, "de": 1}


def test_joining_restores_real_prose(data):
    """Exceptions are lines that begin with a dash and the like: 1.3 % of 15,000 paragraphs."""
    total = lost = 0
    for path in sorted((data / "books" / "heldout").glob("*.txt"))[:4]:
        content = path.read_text()[20_000:60_000]
        paragraphs = [" ".join(each.split()) for each in re.split(r"\n\s*\n", content)]
        wrapped = [textwrap.fill(each, 72) for each in paragraphs]
        rejoined = joined("\n\n".join(wrapped)).split("\n\n")
        total += sum("\n" in each for each in wrapped)
        lost += sum(one != other for one, other in zip(paragraphs, rejoined, strict=True))
    assert total > 100
    assert lost <= 0.03 * total


def test_joining_does_not_change_python_code():
    """In real files only the prose of docstrings is joined."""
    changed = 0
    for module in (textwrap, calendar, tempfile, fileinput, getopt):
        content = Path(module.__file__ or "").read_text()
        changed += joined(content) != content
        assert syntax_tree(joined(content)) == syntax_tree(content)
    assert changed


def syntax_tree(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)
