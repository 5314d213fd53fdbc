"""A tokenizer's chat template: which one is used, what it writes, and where it says that it learns.

    template = ChatTemplate.of(tokenizer)
    text, spans = template.render(turns)

Generation marks are found by jinja's parser, so that every way to write the tag counts, and none in
a comment or a raw block does.
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
"""Characters from a start to an end."""
Clock = Callable[[str], str]
"""From a format of strftime to the text that a template writes for it."""
CLOCK = "strftime_now"
"""What templates call it."""

_NAMES_OF_TEMPLATES = ("<template>", "<unknown>")
"""What jinja calls the file of a template from a string, in a traceback."""
_PROBE = "\U000f0000"


class TemplateError(ValueError):
    """What a chat template said of a conversation, or what is wrong with the template."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template of a tokenizer."""

    name: str
    """`default` or `tool_use` where the tokenizer has several, else empty."""
    source: str
    marks: bool
    """Whether it marks with `{% generation %}` what is learnt."""
    special: Mapping[str, str]
    """The special tokens that it may name."""
    clock: Clock
    """What it takes for the date and time."""
    header: str = ""
    """What it opens an assistant's turn with; empty where it has no such thing."""
    end: str | None = None
    """The special token that ends an assistant's turn; None where it writes none."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> "ChatTemplate":
        """The template that a conversation, with tools or without, is written by.

        Raises:
            TemplateError: there is none, or it is no jinja.
        """
        name, source = _chosen(tokenizer, tools)
        special = ((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
        clock, specials = clock_of(tokenizer), tuple(special_tokens(tokenizer))
        return _analysed(name, source, tuple(special), specials, clock)

    @property
    def title(self) -> str:
        """In messages."""
        return f"the chat template {self.name!r}" if self.name else "the chat template"

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, *, ask: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the parts that the template marks as generated.

        Args:
            ask: end with what opens an assistant's turn.

        Raises:
            TemplateError: what the template raised, with its line there.
        """
        try:
            texts, spans = cast(Any, render_jinja_template)(
                conversations=[[_shown(turn) for turn in turns]],
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
            raise TemplateError(f"{where}, refuses it: {_told(error)}") from None
        return texts[0], list(spans[0]) if self.marks else []


def _shown(turn: Turn) -> dict[str, Any]:
    """What a template gets to see."""
    return {name: value for name, value in turn.items() if name != "weight"}


_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template's own expressions raise."""


def tells_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template of the tokenizer writes the date or the time."""
    given: Any = tokenizer.chat_template or ""
    return any(
        CLOCK in source for source in (given.values() if isinstance(given, dict) else [given])
    )


def stop_clock(tokenizer: PreTrainedTokenizerBase, moment: datetime) -> None:
    """Whenever this tokenizer's templates are rendered from now on, it is that moment to them."""
    tokenizer.clock = moment.strftime  # type: ignore[attr-defined]


def clock_of(tokenizer: PreTrainedTokenizerBase) -> Clock:
    return getattr(tokenizer, "clock", _now)


def _now(wanted: str) -> str:
    return datetime.now().strftime(wanted)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as one special token, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token.content) for token in added if token.special}
    texts |= {str(token) for token in tokenizer.all_special_tokens}
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def _chosen(tokenizer: PreTrainedTokenizerBase, tools: bool) -> tuple[str, str]:
    given: Any = tokenizer.chat_template
    if not given:
        raise TemplateError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template; accepted: one that "
            "has, or plain texts in place of conversations."
        )
    if isinstance(given, str):
        return "", given
    name = "tool_use" if tools and "tool_use" in given else "default"
    if name not in given:
        raise TemplateError(
            f"the tokenizer has the chat templates {', '.join(sorted(given))}; accepted: one of "
            "the name 'default'. Rename the one that you mean."
        )
    return name, given[name]


@lru_cache(maxsize=16)
def _analysed(
    name: str,
    source: str,
    special: tuple[tuple[str, str], ...],
    specials: tuple[str, ...],
    clock: Clock,
) -> ChatTemplate:
    bare = ChatTemplate(name, source, _has_marks(name, source), dict(special), clock)
    header, end = _frame(bare, specials)
    return replace(bare, header=header, end=end)


class _Marks(jinja2.ext.Extension):
    """Takes the tag as transformers does, and notes that it was there."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it off the class

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


def _frame(template: ChatTemplate, specials: Sequence[str]) -> tuple[str, str | None]:
    """What an assistant's turn begins and ends with, from the shortest conversations."""
    asked: list[Turn] = [{"role": "user", "content": "x"}]
    try:
        bare, _ = template.render(asked)
        opened, _ = template.render(asked, ask=True)
        answered, _ = template.render([*asked, {"role": "assistant", "content": _PROBE}])
    except TemplateError:
        return "", None
    header = opened.removeprefix(bare) if opened.startswith(bare) else ""
    _, _, tail = answered.rpartition(_PROBE)
    end = next((token for token in specials if tail.lstrip().startswith(token)), None)
    return header, end


def _line(error: BaseException) -> int | None:
    """The line of the template in which it happened: jinja writes it into the traceback."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename in _NAMES_OF_TEMPLATES:
            line = at.tb_lineno
        at = at.tb_next
    return line


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 300 else f"{text[:299]}…"
    return text if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {text}"
