"""Texts from files: what a user has, one text at a time.

for text in read(Path("novels")): ...

.txt .md .rst    one text a file, UTF-8
.jsonl           one a line: `text`, or `messages` [{"role", "content"}, …], or `prompt` and
                 `response`
.parquet         one a row, the same fields
a folder         of these, at any depth, in the order of their paths; hidden files are left out
a folder that datasets' save_to_disk wrote    one a row, the same fields

The files of a folder lie in it, or in the Hugging Face cache as a snapshot's do; a link that leads
elsewhere is refused, as are FIFOs and devices (`bounded_files`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.bounded_files import (
    FileError,
    advised,
    chunks,
    entries,
    is_plain_name,
    lines,
    open_file,
    parse_json,
    read_json,
    real_file,
    shaped_as,
)

TEXTS = (".txt", ".md", ".rst")
RECORDS = (".jsonl", ".parquet")
LARGEST = 64 << 20
"""Bytes of one text file, and of one line of a .jsonl file: either is held in memory whole."""
LARGEST_RECORDS = 1 << 42
"""Bytes of a file of records, of which a line or some rows are held at once."""
LARGEST_GROUP = 4 << 30
"""Bytes of a row group of a .parquet file, unpacked."""
LARGEST_STATE = 16 << 20
"""Bytes of a JSON file of datasets."""
MOST_FILES = 1 << 22
BATCH_ROWS = 256
"""Rows of a .parquet file that are held in memory at once."""
CALLS = ("tool_calls", "function_call")
FIELDS = "`text`, or `messages`, or `prompt` and `response`"
DATASET_SPLITS, DATASET_STATE = "dataset_dict.json", "state.json"
DATASET_INFO = "dataset_info.json"


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


def read(path: Path) -> Iterator[Text]:
    """The texts of a file or a folder, in an order that does not change.

    Raises:
        ValueError: names the file, and the line or row: nothing there, a suffix that is not known,
            not UTF-8, too large, broken JSON, a field that is missing or of a wrong type, no
            regular file, or one that lies elsewhere.
    """
    if not path.exists():
        raise ValueError(f"{path}: nothing is there; accepted: {_accepted()}.")
    if path.is_dir() and any((path / mark).exists() for mark in (DATASET_SPLITS, DATASET_STATE)):
        yield from _dataset(path)
    elif path.is_dir():
        for file in _files(path):
            yield from _file(file, file.relative_to(path).as_posix(), within=path)
    else:
        yield from _file(path, path.name)


def _accepted() -> str:
    suffixes = ", ".join((*TEXTS, *RECORDS))
    return (
        f"files with the suffix {suffixes}, a folder of them, or a folder of Hugging Face datasets"
    )


def _files(folder: Path) -> list[Path]:
    found = (Path(name) for name in entries(folder, most=MOST_FILES))
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(shown, key=lambda path: path.parts)]


def _file(path: Path, origin: str, within: Path | None = None) -> Iterator[Text]:
    suffix = path.suffix.lower()
    real_file(path, within=within, largest=LARGEST_RECORDS)
    if suffix in TEXTS:
        yield _text_file(path, origin, within)
    elif suffix == ".jsonl":
        yield from _lines(path, origin, within)
    elif suffix == ".parquet":
        yield from _parquet(path, origin, within)
    else:
        raise ValueError(f"{path}: got the suffix {suffix!r}; accepted: {_accepted()}.")


def _text_file(path: Path, origin: str, within: Path | None) -> Text:
    try:
        with open_file(path, within=within, largest=LARGEST) as file:
            content = b"".join(chunks(file, path, largest=LARGEST))
    except FileError as error:
        raise ValueError(advised(error, "cut it into several texts, or leave it out")) from None
    return _plain(_decoded(content, f"{path}"), origin)


def _lines(path: Path, origin: str, within: Path | None) -> Iterator[Text]:
    found = lines(path, within=within, largest=LARGEST_RECORDS, longest=LARGEST)
    for number, line in enumerate(found, 1):
        where = f"{path}, line {number}"
        if line.strip():
            # Numbers of other fields are not ours to judge.
            record = parse_json(_decoded(line, where), where, finite=False)
            yield _record(record, where, f"{origin}:{number}")


def _parquet(path: Path, origin: str, within: Path | None) -> Iterator[Text]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        opened = parquet.ParquetFile(real_file(path, within=within, largest=LARGEST_RECORDS))
        _refuse_large_groups(opened.metadata, path)
        for batch in opened.iter_batches(batch_size=BATCH_ROWS):
            for record in batch.to_pylist():
                row += 1
                yield _record(record, f"{path}, row {row}", f"{origin}:{row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a .parquet file that can be read ({error}); write it "
            "anew, or leave it out."
        ) from None


def _refuse_large_groups(metadata: Any, path: Path) -> None:
    sizes = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if (largest := max(sizes, default=0)) > LARGEST_GROUP:
        raise ValueError(
            f"{path}: got a row group of {largest:,} bytes; accepted: at most {LARGEST_GROUP:,}; "
            "write it with smaller ones."
        )


def _dataset(path: Path) -> Iterator[Text]:
    import datasets
    import pyarrow

    try:
        _check_dataset(path)
        loaded = datasets.load_from_disk(str(path))
    except FileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a datasets folder that can be read ({told}).") from None
    named = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [(path.name, loaded)]
    for split, rows in sorted((str(name), rows) for name, rows in named):
        row = 0
        # As arrow has them: a feature that is decoded may open a file that a row names.
        batches: Any = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
        for batch in batches:
            for record in batch.to_pylist():
                row += 1
                yield _record(record, f"{path}, {split} row {row}", f"{split}:{row}")


def _check_dataset(path: Path) -> None:
    """Refuse a folder whose JSON names what lies elsewhere: datasets would open it."""
    splits = [path]
    if (path / DATASET_SPLITS).exists():
        where = path / DATASET_SPLITS
        given = read_json(where, within=path, largest=LARGEST_STATE, finite=False)
        with shaped_as(where, "the `splits` that save_to_disk writes"):
            splits = [path / _plain_part(name, where) for name in given["splits"]]
    for split in splits:
        where = split / DATASET_STATE
        given = read_json(where, within=path, largest=LARGEST_STATE, finite=False)
        read_json(split / DATASET_INFO, within=path, largest=LARGEST_STATE, finite=False)
        with shaped_as(where, "the `_data_files` that save_to_disk writes"):
            names = [_plain_part(each["filename"], where) for each in given["_data_files"]]
        for name in names:
            real_file(split / name, within=path, largest=LARGEST_RECORDS)


def _plain_part(name: object, where: Path) -> str:
    if not isinstance(name, str) or not is_plain_name(name):
        problem = f"{where}: got the name {_shown(name)}; accepted: files in its folder"
        raise FileError(problem, "leave the folder out")
    return name


# ── One record ───────────────────────────────────────────────────────────────────────────────────


def _record(record: object, where: str, origin: str) -> Text:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: got {_shown(record)}; accepted: an object with {FIELDS}.")
    given = {name for name in record if record[name] is not None}
    if "messages" in given:
        tools = _tools(record.get("tools"), f"{where}, tools")
        return _conversation(_turns(record["messages"], where), origin, tools)
    if "text" in given:
        return _plain(_string(record["text"], f"{where}, text"), origin)
    if {"prompt", "response"} <= given:
        asked = _string(record["prompt"], f"{where}, prompt")
        said = _string(record["response"], f"{where}, response")
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
        return _conversation(turns, origin)
    listed = ", ".join(sorted(map(str, given))) or "none"
    raise ValueError(f"{where}: got the fields {_shown(listed)}; accepted: {FIELDS}.")


def _tools(given: object, where: str) -> tuple[Any, ...]:
    if isinstance(given, str):  # As datasets of one column type keep them.
        given = parse_json(given, where)
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise ValueError(f"{where}: got {_shown(given)}; accepted: a list of JSON schemas.")
    return tuple(given)


def _turns(given: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where}, messages: got {_shown(given)}; accepted: a list of turns.")
    return tuple(_turn(each, f"{where}, messages[{i}]") for i, each in enumerate(given))


def _turn(given: object, where: str) -> Mapping[str, Any]:
    """With every field that has a value: what of them counts, the chat template says."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: got {_shown(given)}; accepted: `role` and `content`.")
    turn = {str(name): value for name, value in given.items() if value is not None}
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
            raise ValueError(f"{where}: got a part of the type {_shown(kind)}; accepted: text.")
    return "".join(_string(part.get("text"), where) for part in given)


def _conversation(
    turns: tuple[Mapping[str, Any], ...], origin: str, tools: tuple[Any, ...] = ()
) -> Text:
    return Text("\n\n".join(map(said, turns)), turns, origin, tools=tools)


def said(turn: Mapping[str, Any]) -> str:
    """The text of a turn: its content, and what it calls as JSON."""
    calls = [json.dumps(turn[name], ensure_ascii=False) for name in CALLS if turn.get(name)]
    return "\n".join([turn["content"], *calls] if turn["content"] else calls)


def _plain(content: str, origin: str) -> Text:
    return Text(content.replace("\r\n", "\n").replace("\r", "\n"), None, origin)


def _string(given: object, where: str) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{where}: got {_shown(given)}; accepted: a text.")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}; accepted: valid Unicode."
        ) from None
    return given


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = where if ", line " in where else f"{where}, line {line}"
        raise ValueError(
            f"{place}: byte 0x{content[error.start]:02x} is not UTF-8; accepted: UTF-8. "
            "Convert it first, as in: iconv -f latin1 -t utf-8."
        ) from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
