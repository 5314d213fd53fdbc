"""Marks shared phrases, AI phrases and errors in the answers to one prompt.

marked = mark(["Once upon a time there was …", "Once upon a time there lived …"])
marked[0].marks[0]      Mark(start=0, stop=22, kind="shared", why="also in 1 of the others")
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dftserve.evaluate.metrics import errors
from dftserve.evaluate.metrics.slop import read_phrases
from dftserve.evaluate.text.tokenize import normalise

SHARED, PHRASE, ERROR = "shared", "phrase", "error"
SEQUENCE = 4
"""Minimum number of consecutive words that another answer must share."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, order=True)
class Mark:
    """Characters [start, stop) of a text."""

    start: int
    stop: int
    kind: str
    why: str


@dataclass(frozen=True)
class Marked:
    """A text, and the parts of it that the demo highlights."""

    text: str
    marks: tuple[Mark, ...]
    """In order; they may overlap."""

    @property
    def words(self) -> int:
        return len(_WORD.findall(self.text))

    def count(self, kind: str) -> int:
        return sum(mark.kind == kind for mark in self.marks)

    def words_in(self, kind: str) -> int:
        spans = [(m.start, m.stop) for m in self.marks if m.kind == kind]
        starts = [word.start() for word in _WORD.finditer(self.text)]
        return sum(any(start <= at < stop for start, stop in spans) for at in starts)


def mark(texts: Sequence[str]) -> list[Marked]:
    """Each text with its marks; `shared` phrases are shared among these texts."""
    shared = _shared(texts)
    return [
        Marked(text, tuple(sorted([*common, *_phrases(text), *_errors(text)])))
        for text, common in zip(texts, shared, strict=True)
    ]


def can_find_errors() -> bool:
    """Whether the grammar checker is installed."""
    return _linter() is not None


# ── Each kind ────────────────────────────────────────────────────────────────────────────────────


def _shared(texts: Sequence[str]) -> list[list[Mark]]:
    words = [list(_WORD.finditer(text)) for text in texts]
    runs = [
        [tuple(w[0].lower() for w in each[i : i + SEQUENCE]) for i in range(_runs_of(each))]
        for each in words
    ]
    texts_with = Counter(run for each in runs for run in set(each))
    return [
        _merged(
            (each[i].start(), each[i + SEQUENCE - 1].end(), texts_with[run] - 1)
            for i, run in enumerate(found)
            if texts_with[run] > 1
        )
        for each, found in zip(words, runs, strict=True)
    ]


def _runs_of(words: Sequence[Any]) -> int:
    return max(0, len(words) - SEQUENCE + 1)


def _merged(spans: Iterator[tuple[int, int, int]]) -> list[Mark]:
    """Merge spans that overlap; `why` has the count of the most frequent one."""
    merged: list[tuple[int, int, int]] = []
    for start, stop, others in spans:
        if merged and start <= merged[-1][1]:
            first, _, before = merged.pop()
            start, others = first, max(before, others)
        merged.append((start, stop, others))
    return [Mark(a, b, SHARED, f"also in {others} of the others") for a, b, others in merged]


def _phrases(text: str) -> Iterator[Mark]:
    at = 0
    for phrase in _phrase_list().found(normalise(text)):
        pattern = r"\s*".join(map(re.escape, phrase.split())).replace("'", "['’]")
        found = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE).search(text, at)
        if found:  # Not found if normalising changed more than quotes.
            at = found.end()
            yield Mark(found.start(), at, PHRASE, "far more often in the prose of assistants")


def _errors(text: str) -> Iterator[Mark]:
    linter = _linter()
    for found in errors.marks(text, linter) if linter else ():
        yield Mark(found.span.start, found.span.end, ERROR, found.message)


@cache
def _phrase_list() -> Any:
    return read_phrases()


@cache
def _linter() -> Any:
    """Harper's linter; None if harper-py is not installed."""
    try:
        return errors.linter()
    except RuntimeError:
        return None
