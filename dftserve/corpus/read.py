"""Reads texts from files of several formats, one text at a time.

for text in read(Path("novels")): ...

.txt .md .rst    one text per file, UTF-8
.jsonl           one per line: `text`, `messages`, `prompt` and `response`, … (records.py)
.jsonl.gz        the same, compressed
.json            one per object of a list, with the same fields
.csv             one per row, with the same fields, named in the header; empty cells are ignored
.parquet         one per row, with the same fields
a folder         of these, at any depth, in the order of their paths; hidden files are skipped
a folder written by datasets' save_to_disk    one per row, with the same fields

Splits are respected: if there is a split `train`, then `test`, `validation` and the like are held
out, and come first. Splits are those of a DatasetDict (`test_sft` is one of `test`), or are given
by the names of a folder's files of records (`test.jsonl`, `my_train.csv`,
`train-00000-of-00002-a09b74b3ef9c3b56.parquet`), of its texts (`train.txt`, nothing else in the
name), or of the folders in it (`test/…`).

A README in a folder with records describes them, and is not read.

The files of a folder must be inside it, or in the Hugging Face cache as for a snapshot. Links that
lead elsewhere, FIFOs and devices are refused (`bounded_files`).
"""

import codecs
import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from dftserve.bounded_files import (
    FileError,
    chunks,
    entries,
    is_plain_name,
    lines,
    lines_of,
    open_file,
    parse_json,
    read_json,
    real_file,
    shaped_as,
    with_advice,
)
from dftserve.corpus.records import KNOWN, Fields, plain, record
from dftserve.corpus.text import Text
from dftserve.settings import quoted

TRAIN_SPLITS = ("train", "training")
HELDOUT_SPLITS = (
    *("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"),
    *("heldout", "holdout"),
)
TEXTS = (".txt", ".md", ".rst")
RECORDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
LARGEST = 64 << 20
"""Bytes of a text file, of a line of a .jsonl file and of a row of a .csv file; each is read into
memory as a whole."""
LARGEST_LIST = 1 << 30
"""Bytes of a .json file, whose whole list is in memory and takes several times as much there."""
LARGEST_RECORDS = 1 << 42
"""Bytes of a file of records, which is read line by line or a few rows at a time."""
LARGEST_GROUP = 4 << 30
"""Bytes of a row group of a .parquet file, uncompressed."""
LARGEST_STATE = 16 << 20
"""Bytes of a JSON file written by datasets."""
MOST_FILES = 1 << 22
"""Maximum number of files in a folder of texts."""
BATCH_ROWS = 256
"""Rows of a .parquet file in memory at a time."""
SAMPLE = 1 << 16
"""Bytes of a file from which its encoding is guessed."""
DATASET_SPLITS, DATASET_STATE = "dataset_dict.json", "state.json"
DATASET_INFO = "dataset_info.json"


Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Part:
    """The texts of one file or split."""

    split: Split | None
    """Which split they belong to; None: it is drawn."""
    texts: Iterator[Text]
    """Read lazily."""


def read(path: Path, fields: Fields = KNOWN) -> Iterator[Text]:
    """The texts of a file or a folder, in a fixed order with held-out splits first.

    Raises:
        ValueError: names the file, and the line or row: nothing there, an unknown suffix, not
            UTF-8, too large, broken JSON, a field that is missing or has the wrong type, not a
            regular file, or a file outside the folder.
    """
    yield from in_order(parts(path, fields))


def parts(path: Path, fields: Fields = KNOWN) -> list[Part]:
    """What `read` reads, as one part per file or split; raises the same errors."""
    check(path)
    if _is_dataset(path):
        return _dataset(path, fields)
    if not path.is_dir():
        return [Part(None, _file(path, _origin(Path(path.name)), fields))]
    files = _files(path)
    names = [file.relative_to(path) for file in files]
    return [
        Part(split, _file(file, _origin(name), fields, within=path))
        for file, name, split in zip(files, names, _splits(map(_split_of, names)), strict=True)
    ]


def _origin(name: Path) -> str:
    """A file's name as text: bytes of it that are not UTF-8 are written as \\xe9, since reports
    with it are written as UTF-8."""
    return os.fsencode(name.as_posix()).decode("utf-8", "backslashreplace")


def in_order(listed: Iterable[Part]) -> Iterator[Text]:
    """The texts of all parts, held-out ones first, since the later of near-copies is dropped."""
    for part in sorted(listed, key=lambda part: part.split != "heldout"):
        for text in part.texts:
            yield replace(text, split=part.split)


def check(path: Path) -> None:
    """Refuse paths that `read` could not read, without opening any file.

    Raises:
        ValueError: nothing there, an unknown suffix, or a folder without files.
    """
    if not path.exists():
        raise ValueError(f"{path}: nothing is there; accepted: {_accepted()}.")
    if _is_dataset(path):
        return
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: got no files with the suffix {_SUFFIXES}; give some.")
    for file in files:
        if _suffix(file) not in (*TEXTS, *RECORDS):
            raise ValueError(f"{file}: got the suffix {_suffix(file)!r}; accepted: {_accepted()}.")


_SUFFIXES = ", ".join((*TEXTS, *RECORDS))


def _suffix(path: Path) -> str:
    """The suffix in lower case; both suffixes of a .gz file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def _accepted() -> str:
    return (
        f"files with the suffix {_SUFFIXES}, a folder of them, or a folder of Hugging Face datasets"
    )


def _is_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / mark).exists() for mark in (DATASET_SPLITS, DATASET_STATE))


def _files(folder: Path) -> list[Path]:
    paths = (Path(name) for name in entries(folder, most=MOST_FILES))
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    if any(_suffix(path) in RECORDS for path in visible):
        visible = [path for path in visible if not _is_readme(path)]
    return [folder / path for path in sorted(visible, key=lambda path: path.parts)]


def _is_readme(path: Path) -> bool:
    return _suffix(path) in TEXTS and path.stem.lower() == "readme"


def _split_of(path: Path) -> Split | None:
    """The split that a file's path, relative to the corpus, names: the file's own name, or else
    that of the innermost folder."""
    stem = path.name[: -len(_suffix(path))]
    named = _split_named(stem) if _suffix(path) in RECORDS else _exact_split(stem)
    folders = map(_exact_split, reversed(path.parts[:-1]))
    return named or next((split for split in folders if split), None)


def _split_named(name: str) -> Split | None:
    """The split that a word of a name names (`train_sft`, `alpaca-test-00000-of-00001`); None if
    there is none, or if there are two."""
    words = map(_exact_split, re.split(r"[^a-zA-Z]+", name))
    named: set[Split] = {split for split in words if split}
    return named.pop() if len(named) == 1 else None


def _exact_split(word: str) -> Split | None:
    if word.lower() in TRAIN_SPLITS:
        return "train"
    return "heldout" if word.lower() in HELDOUT_SPLITS else None


def _splits(named: Iterable[Split | None]) -> list[Split | None]:
    """The splits that names name, and `train` for what names none; None for all if not both kinds
    are present."""
    listed = list(named)
    if not {"train", "heldout"} <= {*listed}:
        return [None] * len(listed)
    return [each or "train" for each in listed]


def _file(path: Path, origin: str, fields: Fields, within: Path | None = None) -> Iterator[Text]:
    suffix = _suffix(path)
    real_file(path, within=within, largest=LARGEST_RECORDS)
    if suffix in TEXTS:
        yield _text_file(path, origin, within)
    elif suffix == ".jsonl":
        raw_lines = lines(path, within=within, largest=LARGEST_RECORDS, longest=LARGEST)
        yield from _lines(raw_lines, path, origin, fields)
    elif suffix == ".jsonl.gz":
        yield from _lines(_unpacked(path, within), path, origin, fields)
    elif suffix == ".csv":
        yield from _table(path, origin, fields, within)
    elif suffix == ".json":
        yield from _list(path, origin, fields, within)
    else:
        yield from _parquet(path, origin, fields, within)


def _text_file(path: Path, origin: str, within: Path | None) -> Text:
    try:
        content = _content(path, within, LARGEST)
    except FileError as error:
        raise ValueError(with_advice(error, "cut it into several texts, or leave it out")) from None
    return plain(_decoded(content, f"{path}"), origin)


def _content(path: Path, within: Path | None, largest: int) -> bytes:
    with open_file(path, within=within, largest=largest) as file:
        return b"".join(chunks(file, path, largest=largest))


def _list(path: Path, origin: str, fields: Fields, within: Path | None) -> Iterator[Text]:
    try:
        content = _content(path, within, LARGEST_LIST)
    except FileError as error:
        raise ValueError(with_advice(error, "write it as .jsonl, one record a line")) from None
    try:
        records = parse_json(_decoded(content, f"{path}"), f"{path}", finite=False)
    except FileError as error:
        one_a_line = "correct the file, or, if it has one record a line, name it .jsonl"
        raise ValueError(with_advice(error, one_a_line)) from None
    if not isinstance(records, list):
        raise ValueError(
            f"{path}: got a {type(records).__name__}; accepted: a list of records, [{{…}}, …]. One "
            "record a line is .jsonl."
        )
    for number, each in enumerate(records, 1):
        yield record(each, f"{path}, record {number}", f"{origin}:{number}", fields)


def _lines(raw_lines: Iterable[bytes], path: Path, origin: str, fields: Fields) -> Iterator[Text]:
    for number, line in enumerate(raw_lines, 1):
        where = f"{path}, line {number}"
        if line.strip():
            # NaN and infinity are allowed: other fields of the record may contain them.
            value = parse_json(_decoded(line, where), where, finite=False)
            yield record(value, where, f"{origin}:{number}", fields)


def _unpacked(path: Path, within: Path | None) -> Iterator[bytes]:
    """The lines of a .gz file, read one at a time."""
    try:
        with (
            open_file(path, within=within, largest=LARGEST_RECORDS) as packed,
            gzip.GzipFile(fileobj=packed) as file,
        ):
            yield from lines_of(cast(Any, file), path, largest=LARGEST_RECORDS, longest=LARGEST)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a .gz file that can be read ({error}); compress it again, or leave it "
            "out."
        ) from None


def _table(path: Path, origin: str, fields: Fields, within: Path | None) -> Iterator[Text]:
    # A global setting of the csv module; the default of 128 KiB is less than a long text.
    csv.field_size_limit(LARGEST)
    row = _Row(path, within)
    reader = csv.reader(row.lines(), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: got the header {quoted(names)}; accepted: each name once.")
        for number, values in enumerate(filter(None, reader), 1):
            row.size = 0
            where = f"{path}, row {number} after the header"
            if len(values) != len(names):
                raise ValueError(
                    f"{where}: got {len(values)} fields; accepted: {len(names)}, as in the header. "
                    'Put texts with commas or line ends into "".'
                )
            values_by_name = {
                name: value for name, value in zip(names, values, strict=True) if value
            }
            yield record(values_by_name, where, f"{origin}:{number}", fields)
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: not a .csv file that can be read ({error}); write it "
            "again, or as .jsonl."
        ) from None


@dataclass
class _Row:
    """Reads the lines of a .csv file, and bounds the size of a row, which may span many lines."""

    path: Path
    within: Path | None
    size: int = 0
    """Bytes read since the end of the last row."""

    def lines(self) -> Iterator[str]:
        raw_lines = lines(self.path, within=self.within, largest=LARGEST_RECORDS, longest=LARGEST)
        for number, line in enumerate(raw_lines, 1):
            where = f"{self.path}, line {number}"
            self.size += len(line)
            if self.size > LARGEST:
                raise ValueError(
                    f"{where}: got a row of more than {LARGEST:,} bytes; accepted: shorter ones. "
                    'Is a " not closed?'
                )
            yield _decoded(line, where)


def _parquet(path: Path, origin: str, fields: Fields, within: Path | None) -> Iterator[Text]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        opened = parquet.ParquetFile(real_file(path, within=within, largest=LARGEST_RECORDS))
        _refuse_large_groups(opened.metadata, path)
        for batch in opened.iter_batches(batch_size=BATCH_ROWS):
            for values in _values(batch, f"{path}, rows from {row + 1}"):
                row += 1
                yield record(values, f"{path}, row {row}", f"{origin}:{row}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path}: not a .parquet file that can be read ({error}); write it again, or leave it "
            "out."
        ) from None


def _refuse_large_groups(metadata: Any, path: Path) -> None:
    sizes = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if (largest := max(sizes, default=0)) > LARGEST_GROUP:
        raise ValueError(
            f"{path}: got a row group of {largest:,} bytes; accepted: at most {LARGEST_GROUP:,}; "
            "write it with smaller ones."
        )


def _dataset(path: Path, fields: Fields) -> list[Part]:
    import datasets
    import pyarrow

    try:
        _check_dataset(path)
        loaded = datasets.load_from_disk(str(path))
    except FileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a datasets folder that can be read ({reason}).") from None
    named = loaded.items() if isinstance(loaded, datasets.DatasetDict) else [(path.name, loaded)]
    by_split = sorted((str(name), rows) for name, rows in named)
    sides = _splits(_split_named(split) for split, _ in by_split)
    return [
        Part(side, _rows(rows, path, split, fields))
        for side, (split, rows) in zip(sides, by_split, strict=True)
    ]


def _rows(rows: Any, path: Path, split: str, fields: Fields) -> Iterator[Text]:
    row = 0
    # Raw Arrow values: decoding a feature may open a file whose path is in the row.
    for batch in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for values in _values(batch, f"{path}, {split} rows from {row + 1}"):
            row += 1
            yield record(values, f"{path}, {split} row {row}", f"{split}:{row}", fields)


def _values(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table, without its columns of times, which no record uses: times that
    Python has no type for (years above 9999, an unknown time zone) are no reason to refuse texts.

    Raises:
        ValueError: a value that Python cannot represent, such as a text that is not UTF-8.
    """
    import pyarrow

    names: list[str] = batch.schema.names
    if len({*names}) < len(names):
        raise ValueError(f"{where}: got the columns {quoted(names)}; accepted: each name once.")
    kept = [each.name for each in batch.schema if not pyarrow.types.is_temporal(each.type)]
    columns: dict[str, list[Any]] = {}
    for name in kept:
        try:
            columns[name] = batch.column(name).to_pylist()
        except (OverflowError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{where}, column {name}: got a value that cannot be read ({error}); correct the "
                "column, or leave it out."
            ) from None
    for number in range(batch.num_rows):
        yield {name: values[number] for name, values in columns.items()}


def _check_dataset(path: Path) -> None:
    """Refuse a folder whose JSON names files outside it, which datasets would open."""
    splits = [path]
    if (path / DATASET_SPLITS).exists():
        where = path / DATASET_SPLITS
        state = read_json(where, within=path, largest=LARGEST_STATE, finite=False)
        with shaped_as(where, "the `splits` that save_to_disk writes"):
            splits = [path / _plain_part(name, where) for name in state["splits"]]
    for split in splits:
        where = split / DATASET_STATE
        state = read_json(where, within=path, largest=LARGEST_STATE, finite=False)
        read_json(split / DATASET_INFO, within=path, largest=LARGEST_STATE, finite=False)
        with shaped_as(where, "the `_data_files` that save_to_disk writes"):
            names = [_plain_part(each["filename"], where) for each in state["_data_files"]]
        for name in names:
            real_file(split / name, within=path, largest=LARGEST_RECORDS)


def _plain_part(name: object, where: Path) -> str:
    if not isinstance(name, str) or not is_plain_name(name):
        problem = f"{where}: got the name {quoted(name)}; accepted: files in its folder"
        raise FileError(problem, "leave the folder out")
    return name


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        position = where if ", line " in where else f"{where}, line {line}"
        raise ValueError(
            f"{position}: byte 0x{content[error.start]:02x} is not UTF-8; accepted: UTF-8. "
            f"Convert it first, as in: iconv -f {_encoding(content)} -t utf-8."
        ) from None


def _encoding(content: bytes) -> str:
    """A guess at the encoding of bytes that are not UTF-8, by iconv's name for it.

    UTF-16 has a byte order mark, or a null byte next to each ASCII character. Windows-1252 has all
    characters of Latin-1, and quotation marks and dashes where that has control characters.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    nulls = [content[start:SAMPLE:2].count(0) for start in (0, 1)]
    if max(nulls) * 8 < min(len(content), SAMPLE):  # A quarter of the characters.
        return "cp1252"
    return "utf-16be" if nulls[0] > nulls[1] else "utf-16le"
