"""The corpus: what is read, what is dropped and why, how it is cut and split."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import unicodedata

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from pyarrow import parquet

from dftserve import settings
from dftserve.corpus import families as families_module
from dftserve.corpus import filters as filters_module
from dftserve.corpus import read as read_module
from dftserve.corpus.duplicates import Duplicates, shingles
from dftserve.corpus.families import Families
from dftserve.corpus.filters import Filters, cleaned, verdict
from dftserve.corpus.prepare import DUPLICATE, LIKE_HELDOUT, cut, prepare
from dftserve.corpus.read import read
from dftserve.corpus.records import opening
from dftserve.corpus.text import Text

WORDS = [
    *("river", "stone", "quiet", "lantern", "garden", "winter", "letter", "captain", "orchard"),
    *("silver", "promise", "doorway", "harbour", "feather", "candle", "thunder", "meadow"),
    *("kitchen", "island", "whisper", "ladder", "copper", "evening", "mirror"),
]
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
ANY = Filters(min_words=0)


def prose(words: int, seed: int = 0) -> str:
    """Paragraphs of random words: no two seeds are near-duplicates."""
    chosen = random.Random(seed)
    sentences = []
    while words > 0:
        size = min(words, chosen.randint(6, 14))
        sentences.append(" ".join(chosen.choices(WORDS, k=size)).capitalize() + ".")
        words -= size
    paragraphs = [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
    return "\n\n".join(paragraphs) + "\n"


def packed(content: bytes) -> bytes:
    """Without the time, which would be part of a test's name and differ between processes."""
    return gzip.compress(content, mtime=0)


def text(content: str, origin: str = "a.txt") -> Text:
    return Text(content, None, origin)


def answered(prompt: str, answer: str, origin: str = "c.jsonl:1") -> Text:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Text(f"{prompt}\n\n{answer}", turns, origin)


def texts(count: int, words: int = 60) -> list[Text]:
    return [text(prose(words, seed), f"{seed}.txt") for seed in range(count)]


# Reading


def test_text_files(tmp_path):
    (tmp_path / "b.md").write_text("# Title\r\nBody\rend", encoding="utf-8", newline="")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.TXT").write_bytes(b"\xef\xbb\xbfna\xc3\xafve")
    (tmp_path / ".hidden.bin").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.bin").write_bytes(b"\xff")
    assert list(read(tmp_path)) == [
        text("naïve", "a/x.TXT"),
        text("# Title\nBody\nend", "b.md"),
    ]
    assert next(read(tmp_path / "b.md")).origin == "b.md"


def test_jsonl_fields(tmp_path):
    records = [{"text": "T"}, {"messages": TURNS}, {"prompt": "P", "response": "R", "id": 3}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)))
    plain, chat, pair = read(path)
    assert plain == text("T", "x.jsonl:1")
    assert (chat.content, chat.messages) == ("Why?\n\nBecause.", tuple(TURNS))
    assert pair.messages == (
        {"role": "user", "content": "P"},
        {"role": "assistant", "content": "R"},
    )
    assert pair.origin == "x.jsonl:5"


def test_parquet_and_datasets_are_read_like_jsonl(tmp_path):
    rows = [{"text": f"text {i}", "messages": None} for i in range(600)]
    rows.append({"text": None, "messages": TURNS})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    loaded = list(read(tmp_path / "x.parquet"))
    assert [each.content for each in loaded[:600]] == [f"text {i}" for i in range(600)]
    assert loaded[600].messages == tuple(TURNS)
    assert loaded[600].origin == "x.parquet:601"

    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"b": table, "a": table}).save_to_disk(tmp_path / "two")
    assert [each.content for each in read(tmp_path / "one")] == [each.content for each in loaded]
    assert [each.origin for each in read(tmp_path / "two")][::601] == ["a:1", "b:1"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.txt", b"fine\ncaf\xe9", ["x.txt, line 2", "0xe9", "UTF-8"]),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["line 2", "0xff", "UTF-8"]),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', ["line 2", "not JSON"]),
        ("x.jsonl", b"[" * 100_000, ["line 1", "more than 64 levels"]),
        ("x.jsonl", b'{"body": "a"}', ["line 1", "'body'", "`text`"]),
        ("x.jsonl", b'{"prompt": "a"}', ["line 1", "'prompt'", "`response`"]),
        ("x.jsonl", b'["a"]', ["line 1", "accepted: an object"]),
        ("x.jsonl", b'{"text": 3}', ["line 1, text: got 3", "a text"]),
        ("x.jsonl", b'{"text": "\\ud800"}', ["line 1, text", "surrogate"]),
        ("x.jsonl", b'{"messages": []}', ["line 1, messages", "a list of turns"]),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}', ["messages[0].content: got None"]),
        ("x.parquet", b"PAR1 not", ["x.parquet", "not a .parquet file"]),
        ("x.jsonl.gz", b"not packed", ["x.jsonl.gz", "not a .gz file"]),
        ("x.jsonl.gz", packed(b'{"text": "a"}\n' * 99)[:-9], ["x.jsonl.gz", "not a .gz"]),
        ("x.jsonl.gz", packed(b'{"text": 3}'), ["line 1, text: got 3"]),
        ("x.txt.gz", packed(b"a"), ["'.txt.gz'", ".jsonl.gz"]),
        ("x.csv", b"body\na\n", ["x.csv, row 1 after the header", "'body'", "`text`"]),
        ("x.csv", b"text,n\na, b,1\n", ["row 1", "got 3 fields; accepted: 2"]),
        ("x.csv", b"text,text\na,b\n", ["each name once"]),
        ("x.csv", b'text\n"a\nb', ["line 3", "not a .csv file"]),
        ("x.csv", b"text\n\xff\n", ["line 2", "0xff", "UTF-8"]),
        ("x.pdf", b"", ["x.pdf", "'.pdf'", ".txt", ".jsonl", ".parquet"]),
    ],
)
def test_unreadable_files_are_reported(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        list(read(tmp_path))
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("Déjà vu.".encode("latin1"), "cp1252"),
        ("“Déjà vu” – she said.".encode("cp1252"), "cp1252"),
        ("Déjà vu.".encode("utf-16"), "utf-16"),
        ("Déjà vu.".encode("utf-16-le"), "utf-16le"),
        ("Déjà vu.".encode("utf-16-be"), "utf-16be"),
        (b"caf\xe9 au lait, et du th\xe9 \x00", "cp1252"),
    ],
)
def test_another_encoding_is_detected_from_the_bytes(tmp_path, content, encoding):
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"iconv -f {encoding} -t utf-8") as caught:
        list(read(tmp_path / "x.txt"))
    assert "x.txt, line 1: byte" in str(caught.value)
    (tmp_path / "x.txt").write_bytes(content.decode(encoding).encode())
    (converted,) = read(tmp_path / "x.txt")
    assert not re.search("[\x80-\x9f]", converted.content)


def test_sizes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "LARGEST", 100)
    (tmp_path / "x.txt").write_text("a" * 101)
    with pytest.raises(ValueError, match="101 bytes; accepted: at most 100"):
        list(read(tmp_path / "x.txt"))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 50 + json.dumps({"text": "a" * 100}))
    with pytest.raises(ValueError, match="line 51: got more than 100 bytes"):
        list(read(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "a" * 100}).encode()))
    with pytest.raises(ValueError, match="line 1: got more than 100 bytes"):
        list(read(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.csv").write_text("text\n" + "a\n" * 99 + '"' + "b\n" * 60 + '"\n')
    with pytest.raises(ValueError, match=r"line 15\d: got a row of more than 100 bytes.*closed"):
        list(read(tmp_path / "x.csv"))


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is there"):
        list(read(tmp_path / "missing"))
    with pytest.raises(ValueError, match="got no files with the suffix"):
        list(read(tmp_path))


@runs(max_examples=200)
@given(
    content=st.binary(max_size=300),
    suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".jsonl.gz", ".parquet"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"x{suffix}"
    path.write_bytes(content)
    try:
        for each in read(path):
            each.content.encode()
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017


# Filters


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (prose(60), None),
        ("few words only", "too short"),
        (prose(60).replace("e", "\ufffd"), "damaged encoding"),
        (prose(60).replace(". ", "\x00 "), "damaged encoding"),
        (prose(60) + "It’s naïve, isn’t it? “Déjà vu”…", None),
        (
            (prose(60) + "It’s naïve.").replace("o", "é").encode().decode("latin1"),
            "damaged encoding",
        ),
        (
            prose(60).replace(" ", "’").replace("’", " ", 50).encode().decode("cp1252"),
            "damaged encoding",
        ),
        ("\n".join(["the same line again and again"] * 20), "repeated lines"),
        (" ".join(["one two three four five six seven"] * 20), "repeated phrases"),
        ("Skip to content\nHome | News | About | Contact\nWe use cookies.\n" * 5, "boilerplate"),
    ],
)
def test_verdicts(content, reason):
    assert verdict(text(content), Filters(language_min_words=0)) == reason


ENGLISH = (
    "The captain looked at the quiet harbour and wondered whether the ship would ever return. "
)
GERMAN = "Der Kapitän sah auf den stillen Hafen und fragte sich, ob das Schiff wiederkehren würde. "


def test_languages():
    only = Filters(min_words=1, languages=("en",), language_min_words=10)
    assert verdict(text(ENGLISH), only) is None
    assert verdict(text(GERMAN), only) == "language de"
    assert verdict(text(GERMAN), Filters(min_words=1, languages=("en", "de"))) is None
    assert verdict(text("Der Kapitän"), only) is None  # Too short to tell.
    assert verdict(text("他们在河边等着。"), only) is None
    assert verdict(text("他们在河边的花园里等着船长回来，天色已经很晚了。"), only) == "language zh"
    assert verdict(text("船长は庭で手紙を待っていました。もう夜でした。"), only) == "language ja"


def test_repetition_limits_are_of_characters():
    once = prose(400)
    assert filters_module.repeated_lines(once) == 0
    assert filters_module.repeated_lines("aaaa\nbbbb\naaaa\n") == pytest.approx(1 / 3)
    words = [f"w{i:02}" for i in range(20)]
    assert filters_module.repeated_grams(words) == 0
    assert filters_module.repeated_grams(words + words[:5]) == pytest.approx(5 / 25)
    assert filters_module.repeated_grams(words + words[:6]) == pytest.approx(6 / 26)
    assert filters_module.repeated_grams(words * 2) == pytest.approx(0.5)


def test_a_gutenberg_frame_is_stripped():
    body = prose(200).strip()
    framed = (
        "The Project Gutenberg EBook of Something\n\nLicence text.\n\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***\n"
        f"{body}\n"
        "*** END OF THIS PROJECT GUTENBERG EBOOK SOMETHING ***\n" + "Legal words. " * 500
    )
    assert cleaned(text(framed), ANY).content.strip() == body
    assert verdict(text(framed), Filters()) is None
    untouched = Filters(strip_boilerplate=False)
    assert cleaned(text(framed), untouched).content == framed


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        ("_GUTENBERG_START", "** START OF THIS PROJECT GUTENBERG EBOOK X"),
        ("_GUTENBERG_END", "** END OF THIS PROJECT GUTENBERG EBOOK X"),
        ("_NOTICE", "** all rights reserved **"),
    ],
)
def test_marks_are_searched_line_by_line(pattern, line):
    """From each blank line, a match across lines would scan all the text after it."""
    match = getattr(filters_module, pattern).search(f"*\n\n{line}\n\n*")
    assert match
    assert line.startswith(match[0].strip("\n"))
    assert match.start() == len("*\n\n")


def test_licences_and_cookie_lines_are_stripped_and_prose_is_not():
    body = prose(300).strip().split("\n\n")
    licence = (
        "Copyright 2020 Somebody.\nPermission is hereby granted, free of charge, to any person"
    )
    site = "We use cookies to make this site better.\nHome | News | About us | Contact"
    page = "\n\n".join([licence, body[0], site, *body[1:]])
    assert cleaned(text(page), ANY).content == "\n\n".join(body)
    clean = text("He had a privacy policy of his own, and it was this: " + prose(60))
    assert cleaned(clean, ANY) is clean


@pytest.mark.parametrize(
    "sentence",
    [
        "He signed: all rights reserved to the elder son. {0}",
        "He signed: all rights reserved to the elder son.",
        "{0} It was licensed under the GNU way of living, placed in the public domain. {0}",
    ],
)
def test_prose_that_mentions_rights_is_kept(sentence):
    novel = sentence.format(prose(90).replace("\n\n", " ")) + "\n\n" + prose(200, 1)
    for content in (novel, novel.replace(" all", "\nall")):
        assert cleaned(text(content), ANY).content.strip() == content.strip()


def test_a_long_line_is_not_searched_for_boilerplate(monkeypatch):
    searched = []

    class Recorded:
        def search(self, line: str) -> None:
            searched.append(line)

    monkeypatch.setattr(filters_module, "_SITE_LINE", Recorded())
    monkeypatch.setattr(filters_module, "_is_rights_notice", searched.append)
    long = "(c) " * (filters_module.NOTICE_WORDS + 1)
    short = "(c) " * filters_module.LINE_WORDS
    assert cleaned(text(f"{long}\n{short}"), ANY).content == f"{long}\n{short}"
    assert set(searched) == {short}


MARKS = ["(c)", "(C)", "©", "Copyright", "all rights reserved", "All Rights Reserved.", "x", " "]


@given(st.lists(st.sampled_from(MARKS), max_size=6).map("".join))
def test_a_rights_notice_has_a_copyright_mark_and_the_phrase(line):
    mark, rights = r"(?:copyright|©|\(c\))", "all rights reserved"
    match = re.search(f"{mark}.*{rights}|{rights}.*{mark}", line, re.IGNORECASE)
    assert filters_module._is_rights_notice(line) == bool(match)


def test_only_the_line_of_a_copyright_notice_is_stripped():
    code = "".join(f"x{i} = compute({i})\n" for i in range(60))
    for notice in ("# Copyright 2024 X. All rights reserved.", "# SPDX-License-Identifier: MIT"):
        file = text(f"import numpy\n{notice}\n{code}")
        assert cleaned(file, ANY).content == f"import numpy\n{code}".strip()
        assert verdict(file, ANY) is None


def test_a_conversation_is_not_cleaned():
    chat = answered("Why?", "We use cookies.\nBecause.")
    assert cleaned(chat, ANY) is chat


def test_filters_from_a_recipe():
    assert settings.load(Filters, {"languages": ["en"], "min_words": 5}, "corpus").min_words == 5
    for values, message in (
        ({"min_word": 5}, "did you mean 'min_words'"),
        ({"languages": ["english"]}, "languages: got 'english'"),
        ({"min_words": 9, "max_words": 3}, "min_words"),
        ({"max_damage": 2}, "max_damage: got 2"),
        ({"duplicate_threshold": 0}, "duplicate_threshold: got 0"),
        ({"split_words": 0}, "split_words: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.load(Filters, values, "corpus")


# Duplicates


def test_near_duplicates_are_found_and_others_are_not():
    known = Duplicates(0.8)
    first = prose(300)
    assert known.of(first, "first") is None
    assert known.of(first, "again") == "first"
    assert known.of(first.upper().replace(".", " !"), "shouted") == "first"
    assert known.of(first.replace("river", "brook", 1), "edited") == "first"
    assert known.of(prose(300, seed=1), "other") is None
    assert known.of(first[: len(first) // 2] + prose(150, seed=2), "half") is None


def changed(content: str, share: float, seed: int) -> str:
    """A copy in which `share` of the words are replaced by others of `WORDS`."""
    words, chosen = content.split(), random.Random(seed)
    for index in chosen.sample(range(len(words)), round(share * len(words))):
        words[index] = chosen.choice([word for word in WORDS if word != words[index]])
    return " ".join(words)


@pytest.mark.parametrize("words", [100, 300, 1000])
def test_copies_with_3_percent_of_their_words_changed_are_found(words):
    """At the earlier threshold, 0.8, one in seven was found."""
    threshold = Filters().duplicate_threshold
    missed = 0
    for seed in range(30):
        known = Duplicates(threshold)
        known.of(prose(words, seed), "first")
        missed += known.of(changed(prose(words, seed), 0.03, seed), "copy") is None
    assert missed <= 1  # 0 of 150 on real prose; a similarity below .6 is four deviations away.


HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁"


def clauses(seed: int) -> str:
    chosen = random.Random(seed)
    return "".join("".join(chosen.choices(HAN, k=9)) + "，" for _ in range(30))


def test_chinese_copies_are_found_and_other_texts_are_not():
    known = Duplicates(Filters().duplicate_threshold)
    first = clauses(0)
    edited = "".join("某" if index % 50 == 7 else each for index, each in enumerate(first))
    assert known.of(first, "first") is None
    assert known.of(edited, "edited") == "first"
    assert known.of(clauses(1), "other") is None


def test_different_texts_without_words_are_not_duplicates():
    known = Duplicates(0.6)
    assert [known.of(each, each) for each in ("—", "😀", "…", "", "😀 😀")] == [None] * 5


def test_a_threshold_of_one_or_none():
    first, edited = prose(300), prose(300).replace("river", "brook", 1)
    equal, none = Duplicates(1.0), Duplicates(None)
    assert [equal.of(each, str(i)) for i, each in enumerate((first, edited, first))] == [
        None,
        None,
        "0",
    ]
    assert [none.of(first, str(i)) for i in range(3)] == [None] * 3


def test_only_answers_to_one_prompt_are_duplicates():
    known = Duplicates(0.8)
    assert known.of("Sure.", "a", within="Can you?") is None
    assert known.of("Sure.", "b", within="Will you?") is None
    assert known.of("sure", "c", within="Can you?") == "a"


def test_shingles_depend_on_the_order_of_words():
    words = [f"w{i}" for i in range(9)]
    assert len(shingles(" ".join(words))) == 5
    assert not set(shingles(" ".join(words))) & set(shingles(" ".join(reversed(words))))
    assert len(shingles("")) == 1


def test_unrelated_texts_share_few_shingles():
    one, two = set(shingles(prose(5000, 1))), set(shingles(prose(5000, 2)))
    assert len(one & two) <= 15  # Of 24^5 grams about 3 are in both; more than 15: 1e-7.


# Cutting


@runs(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(["\n\n", ". ", "\n", " ", "\n \n\n", "。"])),
        max_size=40,
    ),
    st.integers(1, 40),
)
def test_pieces_have_the_words_of_the_text(parts, limit):
    content = "".join(" ".join(WORDS[i % 20] for i in range(n)) + end for n, end in parts)
    pieces = cut(text(content), limit)
    joined = "".join(piece.content for piece in pieces)
    assert "".join(joined.split()) == "".join(content.split())
    assert all(len(piece.content.split()) <= limit for piece in pieces)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    if len(content.split()) > limit:
        assert all(piece.content.strip() for piece in pieces)


def test_pieces_end_at_paragraph_ends_and_have_similar_sizes():
    content = prose(5050)
    pieces = cut(text(content), 1000)
    assert len(pieces) == 6
    assert "\n\n".join(piece.content for piece in pieces) == content.strip()
    sizes = [len(piece.content.split()) for piece in pieces]
    assert min(sizes) > 700
    assert [piece.origin for piece in pieces] == [f"a.txt#{i}" for i in range(1, 7)]


def test_a_conversation_is_not_cut():
    chat = answered("Why?", prose(100))
    assert cut(chat, 10) == [chat]


# Preparing


def test_the_report_counts_everything():
    listed = [
        *texts(10),
        text("short", "s.txt"),
        text("short too", "t.txt"),
        text("short also", "u.txt"),
        text("short still", "v.txt"),
        text(prose(60, 3), "copy.txt"),
        text(prose(250, 99), "long.txt"),
    ]
    corpus = prepare(listed, Filters(split_words=100), heldout=0.2)
    counts = corpus.report.as_dict()
    assert counts["read"] == 16
    assert counts["kept"] == 11
    assert counts["dropped"] == {
        DUPLICATE: {"count": 1, "examples": ["copy.txt"]},
        "too short": {"count": 4, "examples": ["s.txt", "t.txt", "u.txt"]},
    }
    assert counts["documents"] == {"train": len(corpus.train), "heldout": len(corpus.heldout)}
    assert sum(counts["documents"].values()) == 10 + len(cut(listed[-1], 100))
    assert sum(counts["words"].values()) == 10 * 60 + 250
    assert json.loads(json.dumps(counts)) == counts


def test_dropped_copies_of_held_out_texts_are_not_counted_as_changed():
    bodies = [prose(100, seed) for seed in range(3)]
    listed = [
        Text(bodies[0], None, "aside.txt", split="heldout"),
        text(f"We use cookies.\n\n{changed(bodies[0], 0.1, 1)}", "copy.txt"),
        text(textwrap.fill(changed(bodies[0], 0.1, 2), 60), "wrapped.txt"),
        text(f"We use cookies.\n\n{bodies[1]}", "stripped.txt"),
        text(textwrap.fill(bodies[2].replace("\n", " "), 60), "joined.txt"),
    ]
    report = prepare(listed, ANY).report.as_dict()
    assert report["dropped"][LIKE_HELDOUT]["count"] == 2
    assert (report["kept"], report["stripped"], report["joined"]) == (3, 1, 1)


def test_added_texts_do_not_move_others():
    some = prepare(texts(60), ANY, heldout=0.3)
    more = prepare(reversed(texts(120)), ANY, heldout=0.3)
    assert {each.content for each in some.heldout} <= {each.content for each in more.heldout}
    assert {each.content for each in some.train} <= {each.content for each in more.train}


def test_the_given_share_is_held_out():
    """Of 1,000 texts, binomial: outside 200 ± 65 with probability 3e-7; the seed is fixed."""
    corpus = prepare(texts(1000, words=20), ANY, heldout=0.2)
    assert abs(len(corpus.heldout) - 200) <= 65


def test_copies_of_one_another_stay_on_one_side():
    """Also copies that are too different to be dropped, and copies of these."""
    families = []
    for seed in range(40):
        first = prose(200, seed)
        second = changed(first, 0.07, seed)
        families.append([first, second, changed(second, 0.07, seed + 1)])
    listed = [
        text(each, f"{i}/{j}") for i, row in enumerate(families) for j, each in enumerate(row)
    ]
    together = Filters(min_words=0, duplicate_threshold=None)
    corpus = prepare(listed, together, heldout=0.3, seed=3)
    sides = [
        {each.origin.split("/")[0] for each in part} for part in (corpus.train, corpus.heldout)
    ]
    assert not sides[0] & sides[1]
    assert corpus.report.noted["near-copies kept on one side"].count >= 70
    separate = Filters(min_words=0, duplicate_threshold=None, family_threshold=None)
    corpus = prepare(listed, separate, heldout=0.3, seed=3)
    assert {each.origin.split("/")[0] for each in corpus.train} & {
        each.origin.split("/")[0] for each in corpus.heldout
    }


def are_family(one: str, other: str) -> bool:
    """Whether one text is dropped as a copy or kept on the side of the other, cut at 300 words."""
    listed = [text(one, "one.txt"), text(prose(40, 500), "third.txt"), text(other, "other.txt")]
    corpus = prepare(listed, Filters(min_words=0, split_words=300), heldout=0.5)
    parts = [{each.origin.split("#")[0] for each in p} for p in (corpus.train, corpus.heldout)]
    is_noted = "near-copies kept on one side" in corpus.report.noted
    is_dropped = all("other.txt" not in part for part in parts)
    assert is_dropped or not is_noted or {"one.txt", "other.txt"} in parts
    return is_noted or is_dropped


def interleaved(content: str) -> str:
    """Every third paragraph from the first on, then from the second, then from the third."""
    parts = content.strip().split("\n\n")
    return "\n\n".join([*parts[::3], *parts[1::3], *parts[2::3]])


BOOK = prose(900, 7)
ACCENTED = BOOK.replace("e", "é")


@pytest.mark.parametrize(
    "other",
    [
        *(prose(words, 8) + "\n" + BOOK for words in (150, 290)),
        " ".join(BOOK.split()[:100]),
        " ".join(BOOK.split()[400:490]),
        interleaved(BOOK),
        changed(BOOK, 0.15, 1),
        BOOK.replace("er", "e\u00adr").replace("in", "i\u200bn"),
        unicodedata.normalize("NFD", ACCENTED),
    ],
    ids=lambda content: f"{len(content.split())} words",
)
def test_partial_copies_are_on_one_side(other):
    """A foreword, an excerpt, shuffled paragraphs, changed words, other Unicode forms."""
    assert are_family(ACCENTED if "é" in unicodedata.normalize("NFC", other) else BOOK, other)


def test_unrelated_texts_are_not_a_family():
    assert not are_family(BOOK, prose(300, 9))
    assert not are_family(BOOK, prose(900, 9))


def test_a_text_whose_first_piece_is_dropped_as_a_copy_is_of_that_family():
    known = Duplicates(0.6)
    first, edited = prose(300), changed(prose(300), 0.03, 1)
    assert known.of(first, "0 0") is None
    assert [known.of(edited, name) for name in ("1 0", "2 0")] == ["0 0", "0 0"]
    copy = first.strip() + "\n\n" + prose(290, 5)
    assert are_family(first, copy)


def test_unrelated_real_texts_are_not_a_family(data):
    """Of 5,000 passages of 100 words from novels; those of one novel may quote one another."""
    families, owners = Families(Filters().family_threshold), []
    for number, path in enumerate(sorted((data / "books" / "heldout").glob("*.txt"))[1:11]):
        words = path.read_text().split()[2000:22_000]
        for start in range(0, len(words) - 100, 100):
            families.add([" ".join(words[start : start + 100])])
            owners.append(number)
    firsts = families.firsts()
    assert all(owners[first] == owner for first, owner in zip(firsts, owners, strict=True))
    assert sum(first != number for number, first in enumerate(firsts)) <= 5


def test_a_pair_is_counted_once_and_none_is_within_a_text():
    """A text in three pieces and as a whole, and a copy: no pairs of a piece and its own whole."""
    pieces = [shingles(prose(100, seed)) for seed in range(3)]
    whole = np.unique(np.concatenate(pieces))
    pairs_K, shared_K = families_module._shared([*pieces, whole, whole], np.array([0, 0, 0, 0, 1]))
    expected = {(i, 4): len(grams) for i, grams in enumerate([*pieces, whole]) if i != 4}
    counted = {
        divmod(int(pair), 5): int(count) for pair, count in zip(pairs_K, shared_K, strict=True)
    }
    assert counted == expected


def test_a_large_corpus_is_compared_by_a_sample_of_its_grams(monkeypatch):
    monkeypatch.setattr(families_module, "MOST", 8000)
    families = Families(0.25)
    for seed in range(30):
        families.add([prose(300, seed), prose(300, seed + 100)])
        families.add([changed(prose(300, seed), 0.1, seed)])
    assert sum(map(len, families._grams)) <= 8000
    assert families.share < 1
    assert families.firsts() == [number - number % 2 for number in range(60)]


def test_the_report_has_the_share_of_grams_that_were_compared(monkeypatch):
    assert prepare(texts(40), ANY, heldout=0.3).report.as_dict()["compared"] == 1
    monkeypatch.setattr(families_module, "MOST", 1000)
    assert prepare(texts(40), ANY, heldout=0.3).report.as_dict()["compared"] < 1


def phrased(words: int, seed: int) -> str:
    """Random words, one in five of them in a phrase of nine words that other texts have too."""
    chosen, text_words = random.Random(seed), []
    while words > 0:
        text_words += [f"w{chosen.randrange(5000)}" for _ in range(36)]
        phrase = chosen.randrange(30)
        text_words += [f"p{phrase}w{index}" for index in range(9)]
        words -= 45
    return " ".join(text_words)


def families_of(listed: list[str]) -> tuple[list[int], float]:
    families = Families(0.25)
    for each in listed:
        families.add([each])
    share = families.share
    return families.firsts(), share


@pytest.mark.parametrize(("most", "share", "at_least"), [(40_000, 1 / 8, 58), (16_000, 1 / 16, 55)])
def test_a_sample_of_grams_joins_no_unrelated_texts(monkeypatch, most, share, at_least):
    """Short texts and long ones that have phrases in common, and copies of the short ones."""
    listed = [phrased(90, seed) for seed in range(300)]
    listed += [phrased(5000, seed) for seed in range(300, 320)]
    assert families_of(listed)[0] == list(range(320))
    copies = [changed(each, 0.07, seed) for seed, each in enumerate(listed[:60])]
    whole, whole_share = families_of(listed + copies)
    monkeypatch.setattr(families_module, "MOST", most)
    firsts, sampled_share = families_of(listed + copies)
    assert (whole_share, sampled_share) == (1, share)
    assert whole == [*range(320), *range(60)]
    missed = [320 + copy for copy in range(60) if firsts[320 + copy] != copy]
    assert firsts == [number if number in missed else first for number, first in enumerate(whole)]
    assert len(copies) - len(missed) >= at_least


def test_an_instruction_in_all_prompts_makes_no_family():
    instruction = prose(200, 99)
    listed = [
        answered(f"{instruction}\n\n{prose(20, seed)}", prose(words, seed + 50), f"c:{seed}")
        for words in (8, 60)
        for seed in range(30)
    ]
    corpus = prepare(listed, ANY, heldout=0.3)
    assert corpus.report.noted == {}
    assert 0.05 < corpus.report.heldout_share < 0.6


@pytest.mark.parametrize("answer", [lambda seed: prose(60, seed + 50), clauses])
def test_answers_that_are_copies_are_on_one_side(answer):
    listed = [answered(prose(20, seed), answer(seed // 2), f"{seed}") for seed in range(40)]
    corpus = prepare(listed, ANY, heldout=0.3)
    sides = [{int(each.origin) // 2 for each in p} for p in (corpus.train, corpus.heldout)]
    assert not sides[0] & sides[1]


def greeted(seed: int, *, greets: bool = True) -> Text:
    """A system turn and a greeting that all share, a question and an answer."""
    turns = [
        {"role": "system", "content": "Be kind."},
        *([{"role": "assistant", "content": "Hello! What can I do?"}] if greets else []),
        {"role": "user", "content": prose(12, seed)},
        {"role": "assistant", "content": prose(40, seed + 500)},
    ]
    return Text("\n\n".join(each["content"] for each in turns), tuple(turns), f"{seed}")


def test_a_greeting_does_not_count_as_an_answer_to_one_prompt():
    corpus = prepare([greeted(seed) for seed in range(40)], ANY, heldout=0.3)
    assert len(corpus.train) + len(corpus.heldout) == 40
    assert len(corpus.heldout) > 1  # Of 40 by a hash: one or none below 1e-4.
    assert corpus.report.dropped == {}


def test_the_opening_of_a_conversation():
    assert opening(greeted(1)) == f"Be kind.\n\nHello! What can I do?\n\n{prose(12, 1)}\n\n"
    assert opening(greeted(1, greets=False)) == f"Be kind.\n\n{prose(12, 1)}\n\n"
    greeting = Text("", (greeted(1).messages or ())[:2], "")
    assert opening(greeting) == "Be kind.\n\n"
    assert opening(text("plain")) == ""


def test_a_corpus_of_answers_to_one_prompt_is_refused_with_a_remedy():
    answers = [answered("Why?", prose(40, seed)) for seed in range(10)]
    with pytest.raises(ValueError, match=r"answers to one prompt .* other prompts") as caught:
        prepare(answers, Filters(min_words=0, family_threshold=None))
    assert "family_threshold" not in str(caught.value)


def test_letters_of_one_form_are_refused_with_a_remedy():
    form = prose(200, 99)
    letters = [text(f"{form}\n{prose(160, seed)}", f"{seed}.txt") for seed in range(10)]
    with pytest.raises(ValueError, match=r"corpus\.family_threshold=null"):
        prepare(letters, ANY)
    separate = settings.load(Filters, {"min_words": 0, "family_threshold": None}, "corpus")
    assert prepare(letters, separate).heldout


def test_a_shared_system_turn_makes_no_family():
    system = {"role": "system", "content": prose(400, 99)}
    listed = [answered(prose(30, seed), prose(40, seed + 50), f"c:{seed}") for seed in range(30)]
    listed = [Text(each.content, (system, *(each.messages or ())), each.origin) for each in listed]
    corpus = prepare(listed, ANY, heldout=0.3)
    assert corpus.report.noted == {}
    assert 0.05 < corpus.report.heldout_share < 0.6


def test_the_share_of_words_that_is_held_out_is_reported():
    report = prepare(texts(200), ANY, heldout=0.2).report
    words = report.words["heldout"] / (report.words["train"] + report.words["heldout"])
    assert report.as_dict()["heldout_share"] == pytest.approx(words, abs=1e-6)
    assert report.as_dict()["heldout_asked"] == 0.2


def test_pieces_of_one_file_stay_together():
    books = [text(prose(500, seed), f"{seed}.txt") for seed in range(30)]
    corpus = prepare(books, Filters(split_words=50), heldout=0.3)
    sides = [
        {each.origin.split("#")[0] for each in split} for split in (corpus.train, corpus.heldout)
    ]
    assert not sides[0] & sides[1]
    assert all(sides)


def test_answers_to_one_prompt_stay_together():
    answers = [
        answered(f"Question {i}?", prose(30, 100 * i + j), f"c.jsonl:{10 * i + j}")
        for i in range(30)
        for j in range(4)
    ]
    corpus = prepare(answers, ANY, heldout=0.3)
    prompts = [{each.messages[0]["content"] for each in s} for s in (corpus.train, corpus.heldout)]
    assert not prompts[0] & prompts[1]
    assert len(corpus.train) + len(corpus.heldout) == 120
    assert len(corpus.heldout) % 4 == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_corpus_has_both_parts(count):
    for seed in range(20):
        corpus = prepare(texts(count), ANY, seed=seed)
        assert corpus.train
        assert corpus.heldout


def test_a_corpus_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="the corpus is empty: 0 read"):
        prepare([], ANY)
    with pytest.raises(ValueError, match="the corpus is empty: 1 read, dropped: 1 too short"):
        prepare([text("short")], Filters())
    with pytest.raises(ValueError, match=r"is one text.*\(a\.txt;.*--heldout 0"):
        prepare([text(prose(60))], ANY)
    assert len(prepare([text(prose(60))], ANY, heldout=0).train) == 1
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="accepted: at least 0 and below 1"):
            prepare(texts(3), ANY, heldout=share)


def test_the_corpus_does_not_depend_on_the_hash_seed(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(prose(60, i % 20))
    code = (
        "import sys; from pathlib import Path; from dftserve.corpus.read import read\n"
        "from dftserve.corpus.prepare import prepare; from dftserve.corpus.filters import Filters\n"
        f"c = prepare(read(Path({str(tmp_path)!r})), Filters())\n"
        "print([t.origin for t in c.train], [t.origin for t in c.heldout], c.report.as_dict())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# Real text


def test_novels_are_kept_and_cut(data):
    books = sorted((data / "prose" / "litbank").glob("*.txt"))[:2]
    listed = [each for book in books for each in read(book)]
    corpus = prepare(listed, Filters(languages=("en",), join_lines=False))
    assert corpus.report.dropped == {}
    pieces = [len(each.content.split()) for each in (*corpus.train, *corpus.heldout)]
    assert max(pieces) <= 1000
    assert sum(pieces) == sum(len(each.content.split()) for each in listed)


def test_specifications_are_kept_and_lose_their_licence(data):
    corpus = prepare(read(data / "tech" / "peps"), Filters(languages=("en",)))
    assert corpus.report.kept == corpus.report.read
    assert not any("placed in the public domain" in each.content for each in corpus.train)


def test_texts_that_are_held_out_together_have_the_same_family():
    """Pieces of one text, answers to one prompt and copies; no family if nothing is held out."""
    long = text(prose(500, 1), "long.txt")
    near = text(f"{prose(60, 2)}\n\n{prose(60, 3)}", "near.txt")
    listed = [long, text(prose(60, 2), "a.txt"), near, text(prose(60, 4), "alone.txt")]
    listed += [answered("Why?", prose(40, 5 + i), f"c.jsonl:{i}") for i in range(2)]
    filters = Filters(split_words=200, duplicate_threshold=0.99)
    corpus = prepare(listed, filters, heldout=0.3)
    families = {each.origin: each.family for each in (*corpus.train, *corpus.heldout)}
    assert len({families[f"long.txt#{i}"] for i in (1, 2, 3)}) == 1
    assert families["a.txt"] == families["near.txt"]
    assert families["c.jsonl:0"] == families["c.jsonl:1"]
    assert len(set(families.values())) == 4
    assert {each.family for each in prepare(listed, filters, heldout=0).train} == {""}
