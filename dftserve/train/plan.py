"""Estimate the memory, time and disk space of a run, by counting and by measuring one batch.

One batch is run forward and backward through the real model; nothing is written.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dftserve import atomic, cpu
from dftserve.train.config import AUTO, TrainConfig
from dftserve.train.data import ReadCounts
from dftserve.train.disk import OPTIMIZER_BYTES, free_bytes, needed_bytes, size_text
from dftserve.train.feature_matching import FeatureMatching
from dftserve.train.head import CHUNK_ELEMENTS
from dftserve.train.material import Material, cut_text, steps_of, steps_of_epoch
from dftserve.train.model import enable_checkpointing
from dftserve.train.prepare import matching_of, prepare
from dftserve.train.target_weight import of_first_candidate, probe_steps


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Counts of what a run reads from one store."""

    name: str
    weight: float
    """Its share of the trained tokens."""
    documents: int
    rows: int
    """Rows of one pass over the store."""
    rows_per_epoch: int
    tokens: int
    """Of all steps."""
    trained_tokens: int
    readings: float
    """How often the run reads each row."""

    def as_text(self) -> str:
        return (
            f"{self.name}, weight {self.weight:.4g}: {self.documents:,} documents in "
            f"{self.rows:,} rows, read {self.readings:.3g} times, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained"
        )


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Bytes, seconds and counts of one process."""

    parameters: int
    trained_parameters: int
    documents: int
    rows: int
    """Of an epoch."""
    stores: tuple[StorePlan, ...]
    precision: str
    """Precision of the computation, with a note if this CPU has no instructions for it."""
    weights: str
    """Precision in which the model's own weights are stored."""
    not_packed_because: str | None
    """Why each row has one document although the configuration enables packing; None if packed."""
    cut: str | None
    """Describes documents that are longer than a row; None if there are none."""
    warning: str | None
    """A problem recorded when the targets were built."""
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    steps: int
    probe_steps: int
    """Of all candidates together, if the target's weight is chosen automatically."""
    candidates: tuple[float, ...]
    """Values of λ that are tried before the run; empty if λ is given."""
    tokens: int
    """Of all steps."""
    seconds_per_step: float
    """Measured on this machine: one batch, times the accumulation."""
    seconds: float
    process_bytes: int
    """Measured: resident before the model is loaded; 0 on a GPU, whose memory it does not use."""
    weights_bytes: int
    network_bytes: int
    """The copy of the untrained model that feature matching needs without adapters."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Measured: saved by one batch for its backward pass."""
    head_bytes: int
    """The logits of one chunk and their gradient."""
    disk_bytes: int
    """Checkpoints to resume from, and the final one."""
    free_disk_bytes: int
    """Where the output is, or will be."""

    @property
    def memory_bytes(self) -> int:
        parts = (self.process_bytes, self.weights_bytes, self.network_bytes, self.gradient_bytes)
        return sum(parts) + self.optimizer_bytes + self.activation_bytes + self.head_bytes

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"memory_bytes": self.memory_bytes}, indent=2)

    def as_text(self) -> str:
        lines = {
            "parameters": f"{self.parameters:,}, {self.trained_parameters:,} of them trained",
            "text": self._rows_text(),
            "steps": f"{self.steps:,}, {self.tokens:,} tokens" + self._probes_text(),
            "time": f"{_clock(self.seconds)} at {self.seconds_per_step:.2f} s a step, measured "
            "on one batch; without evaluation and saving",
            "memory": f"{size_text(self.memory_bytes)}: process {size_text(self.process_bytes)}, "
            f"weights {size_text(self.weights_bytes)}{self._network_text()}, gradients "
            f"{size_text(self.gradient_bytes)}, optimizer {size_text(self.optimizer_bytes)}, "
            f"activations {size_text(self.activation_bytes)}, head {size_text(self.head_bytes)}",
            "precision": f"weights {self.weights}, computed in {self.precision}",
            "disk": f"{size_text(self.disk_bytes)} at most; {size_text(self.free_disk_bytes)} free",
        }
        if self.weights == "bf16":
            lines["host"] = (
                f"{size_text(4 * self.parameters)} for the weights in float32, as they are checked "
                "before the run and merged after it"
            )
        if self.not_packed_because is not None:
            lines["packing"] = f"none, one document a row: {self.not_packed_because}"
        if self.cut is not None:
            lines["cut"] = self.cut
        if self.warning is not None:
            lines["warning"] = self.warning
        return "\n".join(f"{name:12}{value}" for name, value in lines.items())

    def _network_text(self) -> str:
        if not self.network_bytes:
            return ""
        return f", those before the run {size_text(self.network_bytes)}"

    def _rows_text(self) -> str:
        epoch = (
            f"{self.rows:,} rows, {self.tokens_per_epoch:,} tokens, "
            f"{self.trained_tokens_per_epoch:,} of them trained"
        )
        if len(self.stores) == 1:
            return f"{self.documents:,} documents in {epoch}"
        lines = (f"an epoch of {epoch}", *(store.as_text() for store in self.stores))
        return f"\n{'':12}".join(lines)

    def _probes_text(self) -> str:
        if not self.candidates:
            return ""
        tried = ", ".join(f"{weight:g}" for weight in self.candidates)
        return f"; before them {self.probe_steps:,} for target_weight auto, which tries {tried}"


def plan_of(config: TrainConfig) -> TrainPlan:
    """The plan of `train` with this configuration.

    Raises:
        ValueError: as `train` would.
        OSError: the output cannot be made or written to.
    """
    atomic.check_writable(Path(config.output))
    prepared = prepare(of_first_candidate(config))
    material, model = prepared.material, prepared.loaded.model
    is_auto = config.divergence.target_weight == AUTO
    candidates = config.divergence.to_try if is_auto else ()
    tries = probe_steps(config, material) * len(candidates)
    model.train()
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    matching = matching_of(config, prepared.loaded, material)
    seconds, activations = _one_batch(config, model, material, matching)
    parameters = [value.numel() for value in model.parameters()]
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    steps = steps_of(config, material)
    read_counts = material.train.sizes()
    tokens, trained_tokens = (
        sum(each.tokens for each in read_counts),
        sum(each.trained for each in read_counts),
    )
    epochs = steps / steps_of_epoch(config, material)
    device = _device_of(model)
    kept = sum(value.numel() * value.element_size() for value in model.parameters())
    return TrainPlan(
        parameters=sum(parameters),
        trained_parameters=trained,
        documents=sum(each.store.count("train") for each in material.stores),
        rows=len(material.train),
        stores=_stores(material, read_counts, epochs),
        precision=_precision(config.precision, device),
        weights=config.weights,
        not_packed_because=prepared.not_packed_because,
        cut=cut_text(material.train.parts),
        warning=material.warning,
        tokens_per_epoch=tokens,
        trained_tokens_per_epoch=trained_tokens,
        steps=steps,
        probe_steps=tries,
        candidates=candidates,
        tokens=round(tokens * epochs),
        seconds_per_step=seconds * config.accumulation,
        seconds=seconds * config.accumulation * (steps + tries),
        process_bytes=prepared.process_bytes if device == "cpu" else 0,
        weights_bytes=kept,
        network_bytes=kept if matching is not None and config.lora is None else 0,
        gradient_bytes=4 * trained,
        optimizer_bytes=OPTIMIZER_BYTES[config.optim] * trained,
        activation_bytes=activations,
        head_bytes=2 * 4 * CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS["cuda"]),
        disk_bytes=needed_bytes(config, model, prepared.tokenizer_bytes),
        free_disk_bytes=free_bytes(config.output),
    )


def _device_of(model: Any) -> str:
    return next(model.parameters()).device.type


def _one_batch(
    config: TrainConfig, model: Any, material: Material, matching: FeatureMatching | None
) -> tuple[float, int]:
    """(seconds, bytes saved for the backward pass) of a batch, after a warm-up batch, on the
    model's device."""
    device = next(model.parameters()).device
    rows = [item for item, _ in islice(material.train.items(), config.batch_size)]
    batch = {name: value.to(device) for name, value in material.collate(rows).items()}
    seconds, kept = 0.0, 0
    for _ in range(2):
        bytes_by_address: dict[int, int] = {}

        def keep(
            tensor: torch.Tensor, bytes_by_address: dict[int, int] = bytes_by_address
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            bytes_by_address[storage.data_ptr()] = storage.nbytes()
            return tensor

        _wait(device)
        start = time.perf_counter()
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        with bf16, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            matched = None if matching is None else matching.match(batch, 0)
            output = model(**batch, **(matched.inputs if matched else {}))
        (output.objective / len(batch["positions_T"])).backward()
        _wait(device)
        seconds = time.perf_counter() - start
        weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
        kept = sum(size for address, size in bytes_by_address.items() if address not in weights)
        model.zero_grad()
    return seconds, kept


def _wait(device: torch.device) -> None:
    """Wait for the device to finish its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _precision(named: str, device: str) -> str:
    if named != "bf16" or device != "cpu" or cpu.has_bf16():
        return named
    return f"{named}, for which this CPU has no instructions: fp32 is many times as fast"


def _stores(
    material: Material, read_counts: Sequence[ReadCounts], epochs: float
) -> tuple[StorePlan, ...]:
    """The plan of each store: the counts of the first epoch times the number of epochs."""
    return tuple(
        StorePlan(
            name=each.name,
            weight=each.weight,
            documents=each.store.count("train"),
            rows=len(part),
            rows_per_epoch=of_epoch.rows,
            tokens=round(of_epoch.tokens * epochs),
            trained_tokens=round(of_epoch.trained * epochs),
            readings=of_epoch.rows * epochs / len(part),
        )
        for each, part, of_epoch in zip(
            material.stores, material.train.parts, read_counts, strict=True
        )
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
