"""Counts writing errors without a language model: marks of a grammar checker, and unknown words.

    check(text, linter())

The checker is Harper (https://writewithharper.com), offline, by the package `harper-py`. Names are
not errors: a capitalised word that is not in the dictionary is not counted. Human text gets marks
too, so compare a rate with the human one. English only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dftserve.evaluate.text.tokenize import normalise, words

KINDS = frozenset(("Agreement", "Capitalization", "Grammar", "Repetition", "Spelling", "Typo"))
"""Kinds of Harper's marks that count as errors; the others are matters of taste."""
SHORTEST = 3
"""Minimum letters of a word that counts as unknown."""


@dataclass(frozen=True)
class Checked:
    """Counts of one text."""

    words: int
    """Words of the normalised text."""
    marks: int
    """Number of marks that `marks` yields."""
    unknown: int
    """Lower-case words that are not in the dictionary."""


def linter() -> Any:
    """Create Harper's checker, which takes about a second: reuse it.

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
    """Harper's marks (`Lint`) that count as errors. Left out are names, single letters (the s of
    "mid-30s"), and a mark at the end of the text, whose last word may have been cut."""
    # Some of Harper's rules panic (a BaseException) if a text ends right after their match.
    for mark in linter.lint(f"{text}\n"):
        word = mark.problem_text
        is_name = mark.lint_kind == "Spelling" and word[:1].isupper()
        is_cut = mark.span.end == len(text)
        if mark.lint_kind in KINDS and not (is_name or is_cut) and len(word) > 1:
            yield mark


def is_unknown(mark: Any) -> bool:
    """Whether a mark is that of an unknown word."""
    word = mark.problem_text
    return mark.lint_kind == "Spelling" and len(word) >= SHORTEST and word.islower()


def check(text: str, linter: Any) -> Checked:
    """The counts of a text; `linter` is the result of `linter()`."""
    all_marks = list(marks(text, linter))
    return Checked(len(words(normalise(text))), len(all_marks), sum(map(is_unknown, all_marks)))
