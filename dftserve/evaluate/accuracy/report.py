"""Read a report of `dftserve evaluate accuracy` for a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dftserve import settings
from dftserve.bounded_files import shaped_as
from dftserve.evaluate.accuracy import parts
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.report.figures import Accuracy
from dftserve.plots.figure import SERIES


def read(path: Path) -> Accuracy:
    """Accuracy by task and diversity.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a report of `evaluate accuracy`.
    """
    stored = parts.read_report(path)
    with shaped_as(path, parts.REPORT):
        asked, tasks = stored["settings"], stored["tasks"]
        content = {
            "model": asked["model"],
            "temperature": asked["temperature"],
            "tasks": {task["task"]: _levels(task["levels"], path) for task in tasks},
        }
    if not 1 <= len(tasks) <= SERIES:
        raise ValueError(f"{path}: got {len(tasks)} tasks; accepted: 1 to {SERIES}.")
    return settings.load(Accuracy, content, f"{path}: report")


def _levels(levels: list[Mapping[str, Any]], path: Path) -> dict[float, Estimate]:
    return {
        _number(level["diversity"]): settings.load(
            Estimate, level["accuracy"], f"{path}: accuracy at {level['diversity']}"
        )
        for level in levels
    }


def _number(diversity: Any) -> float:
    if not isinstance(diversity, int | float):
        raise TypeError(f"the diversity {diversity!r}")
    return float(diversity)
