"""Reads the reference tables of a document: settings and their defaults."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REQUIRED = "required"


def section(text: str, title: str) -> str:
    """The text below a heading of any level, up to the next heading of its level or a higher one.

    Raises:
        KeyError: no such heading.
    """
    heading = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
    if heading is None:
        raise KeyError(title)
    rest = text[heading.end() :]
    end = re.search(rf"^#{{1,{len(heading[1])}}} ", rest, re.MULTILINE)
    return rest if end is None else rest[: end.start()]


def settings_of(text: str) -> dict[str, str]:
    """The default, as written, of each setting in the tables of two columns or more whose second
    column is headed `default`. A row may name several settings."""
    found: dict[str, str] = {}
    header: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if header is None:
            header = cells
        elif header[1] == "default":
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1])
    return found


def read_default(written: str) -> Any:
    """A default as the documents write it: YAML, in backticks or not, or `required`."""
    content = written.strip("`")
    if content == REQUIRED:
        return dataclasses.MISSING
    # YAML 1.1 reads 2e-5, without a point, as a text.
    return float(content) if re.fullmatch(r"\de-\d", content) else yaml.safe_load(content)


def defaults_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a dataclass by their names, with the prefix, and their defaults as YAML would
    read them; MISSING: required."""
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from defaults_of(default, f"{prefix}{field.name}.")
        else:
            yield (
                f"{prefix}{field.name}",
                list(default) if isinstance(default, tuple) else default,
            )


def read(path: Path) -> dict[str, Any]:
    """The settings of a document's tables with their defaults."""
    return {name: read_default(each) for name, each in settings_of(path.read_text()).items()}
