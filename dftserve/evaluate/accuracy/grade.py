"""Grade answers: read what each one says, and compare it with the right answer.

Standard library only: it also runs in lm-eval's environment, which lacks this package's
dependencies.
"""

from dataclasses import dataclass

from dftserve.evaluate.accuracy import extract
from dftserve.evaluate.accuracy.extract.sums import meanings
from dftserve.evaluate.text.thinking import is_cut

UNREADABLE = "unreadable"
"""Grade of an answer in which no letter, number or function was found, or that is empty."""
CUT = "cut"
"""Grade of an answer that ran out of tokens while still thinking."""
REFUSED, ANSWERED = "refused", "answered"
"""Grades of an answer to a prompt of `refusals`."""
NO_CONTENT = "\x1ano content\x1a"
"""Stands for a null `message.content` where only strings can be passed on."""


@dataclass(frozen=True)
class Grade:
    """The grade of one answer."""

    read: str
    """The letter or number, `REFUSED` or `ANSWERED`, `UNREADABLE` or `CUT`."""
    right: bool


def grade_choice(answer: str | None, letter: str) -> Grade:
    """Whether an answer gives this letter of A to D."""
    read = cut_state(answer) or extract.choice(answer or "") or UNREADABLE
    return Grade(read, read == letter)


def grade_number(answer: str | None, right: str) -> Grade:
    """Whether an answer gives this number, however it is written: 1,234.00 is 1234."""
    read = cut_state(answer) or extract.number(answer or "") or UNREADABLE
    return Grade(read, same_number(read, right))


def grade_refusal(answer: str | None, *, refuse: bool) -> Grade:
    """Whether an answer refuses exactly if `refuse` is true."""
    if state := cut_state(answer):
        return Grade(state, False)
    refused = extract.refuses(answer or "")
    read = UNREADABLE if refused is None else REFUSED if refused else ANSWERED
    return Grade(read, refused is refuse)


def same_number(read: str, right: str) -> bool:
    """Whether two texts can mean the same number: `1,234.00` and `1234`, `1/2` and `.5`.
    `4 million` is 4000000 or 4, since a question may ask for millions."""
    return not meanings(read).isdisjoint(meanings(right))


def cut_state(answer: str | None) -> str | None:
    """`CUT` if an answer has no content or ends in its thinking, otherwise None."""
    return CUT if answer is None or answer == NO_CONTENT or is_cut(answer) else None
