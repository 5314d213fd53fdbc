"""Prompts from a file.

.txt      one per line
.jsonl    one object per line: `prompt`, and optionally `system`; other fields are kept in
          `Prompt.about` for the task that reads them
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dftserve.bounded_files import json_rows, read_text

MOST = 100_000
LARGEST = 256 << 20
"""Maximum bytes of a file of prompts."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, with the system prompt before it. `about`: other fields of its line, which are not
    sent."""

    text: str
    system: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What answers to this prompt have in common (`Sample.group`): its text, unless a system
        prompt tells it from others with the same one."""
        return f"{self.system}\0{self.text}" if self.system else self.text

    def messages(self) -> list[dict[str, str]]:
        user = {"role": "user", "content": self.text}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


def read(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in its order.

    Raises:
        ValueError: no such file, another suffix, invalid JSON, half a surrogate pair, a line
            without a prompt, the same prompt twice, too many.
    """
    if path.suffix.lower() not in (".txt", ".jsonl") or not path.exists():
        raise ValueError(f"prompts: got {path}; accepted: a .txt or .jsonl file that exists.")
    lines = read_text(path, largest=LARGEST, encoding="utf-8-sig").split("\n")
    if path.suffix.lower() == ".jsonl":
        rows = json_rows((line.encode() for line in lines), path)
        prompts = [_prompt(record, where) for where, record in rows]
    else:
        prompts = [Prompt(line.strip()) for line in lines if line.strip()]
    _check(prompts, path)
    return tuple(prompts)


def _prompt(record: Any, where: str) -> Prompt:
    """The prompt of a row; all its fields are recorded in asked.json."""
    text = record.get("prompt") if isinstance(record, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: got no `prompt`; accepted: an object with a text `prompt`.")
    system = record.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(f"{where}, system: got {system!r:.80}; accepted: a text.")
    about = {name: value for name, value in record.items() if name not in ("prompt", "system")}
    return Prompt(text, system, about)


def _check(prompts: list[Prompt], path: Path) -> None:
    if not 1 <= len(prompts) <= MOST:
        raise ValueError(f"{path}: got {len(prompts)} prompts; accepted: 1 to {MOST}.")
    seen: set[tuple[str, str]] = set()
    for prompt in prompts:
        if (prompt.system, prompt.text) in seen:
            raise ValueError(
                f"{path}: got {prompt.text[:60]!r} twice; accepted: each prompt once (more answers "
                "to it are `--samples`)."
            )
        seen.add((prompt.system, prompt.text))
