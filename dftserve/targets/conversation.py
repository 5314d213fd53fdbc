"""Tokenises a conversation and marks the tokens to train on, which are the assistant's.

    encoded = encode(tokenizer, messages)
    encoded.document, encoded.notes

If the chat template marks the text to train on ({% generation %}), its marks are used. Otherwise
every assistant turn is trained on, from after the text that opens it up to and including the
special tokens that end it (`answer_spans`), and tokens are located by their offsets.

Shapes: N tokens of a document.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dftserve.bounded_files import parse_json
from dftserve.targets.answer_spans import answer_spans, is_answer
from dftserve.targets.chat_template import (
    ChatTemplate,
    Span,
    TemplateError,
    Turn,
    UnfitError,
    special_tokens,
)
from dftserve.targets.document import Document

PRIVATE = range(0xF0000, 0xFFFFE)
"""Private-use characters. Those that a conversation does not contain serve as marks in it; a text
may contain some, since fonts have icons there."""
OF_TURNS = ("role", "content", "weight")
"""Fields that are always used."""
READ_AS_TEXT = "spells special tokens, read as text"
NO_STOP = "no answer is learnt to a special token at its end: the model does not learn to stop"
CALLS = ("tool_calls", "function_call")

Spelled = Literal["text", "keep", "drop"]
Answers = Literal["all", "last"]


@dataclass(frozen=True)
class Encoded:
    """An encoded text, and what was changed in it."""

    document: Document
    notes: tuple[str, ...] = ()
    """Short descriptions of what was left out or cut, by which texts are counted."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    tools: Sequence[Any] | None = None,
    *,
    spelled: Spelled = "text",
    answers: Answers = "all",
) -> Encoded:
    """Encode a conversation with the tokenizer's chat template.

    Args:
        messages: turns with `role` and `content`; a turn with `weight` 0 is not trained on. Other
            fields are passed to the template, and noted if they do not change the rendered text.
            Arguments of tool calls may be JSON texts, as in OpenAI's format; the template receives
            them as objects, as it does from vLLM.
        spelled: how to read special tokens spelled out in turns and tools: as `text`, or `keep`
            them as special tokens; `drop` leaves the conversation out.
        answers: which of the assistant's turns to train on.

    Raises:
        UnfitError: nothing to train on, the answers' tokens cannot be located, or a call's
            arguments are not a JSON object (vLLM passes an empty one instead, which should not be
            trained on).
        TemplateError: the template is missing or invalid, or refused the conversation.
    """
    if not tokenizer.is_fast:
        raise TemplateError("this tokenizer has no offsets; accepted: one with a tokenizer.json.")
    template = ChatTemplate.of(tokenizer, tools=bool(tools))
    turns, notes = _until_last_answer(messages)
    turns = [*map(_with_arguments, turns)]
    marks = _unused_marks(turns, tools, template.source)
    spellings = _Spellings.of(tokenizer, spelled, marks)
    turns = [_replace_spellings(turn, spellings) for turn in turns]
    tools = [*map(spellings.replace_in, tools)] if tools else None
    turns, tools, more = _used_fields(template, turns, tools)
    notes += _omitted_turns(template, turns, tools, marks)
    text, marked = template.render(turns, tools)
    spans = marked if template.marks else answer_spans(template, turns, tools, text, marks)
    spans = _selected_spans(template, turns, spans, answers)
    if not _follows_prompt(template, text, spans):
        notes.append(_prompt_note(template.header))
    if spellings.occur_in(text):
        notes.append(READ_AS_TEXT)
    tokens_N, offsets = _tokens(tokenizer, text, spellings, [start for start, _ in spans])
    trained_N = np.zeros(len(tokens_N), dtype=bool)
    for start, end in spans:
        trained_N |= [start <= at < end for at, _ in offsets]
    trained_N[:1] = False
    if not trained_N.any():
        raise UnfitError("nothing to train on")
    if not _learns_to_stop(tokenizer, tokens_N, trained_N):
        notes.append(NO_STOP)
    return Encoded(Document(tokens_N, trained_N, has_prompt=True), (*notes, *more))


def _unused_marks(*values: Any) -> Iterator[str]:
    """Private-use characters that occur in none of the values, at any depth."""
    used = set(json.dumps(values, ensure_ascii=False, default=str))
    return (mark for mark in map(chr, PRIVATE) if mark not in used)


# ── Turns ────────────────────────────────────────────────────────────────────────────────────────


def _until_last_answer(messages: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[str]]:
    """Remove what follows the assistant's last turn; returns the turns and notes."""
    turns = [dict(each) for each in messages]
    last = max((i for i, turn in enumerate(turns) if is_answer(turn)), default=None)
    if last is None:
        raise UnfitError("no turn of the role 'assistant'")
    notes = [] if last + 1 == len(turns) else [f"cut behind the last answer: {turns[-1]['role']}"]
    return turns[: last + 1], notes


def _with_arguments(turn: Turn) -> dict[str, Any]:
    """A turn as vLLM passes it to a template: arguments of tool calls are objects."""
    calls = turn.get("tool_calls")
    if not is_answer(turn) or not isinstance(calls, list | tuple):
        return dict(turn)
    rest = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**rest, "tool_calls": [*map(_with_object, calls)]} if calls else rest


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping):
        raise UnfitError("a tool call that is no object")
    if not isinstance(call.get("function", {}), Mapping):
        raise UnfitError("a tool call with a function that is no object")
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}}
    return {**call, "arguments": _arguments(call)} if "arguments" in call else call


def _arguments(called: Mapping[str, Any]) -> Mapping[str, Any]:
    arguments = called.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments", finite=False)
            json.dumps(arguments, ensure_ascii=False).encode()
        except ValueError:  # Also raised for a lone surrogate, which JSON can contain.
            raise UnfitError("a tool call with arguments that are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise UnfitError("a tool call with arguments that are no JSON object")
    return arguments


def _replace_spellings(turn: Turn, spellings: "_Spellings") -> dict[str, Any]:
    return {
        key: value if key == "role" else spellings.replace_in(value) for key, value in turn.items()
    }


def _used_fields(
    template: ChatTemplate, turns: list[dict[str, Any]], tools: Sequence[Any] | None
) -> tuple[list[dict[str, Any]], Sequence[Any] | None, list[str]]:
    """The turns and tools without fields that the template does not use, and notes on these.

    A field is used if the rendered text changes without it.
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
        if _renders_same(template, without, tools, text):
            if name in CALLS:
                raise UnfitError(f"`{name}`, which the chat template does not take")
            notes.append(f"`{name}` is not in the chat template: left out")
            turns = without
    if tools and _renders_same(template, turns, None, text):
        notes.append("`tools` are not in the chat template: left out")
        tools = None
    for turn, before in zip(turns, weighted, strict=True):
        turn["weight"] = before.get("weight", 1)
        if is_answer(turn) and not _has_content(turn):
            turn["weight"] = 0
            notes.append("an empty answer: not learnt")
    return turns, tools, notes


def _renders_same(
    template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[Any] | None, text: str
) -> bool:
    try:
        return template.render(turns, tools)[0] == text
    except ValueError:  # The template needs what was removed.
        return False


def _omitted_turns(
    template: ChatTemplate, turns: Sequence[Turn], tools: Sequence[Any] | None, marks: Iterator[str]
) -> list[str]:
    """A note for each role of which the template silently omits whole turns.

    A mark is appended to each turn that has content; a turn is present if its mark is rendered.
    """
    has_text = [bool(turn.get("content")) and isinstance(turn["content"], str) for turn in turns]
    ends = [next(marks, "") if each else "" for each in has_text]
    marked = [
        {**turn, "content": f"{turn['content']}{end}"} if end else turn
        for turn, end in zip(turns, ends, strict=True)
    ]
    try:
        written = template.render(marked, tools)[0]
    except TemplateError:  # The template parses the content, as JSON for example.
        return []
    gone = [i for i, end in enumerate(ends) if end and end not in written]
    text = template.render(turns, tools)[0] if gone else ""
    # A mark may also be missing because the template rewrites the content.
    roles = [
        turns[i].get("role")
        for i in gone
        if _renders_same(template, [*turns[:i], *turns[i + 1 :]], tools, text)
    ]
    return [
        f"a turn of the role {role!r} is not in the chat template: left out"
        for role in dict.fromkeys(roles)
    ]


def _has_content(turn: Turn) -> bool:
    return any(turn.get(name) for name in turn if name not in ("role", "weight", "name"))


# ── Spans to train on ────────────────────────────────────────────────────────────────────────────


def _selected_spans(
    template: ChatTemplate, turns: Sequence[Turn], spans: Sequence[Span], wanted: Answers
) -> list[Span]:
    """The spans of the turns to train on."""
    answers = [turn for turn in turns if is_answer(turn)]
    trained = [bool(turn["weight"]) for turn in answers]
    if wanted == "last":
        trained = [False] * (len(answers) - 1) + trained[-1:]
    if all(trained):
        return list(spans)
    if len(spans) != len(answers):
        raise UnfitError(
            f"{template.title} marks {len(spans)} parts of {len(answers)} answers, some of which "
            "are not to be trained on"
        )
    return [span for span, each in zip(spans, trained, strict=True) if each]


def _prompt_note(header: str) -> str:
    """The note on an answer that is not trained on where a server asks for it."""
    return (
        f"an answer does not follow {header!r}, with which the chat template asks for one: it is "
        "not learnt where the server samples it"
    )


def _follows_prompt(template: ChatTemplate, text: str, spans: Sequence[Span]) -> bool:
    """Whether every span begins behind, or in, the text with which the template asks for an
    answer."""
    header = template.header
    return all(
        text.find(header, max(0, start - len(header)), start + len(header)) >= 0
        for start, _ in spans
        if start
    )


def _learns_to_stop(
    tokenizer: PreTrainedTokenizerBase, tokens_N: np.ndarray, trained_N: np.ndarray
) -> bool:
    """Whether any trained span ends in a special token, ignoring whitespace after it."""
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
    """The special tokens that a text may spell out, each with a private-use character to replace
    it."""

    private: Mapping[str, str]
    how: Spelled

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, how: Spelled, marks: Iterator[str]
    ) -> "_Spellings":
        return cls({text: next(marks) for text in special_tokens(tokenizer)}, how)

    def replace_in(self, value: Any) -> Any:
        """The value with special tokens replaced by private-use characters, at any depth."""
        if self.how == "keep":
            return value
        if isinstance(value, Mapping):
            return {self.replace_in(key): self.replace_in(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [*map(self.replace_in, value)]
        if not isinstance(value, str):
            return value
        for text, private in self.private.items():
            if text in value:
                if self.how == "drop":
                    raise UnfitError(f"spells the special token {text}")
                value = value.replace(text, private)
        return value

    def occur_in(self, text: str) -> bool:
        return any(private in text for private in self.private.values())

    def pieces(self, text: str) -> Iterator[tuple[str, str | None, int]]:
        """(part, None, position), or (private character, text it replaces, position), in order."""
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
    """int32 [N] tokens and their spans in the text. The text before each of `starts` has the tokens
    that it has alone."""
    tokens, offsets = _tokenized(tokenizer, text, spellings)
    added = tokenizer.added_tokens_decoder
    whole = [number in added and b > a + 1 for number, (a, b) in zip(tokens, offsets, strict=True)]
    merged = []
    for start in starts:
        count = next((i for i, (a, _) in enumerate(offsets) if a >= start), len(tokens))
        # Texts before and behind an added token are tokenised apart.
        first = next((i for i in reversed(range(count)) if whole[i]), 0)
        prompt, _ = _tokenized(tokenizer, text[offsets[first][0] : start], spellings)
        if prompt != tokens[first:count]:
            merged.append(start)
    if not merged:
        return np.array(tokens, dtype=np.int32), offsets
    # At inference the prompt is tokenised without the answer.
    ends = [0, *sorted(merged), len(text)]
    tokens, offsets = [], []
    for start, end in itertools.pairwise(ends):
        piece = text[start:end]
        part, spans = _tokenized(tokenizer, piece, spellings)
        if start and not spellings.occur_in(piece) and not _is_exact(tokenizer, part, piece):
            raise UnfitError(
                "the answer's beginning and the prompt's end are one token, and this tokenizer "
                "cannot read them apart"
            )
        tokens += part
        offsets += [(a + start, b + start) for a, b in spans]
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
