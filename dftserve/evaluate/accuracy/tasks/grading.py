"""What the tasks here call in lm-eval: `dftserve`'s own reading of an answer.

lm-eval's environment has not `dftserve`. Only the modules that read answers, which need nothing but
the standard library, are loaded from where this file is; the path is as before after that.
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
    """Figures of one answer, from what the filter read."""
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
