"""Finds the answers in a conversation that a chat template without generation marks has rendered.

    spans = answer_spans(template, turns, tools, text, marks)

Every turn is rendered once more with private-use characters, its marks, around its texts. An answer
begins behind the text with which the template asks for one, and ends with the special tokens that
end a turn. Calls may end with other tokens, so the end of these is what the template still writes
if the conversation ends there.
"""

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dftserve.targets.chat_template import (
    ChatTemplate,
    Span,
    TemplateError,
    Turn,
    UnfitError,
    common_start,
)

NAMES = ("role", "content", "weight", "name")
"""Fields of a turn that are not among its other texts."""


def is_answer(turn: Turn) -> bool:
    """Whether the turn is the assistant's."""
    return turn.get("role") == "assistant"


def answer_spans(
    template: ChatTemplate,
    turns: Sequence[Turn],
    tools: Sequence[Any] | None,
    text: str,
    marks: Iterator[str],
) -> list[Span]:
    """The span of each assistant turn; (0, 0) for one without content and calls.

    Args:
        text: the conversation as the template renders it.
        marks: characters that occur nowhere in it, three for each turn.

    Raises:
        UnfitError: an answer is not written once, unchanged, behind the text that asks for it and
            apart from the other turns.
        TemplateError: the template refused the conversation.
    """
    marked = _Marked.of(template, turns, tools, text, marks)
    numbers = [i for i, turn in enumerate(turns) if is_answer(turn)]
    ends = {i: marked.end(i) for i in numbers if _core(turns[i]) or turns[i].get("tool_calls")}
    if None in ends.values():
        raise UnfitError(
            f"{template.title} does not write every answer once, so their tokens cannot be told"
        )
    spans: dict[int, Span] = dict.fromkeys(numbers, (0, 0))
    before = 0
    for i, end in sorted(ends.items(), key=lambda item: item[1] or 0):
        start = _start(marked, i, before)
        spans[i] = start, before = start, _stop(marked, i, end or 0)
        if marked.others(i, start + 1, before):
            raise UnfitError(
                f"{template.title} writes other turns inside an answer, so its tokens cannot be "
                "told; mark them there with {% generation %}"
            )
    return [spans[i] for i in numbers]


# ── Marks in the turns ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _TurnMarks:
    """The characters that mark one turn."""

    opens: str
    """Before each text of an answer, and around the content of another turn."""
    closes: str
    """After an answer's content."""
    calls: str
    """After the name of its first call."""


@dataclass(frozen=True)
class _Marked:
    """A rendered conversation, and where the marks of its turns are in it."""

    template: ChatTemplate
    turns: Sequence[Turn]
    tools: Sequence[Any] | None
    text: str
    marked_turns: Sequence[Turn]
    marks: Sequence[_TurnMarks]
    at: Mapping[str, Sequence[int]]
    """The positions of each mark in the text without marks."""

    @classmethod
    def of(
        cls,
        template: ChatTemplate,
        turns: Sequence[Turn],
        tools: Sequence[Any] | None,
        text: str,
        marks: Iterator[str],
    ) -> "_Marked":
        """Locate the turns in the rendered text, by marks that are added to them.

        Raises:
            UnfitError: the template writes other text around every choice of marks.
        """
        each = [_TurnMarks(next(marks), next(marks), next(marks)) for _ in turns]
        tried: list[Sequence[Turn]] = []
        for mark in _MARKINGS:
            marked_turns = [*map(mark, turns, each)]
            if marked_turns in tried:
                continue
            tried.append(marked_turns)
            written, at = _unmarked(template.render(marked_turns, tools)[0], each)
            if written == text:
                return cls(template, turns, tools, text, marked_turns, each, at)
        raise UnfitError(
            f"{template.title} changes the text of an answer, so that the answer's tokens cannot "
            "be located; mark them in the template with {% generation %}"
        )

    def end(self, number: int, at: Mapping[str, Sequence[int]] | None = None) -> int | None:
        """The end of an answer's content, or of the name of its first call; None if the template
        does not write the content exactly once."""
        at, marks = self.at if at is None else at, self.marks[number]
        called = at.get(marks.calls, ())
        if not _core(self.turns[number]):
            # A result of the call may repeat the name.
            return called[0] if called else None
        written = at.get(marks.closes, ())
        return written[0] if len(written) == 1 else None

    def others(self, number: int, start: int, stop: int) -> list[int]:
        """The positions in [start, stop) of the marks of other turns, in order."""
        mine = self.marks[number]
        return sorted(
            position
            for mark, positions in self.at.items()
            for position in positions
            if mark not in (mine.opens, mine.closes, mine.calls) and start <= position < stop
        )


def _unmarked(text: str, marks: Sequence[_TurnMarks]) -> tuple[str, dict[str, list[int]]]:
    """The text without marks, and the positions of each mark in it."""
    characters = {mark for each in marks for mark in (each.opens, each.closes, each.calls)}
    at: dict[str, list[int]] = {}
    for number, match in enumerate(re.finditer(f"[{''.join(characters)}]", text)):
        at.setdefault(match[0], []).append(match.start() - number)
    return re.sub(f"[{''.join(characters)}]", "", text), at


def _core(turn: Turn) -> str:
    content = turn.get("content")
    return content.strip() if isinstance(content, str) else ""


_Marking = Callable[[Turn, _TurnMarks], Turn]


def _marking(*, others: bool, texts: bool, opens: bool, whole: bool, calls: bool) -> _Marking:
    """Puts marks into a turn.

    Args:
        others: mark the turns of other roles.
        texts: mark the start of an answer's other texts, such as its reasoning.
        opens: mark the start of an answer's content.
        whole: mark it before the blanks that the content begins with, not behind them.
        calls: mark the first call of an answer that has content too.
    """

    def marked(turn: Turn, marks: _TurnMarks) -> Turn:
        core = _core(turn)
        if not is_answer(turn):
            around = f"{marks.opens}{core}{marks.opens}"
            return (
                {**turn, "content": _replace_core(turn["content"], around)}
                if core and others
                else turn
            )
        new = dict(turn)
        for name in turn.keys() - {*NAMES} if texts else ():
            if isinstance(turn[name], str) and turn[name].strip():
                new[name] = _replace_core(turn[name], f"{marks.opens}{turn[name].strip()}")
        if core:
            start = marks.opens if opens else ""
            closed = _replace_core(turn["content"], f"{'' if whole else start}{core}{marks.closes}")
            new["content"] = f"{start if whole else ''}{closed}"
        if turn.get("tool_calls") and (calls or not core):
            new["tool_calls"] = copy.deepcopy(turn["tool_calls"])
            called = new["tool_calls"][0].get("function", new["tool_calls"][0])
            called["name"] = f"{called.get('name', '')}{marks.calls}"
        return new

    return marked


def _replace_core(text: str, core: str) -> str:
    """The text with `core` in place of what is between the blanks at its ends."""
    inner = text.strip()
    at = text.index(inner)
    return f"{text[:at]}{core}{text[at + len(inner) :]}"


_MARKINGS = [
    _marking(others=others, texts=opens and texts, opens=opens, whole=whole, calls=calls)
    for opens, others, texts, calls, whole in itertools.product([True, False], repeat=5)
    if opens or not (whole or texts)
]
"""Most marks first: a template may trim, split or compare some of the texts."""


# ── Start and end of an answer ───────────────────────────────────────────────────────────────────


def _start(marked: _Marked, number: int, before: int) -> int:
    """Where an answer begins: behind the turn's header, or at its first text."""
    text, header, marks = marked.text, marked.template.header, marked.marks[number]
    opens, closes, calls = (
        min((at for at in marked.at.get(mark, ()) if at >= before), default=len(text))
        for mark in (marks.opens, marks.closes, marks.calls)
    )
    limit = min(opens, closes, calls)
    before = max(before, *marked.others(number, before, limit + 1), 0)
    opened = text.rfind(header, before, limit) if header else -1
    if opened >= 0:
        return opened + len(header)
    if opens == limit < len(text):
        # A space before a word is part of its token.
        return before + len(text[before:opens].rstrip(" "))
    raise UnfitError(
        f"{marked.template.title} does not open the answer as it opens one that is asked for, so "
        "its tokens cannot be told; mark them there with {% generation %}"
    )


def _stop(marked: _Marked, number: int, end: int) -> int:
    """Where the turn ends whose content, or name of a call, ends at `end`.

    Raises:
        UnfitError: the end of a call cannot be told.
    """
    text, token, tokens = marked.text, marked.template.end, marked.template.tokens
    limit = next(iter(marked.others(number, end, len(text) + 1)), len(text))
    calls = bool(marked.turns[number].get("tool_calls"))
    end_token = text.find(token, end, limit) if token else -1
    stop = end_token + len(token or "") if end_token >= 0 else end
    if end_token >= 0 and not calls:
        return stop
    rest, is_last = text[end:limit], number + 1 == len(marked.turns)
    other = _other_rest(marked, number)
    written = rest if other is None and is_last else common_start(rest, other or "", tokens)
    if token and token in written:
        return max(stop, end + written.rindex(token) + len(token))
    if end_token >= 0:
        return stop
    trimmed = written.rstrip()
    if trimmed.endswith(tokens):
        return end + len(trimmed)
    if is_last or other is not None:
        # The turn's own end, as nothing follows it in this rendering.
        alone = rest if is_last else other or ""
        if written.startswith(alone.rstrip()):
            return end + len(written)
    if calls:
        raise UnfitError(
            f"{marked.template.title} ends a call otherwise than where the conversation ends with "
            "it, so its tokens cannot be told; mark them there with {% generation %}"
        )
    return len(text) if is_last and not token else end


def _other_rest(marked: _Marked, number: int) -> str | None:
    """What is written behind an answer's end in another conversation: the last answer's with a
    question after it, any other's without the turns after it. None if the template refuses it, or
    writes the answer otherwise."""
    is_last = number + 1 == len(marked.turns)
    question = [{"role": "user", "content": "x"}] if is_last else []
    turns = [*marked.marked_turns[: number + 1], *question]
    try:
        other, at = _unmarked(marked.template.render(turns, marked.tools)[0], marked.marks)
    except TemplateError:
        return None
    end = marked.end(number, at)
    return None if end is None else other[end:]
