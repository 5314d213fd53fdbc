"""A `transformers.Trainer` for target stores: loss, held-out evaluation, atomic checkpoints.

Shapes: T trained positions of a batch.
"""

import math
import shutil
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
from dftserve.library_writes import writing
from dftserve.targets import signals
from dftserve.train import workers
from dftserve.train.feature_matching import FeatureMatching, Matched
from dftserve.train.mixed import MixedRows, MixedSampler
from dftserve.train.model import DFTOutput

HUMAN_NLL = "human_nll"
"""−ln p of the held-out text, nats a token: the criterion of early stopping and of the choice of λ.
With several stores, their weighted mean; `human_nll/NAME` is that of one store."""
SUMS = ("loss", "model_entropy", "target_entropy", HUMAN_NLL)
SHOWN = {"loss": "divergence"}
FEATURE_DISTANCE = "feature_distance"
"""Distance of the model's continuations from the text's, with feature matching."""
SEEN = ("divergence", "model_entropy", "target_entropy", FEATURE_DISTANCE)
"""Metrics that are averaged over the steps between two lines of the log."""
TRAINING, HELD_OUT = 0, 1
"""The first of the numbers that seed the drawing of continuations."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out rows of one store."""

    rows: Sequence[Any]
    name: str = ""
    weight: float = 1.0
    """Its share of each metric; those of all stores sum to 1."""


class DFTTrainer(Trainer):
    """Trains a model whose forward computes a divergence (`model.attach`). Its `eval_dataset` is a
    list of `HeldOut`.

    Losses are sums over trained tokens, divided by the trained tokens of the whole step: of all
    batches of an accumulation and all processes.
    """

    def __init__(
        self, *args: Any, keep: int, matching: FeatureMatching | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            keep: number of checkpoints to keep; the newest and the best one always are. It is not
                passed as `save_total_limit`, because with 1 the Trainer would keep the best one
                alone when it ends, which it does on a signal too.
        """
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._keep = keep
        self._matching = matching
        self._batch_of_step = (0, 0)
        """The step, and the index of the current batch in it."""
        self.batch_nll: list[tuple[float, float]] = []
        """(nats, tokens) of each held-out batch of all processes in the last evaluation, one store
        after the other; with several stores, both are scaled so that the total tokens of the stores
        are proportional to their weights."""
        self.batches_of_stores: list[int] = []
        """Number of these batches of each store."""
        self._seen = torch.zeros(2, len(SEEN), dtype=torch.float64, device=self.args.device)
        """Sums, and the number of tokens in each: a batch may have no anchor for continuations."""

    @property
    def steps_of_weights(self) -> int:
        """Optimizer steps that led to the model's weights after `train`: with early stopping, those
        of the best checkpoint, which has been loaded."""
        state = self.state
        best = state.best_global_step if self.args.load_best_model_at_end else None
        return best or state.global_step

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
        # DDP and FSDP average gradients over processes, but `tokens` already counts all processes.
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        total: Any = output.objective if torch.is_grad_enabled() else output.loss
        loss = total * (processes / tokens)
        if torch.is_grad_enabled():
            # Summed on the device: reading their values would synchronise a GPU at every step.
            values: list[Any] = [output.loss, output.model_entropy, output.target_entropy]
            if matched is not None:
                values.append(matched.distance)
            self._seen[0, : len(values)] += torch.stack([each.detach().double() for each in values])
            self._seen[1, : len(values)] += len(inputs["positions_T"])
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sums = zip(SEEN, *self._seen.tolist(), strict=True)
            means = {name: total / max(count, 1.0) for name, total, count in sums}
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
                "checkpoint is unchanged. Lower learning_rate, or look for a damaged model."
            )

    # ── Feature matching ─────────────────────────────────────────────────────────────────────────

    def _matched_in_training(self, inputs: Mapping[str, Tensor]) -> Matched | None:
        """The continuations of the next batch of a step: different in each batch and process, and
        the same in a resumed run."""
        if self._matching is None:
            return None
        step, batch = self._batch_of_step
        now = self.state.global_step
        batch = batch + 1 if step == now else 0
        self._batch_of_step = now, batch
        return self._matched(inputs, TRAINING, now, batch, self.accelerator.process_index)

    def _matched(self, inputs: Mapping[str, Tensor], *key: int) -> Matched | None:
        if self._matching is None:
            return None
        with self.accelerator.autocast():
            return self._matching.match(inputs, *key)

    # ── Order ────────────────────────────────────────────────────────────────────────────────────

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        workers.end_with_the_run(loader)
        return loader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(rows, MixedRows):
            return MixedSampler(rows)
        return super()._get_train_sampler(train_dataset)

    # ── Resuming ─────────────────────────────────────────────────────────────────────────────────

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing if the resumed run had already ended: the Trainer would take one more step."""
        self._update_best_path()
        _set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        out_of_patience = any(
            isinstance(each, EarlyStoppingCallback)
            and each.early_stopping_patience_counter >= each.early_stopping_patience
            for each in self.callback_handler.callbacks
        )
        if out_of_patience or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            if self.args.should_save:
                # The last save may have been killed before it rotated, and no other save follows.
                self._rotate(Path(str(self.args.output_dir)))
        else:
            super()._run_epoch(*args, **kwargs)

    # ── Held-out text ────────────────────────────────────────────────────────────────────────────

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Means over the held-out tokens, in nats: divergence, entropies, human NLL. With several
        stores, the weighted mean of their means, and each one's human NLL.

        Each row counts once, regardless of the number of processes.
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
        """Metrics that an evaluation sums."""
        return SUMS if self._matching is None else (*SUMS, FEATURE_DISTANCE)

    def _measured(
        self, rows: Sequence[Any]
    ) -> tuple[list[float], float, list[tuple[float, float]]]:
        """The means of `_sums` over these rows, the number of trained tokens, and (nats, tokens) of
        each batch, of all processes."""
        # Sharded weights can be used only through the wrapped model.
        model: Any = self.model_wrapped
        model.eval()
        shape = (2, len(self._sums))  # Sums, and the number of tokens in each.
        sums = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        batch_nll = []
        for number, (batch, counts) in enumerate(self._shared_out(rows)):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                output: DFTOutput = model(**inputs)
            if not counts:
                continue
            values = [float(output[name]) for name in SUMS]
            key = HELD_OUT, number, self.accelerator.process_index
            if (matched := self._matched(inputs, *key)) is not None:
                values.append(float(matched.distance))
            tokens = len(inputs["positions_T"])
            sums[0, : len(values)] += sums.new_tensor(values)
            sums[1, : len(values)] += tokens
            batch_nll.append((values[SUMS.index(HUMAN_NLL)], tokens))
        # The lists of all processes joined by rank, so that the order is always the same.
        gathered = gather_object(batch_nll)
        summed: Any = self.accelerator.reduce(sums, reduction="sum")
        totals, counts = summed.tolist()
        means = [total / max(count, 1.0) for total, count in zip(totals, counts, strict=True)]
        return means, counts[0], gathered

    def _shared_out(self, rows: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        """This process's batches, and whether they count.

        All processes get the same number of batches, since DDP and FSDP wait for each other in
        every forward; a process with fewer rows reads the first row again, which does not count.
        """
        size, world = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        mine = range(self.accelerator.process_index, len(rows), world)
        for start in range(0, math.ceil(len(rows) / world), size):
            part = [rows[index] for index in mine[start : start + size]]
            yield self.data_collator(part or [rows[0]]), bool(part)  # type: ignore[arg-type]

    # ── Saving ───────────────────────────────────────────────────────────────────────────────────

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, but to a staging folder, which is then sealed and renamed."""
        self._refuse_nan(float(self._seen[0, 0]))
        run = Path(str(self.args.output_dir))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run / f"{name}{atomic.PARTIAL}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._output_in(staging), writing(staging):
                super()._save_checkpoint(model, trial)
                self._update_best_path()
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

    def _update_best_path(self) -> None:
        """Set the path of the best checkpoint to its final one: not the staging folder, nor the
        path of the run's folder before it was moved or given in another form.
        """
        if self.state.best_global_step:
            run = Path(str(self.args.output_dir))
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    def _put(self, staging: Path, path: Path) -> None:
        try:
            # It exists already only if a signal arrived in the step that had just been saved; then
            # it is the same checkpoint, and complete.
            if not path.exists():
                checkpoint.seal(staging / path.name)
                atomic.move_folder(staging / path.name, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _rotate(self, run: Path) -> None:
        """Keep the newest checkpoints, and the best. Others are renamed before they are deleted, so
        that a checkpoint under its own name is always complete."""
        checkpoints = [path for _, path in sorted(_checkpoints(run).items())]
        best = self.state.best_model_checkpoint
        spare = [path for path in checkpoints[:-1] if str(path) != best]
        for path in spare[: max(len(checkpoints) - self._keep, 0)]:
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
        # A pickle of settings that run.json has as text.
        pickled = Path(output_dir or str(self.args.output_dir)) / "training_args.bin"
        pickled.unlink(missing_ok=True)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Set the sampler's epoch. With several processes, if the first batches of an epoch are
    skipped, accelerate sets it only on its own samplers: a `MixedSampler` that resumes within an
    epoch would use the order of the first one."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    if hasattr(batches.sampler, "set_epoch"):
        batches.sampler.set_epoch(epoch)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint to resume from, verified; leftovers of a killed process are removed.
    Only the first of several processes may call it.

    Raises:
        CheckpointError: the newest one is damaged, so that resuming from it would not be exact;
            says from where the run can go on without it.
    """
    for leftover in run.glob(f"*{atomic.PARTIAL}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    checkpoints = _checkpoints(run)
    if not checkpoints:
        return None
    *older, newest = (checkpoints[step] for step in sorted(checkpoints))
    try:
        checkpoint.verify(newest)
    except CheckpointError as error:
        whole = next((path for path in reversed(older) if is_whole(path)), None)
        otherwise = (
            f"remove {newest} to go on from {whole.name}, which is whole"
            if whole is not None
            else f"remove the {PREFIX_CHECKPOINT_DIR} folders of {run} to start at the first step"
        )
        raise CheckpointError(f"{str(error).removesuffix('.')}, or {otherwise}.") from None
    return newest


def is_whole(path: Path) -> bool:
    """Whether it is an undamaged checkpoint."""
    try:
        checkpoint.verify(path)
    except CheckpointError:
        return False
    return True


def _checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoint folders by step."""
    return {
        int(path.name.rpartition("-")[2]): path
        for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit()
    }


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, finish the step, save and stop, in all processes at the same step.

    The signal may reach only one of several processes, or each at a different time. A process that
    stopped alone would leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.agreed: int | None = None
        """The signal on which all processes stopped."""
        self._received = 0
        self._group: Any = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    @contextmanager
    def installed(self):
        with signals.handled_by(self._receive):
            yield self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            # On the CPU, because reading a flag from a GPU would wait for its step to finish.
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        received = torch.tensor(self._received)
        if self._group is not None:
            distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self._group)
        if received:
            self.agreed = int(received)
            control.should_save = True
            control.should_training_stop = True
