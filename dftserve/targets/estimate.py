"""Estimates how long a build takes, by reading its first batches for some seconds.

estimate = estimate_of(source, plan, documents, processes=1)
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from dftserve.targets.calibrated import Calibration, calibrations
from dftserve.targets.document import Document
from dftserve.targets.progress import duration_text
from dftserve.targets.source import Source
from dftserve.targets.store import SPLITS, Plan, batches_of, parts_of

MEASURED_SECONDS = 10.0
"""No further batch is started after this time."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The size of a build and the time it would take."""

    documents: int
    tokens: int
    """All that the source reads, including those that are not trained on."""
    measured_tokens: int
    tokens_per_second: float
    """For one process."""
    seconds: float
    """For the whole build by the given number of processes, if each is as fast as one alone, on its
    own device or cores."""
    device: str
    """A GPU's name, or cpu."""
    calibrations: tuple[Calibration, ...] = ()
    """Fitted and measured on held-out text, before the first batch."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        lines = {
            "text": f"{self.documents:,} documents, {self.tokens:,} tokens",
            "time": f"{duration_text(self.seconds)} at {self.tokens_per_second:,.4g} tokens a "
            f"second and process, measured on {self.measured_tokens:,} tokens",
            "device": self.device,
        }
        return "\n".join(f"{name:12}{value}" for name, value in lines.items())


def estimate_of(
    source: Source,
    plan: Plan,
    documents: Mapping[str, Sequence[Document]],
    processes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Estimate:
    """Measure on the first shard's batches, after a warm-up batch; nothing is written."""
    shard = parts_of(documents)[0].of(documents)
    batches = [[shard[place] for place in places] for places in batches_of(shard)]
    # Batches are sorted by length; take them alternately from both ends.
    mixed = [batches.pop(-(turn % 2)) for turn in range(len(batches))]
    _read_batch(source, plan, mixed[0])
    measured, seconds, start = 0, 0.0, clock()
    for batch in mixed:
        measured += _read_batch(source, plan, batch)
        seconds = clock() - start
        if seconds > MEASURED_SECONDS:
            break
    rate = measured / max(seconds, 1e-9)
    every = [document for split in SPLITS for document in documents.get(split, ())]
    tokens = sum(len(document.tokens_N) for document in every)
    has_gpu = torch.cuda.is_available()
    return Estimate(
        documents=len(every),
        tokens=tokens,
        measured_tokens=measured,
        tokens_per_second=rate,
        seconds=tokens / rate / processes,
        device=torch.cuda.get_device_name() if has_gpu else "cpu",
        calibrations=tuple(calibrations(plan.source)),
    )


def _read_batch(source: Source, plan: Plan, batch: Sequence[Document]) -> int:
    """Compute the batch's targets; returns its number of tokens."""
    source.targets(batch, k=plan.k, draws=plan.draws, seeds=range(len(batch)))
    return sum(len(document.tokens_N) for document in batch)
