"""The result of an evaluation and its JSON schema, which `result.json` holds.

Field names are those of the file: renaming one is a change of format.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dftserve.bounded_files import FileError, advised, read_json, shaped_as
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.sds import Score
from dftserve.evaluate.metrics.slop import Repeated

FORMAT = "dftserve-evaluation-1"
RESULT = "result.json"
LARGEST = 256 << 20
"""Bytes of a result."""
WRITTEN = "the result.json of `dftserve evaluate`"
BIN_NATS = 0.25
BINS = 16
"""Of the histogram of the answers' mean entropies; the last bin holds all that is above."""


@dataclass(frozen=True)
class Entropy:
    """What the answers say of themselves: nats a token, means over answers."""

    before: Estimate
    after: Estimate
    temperature: Estimate
    changed: Estimate
    histogram_before: tuple[int, ...]
    histogram_after: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """What is measured of a set of texts: a model's at one diversity, or people's."""

    score: Score
    measures: dict[str, Estimate]
    repeated: tuple[Repeated, ...]


@dataclass(frozen=True)
class Level:
    diversity: Any
    side: Side
    tokens: Estimate
    """Of an answer."""
    cut: int
    """Answers that ended in their thinking; they are in no measure."""
    unfinished: int
    """Of the others, those that ended at `max_tokens`; their first words are measured."""
    entropy: Entropy | None
    """None where the field was off."""
    samples: tuple[tuple[str, str | None], ...]
    """Some prompts and an answer to each, None for one that was cut; the same prompts at every
    level."""


@dataclass(frozen=True)
class Result:
    """An evaluation; `human` is the same of held-out human text."""

    model: str
    asked: dict[str, Any]
    """What was asked, less the prompts; `prompts` is their digest, `answers` their number."""
    anchors: dict[str, Any]
    compared: int
    """Texts on each side of the measures that depend on their number."""
    embeddings: str | None
    human: Side
    levels: tuple[Level, ...]
    cost: dict[str, float]
    """seconds_scoring, peak_bytes."""
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def read(path: Path) -> dict[str, Any]:
    """The document of a `result.json`, or of the folder that holds one.

    Raises:
        ValueError: no result that can be read, or one of another format.
    """
    path = path / RESULT if path.is_dir() else path
    try:
        # NaN stands where a measure has no value.
        result = read_json(path, largest=LARGEST, finite=False)
    except FileError as error:
        raise ValueError(advised(error, f"give {WRITTEN}")) from None
    except OSError as error:
        told = error.strerror or "there is none"
        raise ValueError(f"{path}: no result that can be read ({told}); give {WRITTEN}.") from None
    with shaped_as(path, WRITTEN):
        form = result["format"]
    if form != FORMAT:
        raise ValueError(f"{path}: got the format {form!r}; accepted: {FORMAT}.")
    return result
