"""Selects and renders a tokenizer's chat template, and finds the text it marks for training.

    template = ChatTemplate.of(tokenizer)
    text, spans = template.render(turns)

Generation marks are found with jinja's parser, so every spelling of the tag is recognised, and tags
in comments or raw blocks are not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Turn = Mapping[str, Any]
Span = tuple[int, int]
"""Start and end, in characters."""
Clock = Callable[[str], str]
"""From a strftime format to the date or time as text."""
CLOCK = "strftime_now"
"""The name of the clock function in templates."""

_NAMES_OF_TEMPLATES = ("<template>", "<unknown>")
"""File names that jinja uses in a traceback for a template compiled from a string."""
_PROBE = "\U000f0000"


class TemplateError(ValueError):
    """A chat template is missing or invalid, or refused a conversation."""


class UnfitError(ValueError):
    """A conversation must be left out; the message is the reason, by which it is counted."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template of a tokenizer."""

    name: str
    """`default` or `tool_use` if the tokenizer has several templates, else empty."""
    source: str
    marks: bool
    """Whether it marks the text to train on with `{% generation %}`."""
    special: Mapping[str, str]
    """The special tokens available to it as variables."""
    clock: Clock
    """Supplies the date and time."""
    header: str = ""
    """The text with which it opens an assistant's turn; empty if there is none."""
    end: str | None = None
    """The special token, or tokens, that end an assistant's turn; None if it writes none."""
    tokens: tuple[str, ...] = ()
    """The tokenizer's special tokens, longest first."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> "ChatTemplate":
        """The template for conversations with or without tools.

        Raises:
            TemplateError: there is none, or it is not valid jinja.
        """
        name, source = _selected_template(tokenizer, tools)
        special = ((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
        clock, specials = clock_of(tokenizer), tuple(special_tokens(tokenizer))
        return _analysed(name, source, tuple(special), specials, clock)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"the chat template {self.name!r}" if self.name else "the chat template"

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, *, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the parts that the template marks as generated.

        Args:
            ask: end with the text that opens an assistant's turn.

        Raises:
            TemplateError: the template raised an error; gives its message and line.
        """
        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[[_passed_fields(turn) for turn in turns]],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=ask,
                strftime_now=self.clock,
                **self.special,
            )
        except (jinja2.TemplateError, *_FAULTS) as error:
            line = _line(error)
            where = f"{self.title}, line {line}" if line else self.title
            raise TemplateError(f"{where}, refuses it: {_message_of(error)}") from None
        return texts[0], list(spans[0]) if self.marks else []


def _passed_fields(turn: Turn) -> dict[str, Any]:
    """The fields of a turn that are passed to the template."""
    return {name: value for name, value in turn.items() if name != "weight"}


_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that expressions in a template may raise."""


def tells_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template of the tokenizer writes the date or the time."""
    templates: Any = tokenizer.chat_template or ""
    return any(
        CLOCK in source
        for source in (templates.values() if isinstance(templates, dict) else [templates])
    )


def stop_clock(tokenizer: PreTrainedTokenizerBase, moment: datetime) -> None:
    """From now on this tokenizer's templates are rendered with `moment` as the current time."""
    tokenizer.clock = moment.strftime  # type: ignore[attr-defined]


def clock_of(tokenizer: PreTrainedTokenizerBase) -> Clock:
    """The clock that a tokenizer's template reads: the stopped one, or the machine's."""
    return getattr(tokenizer, "clock", _now)


def _now(wanted: str) -> str:
    return datetime.now().strftime(wanted)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as one special token, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token.content) for token in added if token.special}
    texts |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def _selected_template(tokenizer: PreTrainedTokenizerBase, tools: bool) -> tuple[str, str]:
    templates: Any = tokenizer.chat_template
    if not templates:
        raise TemplateError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; accepted: one that "
            "has one, or plain texts instead of conversations."
        )
    if isinstance(templates, str):
        return "", templates
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        raise TemplateError(
            f"the tokenizer has the chat templates {', '.join(sorted(templates))}; accepted: one "
            "named 'default'. Rename the one to be used."
        )
    return name, templates[name]


@lru_cache(maxsize=16)
def _analysed(
    name: str,
    source: str,
    special: tuple[tuple[str, str], ...],
    specials: tuple[str, ...],
    clock: Clock,
) -> ChatTemplate:
    marks = _has_marks(name, source)
    bare = ChatTemplate(name, source, marks, dict(special), clock, tokens=specials)
    header, end = _turn_delimiters(bare)
    return replace(bare, header=header, end=end)


class _Marks(jinja2.ext.Extension):
    """Parses the tag as transformers does, and records that it was found."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        self.environment.extend(found_marks=True)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _has_marks(name: str, source: str) -> bool:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, jinja2.ext.loopcontrols]
    )
    try:
        environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        title = f"the chat template {name!r}" if name else "the chat template"
        raise TemplateError(
            f"{title}, line {error.lineno}, is not jinja: {error.message}; correct it in the "
            "model's folder (chat_template.jinja, or tokenizer_config.json)."
        ) from None
    return bool(getattr(environment, "found_marks", False))


def _turn_delimiters(template: ChatTemplate) -> tuple[str, str | None]:
    """What an assistant's turn begins and ends with, found by rendering minimal conversations."""
    question: list[Turn] = [{"role": "user", "content": "x"}]
    answer: list[Turn] = [{"role": "assistant", "content": _PROBE}]
    try:
        bare, _ = template.render(question)
        opened, _ = template.render(question, ask=True)
        answered, _ = template.render([*question, *answer])
    except TemplateError:
        return "", None
    header = opened.removeprefix(bare) if opened.startswith(bare) else ""
    _, _, tail = answered.rpartition(_PROBE)
    try:
        _, _, goes_on = template.render([*question, *answer, *question])[0].rpartition(_PROBE)
    except TemplateError:
        goes_on = ""
    # A turn may end with several tokens. What follows it is not the same in both renderings, unless
    # the template always asks for an answer.
    end = common_start(tail, goes_on, template.tokens).strip()
    if header and end.startswith(template.tokens) and end.endswith(template.tokens):
        return header, end
    return header, next(
        (token for token in template.tokens if tail.lstrip().startswith(token)), None
    )


def common_start(one: str, other: str, tokens: Sequence[str]) -> str:
    """What both texts begin with, without a part of a special token."""
    pairs = enumerate(zip(one, other, strict=False))
    length = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    for text in (one, other):
        for token in tokens:
            at = text.find(token, max(0, length - len(token) + 1))
            if 0 <= at < length:
                length = at
    return one[:length]


def _line(error: BaseException) -> int | None:
    """The line of the template that raised the error: jinja records it in the traceback."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename in _NAMES_OF_TEMPLATES:
            line = at.tb_lineno
        at = at.tb_next
    return line


def _message_of(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:299]}…"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
