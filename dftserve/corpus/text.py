"""What every part of the corpus works on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana and Han, which are written without blanks, as the ranges of a
regular expression."""


@dataclass(frozen=True)
class Text:
    """One text, or one conversation."""

    content: str
    """Of a conversation: what is said in it, turn by turn."""
    messages: tuple[Mapping[str, Any], ...] | None
    """The conversation's turns, each with `role`, `content` and what else the record has; None for
    a plain text."""
    origin: str
    """The path under what was read, with the line or row: `letters/1.txt`, `chat.jsonl:7`."""
    ends: bool = True
    """False for a piece of a text that goes on in the next one."""
    tools: tuple[Any, ...] = ()
    """What a conversation's assistant may call, as the record has it."""
    split: Literal["train", "heldout"] | None = None
    """Where its corpus says that it belongs; None: drawn."""
    family: str = field(default="", compare=False)
    """Texts that are held out together have it in common: pieces of one, copies, answers to one
    prompt. Empty before `prepare`, and where nothing is held out."""
