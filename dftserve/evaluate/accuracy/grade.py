"""Answers against what is right: read, and compared.

Standard library only: lm-eval's environment, which has not this package's dependencies, loads it.
"""

from dataclasses import dataclass

from dftserve.evaluate.accuracy import extract
from dftserve.evaluate.accuracy.extract.sums import meanings
from dftserve.evaluate.text.thinking import is_cut

UNREADABLE = "unreadable"
"""Judged of an answer in which no letter, number or function was found, or no text at all."""
CUT = "cut"
"""Judged of an answer that ended in its thinking, where the tokens were used up."""
REFUSED, ANSWERED = "refused", "answered"
"""Judged of an answer to a prompt of `refusals`."""
NO_CONTENT = "\x1ano content\x1a"
"""What stands for a `message.content` that is null where only texts can be passed on."""


@dataclass(frozen=True)
class Grade:
    """Of one answer."""

    read: str
    """The letter or number, `REFUSED` or `ANSWERED`, `UNREADABLE` or `CUT`."""
    right: bool


def grade_choice(answer: str | None, letter: str) -> Grade:
    """Whether an answer gives this letter of A to D."""
    read = unread(answer) or extract.choice(answer or "") or UNREADABLE
    return Grade(read, read == letter)


def grade_number(answer: str | None, right: str) -> Grade:
    """Whether an answer gives this number, however it is written: 1,234.00 is 1234."""
    read = unread(answer) or extract.number(answer or "") or UNREADABLE
    return Grade(read, same_number(read, right))


def grade_refusal(answer: str | None, *, refuse: bool) -> Grade:
    """Whether an answer refuses where it is to, and else answers."""
    if state := unread(answer):
        return Grade(state, False)
    refused = extract.refuses(answer or "")
    read = UNREADABLE if refused is None else REFUSED if refused else ANSWERED
    return Grade(read, refused is refuse)


def same_number(read: str, right: str) -> bool:
    """Whether two texts are one number: `1,234.00` and `1234`, `1/2` and `.5`; `4 million`
    is 4000000 and 4, since a question may ask for millions."""
    return not meanings(read).isdisjoint(meanings(right))


def unread(answer: str | None) -> str | None:
    """`CUT` where nothing was said."""
    return CUT if answer is None or answer == NO_CONTENT or is_cut(answer) else None
