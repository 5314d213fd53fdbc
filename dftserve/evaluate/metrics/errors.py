"""Errors of writing that need no model to see: marks of a grammar checker, and unknown words.

    check(text, linter())

The checker is Harper (https://writewithharper.com), offline, by the package `harper-py`. Names are
no errors: a word with a capital that the dictionary lacks is not counted. People get marks too:
read a rate beside theirs. English only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dftserve.evaluate.text.tokenize import words

KINDS = frozenset(("Agreement", "Capitalization", "Grammar", "Repetition", "Spelling", "Typo"))
"""Harper's kinds of what is wrong; its others are matters of taste."""
SHORTEST = 3
"""Letters of a word that counts as unknown."""


@dataclass(frozen=True)
class Checked:
    """Counts of one text."""

    words: int
    marks: int
    """As `marks` finds them."""
    unknown: int
    """Words in lower case that the dictionary lacks."""


def linter() -> Any:
    """Harper's checker; it takes about a second to make, so make one.

    Raises:
        RuntimeError: `harper-py` is not installed.
    """
    try:
        from harper import Linter
    except ImportError:
        raise RuntimeError(
            "harper-py, which counts errors of writing, is not installed: pip install harper-py."
        ) from None
    return Linter()


def marks(text: str, linter: Any) -> Iterator[Any]:
    """Harper's marks (`Lint`) of what is wrong. Names are left out, single letters (the s of
    "mid-30s"), and what ends the text, whose last word may have been cut."""
    # Some of Harper's rules panic (a BaseException) where a text ends right behind what they match.
    for mark in linter.lint(f"{text}\n"):
        word = mark.problem_text
        is_name = mark.lint_kind == "Spelling" and word[:1].isupper()
        is_cut = mark.span.end == len(text)
        if mark.lint_kind in KINDS and not (is_name or is_cut) and len(word) > 1:
            yield mark


def check(text: str, linter: Any) -> Checked:
    """The counts of a text; `linter` is that of `linter()`."""
    found = list(marks(text, linter))
    spelled = [mark.problem_text for mark in found if mark.lint_kind == "Spelling"]
    unknown = [word for word in spelled if len(word) >= SHORTEST and word.islower()]
    return Checked(len(words(text)), len(found), len(unknown))
