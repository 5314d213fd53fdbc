"""Split an answer into takes: it states something, takes it back (`Wait, that's wrong`), and states
something else.

Standard library only, as `extract`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_AT_CLAUSE = (
    r"(?:^|(?<=[.!?…;,:(\n—–。，；])|(?<=\s-))[\s*_>(\"]{0,9}"
    r"(?:(?:but|and|so|oh|ah|well)\b[\s,]*)?"
)
_ITSELF = (
    r"(?:that|this|it|which|(?:the\s+above|my\s+(?:\w+\s+)?(?:answer|result|calculation)|"
    r"(?:the\s+)?(?:first|previous|earlier)\s+(?:answer|result)))"
)
_BAD = (
    r"(?:wrong|incorrect|false|mistaken|an?\s+(?:error|mistake)|too\s+(?:large|small|big|high|low)|"
    r"not\s+(?:right|correct))"
)
_ANEW = re.compile(
    _AT_CLAUSE
    + r"(?:wait(?=\s*(?:[,.!…—–:-]|$)|\s+(?:no|that|this|i|let|it|actually|a|the)\b)|hold\s+on|"
    r"hmm+|actually|on\s+(?:second\s+thoughts?|reflection|closer\s+(?:look|inspection))|sorry|"
    r"(?:re-?)?checking\s+again|let\s+me\s+(?:re-?\w+|double|correct|fix|redo)|or\s+rather|"
    r"i\s+(?:misread|miscounted|miscalculated|forgot|overlooked))\b",
    re.IGNORECASE | re.MULTILINE,
)
"""Begins a new take; the earlier statement still counts if the new take states nothing."""
_BACK = re.compile(
    _AT_CLAUSE + r"(?:no(?:\s+(?:wait|sorry)|(?=\s*[,.!…—–]|\s-\s)"
    # `No, because …`, `No, the others do not fit`: these do not take back what was said.
    r"(?!\W{1,3}(?:because|since|(?:(?:all|none)\s+(?:of\s+)?)?(?:the\s+)?(?:others?|rest|remaining)\b)))"
    r"|(?:scratch|strike)\s+that\b|oops\b|"
    r"correction\b|corrigendum\b|erratum\b|i\s+(?:was|am)\s+(?:wrong|mistaken)\b|"
    r"i\s+(?:made|see|notice|realize|found|spot\w*)\s+(?:an?|my|the)\s+(?:\w+\s+)?"
    r"(?:mistake|error)\b|"
    rf"{_ITSELF}\s*(?:(?:['’]s|is|was|seems|looks)\s+(?:\w+ly\s+)?{_BAD}|"
    r"(?:isn|wasn|doesn|didn|can|couldn)['’]?t\s+(?:be\s+)?"
    r"(?:right|correct|make\s+sense|match|fit|work)|can(?:not|\s+not)\s+be\s+(?:right|correct))\b"
    # `It is wrong to say …`, `it is false that …`, `this is false for B`: nor do these.
    r"(?!\s+(?:to|for|that)\b))",
    re.IGNORECASE | re.MULTILINE,
)
"""Takes back what the previous sentence stated, and begins a new take."""
_BEHIND_A_LABEL = re.compile(r"\b[A-J][.):]\s*(?:[Nn]o\W{1,3})?$")
_REJECTED = re.compile(r"\b[A-J][.):]\s*[Nn]o\b")
_OPTION_WORDS = re.compile(
    r"\W*(?:no\b(?!\W{1,3}(?:wait|sorry|that(?:['’]s|\s+(?:is|was|can|isn)))\b)|it\b)",
    re.IGNORECASE,
)
"""Retractions that may also be the beginning of an option's own text."""
MOST_TURNS = 50
"""Only this many at the end of an answer are considered; one that repeats itself has thousands."""
MOST_IN_A_SENTENCE = 1000
"""Characters in which the last sentence of a text, or the sentence after a match, is looked for."""
_SIGNS = ' \n.,;:!-—–…*_()"'


@dataclass(frozen=True)
class Take:
    """A stretch of an answer in which it does not take back what it says."""

    text: str
    is_withdrawn: bool
    """The next take takes this one back."""


def last_answer(text: str, read: Callable[[str, bool], str | None]) -> str | None:
    """The answer of the last take that states one; empty if that take is withdrawn.

    Args:
        read: reads the answer from a take's text, given whether the take is the first or follows a
            withdrawn one; None if it states none. A take that only follows a `wait` may be just a
            remark.
    """
    several = takes(text, lambda take_text: read(take_text, False))
    is_withdrawn = [True, *(each.is_withdrawn for each in several)]
    for take, is_after_withdrawn in reversed(list(zip(several, is_withdrawn, strict=False))):
        if (answer := read(take.text, is_after_withdrawn)) is not None:
            return "" if take.is_withdrawn else answer
    return None


def takes(text: str, states: Callable[[str], str | None]) -> Sequence[Take]:
    """The takes, in order.

    Args:
        states: the answer that a text states. `No` and `that is wrong` take back a sentence only if
            it states the same as its take: after `Option B: 12.` they refer to an option.
    """
    turns = [(match.start(), match.end(), False) for match in _ANEW.finditer(text)]
    turns += [
        (match.start(), match.end(), True)
        for match in list(_BACK.finditer(text))[-MOST_TURNS:]
        if not _is_of_an_option(text, match, states)
    ]
    several: list[Take] = []
    begun = 0
    for start, end, is_back in sorted(turns)[-MOST_TURNS:]:
        if start < begun:
            begun = max(begun, end)
            continue
        take_text = text[begun:start].lstrip(" \n,;:…—") if begun else text[:start]
        if not take_text.strip(_SIGNS):
            # `No, wait, sorry` is one turn.
            several[-1:] = [Take(each.text, each.is_withdrawn or is_back) for each in several[-1:]]
            begun = end
            continue
        last = states(_last_sentence(take_text)) if is_back else None
        is_stated = bool(last) and states(take_text) == last
        if is_back and not is_stated:
            if last or not several or states(take_text):
                continue
            # `Hmm. The slope is negative. No, that is wrong` refers to the previous take.
            several[-1] = Take(several[-1].text, True)
        several.append(Take(take_text, is_stated))
        begun = end
    take_text = text[begun:].lstrip(" \n,;:…—") if begun else text
    return [*several, Take(take_text, False)]


def _is_of_an_option(text: str, match: re.Match[str], states: Callable[[str], str | None]) -> bool:
    """Whether a retraction is part of an option's text, as in `B. No, it is void`.

    It is not in `B. No, it's C` and `A. No, too small. B. No, too large. So C`, which state an
    answer.
    """
    before = text[max(0, match.start() - 20) : match.start()]
    if not (_OPTION_WORDS.match(text, match.start()) and _BEHIND_A_LABEL.search(before)):
        return False
    after = text[match.end() : match.end() + MOST_IN_A_SENTENCE].lstrip(_SIGNS)
    is_one_of_several = _REJECTED.search(after) is not None
    return not states(after if is_one_of_several else re.split(r"[.!?;\n]", after)[0])


def _last_sentence(text: str) -> str:
    end = text[-MOST_IN_A_SENTENCE:]
    sentences = re.split(r"(?<=[^\d\W])[.!?;]+(?=\s|$)|(?<=[\d)}\]])[.!?;]+(?=\s|$)|\n+", end)
    kept = [each for each in sentences if each.strip(_SIGNS)]
    return kept[-1] if kept else ""
