"""The model and the trainer of a run, checked before anything is written."""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from dftserve import lm, pretrained
from dftserve.model_config import CHUNK, ORIGINAL
from dftserve.train import continuations, processes
from dftserve.train.adapters import adapted
from dftserve.train.config import SCHEDULES, FeatureMatchingConfig, TrainConfig
from dftserve.train.continuations import Anchors
from dftserve.train.feature_matching import FeatureMatching, FeatureNetwork
from dftserve.train.material import (
    Material,
    check_patience,
    heldout_parts,
    read,
    steps_of,
    warmup_of,
)
from dftserve.train.model import attach, checkpointing_name
from dftserve.train.save import try_save
from dftserve.train.trainer import HUMAN_NLL, DFTTrainer

CHECKED_TOKENS = 256
"""Tokens that the checks of a model read at once if they run on the CPU and training does not."""

WRAPPED = ".base_layer"
"""What peft inserts into the name of a layer that it adapts."""


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
    tokenizer_bytes: int
    """The tokenizer and configurations in a checkpoint."""


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
        processes.print_once(
            f"{loaded.language_model.family}: one document a row, not packed: {reason}."
        )
        material = material.unpacked(config)
    if not config.steps:  # Steps follow from the number of rows, which is larger without packing.
        check_patience(config, steps_of(config, material))
    if config.batch_size > 1:
        loaded.language_model.check_batch(material.longest, most=most)
    if config.feature_matching is not None:
        _check_anchors(config.feature_matching, material)
        continuations.check(loaded.language_model, material.longest)
    saved = try_save(loaded.language_model.model, material.tokenizer, material.model_files.name)
    return Prepared(material, cast_frozen_weights(loaded, config), reason, resident, saved)


def _check_anchors(matching: FeatureMatchingConfig, material: Material) -> None:
    """Raises ValueError if no document has an anchor for continuations."""
    source = np.random.default_rng(0)
    for item, _ in material.train.items():
        batch = material.collate([item])
        if len(Anchors.draw(batch, length=matching.length, every=matching.every, source=source)):
            return
    raise ValueError(
        f"feature_matching.length: got {matching.length}, and no document of these targets has "
        "that many trained tokens in a row; accepted: fewer. Or leave feature_matching out."
    )


def _most_checked(config: TrainConfig) -> int | None:
    """Maximal tokens that the checks read at once; None: as many as the run. Prints a note if the
    checks read fewer."""
    if _checked_on(config) == _device(config) and not (config.fsdp and torch.cuda.is_available()):
        return None
    if (config.packing or config.batch_size > 1) and config.max_length > CHECKED_TOKENS:
        processes.print_once(
            f"{'fsdp' if config.fsdp else 'weights bf16'}: whether documents are kept separate is "
            f"tested on the CPU, with at most {CHECKED_TOKENS} tokens at once; longer rows are "
            f"judged by the configuration only ({CHUNK}, and {ORIGINAL} of longrope)."
        )
    return CHECKED_TOKENS


def _why_not_packed(
    language_model: lm.LanguageModel, material: Material, most: int | None
) -> str | None:
    rows = (sum(map(len, row)) for each in material.splits for row in each.rows)
    return language_model.packing_leak(material.longest, max(rows, default=0), most=most)


def load_model(config: TrainConfig, material: Material) -> Loaded:
    """The model in float32 with its divergence attached, and with adapters if the run uses them."""
    files = material.model_files
    model: Any = pretrained.load(
        files, dtype=torch.float32, device=_checked_on(config), attention=config.attention
    )
    embeddings: Any = model.get_input_embeddings().weight
    divergence = config.divergence.build(embeddings, config.seed)
    language_model = attach(model, divergence, name=files.name, tokens_N=material.text_N)
    if config.lora is not None:
        model = adapted(language_model, config.lora, checkpointing=config.gradient_checkpointing)
    return Loaded(model, language_model)


def cast_frozen_weights(loaded: Loaded, config: TrainConfig) -> Loaded:
    """If `weights` is bf16, cast the frozen weights to it in place and move the model to the
    training device.

    The other checks ran before in float32: in bf16, rounding errors look like documents that leak
    into each other.

    Raises:
        ValueError: the model's forward fails in these dtypes.
    """
    if config.weights == "bf16":
        model: Any = loaded.language_model.model
        wide = tuple(model._keep_in_fp32_modules_strict or ())
        for name, value in model.named_parameters():
            own_name = name.replace(WRAPPED, "")
            # The names are patterns, as for transformers.
            is_wide = any(re.search(each, own_name) for each in wide)
            if not value.requires_grad and not is_wide:
                value.data = value.data.to(torch.bfloat16)
        model.to(_device(config))
        loaded.language_model.check_reads()
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
        network: Any = pretrained.load(
            material.model_files,
            dtype=torch.float32,
            device=_device(config),
            attention=config.attention,
        )
        model = lm.LanguageModel(network, material.model_files.name, material.text_N)
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
    """The trainer of a run, whose inputs have passed all checks.

    Args:
        model: one that `load_model` returned.
        matching: as `matching_of` returns it.
    """
    heldout = heldout_parts(config, material)
    trainer = DFTTrainer(
        model=model,
        keep=config.keep,
        matching=matching,
        args=_arguments(config, material, evaluates=bool(heldout)),
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


def _arguments(config: TrainConfig, material: Material, *, evaluates: bool) -> TrainingArguments:
    early = config.patience is not None
    # Untyped: transformers annotates `fsdp` as a string, but warns if it gets one.
    untyped: dict[str, Any] = {
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
        lr_scheduler_type=SCHEDULES[config.schedule],
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
        eval_strategy="steps" if evaluates else "no",
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
        **untyped,
    )
    # Several GPUs are used by several processes, never by DataParallel, which would divide the rows
    # of a batch and their targets at different places.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
