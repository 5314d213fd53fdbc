"""`transformers.Trainer` on a target store: its loss, its held-out figures, its atomic saves.

Shapes: T trained positions of a batch.
"""

import math
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dftserve import atomic, checkpoint
from dftserve.checkpoint import CheckpointError
from dftserve.train.feature_matching import FeatureMatching, Matched
from dftserve.train.mixed import MixedRows, MixedSampler
from dftserve.train.model import DFTOutput

HUMAN_NLL = "human_nll"
"""−ln p of the held-out text, nats a token: what early stopping and λ are judged by. Of several
stores, the mean by their weights; `human_nll/NAME` is one store's."""
SUMS = ("loss", "model_entropy", "target_entropy", HUMAN_NLL)
SHOWN = {"loss": "divergence"}
FEATURE_DISTANCE = "feature_distance"
"""Of the model's continuations from the text's, where they are matched."""
SEEN = ("divergence", "model_entropy", "target_entropy", FEATURE_DISTANCE)
"""Means over the steps between two lines of the log."""
TRAINING, HELD_OUT = 0, 1
"""First of the numbers that decide which continuations are drawn."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out rows of one store."""

    rows: Sequence[Any]
    name: str = ""
    weight: float = 1.0
    """Its share of each figure; those of all stores sum to 1."""


class DFTTrainer(Trainer):
    """Trains a model that `attach` has given a divergence. Its `eval_dataset` is a list of
    `HeldOut`.

    Losses are sums over trained tokens, divided by the tokens of the whole step: over all batches
    of an accumulation and all processes.
    """

    def __init__(self, *args: Any, matching: FeatureMatching | None = None, **given: Any) -> None:
        super().__init__(*args, **given)
        self.model_accepts_loss_kwargs = True
        self._matching = matching
        self._batch_of_step = (0, 0)
        """The step, and how many of its batches came before."""
        self.batch_nll: list[tuple[float, float]] = []
        """(nats, tokens) of each held-out batch of all processes, as last evaluated, one store
        after the other; of several stores, both scaled so that all tokens of a store stand in the
        ratio of its weight."""
        self.batches_of_stores: list[int] = []
        """How many of them are of each store."""
        self._seen = torch.zeros(2, len(SEEN), dtype=torch.float64, device=self.args.device)
        """Sums, and of how many tokens each is: a batch may have no place for a continuation."""

    # ── Loss ─────────────────────────────────────────────────────────────────────────────────────

    def _get_num_items_in_batch(
        self, batch_samples: list[Mapping[str, Tensor]], device: torch.device
    ) -> Tensor:
        tokens = sum(len(batch["positions_T"]) for batch in batch_samples)
        counted: Any = self.accelerator.gather(torch.tensor([tokens], device=device))
        return counted.sum()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        matched = self._matched_in_training(inputs)
        output: DFTOutput = model(**inputs, **(matched.inputs if matched else {}))
        tokens = len(inputs["positions_T"]) if num_items_in_batch is None else num_items_in_batch
        # DDP and FSDP average gradients over processes; the tokens are already all processes'.
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        total: Any = output.objective if torch.is_grad_enabled() else output.loss
        loss = total * (processes / tokens)
        if torch.is_grad_enabled():
            # Summed where they are: asking for their values would stop a GPU at every step.
            seen: list[Any] = [output.loss, output.model_entropy, output.target_entropy]
            if matched is not None:
                seen.append(matched.distance)
            self._seen[0, : len(seen)] += torch.stack([each.detach().double() for each in seen])
            self._seen[1, : len(seen)] += len(inputs["positions_T"])
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seen = zip(SEEN, *self._seen.tolist(), strict=True)
            means = {name: total / max(count, 1.0) for name, total, count in seen}
            self._seen.zero_()
            if self._matching is None:
                del means[FEATURE_DISTANCE]
            logs |= means
            self._refuse_nan(logs["divergence"])
        super().log(logs, start_time)

    def _refuse_nan(self, divergence: float) -> None:
        if not math.isfinite(divergence):
            raise ValueError(
                f"the divergence is {divergence} after step {self.state.global_step}; the last "
                "checkpoint is as it was. Lower learning_rate, or look for a damaged model."
            )

    # ── Feature matching ─────────────────────────────────────────────────────────────────────────

    def _matched_in_training(self, inputs: Mapping[str, Tensor]) -> Matched | None:
        """The continuations of the next batch of a step: others in each batch and process, the same
        in a run that goes on."""
        if self._matching is None:
            return None
        step, batch = self._batch_of_step
        now = self.state.global_step
        batch = batch + 1 if step == now else 0
        self._batch_of_step = now, batch
        return self._matched(inputs, TRAINING, now, batch, self.accelerator.process_index)

    def _matched(self, inputs: Mapping[str, Tensor], *place: int) -> Matched | None:
        if self._matching is None:
            return None
        with self.accelerator.autocast():
            return self._matching.match(inputs, *place)

    # ── Order ────────────────────────────────────────────────────────────────────────────────────

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, MixedRows):
            return MixedSampler(rows)
        return super()._get_train_sampler(train_dataset)

    # ── Resuming ─────────────────────────────────────────────────────────────────────────────────

    def _run_epoch(self, *args: Any, **given: Any) -> None:
        """Nothing, where what is resumed had ended: the Trainer's own takes one more step."""
        self._place_best()
        _set_epoch(given["train_dataloader"], given["epoch"])
        spent = any(
            isinstance(each, EarlyStoppingCallback)
            and each.early_stopping_patience_counter >= each.early_stopping_patience
            for each in self.callback_handler.callbacks
        )
        if spent or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            if self.args.should_save:
                # No save follows that would do what a kill may have come before.
                self._rotate(Path(str(self.args.output_dir)))
        else:
            super()._run_epoch(*args, **given)

    # ── Held-out text ────────────────────────────────────────────────────────────────────────────

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the held-out tokens, in nats: divergence, entropies, human NLL. Of several
        stores, the mean of their means by weight, and each one's human NLL.

        Each row counts once, whatever the number of processes.
        """
        parts: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        measured = [self._measured(part.rows) for part in parts]
        all_tokens = sum(tokens for _, tokens, _ in measured)
        names = self._sums
        metrics = dict.fromkeys((f"{metric_key_prefix}_{SHOWN.get(n, n)}" for n in names), 0.0)
        self.batch_nll, self.batches_of_stores = [], []
        for part, (means, tokens, batches) in zip(parts, measured, strict=True):
            for name, mean in zip(names, means, strict=True):
                metrics[f"{metric_key_prefix}_{SHOWN.get(name, name)}"] += part.weight * mean
            if len(parts) > 1:
                nll = means[SUMS.index(HUMAN_NLL)]
                metrics[f"{metric_key_prefix}_{HUMAN_NLL}/{part.name}"] = nll
                scale = part.weight * all_tokens / max(tokens, 1.0)
                batches = [(scale * nats, scale * count) for nats, count in batches]
            self.batch_nll += batches
            self.batches_of_stores.append(len(batches))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @property
    def _sums(self) -> tuple[str, ...]:
        """What an evaluation adds up."""
        return SUMS if self._matching is None else (*SUMS, FEATURE_DISTANCE)

    def _measured(
        self, rows: Sequence[Any]
    ) -> tuple[list[float], float, list[tuple[float, float]]]:
        """The means of `_sums` over these rows, their tokens, and (nats, tokens) of each batch; of
        all processes."""
        # As training wrapped it, where it did: sharded weights have no other way in.
        model: Any = self.model_wrapped
        model.eval()
        shape = (2, len(self._sums))  # Sums, and of how many tokens each is.
        sums = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        batch_nll = []
        for number, (batch, counts) in enumerate(self._shared_out(rows)):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                output: DFTOutput = model(**inputs)
            if not counts:
                continue
            values = [float(output[name]) for name in SUMS]
            place = HELD_OUT, number, self.accelerator.process_index
            if (matched := self._matched(inputs, *place)) is not None:
                values.append(float(matched.distance))
            tokens = len(inputs["positions_T"])
            sums[0, : len(values)] += sums.new_tensor(values)
            sums[1, : len(values)] += tokens
            batch_nll.append((values[SUMS.index(HUMAN_NLL)], tokens))
        # One list after the other, in the same order each time.
        gathered = gather_object(batch_nll)
        summed: Any = self.accelerator.reduce(sums, reduction="sum")
        totals, counts = summed.tolist()
        means = [total / max(count, 1.0) for total, count in zip(totals, counts, strict=True)]
        return means, counts[0], gathered

    def _shared_out(self, rows: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process's batches, and whether they count.

        As many for each process: one that has fewer reads the first row again, since DDP and FSDP
        wait for all in every forward.
        """
        size, world = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        mine = range(self.accelerator.process_index, len(rows), world)
        for start in range(0, math.ceil(len(rows) / world), size):
            part = [rows[place] for place in mine[start : start + size]]
            yield self.data_collator(part or [rows[0]]), bool(part)  # type: ignore[arg-type]

    # ── Saving ───────────────────────────────────────────────────────────────────────────────────

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, into a folder beside its place, then sealed and renamed."""
        self._refuse_nan(float(self._seen[0, 0]))
        run = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run / f"{name}{atomic.PARTIAL}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._output_in(staging), checkpoint.writing(staging):
                super()._save_checkpoint(model, trial)
                self._place_best()
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._put(staging, run / name)
            self._rotate(run)
        self.accelerator.wait_for_everyone()

    def _place_best(self) -> None:
        """The best checkpoint by the place where it stands: not where it is being written, nor
        where the run's folder was before it was moved or named in another way.
        """
        if self.state.best_global_step:
            run = Path(str(self.args.output_dir))
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    def _put(self, staging: Path, place: Path) -> None:
        try:
            # There from before only where a signal came in the step that had just been saved: it is
            # the same, and it is whole.
            if not place.exists():
                checkpoint.seal(staging / place.name)
                atomic.move_folder(staging / place.name, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _rotate(self, run: Path) -> None:
        """Keep the newest checkpoints, and the best; what stands under its own name is whole."""
        found = [path for _, path in sorted(_checkpoints(run).items())]
        best = self.state.best_model_checkpoint
        spare = [path for path in found[:-1] if str(path) != best]
        excess = len(found) - (self.args.save_total_limit or len(found))
        for path in spare[: max(excess, 0)]:
            doomed = path.with_name(path.name + atomic.PARTIAL)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def _output_in(self, folder: Path):
        self._staging = folder
        try:
            yield
        finally:
            del self._staging

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_staging", None) or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of what run.json says in the open.
        pickled = Path(output_dir or str(self.args.output_dir)) / "training_args.bin"
        pickled.unlink(missing_ok=True)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler its epoch. With several processes accelerate reaches no sampler but its own
    where the first batches of an epoch are skipped: the epoch of a `MixedSampler` that is gone on
    in would have the order of the first one."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    if hasattr(batches.sampler, "set_epoch"):
        batches.sampler.set_epoch(epoch)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint to resume from, verified; leftovers of a kill are removed. For the
    first of several processes.

    Raises:
        CheckpointError: the newest one is damaged: resuming from it would not be exact. Says which
            older one is whole, where one is.
    """
    for leftover in run.glob(f"*{atomic.PARTIAL}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    found = _checkpoints(run)
    if not found:
        return None
    *older, newest = (found[step] for step in sorted(found))
    try:
        checkpoint.verify(newest)
    except CheckpointError as error:
        whole = next((path for path in reversed(older) if is_whole(path)), None)
        if whole is None:
            raise
        raise CheckpointError(
            f"{str(error).removesuffix('.')}, or remove {newest} to go on from {whole.name}, which "
            "is whole."
        ) from None
    return newest


def is_whole(path: Path) -> bool:
    """Whether it is a checkpoint as it was written."""
    try:
        checkpoint.verify(path)
    except CheckpointError:
        return False
    return True


def _checkpoints(run: Path) -> dict[int, Path]:
    """By step."""
    return {
        int(path.name.rpartition("-")[2]): path
        for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    }


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT: finish the step, save, leave; all processes at the same step.

    The signal may reach one process of several, or each at another time. One that left alone would
    leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.agreed: int | None = None
        """The signal for which all processes stopped."""
        self._received = 0
        self._former: dict[int, Any] = {}
        self._group: Any = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @contextmanager
    def installed(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._former[number] = signal.signal(number, self._receive)
        try:
            yield self
        finally:
            for number, former in self._former.items():
                signal.signal(number, former)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            # On the CPU: a GPU would have to finish its step before the flag could be read.
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        received = torch.tensor(self._received)
        if self._group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self._group)
        if received:
            self.agreed = int(received)
            control.should_save = True
            control.should_training_stop = True
