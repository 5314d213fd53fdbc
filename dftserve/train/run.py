"""One training run, from a configuration to a checkpoint that serves.

train(TrainConfig(model="base", targets="store", output="run"))

run/settings.json     settings that a resumed run must match (`run_folder`)
run/checkpoint-N/     to resume from
run/final/            the checkpoint: weights, tokenizer, dft.json, run.json, checksums.json;
                      the adapter in final/adapter
"""

import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from dftserve import atomic, checkpoint, lm
from dftserve.bounded_files import shaped_as
from dftserve.checkpoint import FINAL
from dftserve.spec import Promise
from dftserve.targets.calibrated import is_refused
from dftserve.targets.document import load_tokenizer
from dftserve.train import continuations, processes
from dftserve.train.adapters import adapted
from dftserve.train.config import AUTO, FeatureMatchingConfig, TrainConfig
from dftserve.train.continuations import Anchors
from dftserve.train.data import Collator, Rows
from dftserve.train.divergences import DIVERGENCES
from dftserve.train.feature_matching import FeatureMatching, FeatureNetwork
from dftserve.train.mixed import MixedRows
from dftserve.train.model import attach, checkpointing_name
from dftserve.train.profile import Profile, measure
from dftserve.train.run_folder import WEIGHTS, RunFolder, targets_digest
from dftserve.train.save import SaveError, check_reloaded, nll, try_save
from dftserve.train.stores import NamedStore, open_stores, source_of, store_names
from dftserve.train.trainer import (
    HUMAN_NLL,
    DFTTrainer,
    HeldOut,
    StopOnSignal,
    last_checkpoint,
)

ADAPTER = "adapter"
REFUSED = (
    "The mixture of these targets is refused (`dftserve target inspect` says why): dft.json will "
    "name no target entropy and suggest no diversity."
)
PROFILE_TOKENS = 20_000
CHECKED_TOKENS = 256
"""Tokens that the checks of a model read at once if they run on the CPU and training does not."""


@dataclass(frozen=True, eq=False)
class Material:
    """The inputs of a run."""

    tokenizer: PreTrainedTokenizerBase
    stores: tuple[NamedStore, ...]
    train: Rows | MixedRows
    heldout: Rows | MixedRows
    collate: Collator
    found: lm.Examined
    """The model's configuration, without weights."""
    weights: str
    """`lm.model_digest` of the model."""

    @property
    def splits(self) -> tuple[Rows | MixedRows, Rows | MixedRows]:
        return self.train, self.heldout

    @property
    def longest(self) -> int:
        """Tokens of the longest document, or window of one, in a row."""
        return max(
            (len(part) for each in self.splits for row in each.rows for part in row), default=0
        )

    @property
    def text_N(self) -> Sequence[int]:
        """The first tokens of the training text, on which the model is checked."""
        tokens: list[int] = []
        for item, _ in self.train.items():
            for document, _ in item:
                tokens += document.tokens_N.tolist()
            if len(tokens) >= 2 * lm.PROBE_TOKENS:
                break
        return tokens

    def unpacked(self, config: TrainConfig) -> "Material":
        """A copy with one document per row."""
        train, heldout = (
            _rows(self.stores, split, config, packing=False) for split in ("train", "heldout")
        )
        return replace(self, train=train, heldout=heldout, collate=Collator(packing=False))

    def named_after(self, paths: Sequence[str]) -> "Material":
        """A copy with the stores named after these paths: a resumed run has metrics by the names
        from its start, and the folders may have been renamed since."""
        named = zip(self.stores, store_names(paths), strict=True)
        return replace(self, stores=tuple(replace(each, name=name) for each, name in named))

    def shown(self) -> str:
        """The amount of training text, in one line per store."""
        rows_of = zip(self.stores, self.train.parts, strict=True)
        lines = [_shown(each, rows) for each, rows in rows_of]
        if len(self.stores) > 1:
            lines = [
                f"{each.name}: {line} Weight {each.weight:.4g}."
                for each, line in zip(self.stores, lines, strict=True)
            ]
            lines.append(f"An epoch is {len(self.train):,} rows: until one store was read once.")
        if is_refused(source_of(self.stores)):
            lines.append(REFUSED)
        if self.warning is not None:
            lines.append(f"Warning: {self.warning}")
        return "\n".join(lines)

    @property
    def warning(self) -> str | None:
        """Problems recorded when the stores were built."""
        warnings = [
            each.warning if len(self.stores) == 1 else f"{each.name}: {each.warning}"
            for each in self.stores
            if each.warning is not None
        ]
        return " ".join(warnings) or None


def _shown(named: NamedStore, rows: Rows) -> str:
    counts = named.store.manifest.plan.corpus
    trained, tokens = (counts.get(what, {}).get("train") for what in ("trained", "tokens"))
    learnt = "" if trained is None else f", {tokens:,} tokens, {trained:,} of them learnt"
    shown = f"{named.store.count('train'):,} documents in {len(rows):,} rows{learnt}."
    return shown if (cut := cut_shown([rows])) is None else f"{shown} {cut}."


def cut_shown(parts: Sequence[Rows]) -> str | None:
    """A description of the documents that are longer than a row; None if there are none."""
    documents = sum(part.cut.documents for part in parts)
    if not documents:
        return None
    learnt = sum(part.cut.learnt for part in parts)
    return (
        f"{documents:,} documents are longer than a row (max_length) and are cut: {learnt:,} of "
        "the learnt tokens do not see the beginning of their document, which their targets may"
    )


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that computes its divergence, and the `LanguageModel` that was checked."""

    model: Any
    """With adapters if the run uses them."""
    language_model: lm.LanguageModel


@dataclass(frozen=True, eq=False)
class Prepared:
    """The inputs and the model of a run, after all checks."""

    material: Material
    loaded: Loaded
    not_packed_because: str | None
    """Why each row has one document although the configuration enables packing; None if packed."""
    process_bytes: int
    """Resident before the model was loaded: interpreter, libraries, tokenizer, store."""


def prepare(config: TrainConfig) -> Prepared:
    """Read the store, load the model, and check that training and saving will work.

    Raises:
        ValueError: the configuration, targets or model are refused; nothing has been written.
    """
    material = read(config)
    set_seed(config.seed)
    resident = psutil.Process().memory_info().rss
    loaded = load_model(config, material)
    most = _most_checked(config)
    reason = _why_not_packed(loaded.language_model, material, most) if config.packing else None
    if reason is not None:
        _say(f"{loaded.language_model.family}: one document a row, not packed: {reason}.")
        material = material.unpacked(config)
    if not config.steps:  # Steps follow from the number of rows, which is larger without packing.
        _check_patience(config, math.ceil(steps_of(config, material) / processes.count()))
    if config.batch_size > 1:
        loaded.language_model.check_batch(material.longest, most=most)
    if config.feature_matching is not None:
        _check_anchors(config.feature_matching, material)
        continuations.check(loaded.language_model, material.longest)
    try_save(loaded.language_model.model, material.tokenizer, material.found.name)
    return Prepared(material, narrowed(loaded, config), reason, resident)


def _check_anchors(matching: FeatureMatchingConfig, material: Material) -> None:
    """Raises ValueError if no document has an anchor for continuations."""
    source = np.random.default_rng(0)
    for item, _ in material.train.items():
        batch = material.collate([item])
        if len(Anchors.drawn(batch, length=matching.length, every=matching.every, source=source)):
            return
    raise ValueError(
        f"feature_matching.length: got {matching.length}, and no document of these targets has "
        "that many learnt tokens in a row; accepted: fewer. Or leave feature_matching out."
    )


def _most_checked(config: TrainConfig) -> int | None:
    """Maximal tokens that the checks read at once; None: as many as the run. Prints a note if the
    checks read fewer."""
    if _checked_on(config) == _device(config) and not (config.fsdp and torch.cuda.is_available()):
        return None
    if (config.packing or config.batch_size > 1) and config.max_length > CHECKED_TOKENS:
        _say(
            f"{'fsdp' if config.fsdp else 'weights bf16'}: whether documents are kept separate is "
            f"tested on the CPU, with at most {CHECKED_TOKENS} tokens at once; longer rows are "
            f"judged by the configuration only ({lm.CHUNK}, and {lm.ORIGINAL} of longrope)."
        )
    return CHECKED_TOKENS


def _why_not_packed(
    language_model: lm.LanguageModel, material: Material, most: int | None
) -> str | None:
    rows = (sum(map(len, row)) for each in material.splits for row in each.rows)
    return language_model.packing_leak(material.longest, max(rows, default=0), most=most)


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
        is_finished = processes.gathered(has_final)[0]
        finished = f"{output / FINAL} exists: this run is finished."
        # After a restart by torchrun this is no error: a process may have died after the run ended.
        if is_finished and not processes.may_restart():
            raise ValueError(f"{finished} Choose another output, or remove it.")
        with processes.together():
            folder = opened.enter_context(RunFolder(config))
        folder.check_same_run()
        if is_finished:
            _say(finished)
            return output / FINAL
        return _train(config, folder, output)


def _train(config: TrainConfig, folder: RunFolder, output: Path) -> Path:
    with processes.together():
        prepared = prepare(of_first_candidate(config))
        folder.begin()
    folder.check_seen()
    material = prepared.material.named_after(folder.store_paths())
    prepared = replace(prepared, material=material)
    _say(material.shown())
    resume, tried = folder.resume_state()
    if resume is not None:
        _say(f"Going on from {resume}.")
    if config.divergence.target_weight == AUTO:
        # Every candidate loads the model again, and memory may be enough for only one model.
        checked = partial(
            Prepared,
            material=material,
            not_packed_because=prepared.not_packed_because,
            process_bytes=prepared.process_bytes,
        )
        del prepared
        config = _with_weight(config, material, output, tried)
        set_seed(config.seed)
        prepared = checked(loaded=narrowed(load_model(config, material), config))
    with processes.together():
        matching = matching_of(config, prepared.loaded, material)
        trainer = make_trainer(config, prepared.loaded.model, material, matching=matching)
    if config.fsdp and not trainer.is_fsdp_enabled:
        _say("fsdp: accelerate does not shard on CPUs; each process holds the whole model.")
    # Evaluate the untrained model before the first step; a resumed run has its metrics already.
    trainer.args.eval_on_start = resume is None and len(material.heldout) > 0
    with StopOnSignal().installed() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.agreed is not None:
        _say(f"Stopped, and saved in {output}; {_how_to_resume()}")
        raise SystemExit(128 + stop.agreed)
    figures = trainer.evaluate(metric_key_prefix="final") if len(material.heldout) else {}
    figures |= _untouched_figures(trainer, figures)
    whole = whole_model(trainer, config, prepared)
    if whole is not None:
        with _as_save_error(trainer, output):
            steps = trainer.state.global_step
            finish(output / FINAL, config, whole, steps=steps, figures=figures)
    trainer.accelerator.wait_for_everyone()
    return output / FINAL


def _how_to_resume() -> str:
    if processes.may_restart():
        return "torchrun restarts it, as long as it has restarts left."
    return "the same command continues from there."


def _untouched_figures(trainer: DFTTrainer, figures: Mapping[str, float]) -> dict[str, float]:
    """Print the likelihood of held-out text before and after training; returns those before it."""
    name = f"eval_{HUMAN_NLL}"
    before = [
        line[name] for line in trainer.state.log_history if name in line and line["step"] == 0
    ]
    if not (before and figures):
        return {}
    after = figures[f"final_{HUMAN_NLL}"]
    _say(f"Held-out human NLL: {after:.4f} nats a token; {before[0]:.4f} before training.")
    if after > before[0]:
        _say(
            "Warning: the trained model is worse at held-out text than the untrained one. Use a "
            "lower learning_rate, fewer steps (`patience` stops by itself), another target_weight, "
            "or more text."
        )
    return {f"untouched_{HUMAN_NLL}": before[0], **_of_each_store(trainer, figures)}


def _of_each_store(trainer: DFTTrainer, figures: Mapping[str, float]) -> dict[str, float]:
    """The same for each store, if there are several."""
    found = {}
    untouched = next(line for line in trainer.state.log_history if f"eval_{HUMAN_NLL}" in line)
    for name, after in figures.items():
        own = name.removeprefix("final_")
        if not own.startswith(f"{HUMAN_NLL}/"):
            continue
        before = untouched[f"eval_{own}"]
        _say(f"  {own.partition('/')[2]}: {after:.4f}; {before:.4f} before training.")
        found[f"untouched_{own}"] = before
    return found


def read(config: TrainConfig) -> Material:
    """Read the stores and the tokenizer, and check them against each other and the configuration.

    Raises:
        ValueError: no store, a store of another tokenizer or template, or a lumped tail if the
            divergence needs draws.
    """
    found = lm.examine(config.model)
    tokenizer = load_tokenizer(config.model)
    found.check_tokenizer(tokenizer)
    stores = open_stores(config, tokenizer, vocabulary=found.vocabulary)
    has_heldout = stores[0].store.count("heldout") > 0  # All stores have some, or none has.
    if config.steps:
        _check_patience(config, config.steps)
    if config.patience is not None and not has_heldout:
        raise ValueError("patience: the store has no held-out text to stop by; build it with some.")
    if config.divergence.target_weight == AUTO and not has_heldout:
        raise ValueError("target_weight: auto needs held-out text; build the store with some.")
    rows = {
        split: _rows(stores, split, config, packing=config.packing)
        for split in ("train", "heldout")
    }
    collate = Collator(packing=config.packing)
    weights = lm.model_digest(found)
    material = Material(tokenizer, stores, rows["train"], rows["heldout"], collate, found, weights)
    found.check_length(material.longest, "max_length")
    return material


def _check_patience(config: TrainConfig, steps: int) -> None:
    if config.patience is not None and steps <= config.evaluate_every:
        raise ValueError(
            f"patience: a run of {steps} steps that evaluates every {config.evaluate_every} "
            "cannot stop early; lower evaluate_every."
        )


def _rows(
    stores: Sequence[NamedStore], split: str, config: TrainConfig, *, packing: bool
) -> Rows | MixedRows:
    """The rows of a single store, or of several mixed by their weights.

    Raises:
        ValueError: a store has text in this split but no trained token.
    """
    given: dict[str, Any] = {"packing": packing, "seed": config.seed}
    parts = [Rows(each.store, split, longest=config.max_length, **given) for each in stores]
    for each, part in zip(stores, parts, strict=True):
        if each.store.count(split) and not len(part):
            advice = "Leave it out, or build" if len(stores) > 1 else "Build"
            raise ValueError(
                f"targets: {each.store.folder} has no {split} token that is learnt; accepted: "
                f"stores with some. {advice} it from other text."
            )
    if len(parts) == 1:
        return parts[0]
    return MixedRows(parts, weights=[each.weight for each in config.stores], seed=config.seed)


def load_model(config: TrainConfig, material: Material) -> Loaded:
    """The model in float32 with its divergence attached, and with adapters if the run uses them."""
    found = material.found
    model: Any = lm.load(
        found, dtype=torch.float32, device=_checked_on(config), attention=config.attention
    )
    if config.gradient_checkpointing:
        model.config.use_cache = False
    embeddings: Any = model.get_input_embeddings().weight
    divergence = config.divergence.build(embeddings, config.seed)
    language_model = attach(model, divergence, name=found.name, tokens_N=material.text_N)
    if config.lora is not None:
        model = adapted(model, config.lora, checkpointing=config.gradient_checkpointing)
    return Loaded(model, language_model)


def narrowed(loaded: Loaded, config: TrainConfig) -> Loaded:
    """If `weights` is bf16, cast the frozen weights to it in place and move the model to the
    training device.

    The checks ran before in float32: in bf16, rounding errors look like documents that leak into
    each other.
    """
    if config.weights == "bf16":
        model: Any = loaded.language_model.model
        wide = tuple(model._keep_in_fp32_modules_strict or ())
        for name, value in model.named_parameters():
            if not value.requires_grad and not any(each in name for each in wide):
                value.data = value.data.to(torch.bfloat16)
        model.to(_device(config))
    return loaded


def _checked_on(config: TrainConfig) -> torch.device:
    """The device on which the model is loaded and checked: the CPU if its weights will be bf16,
    since the GPU may be too small for them in float32."""
    return torch.device("cpu") if config.weights == "bf16" else _device(config)


def _device(config: TrainConfig) -> torch.device:
    """The device on which the Trainer will put the model, so that the checks run there too."""
    if not torch.cuda.is_available() or config.fsdp:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def matching_of(config: TrainConfig, loaded: Loaded, material: Material) -> FeatureMatching | None:
    """Feature matching with the features of the model before the run: the same model with its
    adapters disabled, or a second copy if there are none."""
    if config.feature_matching is None:
        return None
    model, untrained = loaded.language_model, nullcontext
    if config.lora is not None:
        untrained = loaded.model.disable_adapter
    else:
        network: Any = lm.load(
            material.found,
            dtype=torch.float32,
            device=_device(config),
            attention=config.attention,
        )
        model = lm.LanguageModel(network, material.found.name, material.text_N)
    rows = (item for item, _ in material.train.items())
    groups = iter(lambda: list(islice(rows, config.batch_size)), [])
    device = model.model.device
    batches = (
        {name: value.to(device) for name, value in material.collate(group).items()}
        for group in groups
    )
    network = FeatureNetwork.of(model, config.feature_matching.layers, batches, untrained)
    return FeatureMatching(config.feature_matching, loaded.language_model, network, config.seed)


def make_trainer(
    config: TrainConfig,
    model: Any,
    material: Material,
    callbacks: tuple = (),
    *,
    matching: FeatureMatching | None = None,
) -> DFTTrainer:
    heldout = heldout_parts(config, material)
    early = config.patience is not None
    # Untyped: transformers annotates `fsdp` as a string, but warns if it gets one.
    given: dict[str, Any] = {
        checkpointing_name(): config.gradient_checkpointing,
        "fsdp": config.fsdp,
    }
    arguments = TrainingArguments(
        output_dir=config.output,
        max_steps=config.steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        optim=config.optim,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=warmup_of(config, material),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        fsdp_config={"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"},
        save_strategy="steps",
        # The best model can be kept only if it is saved at the evaluation that finds it.
        save_steps=config.evaluate_every if early else config.save_every,
        save_total_limit=config.keep,
        eval_strategy="steps" if heldout else "no",
        eval_steps=config.evaluate_every,
        load_best_model_at_end=early,
        # For example the remaining patience.
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model=HUMAN_NLL if early else None,
        greater_is_better=False if early else None,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        seed=config.seed,
        remove_unused_columns=False,
        torch_compile=config.torch_compile,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=False,
        **given,
    )
    trainer = DFTTrainer(
        model=model,
        matching=matching,
        args=arguments,
        train_dataset=material.train,
        eval_dataset=heldout or None,
        data_collator=material.collate,
        processing_class=material.tokenizer,
        callbacks=list(callbacks),
    )
    if trainer.is_fsdp_enabled and config.precision == "bf16":
        # accelerate's policy would round to bf16 the targets passed to the model, the sums that it
        # returns, and the gradients that processes add up.
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy,
            cast_forward_inputs=False,
            output_dtype=None,
            reduce_dtype=torch.float32,
        )
    if config.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(config.patience))
    return trainer


def heldout_parts(config: TrainConfig, material: Material) -> list[HeldOut]:
    """The held-out rows of each store, up to its share of `evaluate_tokens`; empty if there is no
    held-out text."""
    if not len(material.heldout):
        return []
    return [
        HeldOut(_some(part, config.evaluate_tokens * each.weight), each.name, each.weight)
        for each, part in zip(material.stores, material.heldout.parts, strict=True)
    ]


def whole_model(trainer: DFTTrainer, config: TrainConfig, prepared: Prepared) -> Prepared | None:
    """The trained model, or an unsharded copy of it; None in all processes but the first."""
    if not trainer.is_fsdp_enabled:
        return prepared if trainer.is_world_process_zero() else None
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return None
    loaded = load_model(config, prepared.material)
    loaded.model.load_state_dict(weights)
    return replace(prepared, loaded=loaded)


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


def finish(
    folder: Path,
    config: TrainConfig,
    prepared: Prepared,
    *,
    steps: int,
    figures: Mapping[str, float],
) -> None:
    """Write the checkpoint and read it back; a failed one is not kept."""
    model, material = prepared.loaded.model, prepared.material
    model.eval()
    source = source_of(material.stores)
    if len(material.heldout):
        what = "next-token entropies" if is_refused(source) else "the diversity to suggest"
        _say(f"Measuring {what}, on held-out text.")
    seen = profile(prepared.loaded.language_model, config, material)
    promised = promise(config, seen, source)
    if promised.diversity is not None:
        _say(f"Suggested: diversity {promised.diversity.level:g} (dft.json).")
    data = {
        "model": Path(config.model).name,
        "weights": material.weights,
        **_data_of(material.stores),
        "packing": {
            "used": material.collate.packing,
            "refused_because": prepared.not_packed_because,
        },
    }
    measured = {name.removeprefix("final_"): value for name, value in figures.items()}
    run = checkpoint.Run.of(asdict(config), data, steps=steps, figures=measured)
    _say(f"Writing {folder}, and reading it back.")
    if config.weights == "bf16":
        # Merging in bf16 would round away small adapters; the CPU has memory for float32.
        model.to("cpu", torch.float32)
    sample = material.collate(_some(material.heldout, 1) or _some(material.train, 1))
    trained = nll(prepared.loaded.language_model, sample)
    with atomic.folder(folder) as made, checkpoint.writing(folder):
        if config.lora is not None:
            model.save_pretrained(made / ADAPTER)
            model = model.merge_and_unload()
        model.save_pretrained(made)
        material.tokenizer.save_pretrained(made)
        check_reloaded(made, trained, sample)
        checkpoint.describe(made, promised, run)
        checkpoint.seal(made)


def _data_of(stores: Sequence[NamedStore]) -> dict[str, Any]:
    """Digests of the targets, the corpus and the tokenizer; those of several stores by name."""
    plans = {each.name: each.store.manifest.plan for each in stores}
    digests = {
        "targets": {each.name: targets_digest(each.store.folder) for each in stores},
        "corpus": {name: plan.corpus_blake3 for name, plan in plans.items()},
    }
    if len(stores) == 1:
        digests = {what: next(iter(by_name.values())) for what, by_name in digests.items()}
    return {**digests, "tokenizer": stores[0].store.manifest.plan.tokenizer}


def profile(language_model: lm.LanguageModel, config: TrainConfig, material: Material) -> Profile:
    """The model's profile on held-out text; with several stores, their weighted mean."""
    weights = [each.weight for each in material.stores]
    parts = [
        _profile_of(language_model, config, material, part, share=weight)
        for part, weight in zip(material.heldout.parts, weights, strict=True)
    ]
    return parts[0] if len(parts) == 1 else Profile.mixed(parts, weights)


def _profile_of(
    language_model: lm.LanguageModel,
    config: TrainConfig,
    material: Material,
    rows: Rows,
    *,
    share: float,
) -> Profile:
    device = language_model.model.device
    tokens = share * PROFILE_TOKENS
    loader = DataLoader(
        _some(rows, tokens),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        collate_fn=material.collate,
    )
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in loader)
    end: Any = material.tokenizer.eos_token_id
    stops: frozenset[int] = frozenset() if end is None else frozenset({end})
    return measure(language_model, batches, stop_ids=stops, tokens=tokens, share=share)


def promise(config: TrainConfig, seen: Profile, source: Mapping[str, Any]) -> Promise:
    """The content of the checkpoint's dft.json.

    Held-out targets are the mixture's own even if the mixture is refused. Then they are neither
    what was learnt nor known to be nearer to the text than the model is, so they are not used.
    """
    recipe = f"{config.divergence.name} toward {json.dumps(source, ensure_ascii=False)}"
    if not len(seen.model_T):
        return Promise(recipe=recipe)
    refused = is_refused(source)
    reads = DIVERGENCES[config.divergence.name].reads_target and not refused
    return Promise(
        recipe=recipe,
        diversity=None if refused else seen.suggested,
        target_entropy=round(seen.target_mean, 4) if reads else None,
        model_entropy=round(seen.model_mean, 4),
        target_deciles=seen.target_deciles if reads else None,
        model_deciles=seen.model_deciles,
    )


def _with_weight(
    config: TrainConfig, material: Material, output: Path, tried: dict[str, Any]
) -> TrainConfig:
    """Choose λ by the held-out human NLL after a short run of each candidate.

    Args:
        tried: the results of an earlier start, which are not computed again; the same in every
            process.
    """
    path = output / WEIGHTS
    candidates = config.divergence.to_try
    steps = probe_steps(config, material)
    for weight in candidates:
        if f"{weight:g}" in tried:
            continue
        gc.collect()  # A model has reference cycles, so the previous one is not freed by itself.
        _say(f"Trying target_weight {weight:g}, {steps} steps:")
        probe = replace(
            _weighted(config, weight),
            steps=steps,
            evaluate_every=1 << 30,
            patience=None,
            report_to="none",
        )
        set_seed(config.seed)
        loaded = narrowed(load_model(probe, material), probe)
        matching = matching_of(probe, loaded, material)
        trainer = make_trainer(probe, loaded.model, material, matching=matching)
        trainer.args.save_strategy = "no"
        trainer.train()
        nll = trainer.evaluate()[f"eval_{HUMAN_NLL}"]
        tried[f"{weight:g}"] = {HUMAN_NLL: nll, "batches": trainer.batch_nll}
        if len(material.stores) > 1:
            tried[f"{weight:g}"]["stores"] = trainer.batches_of_stores
        if trainer.is_world_process_zero():
            atomic.write_text(path, json.dumps(tried, indent=2) + "\n")
        del loaded, matching, trainer
    gc.collect()
    with shaped_as(path, "likelihoods for each weight"):
        each = {f"{weight:g}": tried[f"{weight:g}"] for weight in candidates}
        found = {name: float(result[HUMAN_NLL]) for name, result in each.items()}
        batches = _batches_by_candidate(
            path, {name: result["batches"] for name, result in each.items()}
        )
        counts = [int(count) for count in next(iter(each.values())).get("stores", ())]
    best = min(found, key=lambda name: found[name])
    _say(weights_shown(found, best))
    indistinct = [
        name
        for name in found
        if name != best and not _differs(batches[best], batches[name], counts)
    ]
    if indistinct:
        _say(
            "Warning: on this held-out text the best one is not significantly different from "
            f"{', '.join(indistinct)} (two standard errors over its batches). Use more steps, more "
            "divergence.probe_steps or more held-out text, or choose target_weight yourself."
        )
    return _weighted(config, float(best))


def _batches_by_candidate(path: Path, results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(nats, tokens) of each batch, by candidate.

    Raises:
        ValueError: an earlier start wrote something else, or used other batches; the same in every
            process, since all read the same file.
    """
    try:
        stacked = np.stack([np.array(each, float).reshape(-1, 2) for each in results.values()])
    except ValueError:
        raise ValueError(
            f"{path}: got candidates that were judged by different batches of held-out text; "
            "accepted: the same for each. Remove it, and all are tried again."
        ) from None
    return dict(zip(results, stacked, strict=True))


def _differs(ours_B2: np.ndarray, theirs_B2: np.ndarray, counts: Sequence[int]) -> bool:
    """Whether two held-out NLLs differ by more than two standard errors of their difference.

    Args:
        ours_B2: (nats, tokens) of each batch; both are of the same batches.
        counts: the number of batches of each of several stores. The variance is computed about
            each store's own mean.
    """
    nats_B, tokens_B = ours_B2[:, 0] - theirs_B2[:, 0], ours_B2[:, 1]
    squares = 0.0
    for part in _strata(len(nats_B), counts):
        if len(part) < 2:
            return False
        rest_B = nats_B[part] - nats_B[part].sum() / tokens_B[part].sum() * tokens_B[part]
        # A batch with a large share of the tokens pulls the mean toward itself. As in the
        # jackknife, it is compared with the mean of the other batches.
        rest_B /= 1 - tokens_B[part] / tokens_B[part].sum()
        squares += (rest_B**2).sum() * (len(part) - 1) / len(part)
    error = np.sqrt(squares) / tokens_B.sum()
    return bool(abs(nats_B.sum() / tokens_B.sum()) > 2 * error)


def _strata(batches: int, counts: Sequence[int]) -> list[np.ndarray]:
    """The indices of the batches of each store. A single batch has no variance, so stores with one
    batch are merged with the store that has most batches (collapsed strata: Cochran, Sampling
    Techniques, 5A.12). There the difference between the stores counts as variance too, so that the
    variance is not underestimated."""
    parts = np.split(np.arange(batches), np.cumsum(counts)[:-1].astype(int))
    most = max(range(len(parts)), key=lambda store: len(parts[store]))
    own = [part for store, part in enumerate(parts) if store != most and len(part) > 1]
    single = [part for store, part in enumerate(parts) if store != most and len(part) < 2]
    return [np.concatenate([parts[most], *single]), *own]


def steps_of(config: TrainConfig, material: Material) -> int:
    """Optimizer steps of the run, for one process."""
    return config.steps or math.ceil(steps_of_epoch(config, material) * config.epochs)


def steps_of_epoch(config: TrainConfig, material: Material) -> int:
    return math.ceil(len(material.train) / config.batch_size / config.accumulation)


def warmup_of(config: TrainConfig, material: Material) -> float:
    """Warm-up as a fraction of the steps; 0 if it is shorter than one step."""
    return config.warmup if config.warmup * steps_of(config, material) >= 1 else 0.0


def probe_steps(config: TrainConfig, material: Material) -> int:
    """Optimizer steps of each candidate of `auto`."""
    third = steps_of(config, material) // (3 * len(config.divergence.to_try))
    return min(config.divergence.probe_steps, max(1, third))


def weights_shown(tried: Mapping[str, float], best: str) -> str:
    """The likelihood of each candidate of `auto`, one per line."""
    width = max(map(len, tried))
    lines = (
        f"  {weight:<{width}}  {nll:.4f}{'  taken' if weight == best else ''}"
        for weight, nll in tried.items()
    )
    return "\n".join(("Held-out human NLL by target_weight, nats a token:", *lines))


def of_first_candidate(config: TrainConfig) -> TrainConfig:
    """The configuration, with the first candidate as weight if it is still to be chosen."""
    is_auto = config.divergence.target_weight == AUTO
    return _weighted(config, config.divergence.to_try[0]) if is_auto else config


def _weighted(config: TrainConfig, weight: float) -> TrainConfig:
    return replace(config, divergence=replace(config.divergence, target_weight=weight))


def _say(line: str) -> None:
    if processes.is_first():
        print(line, file=sys.stderr, flush=True)


def _some(rows: Rows | MixedRows, tokens: float) -> list:
    """The first rows that together have at least `tokens` tokens."""
    some, total = [], 0
    for item, size in rows.items():
        some.append(item)
        total += size
        if total >= tokens:
            break
    return some
