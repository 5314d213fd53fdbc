"""One training run, from a configuration to a checkpoint that serves.

train(TrainConfig(model="base", targets="store", output="run"))

run/settings.json     settings that a resumed run must match (`run_folder`)
run/checkpoint-N/     to resume from
run/final/            the checkpoint: weights, tokenizer, dft.json, run.json, checksums.json;
                      the adapter in final/adapter
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import EarlyStoppingCallback, set_seed
from transformers.utils import logging

from dftserve.spec import FINAL
from dftserve.train import disk, final_checkpoint, processes, target_weight
from dftserve.train.config import AUTO, TrainConfig
from dftserve.train.final_checkpoint import whole_model
from dftserve.train.prepare import (
    Prepared,
    cast_frozen_weights,
    load_model,
    make_trainer,
    matching_of,
    prepare,
)
from dftserve.train.run_folder import RunFolder
from dftserve.train.save import SaveError
from dftserve.train.trainer import HUMAN_NLL, DFTTrainer, StopOnSignal, last_checkpoint


def train(config: TrainConfig) -> Path:
    """Train, or resume a run with the same settings; returns the final checkpoint's folder.

    Raises:
        ValueError: the configuration, targets or model are refused, before anything is written; or
            the divergence is no longer finite.
        SaveError: the final checkpoint cannot be written, or differs from the trained model; the
            message says where the weights are.
        OSError: from the disk; the last checkpoint is then complete.
    """
    processes.check_restarts()
    output = Path(config.output)
    logging.disable_progress_bar()  # For loading and saving; the one of training stays.
    with ExitStack() as opened:
        with processes.together():
            has_final = (output / FINAL).exists()
        is_finished = processes.gather(has_final)[0]
        finished = f"{output / FINAL} exists: this run is finished."
        # After a restart by torchrun this is no error: a process may have died after the run ended.
        if is_finished and not processes.may_restart():
            raise ValueError(f"{finished} Choose another output, or remove it.")
        with processes.together():
            folder = opened.enter_context(RunFolder(config))
        folder.check_same_run()
        if is_finished:
            processes.print_once(finished)
            return output / FINAL
        return _train(config, folder, output)


def _train(config: TrainConfig, folder: RunFolder, output: Path) -> Path:
    with processes.together():
        prepared = prepare(target_weight.of_first_candidate(config))
        folder.begin()
    folder.check_seen()
    material = prepared.material.named_after(folder.store_paths())
    prepared = replace(prepared, material=material)
    processes.print_once(material.as_text())
    resume, tried = folder.resume_state()
    if resume is not None:
        processes.print_once(f"Going on from {resume}.")
    elif not tried:
        disk.warn_if_short(config, prepared.loaded.model, prepared.tokenizer_bytes)
    if config.divergence.target_weight == AUTO:
        # Every candidate loads the model again, and memory may be enough for only one model.
        prepared_with = partial(
            Prepared,
            material=material,
            not_packed_because=prepared.not_packed_because,
            process_bytes=prepared.process_bytes,
            tokenizer_bytes=prepared.tokenizer_bytes,
        )
        del prepared
        config = target_weight.choose(config, material, output, tried)
        set_seed(config.seed)
        prepared = prepared_with(loaded=cast_frozen_weights(load_model(config, material), config))
    with processes.together():
        matching = matching_of(config, prepared.loaded, material)
        trainer = make_trainer(config, prepared.loaded.model, material, matching=matching)
    if config.fsdp and not trainer.is_fsdp_enabled:
        processes.print_once(
            "fsdp: accelerate does not shard on CPUs; each process holds the whole model."
        )
    # Evaluate the untrained model before the first step; a resumed run has its metrics already.
    trainer.args.eval_on_start = resume is None and len(material.heldout) > 0
    with StopOnSignal().installed() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.agreed is not None:
        processes.print_once(f"Stopped, and saved in {output}; {_how_to_resume()}")
        raise SystemExit(128 + stop.agreed)
    return _write_final(trainer, config, prepared, output)


def _write_final(
    trainer: DFTTrainer, config: TrainConfig, prepared: Prepared, output: Path
) -> Path:
    """Evaluate the trained model, and write the final checkpoint in the first process."""
    # It looks for its metric among those of every evaluation, and would report itself disabled.
    trainer.remove_callback(EarlyStoppingCallback)
    has_heldout = len(prepared.material.heldout) > 0
    metrics = trainer.evaluate(metric_key_prefix="final") if has_heldout else {}
    metrics |= _untouched_metrics(trainer, metrics)
    whole = whole_model(trainer, config, prepared)
    if whole is not None:
        with _as_save_error(trainer, output):
            steps = trainer.steps_of_weights
            final_checkpoint.write(output / FINAL, config, whole, steps=steps, metrics=metrics)
    trainer.accelerator.wait_for_everyone()
    return output / FINAL


def _how_to_resume() -> str:
    if processes.may_restart():
        return "torchrun restarts it, as long as it has restarts left."
    return "the same command continues from there."


def _untouched_metrics(trainer: DFTTrainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """Print the likelihood of held-out text before and after training; returns those before it."""
    name = f"eval_{HUMAN_NLL}"
    before = [
        line[name] for line in trainer.state.log_history if name in line and line["step"] == 0
    ]
    if not (before and metrics):
        return {}
    after = metrics[f"final_{HUMAN_NLL}"]
    processes.print_once(
        f"Held-out human NLL: {after:.4f} nats a token; {before[0]:.4f} before training."
    )
    if after > before[0]:
        processes.print_once(
            "Warning: the trained model is worse at held-out text than the untrained one. Use a "
            "lower learning_rate, fewer steps (`patience` stops by itself), another target_weight, "
            "or more text."
        )
    return {f"untouched_{HUMAN_NLL}": before[0], **_of_each_store(trainer, metrics)}


def _of_each_store(trainer: DFTTrainer, metrics: Mapping[str, float]) -> dict[str, float]:
    """The same for each store, if there are several."""
    before_by_store = {}
    untouched = next(line for line in trainer.state.log_history if f"eval_{HUMAN_NLL}" in line)
    for name, after in metrics.items():
        own = name.removeprefix("final_")
        if not own.startswith(f"{HUMAN_NLL}/"):
            continue
        before = untouched[f"eval_{own}"]
        processes.print_once(
            f"  {own.partition('/')[2]}: {after:.4f}; {before:.4f} before training."
        )
        before_by_store[f"untouched_{own}"] = before
    return before_by_store


@contextmanager
def _as_save_error(trainer: DFTTrainer, output: Path) -> Iterator[None]:
    """Turn any error in writing the final checkpoint into a SaveError.

    Raises:
        SaveError: the reason, and the checkpoint with the trained weights, from which the run can
            be resumed.
    """
    try:
        yield
    except Exception as error:
        best = trainer.state.best_model_checkpoint
        kept = Path(best) if best else last_checkpoint(output)
        raise SaveError(
            f"{output / FINAL} could not be made: {' '.join(str(error).split())}. The trained "
            f"weights are in {kept}; the same command tries again from there."
        ) from error
