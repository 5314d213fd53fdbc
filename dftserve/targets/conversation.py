"""A conversation as a model reads it, and which of its tokens are learnt: what the assistant says.

    encoded = encode(tokenizer, messages)
    encoded.document, encoded.notes

Where the template marks what is learnt ({% generation %}), that is; else every assistant's turn is,
from what opens it (not included) to the special token that ends it. Turns are found in the rendered
text by private characters around what is said, and their tokens by offsets: nothing is compared
with a shorter prompt, which templates may write otherwise.

Shapes: N tokens of a document.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dftserve.bounded_files import parse_json
from dftserve.targets.chat_template import ChatTemplate, Span, TemplateError, Turn, special_tokens
from dftserve.targets.document import Document

PRIVATE = range(0xF0000, 0xFFFFE)
"""Private characters, of which those that a conversation lacks serve as marks in it. Fonts have
icons there, so a text may hold some."""
OF_TURNS = ("role", "content", "weight")
"""Fields that are always heeded."""
READ_AS_TEXT = "spells special tokens, read as text"
NO_STOP = "no answer is learnt to a special token at its end: the model does not learn to stop"
CALLS = ("tool_calls", "function_call")

Spelled = Literal["text", "keep", "drop"]
Learnt = Literal["all", "last"]


class UnfitError(ValueError):
    """A conversation that is left out and counted, and why."""


@dataclass(frozen=True)
class Encoded:
    """A conversation, and what was changed of it."""

    document: Document
    notes: tuple[str, ...] = ()
    """What was dropped or cut, each in a few words: they are counted."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    tools: Sequence[Any] | None = None,
    *,
    spelled: Spelled = "text",
    learnt: Learnt = "all",
) -> Encoded:
    """A conversation through the tokenizer's chat template.

    Args:
        messages: turns with `role` and `content`; `weight` 0 is a turn that is not learnt; other
            fields go to the template, and those that change nothing in its text are noted.
            Arguments of tool calls may be JSON texts, as OpenAI has them: the template gets the
            objects, as it does from vLLM.
        spelled: special tokens in what somebody said, and in tools: `text`, or `keep` as special
            tokens; `drop` leaves the conversation out.
        learnt: of the assistant's turns.

    Raises:
        UnfitError: nothing to learn, its tokens cannot be told, or a call's arguments are no JSON
            object (vLLM shows the model an empty one; nobody is to learn that).
        TemplateError: as the template said.
    """
    if not tokenizer.is_fast:
        raise TemplateError("this tokenizer tells no offsets; accepted: one with a tokenizer.json.")
    template = ChatTemplate.of(tokenizer, tools=bool(tools))
    turns, notes = _cut(messages)
    turns = [*map(_with_arguments, turns)]
    marks = _unused(turns, tools, template.source)
    around = next(marks), next(marks)
    spellings = _Spellings.of(tokenizer, spelled, marks)
    turns = [_hidden(turn, spellings) for turn in turns]
    tools = [*map(spellings.hidden, tools)] if tools else None
    turns, tools, more = _heeded(template, turns, tools)
    notes += _left_out(template, turns, tools, marks)
    text, marked = template.render(turns, tools)
    spans = marked if template.marks else _spans(template, turns, tools, text, around)
    spans = _wanted(template, turns, spans, learnt)
    if spellings.hides(text):
        notes.append(READ_AS_TEXT)
    tokens_N, offsets = _tokens(tokenizer, text, spellings, [start for start, _ in spans])
    trained_N = np.zeros(len(tokens_N), dtype=bool)
    for start, end in spans:
        trained_N |= [start <= at < end for at, _ in offsets]
    trained_N[:1] = False
    if not trained_N.any():
        raise UnfitError("nothing to train on")
    if not _stops(tokenizer, tokens_N, trained_N):
        notes.append(NO_STOP)
    return Encoded(Document(tokens_N, trained_N, has_prompt=True), (*notes, *more))


def _unused(*values: Any) -> Iterator[str]:
    """Private characters that no value holds, at any depth."""
    held = set(json.dumps(values, ensure_ascii=False, default=str))
    return (mark for mark in map(chr, PRIVATE) if mark not in held)


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────


def _cut(messages: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[str]]:
    """Without what follows the assistant's last turn."""
    turns = [dict(each) for each in messages]
    last = max((i for i, turn in enumerate(turns) if _answers(turn)), default=None)
    if last is None:
        raise UnfitError("no turn of the role 'assistant'")
    notes = [] if last + 1 == len(turns) else [f"cut behind the last answer: {turns[-1]['role']}"]
    return turns[: last + 1], notes


def _with_arguments(turn: Turn) -> dict[str, Any]:
    """A turn as vLLM gives it to a template: what is called has an object of arguments."""
    calls = turn.get("tool_calls")
    if not _answers(turn) or not isinstance(calls, list | tuple):
        return dict(turn)
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**rest, "tool_calls": [*map(_with_object, calls)]} if calls else rest


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping):
        raise UnfitError("a tool call that is no object")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}}
    return {**call, "arguments": _arguments(call)} if "arguments" in call else call


def _arguments(called: Mapping[str, Any]) -> Mapping[str, Any]:
    given = called.get("arguments") or {}
    if isinstance(given, str):
        try:
            given = parse_json(given, "arguments", finite=False)
            json.dumps(given, ensure_ascii=False).encode()
        except ValueError:  # Of half a surrogate pair too, which JSON can spell.
            raise UnfitError("a tool call with arguments that are not JSON") from None
    if not isinstance(given, Mapping):
        raise UnfitError("a tool call with arguments that are no JSON object")
    return given


def _hidden(turn: Turn, spellings: "_Spellings") -> dict[str, Any]:
    return {key: value if key == "role" else spellings.hidden(value) for key, value in turn.items()}


def _answers(turn: Turn) -> bool:
    return turn.get("role") == "assistant"


def _heeded(
    template: ChatTemplate, turns: list[dict[str, Any]], tools: Sequence[Any] | None
) -> tuple[list[dict[str, Any]], Sequence[Any] | None, list[str]]:
    """The turns and tools that the template takes, and what it does not take.

    A field is taken where the text is another one without it.
    """
    for turn in turns:
        if (weight := turn.get("weight", 1)) not in (0, 1):
            raise UnfitError(f"weight {weight!r}, which is neither 0 nor 1")
    weighted, notes = turns, []
    turns = [{key: turn[key] for key in turn if key != "weight"} for turn in turns]
    fields = sorted({key for turn in turns for key in turn} - {*OF_TURNS})
    text = template.render(turns, tools)[0] if fields or tools else ""
    for name in fields:
        without = [{key: turn[key] for key in turn if key != name} for turn in turns]
        if _same(template, without, tools, text):
            if name in CALLS:
                raise UnfitError(f"`{name}`, which the chat template does not take")
            notes.append(f"`{name}` is not in the chat template: left out")
            turns = without
    if tools and _same(template, turns, None, text):
        notes.append("`tools` are not in the chat template: left out")
        tools = None
    for turn, before in zip(turns, weighted, strict=True):
        turn["weight"] = before.get("weight", 1)
        if _answers(turn) and not _says(turn):
            turn["weight"] = 0
            notes.append("an empty answer: not learnt")
    return turns, tools, notes


def _same(
    template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[Any] | None, text: str
) -> bool:
    try:
        return template.render(turns, tools)[0] == text
    except ValueError:  # It needs what was taken away.
        return False


def _left_out(
    template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[Any] | None, marks: Iterator[str]
) -> list[str]:
    """A note for each role of which the template leaves out whole turns, without a word of it.

    Each turn that says something ends in a mark of its own, and is there where the mark is.
    """
    said = [bool(turn.get("content")) and isinstance(turn["content"], str) for turn in turns]
    ends = [next(marks, "") if each else "" for each in said]
    marked = [
        {**turn, "content": f"{turn['content']}{end}"} if end else turn
        for turn, end in zip(turns, ends, strict=True)
    ]
    try:
        written = template.render(marked, tools)[0]
    except TemplateError:  # It reads what is said, as JSON for one.
        return []
    gone = [i for i, end in enumerate(ends) if end and end not in written]
    text = template.render(turns, tools)[0] if gone else ""
    # A mark may also go where a template rewrites what is said.
    roles = [
        turns[i].get("role")
        for i in gone
        if _same(template, [*turns[:i], *turns[i + 1 :]], tools, text)
    ]
    return [
        f"a turn of the role {role!r} is not in the chat template: left out"
        for role in dict.fromkeys(roles)
    ]


def _says(turn: Turn) -> bool:
    return any(turn.get(name) for name in turn if name not in ("role", "weight", "name"))


# ── What is learnt ───────────────────────────────────────────────────────────────────────────────


def _wanted(
    template: ChatTemplate, turns: Sequence[Turn], spans: Sequence[Span], learnt: Learnt
) -> list[Span]:
    """The spans of the turns that are to be learnt."""
    answers = [turn for turn in turns if _answers(turn)]
    wanted = [bool(turn["weight"]) for turn in answers]
    if learnt == "last":
        wanted = [False] * (len(answers) - 1) + wanted[-1:]
    if all(wanted):
        return list(spans)
    if len(spans) != len(answers):
        raise UnfitError(
            f"{template.title} marks {len(spans)} parts of {len(answers)} answers, some of which "
            "are not to be learnt"
        )
    return [span for span, each in zip(spans, wanted, strict=True) if each]


def _spans(
    template: ChatTemplate,
    turns: Sequence[Turn],
    tools: Sequence[Any] | None,
    text: str,
    around: tuple[str, str],
) -> list[Span]:
    """Of each assistant's turn, where the template does not mark them.

    Args:
        around: two characters to mark what is said with, which the text lacks.
    """
    last = around[1]
    for first in (around[0], ""):
        marked = template.render([_marked(turn, first, last) for turn in turns], tools)[0]
        if re.sub(f"[{first}{last}]", "", marked) == text:
            break
    else:
        raise UnfitError(
            f"{template.title} writes an answer otherwise than it is, so its tokens cannot be told;"
            " mark them there with {% generation %}"
        )
    places = [
        (match[0], match.start() - number)
        for number, match in enumerate(re.finditer(f"[{first}{last}]", marked))
    ]
    answers = [turn for turn in turns if _answers(turn)]
    marks = [last if _marked(turn, first, last) != turn else "" for turn in answers]
    ends = [place for mark, place in places if mark == last]
    if len(ends) != sum(map(len, marks)):
        raise UnfitError(
            f"{template.title} does not write every answer once, so their tokens cannot be told"
        )
    starts = [
        place if first and opening == first else None
        for (opening, place), (mark, _) in itertools.pairwise([("", 0), *places])
        if mark == last
    ]
    found = iter(_extended(template, text, starts, ends))
    return [next(found) if mark else (0, 0) for mark in marks]


def _marked(turn: Turn, first: str, last: str) -> Turn:
    """An answer with `first` before what is said and `last` behind what is said or called."""
    if not _answers(turn):
        return turn
    content = turn.get("content") or ""
    if core := content.strip():
        at = content.index(core)
        said = f"{content[:at]}{first}{core}{last}{content[at + len(core) :]}"
        return {**turn, "content": said}
    if turn.get("tool_calls"):
        calls = copy.deepcopy(turn["tool_calls"])
        called = calls[0].get("function", calls[0])
        called["name"] = f"{called.get('name', '')}{last}"
        return {**turn, "tool_calls": calls}
    return turn


def _extended(
    template: ChatTemplate, text: str, starts: Sequence[int | None], ends: Sequence[int]
) -> Iterator[Span]:
    """From what opens each turn to the token that ends it, both near what is said."""
    before = 0
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        next_one = ends[number + 1] if number + 1 < len(ends) else len(text)
        if template.end is not None:
            stop = text.find(template.end, end, next_one)
            end = end if stop < 0 else stop + len(template.end)
        elif number + 1 == len(ends):
            end = len(text)
        limit = ends[number] if start is None else start
        opened = text.rfind(template.header, before, limit) if template.header else -1
        if opened >= 0:
            start = opened + len(template.header)
        elif start is not None:
            # A blank before a word is part of its token.
            start = before + len(text[before:start].rstrip(" "))
        else:
            raise UnfitError(
                f"{template.title} does not open the answer as it opens one that is asked for, so "
                "its tokens cannot be told; mark them there with {% generation %}"
            )
        yield start, end
        before = end


def _stops(tokenizer: PreTrainedTokenizerBase, tokens_N: np.ndarray, trained_N: np.ndarray) -> bool:
    """Whether some stretch that is learnt ends in a special token, blanks behind it apart."""
    special = {*tokenizer.all_special_ids} | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    ends = np.flatnonzero(trained_N & ~np.append(trained_N[1:], False))
    for end in ends.tolist():
        while end > 0 and trained_N[end] and _is_blank(tokenizer, int(tokens_N[end])):
            end -= 1
        if trained_N[end] and int(tokens_N[end]) in special:
            return True
    return False


def _is_blank(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not str(tokenizer.decode([token])).strip()


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Spellings:
    """Special tokens that a text spells, each with the private character that stands for it."""

    private: Mapping[str, str]
    how: Spelled

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, how: Spelled, marks: Iterator[str]
    ) -> "_Spellings":
        return cls({text: next(marks) for text in special_tokens(tokenizer)}, how)

    def hidden(self, value: Any) -> Any:
        """The value with private characters in place of special tokens, at any depth."""
        if self.how == "keep":
            return value
        if isinstance(value, Mapping):
            return {self.hidden(key): self.hidden(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [*map(self.hidden, value)]
        if not isinstance(value, str):
            return value
        for text, private in self.private.items():
            if text in value:
                if self.how == "drop":
                    raise UnfitError(f"spells the special token {text}")
                value = value.replace(text, private)
        return value

    def hides(self, text: str) -> bool:
        return any(private in text for private in self.private.values())

    def pieces(self, text: str) -> Iterator[tuple[str, str | None, int]]:
        """(part, None, place), or (private character, what it stands for, place), in order."""
        shown = {private: text for text, private in self.private.items()}
        at = 0
        for match in re.finditer("[" + "".join(shown) + "]", text) if shown else ():
            if text[at : match.start()]:
                yield text[at : match.start()], None, at
            yield match[0], shown[match[0]], match.start()
            at = match.end()
        if text[at:]:
            yield text[at:], None, at


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spellings: _Spellings, starts: Sequence[int]
) -> tuple[np.ndarray, list[Span]]:
    """int32 [N], and where each token stands in the text; one begins at each of `starts`."""
    tokens, offsets = _tokenized(tokenizer, text, spellings)
    merged = [start for start in starts if any(a < start < b for a, b in offsets)]
    if not merged:
        return np.array(tokens, dtype=np.int32), offsets
    # Asked, the model gets the prompt's tokens as they are without the answer.
    ends = [0, *sorted(merged), len(text)]
    tokens, offsets = [], []
    for start, end in itertools.pairwise(ends):
        piece = text[start:end]
        part, places = _tokenized(tokenizer, piece, spellings)
        if start and not spellings.hides(piece) and not _is_exact(tokenizer, part, piece):
            raise UnfitError(
                "the answer's beginning and the prompt's end are one token, and this tokenizer "
                "cannot read them apart"
            )
        tokens += part
        offsets += [(a + start, b + start) for a, b in places]
    return np.array(tokens, dtype=np.int32), offsets


def _is_exact(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str) -> bool:
    return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False) == text


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, text: str, spellings: _Spellings
) -> tuple[list[int], list[Span]]:
    tokens: list[int] = []
    offsets: list[Span] = []
    for part, spelled, at in spellings.pieces(text):
        if spelled is not None:
            ids = tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
            tokens += ids
            offsets += [(at, at + 1)] * len(ids)
            continue
        encoded = tokenizer(
            part, add_special_tokens=False, truncation=False, return_offsets_mapping=True
        )
        tokens += encoded["input_ids"]
        offsets += [(at + a, at + b) for a, b in encoded["offset_mapping"]]
    return tokens, offsets
