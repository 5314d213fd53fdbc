"""One record of a file as a text: which of its fields say what.

    record({"instruction": "Add.", "input": "1, 2", "output": "3"}, "file, line 1", "file:1")

Known without being told: `text`; `messages`, as OpenAI has them; `prompt` and `response`, or
`completion` as TRL has it, both of them texts or lists of turns, of which the prompt's are context;
ShareGPT's `conversations` of `from` and `value`; Alpaca's `instruction`, `input` and `output`.
`Fields` names others.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dftserve.bounded_files import parse_json
from dftserve.corpus.text import Text

Turns = tuple[Mapping[str, Any], ...]

CALLS = ("tool_calls", "function_call")
FIELDS = (
    "`text`, or `messages`, or `prompt` and `response` or `completion`, or `conversations` "
    "(ShareGPT), or `instruction` and `output` (Alpaca)"
)
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
"""Fields that hold a question and its answer."""
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{"bing": "assistant", "bard": "assistant", "model": "assistant", "assistant": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function_response": "tool"},
}
"""What ShareGPT's `from` stands for."""
UNASKED = ("system", "developer", "assistant")
"""Roles of turns that ask nothing."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The names that a file has for what a record says; None: those that are known.

    Names of texts, turns or pairs leave those that are known; all others are beside them.
    """

    text: str | None = None
    messages: str | None = None
    role: str | None = None
    """Of a turn."""
    content: str | None = None
    """Of a turn."""
    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    """Beside prompt and response."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """A role as the file has it → system, user, assistant or tool."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise ValueError("fields: got one of prompt and response; accepted: both, or neither.")
        for name, role in self.roles.items():
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(
                    f"fields.roles.{name}: got {role!r}; accepted: system, user, assistant, tool."
                )

    @property
    def are_known(self) -> bool:
        """Whether a record's text, turns or pair have the names that are known."""
        return self.text is None and self.messages is None and self.prompt is None


KNOWN = Fields()


def record(given: object, where: str, origin: str, fields: Fields = KNOWN) -> Text:
    """
    Raises:
        ValueError: a field that is missing or of a wrong type; begins with `where`.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: got {shown(given)}; accepted: an object with {FIELDS}.")
    has = {name: value for name, value in given.items() if value is not None}
    turns: Turns | None = None
    if (name := _listed(has, fields)) is not None:
        turns = _turns(has[name], f"{where}, {name}", fields)
    elif (text := fields.text or ("text" if fields.are_known else None)) in has:
        return plain(_string(has[text], f"{where}, {text}"), origin)
    elif (pair := _pair(has, fields)) is not None:
        turns = _asked_and_answered(has, pair, where, fields)
    if turns is not None:
        tools = _tools(given.get("tools"), f"{where}, tools")
        return _conversation((*_system(has, fields, where, turns), *turns), origin, tools)
    names = ", ".join(sorted(map(str, has))) or "none"
    wanted = FIELDS if fields.are_known else "those that `fields` names"
    raise ValueError(
        f"{where}: got the fields {shown(names)}; accepted: {wanted}. `fields` in a YAML of "
        "corpora names others."
    )


def _listed(has: Mapping[str, Any], fields: Fields) -> str | None:
    """The field that holds turns."""
    names = ["messages", "conversations"] if fields.are_known else [fields.messages]
    return next((name for name in names if name is not None and name in has), None)


def _pair(has: Mapping[str, Any], fields: Fields) -> tuple[str, str] | None:
    """The fields that hold a question and its answer."""
    if fields.prompt is not None and fields.response is not None:
        pairs = [(fields.prompt, fields.response)]
    else:
        pairs = PAIRS if fields.are_known else ()
    return next((pair for pair in pairs if {*pair} <= has.keys()), None)


def _asked_and_answered(
    has: Mapping[str, Any], pair: tuple[str, str], where: str, fields: Fields
) -> Turns:
    """Of two texts, or of two lists of turns, of which the second is learnt."""
    asked, said = (has[name] for name in pair)
    if isinstance(asked, list) and isinstance(said, list):
        before, answer = (_turns(has[name], f"{where}, {name}", fields) for name in pair)
        if not any(turn["role"] == "assistant" for turn in answer):
            raise ValueError(f"{where}, {pair[1]}: got no turn of the assistant; accepted: one.")
        return (*({**t, "weight": 0} if t["role"] == "assistant" else t for t in before), *answer)
    asked, said = (_string(has[name], f"{where}, {name}") for name in pair)
    if fields.are_known and pair[0] == "instruction" and has.get("input"):
        asked = f"{asked}\n\n{_string(has['input'], f'{where}, input')}"
    return {"role": "user", "content": asked}, {"role": "assistant", "content": said}


def _system(has: Mapping[str, Any], fields: Fields, where: str, turns: Turns) -> Turns:
    """A system turn from a field beside the turns, where they have none."""
    name = fields.system or "system"
    if not has.get(name) or turns[0]["role"] == "system":
        return ()
    return ({"role": "system", "content": _string(has[name], f"{where}, {name}")},)


def _tools(given: object, where: str) -> tuple[Any, ...]:
    if isinstance(given, str):  # As datasets of one column type keep them.
        given = parse_json(given, where)
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise ValueError(f"{where}: got {shown(given)}; accepted: a list of JSON schemas.")
    return tuple(map(_without_nulls, given))


def _without_nulls(value: Any) -> Any:
    """Without keys that have no value, at any depth: columns give all structs the keys of all."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(each) for k, each in value.items() if each is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list | tuple) else value


def _turns(given: object, where: str, fields: Fields) -> Turns:
    if isinstance(given, str):  # As datasets of one column type keep them.
        given = parse_json(given, where)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}: got {shown(given)}; accepted: a list of turns.")
    return tuple(_turn(_named(each, fields), f"{where}[{i}]") for i, each in enumerate(given))


def _named(turn: object, fields: Fields) -> object:
    """A turn with `role` and `content`, whatever its file calls them."""
    if not isinstance(turn, Mapping):
        return turn
    is_sharegpt = "from" in turn and "value" in turn and "role" not in turn
    role = fields.role or ("from" if is_sharegpt else "role")
    content = fields.content or ("value" if is_sharegpt else "content")
    rest = {name: value for name, value in turn.items() if name not in (role, content)}
    who = turn.get(role)
    if isinstance(who, str):
        who = fields.roles.get(who, ROLES.get(who, who) if is_sharegpt else who)
    return {**rest, "role": who, "content": turn.get(content)}


def _turn(given: object, where: str) -> Mapping[str, Any]:
    """With every field that has a value: what of them counts, the chat template says."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: got {shown(given)}; accepted: `role` and `content`.")
    turn = {str(name): value for name, value in _without_nulls(given).items()}
    turn["role"] = _string(given.get("role"), f"{where}.role")
    content = _joined(given.get("content"), f"{where}.content")
    if content is None and any(turn.get(name) for name in CALLS):
        content = ""
    turn["content"] = _string(content, f"{where}.content")
    return turn


def _joined(given: object, where: str) -> object:
    """A content of parts, of which texts are accepted, as one text."""
    if not isinstance(given, list):
        return given
    for part in given:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"{where}: got a part of the type {shown(kind)}; accepted: text.")
    return "".join(_string(part.get("text"), where) for part in given)


def _conversation(
    turns: tuple[Mapping[str, Any], ...], origin: str, tools: tuple[Any, ...] = ()
) -> Text:
    return Text("\n\n".join(map(said, turns)), turns, origin, tools=tools)


def said(turn: Mapping[str, Any]) -> str:
    """The text of a turn: its content, and what it calls as JSON."""
    calls = [json.dumps(turn[name], ensure_ascii=False) for name in CALLS if turn.get(name)]
    return "\n".join([turn["content"], *calls] if turn["content"] else calls)


def opening(text: Text) -> str:
    """What a conversation begins with, up to the first answer to somebody; empty for a plain text.

    An assistant's greeting before anybody spoke is no answer, but where nobody speaks at all.
    """
    turns = text.messages or ()
    asked = next((i for i, turn in enumerate(turns) if turn["role"] not in UNASKED), 0)
    behind = itertools.takewhile(lambda turn: turn["role"] != "assistant", turns[asked:])
    return "".join(f"{said(turn)}\n\n" for turn in (*turns[:asked], *behind))


def plain(content: str, origin: str) -> Text:
    """A plain text, with line ends of one kind."""
    return Text(content.replace("\r\n", "\n").replace("\r", "\n"), None, origin)


def _string(given: object, where: str) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{where}: got {shown(given)}; accepted: a text.")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}; accepted: valid Unicode."
        ) from None
    return given


def shown(value: object) -> str:
    """A value in an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
