"""The disk space that a run needs, and whether there is as much."""

import shutil
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.train import processes
from dftserve.train.config import TrainConfig

OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adafactor": 0, "sgd": 0}
"""Optimizer state per trained parameter: AdamW has two float32 moments, Adafactor one per row and
column, SGD none."""


def needed_bytes(config: TrainConfig, model: Any, tokenizer: int) -> int:
    """The most that a run's files take at one time: the checkpoints to resume from and the final
    one. With adapters the former have no other weights, and the latter has the adapters besides the
    merged weights.

    Args:
        model: with adapters if the run uses them.
        tokenizer: bytes of the tokenizer and configurations in a checkpoint.
    """
    whole = 4 * sum(value.numel() for value in model.parameters())
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    trained, optimizer = 4 * count, OPTIMIZER_BYTES[config.optim] * count
    kept = _most_checkpoints(config) * (trained + optimizer + tokenizer)
    return kept + whole + tokenizer + (0 if config.lora is None else trained)


def _most_checkpoints(config: TrainConfig) -> int:
    """Checkpoints to resume from at one time: those kept and the one that is being written. With
    `patience`, the best is kept in addition to the newest."""
    return max(config.keep, 1 if config.patience is None else 2) + 1


def free_bytes(output: str) -> int:
    """The space that this user may still fill where a run writes, whether its folder exists or
    not."""
    return shutil.disk_usage(atomic.nearest_existing(Path(output))).free


def warn_if_short(config: TrainConfig, model: Any, tokenizer: int) -> None:
    """Print a warning if a new run needs more space than there is. It is not refused: the estimate
    is an upper bound, and a run whose disk is full keeps its last checkpoint."""
    needed, free = needed_bytes(config, model, tokenizer), free_bytes(config.output)
    if needed > free:
        processes.print_once(
            f"Warning: this run may need {size_text(needed)} of disk, and {config.output} has "
            f"{size_text(free)} free; choose another output, or a smaller `keep`."
        )


def size_text(count: int) -> str:
    """A number of bytes with its unit."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
