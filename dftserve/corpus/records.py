"""Converts one record of a file to a text, by the names of its fields.

    record({"instruction": "Add.", "input": "1, 2", "output": "3"}, "file, line 1", "file:1")

Recognised by default: `messages` in OpenAI's format; ShareGPT's `conversations` of `from` and
`value`; `prompt` and `response`, or TRL's `completion`, each a text or a list of turns (the
prompt's are context only); Alpaca's `instruction`, `input` and `output`; `text`. With two texts,
`history` may list earlier pairs. The first of these forms that a record has counts, so a `text`
next to another form, which is the same rendered, is not used. `Fields` gives other names.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dftserve.bounded_files import parse_json
from dftserve.corpus.text import Text
from dftserve.settings import quoted

Turns = tuple[Mapping[str, Any], ...]

CALLS = ("tool_calls", "function_call")
NOT_TEXTS = ("role", "content", "name", "weight")
"""Fields of a turn that hold none of its further texts, such as its reasoning."""
FIELDS = (
    "`text`, or `messages`, or `prompt` and `response` or `completion`, or `conversations` "
    "(ShareGPT), or `instruction` and `output` (Alpaca)"
)
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
"""Fields with a question and its answer."""
SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "developer": "developer", "tool": "tool"},
}
"""Values of `role`, in any case, → roles. Others are left to the chat template."""
ROLES = {
    **SPEAKERS,
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
"""ShareGPT's values of `from`, in any case, → roles; there are no others."""
VERDICTS = ("label", "kto_tag")
"""Fields of data for KTO that tell whether an answer is a good one."""
NOT_ASKING = ("system", "developer", "assistant")
"""Roles of turns that ask nothing."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The field names that a file uses; None: the default names.

    Giving `text`, `messages` or `prompt` and `response` replaces all default names of texts, turns
    and pairs; the other settings can be combined with any of them.
    """

    text: str | None = None
    messages: str | None = None
    role: str | None = None
    """A turn's field."""
    content: str | None = None
    """A turn's field."""
    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    """A record's field with a system prompt."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """A role as written in the file → system, user, assistant or tool."""

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
        """Whether the default names of texts, turns and pairs apply."""
        return self.text is None and self.messages is None and self.prompt is None


KNOWN = Fields()


def record(content: object, where: str, origin: str, fields: Fields = KNOWN) -> Text:
    """The text of a record: its turns, pair or plain text, and the fields that go with it.

    Args:
        where: the file and line, for errors.
        origin: the text's name in reports.

    Raises:
        ValueError: a field is missing or has the wrong type; the message begins with `where`.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: got {quoted(content)}; accepted: an object with {FIELDS}.")
    has = {name: value for name, value in content.items() if value is not None}
    turns: Turns | None = None
    if (name := _listed(has, fields)) is not None:
        turns = _turns(has[name], f"{where}, {name}", fields)
    elif (pair := _pair(has, fields)) is not None:
        turns = _turns_of_pair(has, pair, where, fields)
    elif (text := fields.text or ("text" if fields.are_known else None)) in has:
        return plain(_string(has[text], f"{where}, {text}"), origin)
    if turns is not None:
        if fields.are_known:
            _refuse_bad_answer(has, where)
        tools = _tools(content.get("tools"), f"{where}, tools")
        return _conversation((*_system(has, fields, where, turns), *turns), origin, tools)
    names = ", ".join(sorted(map(str, has))) or "none"
    wanted = FIELDS if fields.are_known else "those that `fields` names"
    raise ValueError(
        f"{where}: got the fields {quoted(names)}; accepted: {wanted}. `fields` in a YAML of "
        "corpora names others."
    )


def _listed(has: Mapping[str, Any], fields: Fields) -> str | None:
    """The name of the field with turns, if the record has one."""
    names = ["messages", "conversations"] if fields.are_known else [fields.messages]
    return next((name for name in names if name is not None and name in has), None)


def _pair(has: Mapping[str, Any], fields: Fields) -> tuple[str, str] | None:
    """The names of the fields with a question and its answer, if the record has them."""
    if fields.prompt is not None and fields.response is not None:
        pairs = [(fields.prompt, fields.response)]
    else:
        pairs = PAIRS if fields.are_known else ()
    return next((pair for pair in pairs if {*pair} <= has.keys()), None)


def _refuse_bad_answer(has: Mapping[str, Any], where: str) -> None:
    """Refuse a record whose answer is marked as one not to give, which would be trained on."""
    for name in VERDICTS:
        if str(has.get(name)).lower() == "false":
            raise ValueError(
                f"{where}, {name}: got {has[name]!r}, which in data for KTO marks an answer that "
                "is not to be given; accepted: answers to learn. Leave such records out, or, if "
                f"`{name}` says something else, name the record's fields by `fields` in a YAML of "
                "corpora."
            )


def _turns_of_pair(
    has: Mapping[str, Any], pair: tuple[str, str], where: str, fields: Fields
) -> Turns:
    """Turns from two texts, or from two lists of turns; only the second is trained on."""
    question, reply = (has[name] for name in pair)
    if isinstance(question, list) and isinstance(reply, list):
        before, answer = (_turns(has[name], f"{where}, {name}", fields) for name in pair)
        if not any(turn["role"] == "assistant" for turn in answer):
            raise ValueError(f"{where}, {pair[1]}: got no turn of the assistant; accepted: one.")
        return (*({**t, "weight": 0} if t["role"] == "assistant" else t for t in before), *answer)
    question, reply = (_string(has[name], f"{where}, {name}") for name in pair)
    if fields.are_known and pair[0] == "instruction" and has.get("input"):
        question = f"{question}\n\n{_string(has['input'], f'{where}, input')}"
    before = _history(has["history"], f"{where}, history") if _has_history(has, fields) else ()
    return (*before, *_asked_and_answered(question, reply))


def _has_history(has: Mapping[str, Any], fields: Fields) -> bool:
    return fields.are_known and bool(has.get("history"))


def _history(value: object, where: str) -> Turns:
    """Turns from earlier pairs of a question and its answer, [[question, answer], …]."""
    if isinstance(value, str):  # JSON in a string column, as some datasets store it.
        value = parse_json(value, where)
    pairs: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"{where}: got {quoted(value)}; accepted: a list of pairs, [[question, answer], …]."
        )
    return tuple(
        turn
        for i, pair in enumerate(pairs)
        for turn in _asked_and_answered(*(_string(text, f"{where}[{i}]") for text in pair))
    )


def _asked_and_answered(question: str, reply: str) -> Turns:
    return {"role": "user", "content": question}, {"role": "assistant", "content": reply}


def _system(has: Mapping[str, Any], fields: Fields, where: str, turns: Turns) -> Turns:
    """A system turn from the record's system field, unless the turns begin with one."""
    name = fields.system or "system"
    if not has.get(name) or turns[0]["role"] == "system":
        return ()
    return ({"role": "system", "content": _string(has[name], f"{where}, {name}")},)


def _tools(value: object, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):  # JSON in a string column, as some datasets store it.
        value = parse_json(value, where) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{where}: got {quoted(value)}; accepted: a list of JSON schemas.")
    _check_unicode(value, where)
    return tuple(map(_without_nulls, value))


def _without_nulls(value: Any) -> Any:
    """Remove keys without a value, at any depth: in columnar files every struct of a column has the
    keys of all."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(each) for k, each in value.items() if each is not None}
    return [*map(_without_nulls, value)] if isinstance(value, list | tuple) else value


def _turns(value: object, where: str, fields: Fields) -> Turns:
    if isinstance(value, str):  # JSON in a string column, as some datasets store it.
        value = parse_json(value, where)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: got {quoted(value)}; accepted: a list of turns.")
    named = (_named(each, fields, f"{where}[{i}]") for i, each in enumerate(value))
    return tuple(_turn(each, f"{where}[{i}]") for i, each in enumerate(named))


def _named(turn: object, fields: Fields, where: str) -> object:
    """A turn with its fields renamed to `role` and `content`, and its role as templates know it."""
    if not isinstance(turn, Mapping):
        return turn
    is_sharegpt = "from" in turn and "value" in turn and "role" not in turn
    role = fields.role or ("from" if is_sharegpt else "role")
    content = fields.content or ("value" if is_sharegpt else "content")
    rest = {name: value for name, value in turn.items() if name not in (role, content)}
    who = turn.get(role)
    if isinstance(who, str):
        who = fields.roles.get(who) or _role(who, role, where, is_sharegpt=is_sharegpt)
    return {**rest, "role": who, "content": turn.get(content)}


def _role(value: str, name: str, where: str, *, is_sharegpt: bool) -> str:
    if not is_sharegpt:
        return SPEAKERS.get(value.lower(), value)
    if value.lower() not in ROLES:
        raise ValueError(
            f"{where}.{name}: got {quoted(value)}; accepted: {', '.join(sorted(ROLES))}. "
            "`fields: {roles: {…}}` in a YAML of corpora says which role another is."
        )
    return ROLES[value.lower()]


def _turn(raw_turn: object, where: str) -> Mapping[str, Any]:
    """A checked turn, with every field that has a value: the chat template decides which it
    uses."""
    if not isinstance(raw_turn, Mapping):
        raise ValueError(f"{where}: got {quoted(raw_turn)}; accepted: `role` and `content`.")
    turn = {str(name): value for name, value in _without_nulls(raw_turn).items()}
    turn["role"] = _string(raw_turn.get("role"), f"{where}.role")
    content = _joined(raw_turn.get("content"), f"{where}.content")
    if content is None and any(turn.get(name) for name in CALLS):
        content = ""
    turn["content"] = _string(content, f"{where}.content")
    _check_unicode({name: turn[name] for name in turn.keys() - {"role", "content"}}, where)
    return turn


def _joined(content: object, where: str) -> object:
    """The content of a turn as one text: a list of parts is joined, and all must be texts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ValueError(f"{where}: got a part of the type {quoted(kind)}; accepted: text.")
    return "".join(_string(part.get("text"), where) for part in content)


def _conversation(
    turns: tuple[Mapping[str, Any], ...], origin: str, tools: tuple[Any, ...] = ()
) -> Text:
    return Text("\n\n".join(map(turn_text, turns)), turns, origin, tools=tools)


def turn_text(turn: Mapping[str, Any]) -> str:
    """The text of a turn: its content, followed by its tool calls as JSON; of the assistant's also
    its other texts, such as reasoning, which a chat template may write.

    Others' turns may have texts that are no part of a prompt, such as the time of each.
    """
    calls = [json.dumps(turn[name], ensure_ascii=False) for name in CALLS if turn.get(name)]
    others = [
        turn[name]
        for name in sorted(turn.keys() - {*NOT_TEXTS, *CALLS})
        if turn["role"] == "assistant" and isinstance(turn[name], str) and turn[name]
    ]
    return "\n".join([*([turn["content"]] if turn["content"] else []), *calls, *others])


def opening(text: Text) -> str:
    """The start of a conversation, up to the first answer to somebody; empty for a plain text.

    An assistant's greeting before anybody spoke is not an answer, unless nobody else speaks at all.
    """
    turns = text.messages or ()
    start = next((i for i, turn in enumerate(turns) if turn["role"] not in NOT_ASKING), 0)
    until_answer = itertools.takewhile(lambda turn: turn["role"] != "assistant", turns[start:])
    return "".join(f"{turn_text(turn)}\n\n" for turn in (*turns[:start], *until_answer))


def plain(content: str, origin: str) -> Text:
    """A plain text, with all line ends converted to \\n."""
    return Text(content.replace("\r\n", "\n").replace("\r", "\n"), None, origin)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: got {quoted(value)}; accepted: a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}; accepted: valid Unicode."
        ) from None
    return value


def _check_unicode(value: Any, where: str) -> None:
    """Refuse half a surrogate pair in any text of the value, which no tokenizer reads."""
    _string(json.dumps(value, ensure_ascii=False, default=str), where)
