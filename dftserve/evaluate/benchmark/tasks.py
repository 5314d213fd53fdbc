"""The tasks of the Style Diversity Benchmark: what to ask, and how people answer.

A task is a YAML file; `story`, `essay` and `e2e` come with dftserve, and a file of your own has the
same keys. The texts are not part of it; they are read from files in a data folder:

    title       a line
    about       what the human texts are, and what they are not
    kind        style: how varied, and how near to people;
                meaning: one meaning in many words (`benchmark.slots`)
    prompts     file   .txt or .jsonl, as `generate.prompts`; .json, a list of texts; .csv, the
                       different meanings of its column `mr`
                first, count     the range of its rows to use, from 0
                ask    the text that is sent, with `{}` for the row
    human       files  names or patterns, as `fdg_*.json`
                       .json  {"original": texts by people, "sampled": by a model that was given
                              the same beginning}; what both begin with is the prompt
                       .rst   documents, of which the prose is used
                       .csv   the column `ref`, answers to the meaning in `mr`
                       other  as `dftserve.corpus` reads them
                pieces    maximum number of windows of one work
                least     prompts with fewer human texts are left out
    words       per window; only for `style`
    samples     texts per prompt
    max_tokens  per text
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import settings
from dftserve.bounded_files import decoded, read_bytes, read_json, read_text, real_file
from dftserve.corpus.read import LARGEST_RECORDS
from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import rst, slots
from dftserve.evaluate.generate import prompts
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.text import windows
from dftserve.evaluate.text.windows import LEAST_WORDS, WORDS, Sample

FOLDER = Path(__file__).parent
SUFFIXES = (".yaml", ".yml")
LARGEST = 256 << 20
"""Maximum size of a file of texts, in bytes."""
DATA = "DFTSERVE_DATA"
"""The environment variable that names the folder of data."""
KINDS = ("style", "meaning")
_SAME = 30
"""Texts whose first words, this many, are the same count as one."""


class Missing(ValueError):  # noqa: N818 - describes the texts.
    """The texts of a task are missing, so it can be skipped."""


@dataclass(frozen=True)
class Task:
    """A part of the benchmark with its texts.

    words: per window; 0 for `meaning`, whose texts are compared whole.
    samples: texts per prompt. prompts: for `meaning`, each has `about["meaning"]`.
    """

    title: str
    about: str
    kind: str
    prompts: tuple[Prompt, ...]
    human: tuple[Sample, ...]
    words: int
    samples: int
    max_tokens: int


def shipped() -> list[str]:
    """The names of the tasks that come with dftserve."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str | Path, data: Path | None = None) -> Task:
    """A shipped task by its name, or one from a .yaml file, with its texts.

    Args:
        data: the folder for files whose path is not absolute; default: $DFTSERVE_DATA.

    Raises:
        Missing: there is no such folder, or a file is not in it.
        ValueError: no such task, not YAML, an unknown key (the message has the nearest name), an
            invalid value, or a file of another format.
    """
    path = _path(name)
    file = settings.load(_File, settings.read_yaml(path), path.name)
    folder = _folder(path.stem, data)
    human = list(_human(file, folder, path.stem))
    asked = list(_prompts(file, folder, path.stem))
    if file.human.least:
        counts = Counter(sample.prompt for sample in human)
        asked = [prompt for prompt in asked if counts[prompt.text] >= file.human.least]
        kept = {prompt.text for prompt in asked}
        human = [sample for sample in human if sample.prompt in kept]
    if file.kind == "style":
        human = _distinct(human)
    if not asked or not human:
        raise ValueError(
            f"{path.name}: got {len(asked)} prompts and {len(human)} human texts; accepted: at "
            "least one of each."
        )
    return Task(
        title=file.title,
        about=file.about,
        kind=file.kind,
        prompts=tuple(asked),
        human=tuple(human),
        words=file.words if file.kind == "style" else 0,
        samples=file.samples,
        max_tokens=file.max_tokens,
    )


def continuations(path: Path) -> Iterator[tuple[Sample, Sample]]:
    """Pairs of a text by a person and one by a model with the same beginning, which is the prompt
    of both and remains part of each text; from a file in the format of Fast-DetectGPT (arXiv
    2310.05130).

    Raises:
        ValueError: a file of another format.
    """
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; accepted: `original`, `sampled`.")
    originals, sampled = (_texts(content.get(name), path) for name in ("original", "sampled"))
    for original, other in zip(originals, sampled, strict=True):
        prompt = _shared_beginning(original, other)
        yield Sample(original, prompt), Sample(other, prompt)


# ── The file ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Prompts:
    file: str
    first: int = 0
    count: int | None = None
    ask: str = "{}"

    def __post_init__(self) -> None:
        if self.first < 0 or (self.count is not None and self.count < 1):
            raise ValueError(
                f"first, count: got {self.first}, {self.count}; accepted: from 0, at least 1."
            )
        if self.ask.count("{}") != 1:
            raise ValueError(f"ask: got {self.ask!r:.80}; accepted: a text with one {{}}.")


@dataclass(frozen=True)
class _Human:
    files: tuple[str, ...]
    pieces: int = 1
    least: int = 0

    def __post_init__(self) -> None:
        if not self.files or self.pieces < 1 or self.least < 0:
            raise ValueError(
                f"files, pieces, least: got {len(self.files)} files, {self.pieces}, {self.least}; "
                "accepted: at least one file, 1 or more, 0 or more."
            )


@dataclass(frozen=True)
class _File:
    title: str
    kind: str
    prompts: _Prompts
    human: _Human
    samples: int
    max_tokens: int
    about: str = ""
    words: int = WORDS

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"kind: got {self.kind!r}; accepted: {settings.accepted_names(self.kind, KINDS)}."
            )
        if min(self.samples, self.max_tokens) < 1 or self.words < LEAST_WORDS:
            raise ValueError(
                f"samples, max_tokens, words: got {self.samples}, {self.max_tokens}, {self.words}; "
                f"accepted: 1 or more, 1 or more, {LEAST_WORDS} or more."
            )


def _path(name: str | Path) -> Path:
    path = Path(name)
    if str(name) in shipped():
        return FOLDER / f"{name}.yaml"
    if path.suffix in SUFFIXES and path.exists():
        return path
    raise ValueError(
        f"task: got {str(name)!r}; accepted: {settings.accepted_names(name, shipped())}, or an "
        "existing .yaml file."
    )


# ── Its texts ────────────────────────────────────────────────────────────────────────────────────


def _folder(task: str, data: Path | None) -> Path:
    named = os.environ.get(DATA)
    if data is None and not named:
        raise Missing(f"{task}: no folder of data; {DATA} names none.")
    folder = data if data is not None else Path(named or "")
    if not folder.is_dir():
        raise Missing(f"{task}: {folder} is not there; {DATA} names the folder of data.")
    return folder


def _matching_files(folder: Path, pattern: str, task: str) -> list[Path]:
    path = folder / pattern
    paths = sorted(path.parent.glob(path.name))
    if not Path(pattern).is_absolute():
        for each in paths:
            if not each.is_dir():
                real_file(each, within=folder, largest=LARGEST_RECORDS)
    if not paths:
        raise Missing(f"{task}: {pattern} is not in {folder}; {DATA} names the folder of data.")
    return paths


def _prompts(file: _File, folder: Path, task: str) -> Iterator[Prompt]:
    settings = file.prompts
    (path, *_) = _matching_files(folder, settings.file, task)
    match path.suffix:
        case ".json":
            rows = [Prompt(text) for text in _texts(_json(path), path)]
        case ".csv":
            meanings = dict.fromkeys(row["mr"] for row in _csv(path, "mr"))
            rows = [Prompt(meaning, about={"meaning": meaning}) for meaning in meanings]
        case _:
            rows = prompts.read(path)
    stop = None if settings.count is None else settings.first + settings.count
    if len(rows) < (stop or settings.first + 1):
        raise ValueError(f"{path}: got {len(rows)} rows; accepted: {stop or settings.first + 1}.")
    for row in rows[settings.first : stop]:
        if file.kind == "meaning":
            slots.parse(row.about.get("meaning", ""))
        yield Prompt(settings.ask.replace("{}", row.text), row.system, row.about)


def _human(file: _File, folder: Path, task: str) -> Iterator[Sample]:
    for pattern in file.human.files:
        for path in _matching_files(folder, pattern, task):
            for sample in _read(path, file.prompts.ask):
                yield from windows.pieces(sample, file.words, file.human.pieces)


def _read(path: Path, ask: str) -> Iterable[Sample]:
    match path.suffix:
        case ".json":
            return [human for human, _ in continuations(path)]
        case ".rst":
            return [Sample(rst.prose(read_text(path, largest=LARGEST)), source=path.name)]
        case ".csv":
            rows = _csv(path, "mr", "ref")
            return [Sample(row["ref"], ask.replace("{}", row["mr"])) for row in rows]
        case _:
            return reference.samples(path)


def _shared_beginning(a: str, b: str) -> str:
    words, others = a.split(), b.split()
    pairs = enumerate(zip(words, others, strict=False))
    differ = next((index for index, (x, y) in pairs if x != y), min(len(words), len(others)))
    return " ".join(words[:differ])


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    """The first of those with the same beginning: one original can be in several files."""
    kept: dict[str, Sample] = {}
    for sample in samples:
        kept.setdefault(" ".join(sample.text.split()[:_SAME]), sample)
    return list(kept.values())


def _json(path: Path) -> Any:
    return read_json(path, largest=LARGEST)


def _texts(value: Any, path: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{path}: got {value!r:.60}; accepted: a list of texts.")
    return value


def _csv(path: Path, *columns: str) -> list[dict[str, str]]:
    text = decoded(read_bytes(path, largest=LARGEST), str(path), "utf-8-sig")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}).") from None
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise ValueError(f"{path}: got other columns; accepted: {', '.join(columns)} in each row.")
    return rows
