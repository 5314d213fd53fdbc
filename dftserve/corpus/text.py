"""The text type that all modules of the corpus package work on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana and Han, which are written without spaces, as ranges for a
regular expression."""
_UNSPACED = re.compile(f"[{UNSPACED}]")


@dataclass(frozen=True)
class Text:
    """One text, or one conversation."""

    content: str
    """For a conversation, the text of its turns, one after another."""
    messages: tuple[Mapping[str, Any], ...] | None
    """The conversation's turns, each with `role`, `content` and any other fields of the record;
    None for a plain text."""
    origin: str
    """The path relative to the corpus, with the line or row: `letters/1.txt`, `chat.jsonl:7`."""
    ends: bool = True
    """False for a piece of a text that continues in the next piece."""
    tools: tuple[Any, ...] = ()
    """The tools that a conversation's assistant may call, as given in the record."""
    split: Literal["train", "heldout"] | None = None
    """The split that its corpus assigns; None: it is drawn."""
    family: str = field(default="", compare=False)
    """An identifier shared by texts that must be in the same split: pieces of one text, copies,
    answers to one prompt. Empty before `prepare`, and if nothing is held out."""


def length_in_words(content: str) -> int:
    """Words separated by spaces; of scripts written without them, two characters count as one."""
    spaced, characters = _UNSPACED.subn(" ", content)
    return len(spaced.split()) + characters // 2
