"""Filters and metrics that the tasks here use in lm-eval; answers are read by `dftserve`'s rules.

`dftserve` is not installed in lm-eval's environment. The modules that read answers, which need only
the standard library, are imported from this source tree; `sys.path` is restored afterwards.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = str(Path(__file__).resolve().parents[4])

sys.path.insert(0, _PACKAGES)
try:
    from dftserve.evaluate.accuracy import grade
finally:
    sys.path.remove(_PACKAGES)


def letters(responses: Iterable[Sequence[str]], documents: Any) -> list[list[str]]:
    """A filter: the letter of each answer."""
    return [[grade.grade_choice(each, "").read for each in several] for several in responses]


def numbers(responses: Iterable[Sequence[str]], documents: Any) -> list[list[str]]:
    """A filter: the number of each answer."""
    return [[grade.grade_number(each, "").read for each in several] for several in responses]


def score_letter(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The metrics of one answer, from the filter's output."""
    return _scores(results[0], right=results[0] == "ABCD"[document["answer"]])


def score_number(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As `score_letter`."""
    right = document["answer"].split("####")[-1].strip()
    return _scores(results[0], right=grade.same_number(results[0], right))


def _scores(read: str, *, right: bool) -> dict[str, float]:
    return {
        "exact_match": float(right),
        grade.UNREADABLE: float(read == grade.UNREADABLE),
        grade.CUT: float(read == grade.CUT),
    }
