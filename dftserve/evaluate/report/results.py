"""The result of an evaluation, and the format of `result.json`.

Field names are the keys of the file: renaming one changes the format.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dftserve.bounded_files import FileError, read_json, shaped_as, with_advice
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.sds import Score
from dftserve.evaluate.metrics.slop import Repeated

FORMAT = "dftserve-evaluation-1"
RESULT = "result.json"
LARGEST = 256 << 20
"""Maximum bytes of a result."""
WRITTEN = "the result.json of `dftserve evaluate`"
BIN_NATS = 0.25
"""Width of a bin."""
BINS = 16
"""Bins in the histogram of the answers' mean entropies; the last includes all higher values."""


@dataclass(frozen=True)
class Entropy:
    """Means over answers of the statistics that the server reports. Entropies in nats."""

    before: Estimate
    after: Estimate
    temperature: Estimate
    changed: Estimate
    histogram_before: tuple[int, ...]
    histogram_after: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """All measurements of a set of texts: a model's at one diversity, or human text."""

    score: Score
    measures: dict[str, Estimate]
    repeated: tuple[Repeated, ...]


@dataclass(frozen=True)
class Level:
    """What was measured on the answers at one diversity."""

    diversity: Any
    side: Side
    tokens: Estimate
    """Mean per answer."""
    cut: int
    """Answers that ended in their thinking; they are not measured."""
    unfinished: int
    """Other answers that ended at `max_tokens`; their first words are measured."""
    entropy: Entropy | None
    """None if the field was off."""
    samples: tuple[tuple[str, str | None], ...]
    """Some prompts and an answer to each, None for one that was cut; the same prompts at every
    level."""


@dataclass(frozen=True)
class Result:
    """An evaluation; `human` has the measurements of held-out human text."""

    model: str
    asked: dict[str, Any]
    """Settings of the requests; `prompts` is a digest of the prompts, `answers` the number of
    answers at each diversity."""
    anchors: dict[str, Any]
    compared: int
    """Number of texts on each side, for measures that depend on it."""
    embeddings: str | None
    phrases: str
    """A digest of the counted phrases."""
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
        ValueError: there is no readable result, or it has another format.
    """
    path = path / RESULT if path.is_dir() else path
    try:
        # A measure without a value is NaN.
        result = read_json(path, largest=LARGEST, finite=False)
    except FileError as error:
        raise ValueError(with_advice(error, f"give {WRITTEN}")) from None
    except OSError as error:
        why = error.strerror or "there is none"
        raise ValueError(f"{path}: no result that can be read ({why}); give {WRITTEN}.") from None
    with shaped_as(path, WRITTEN):
        form = result["format"]
    if form != FORMAT:
        raise ValueError(f"{path}: got the format {form!r}; accepted: {FORMAT}.")
    return result
