"""The final checkpoint of a run: measured, written and read back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dftserve import atomic, checkpoint, lm
from dftserve.library_writes import writing
from dftserve.spec import CheckpointInfo
from dftserve.targets.calibrated import is_refused
from dftserve.train import processes
from dftserve.train.config import TrainConfig
from dftserve.train.data import Rows
from dftserve.train.divergences import DIVERGENCES
from dftserve.train.entropy_profile import EntropyProfile, measure
from dftserve.train.material import Material, some_rows
from dftserve.train.prepare import Prepared, load_model
from dftserve.train.run_folder import targets_digest
from dftserve.train.save import check_reloaded, copy_companions, nll
from dftserve.train.stores import NamedStore, source_of
from dftserve.train.trainer import DFTTrainer

ADAPTER = "adapter"
SET_BY_TRAINER = ("use_cache", "pad_token_id")
"""Settings of a model's config.json that the Trainer sets for its own steps, or to the tokenizer's.
A tuned model without a cache answers slowly, and Youtu loses the embedding of a padding token."""
PROFILE_TOKENS = 20_000
"""Held-out tokens on which the entropies and the suggested diversity are measured."""


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


def write(
    folder: Path,
    config: TrainConfig,
    prepared: Prepared,
    *,
    steps: int,
    metrics: Mapping[str, float],
) -> None:
    """Measure the trained model, write the checkpoint and read it back; a failed one is not kept.

    Args:
        steps: optimizer steps that led to these weights.
        metrics: of the trained model, by the Trainer's names; those that begin with `final_` are
            written without it.

    Raises:
        OSError: the checkpoint cannot be written.
        ValueError: what was read back differs from the trained model.
    """
    model, material = prepared.loaded.model, prepared.material
    model.eval()
    info = _measured_info(config, prepared)
    measured = {name.removeprefix("final_"): value for name, value in metrics.items()}
    run = checkpoint.Run.of(
        asdict(config), _data_of(config, prepared), steps=steps, metrics=measured
    )
    processes.print_once(f"Writing {folder}, and reading it back.")
    if config.weights == "bf16":
        # Merging in bf16 would round away small adapters; the CPU has memory for float32.
        model.to("cpu", torch.float32)
    sample = material.collate(some_rows(material.heldout, 1) or some_rows(material.train, 1))
    trained_nll = nll(prepared.loaded.language_model, sample)
    with atomic.folder(folder) as staging, writing(folder):
        if config.lora is not None:
            model.save_pretrained(staging / ADAPTER)
            model = model.merge_and_unload()
        _restore(model.config, material.model_files.config)
        model.save_pretrained(staging)
        material.tokenizer.save_pretrained(staging)
        copy_companions(material.model_files.folder, staging)
        check_reloaded(staging, trained_nll, sample)
        checkpoint.describe(staging, info, run)
        checkpoint.seal(staging)


def _measured_info(config: TrainConfig, prepared: Prepared) -> CheckpointInfo:
    """The content of dft.json, measured on held-out text; prints what it suggests."""
    material = prepared.material
    source = source_of(material.stores)
    if len(material.heldout):
        what = "next-token entropies" if is_refused(source) else "the diversity to suggest"
        processes.print_once(f"Measuring {what}, on held-out text.")
    profile = measure_profile(prepared.loaded.language_model, config, material)
    info = checkpoint_info(config, profile, source)
    if info.diversity is not None and (level := info.diversity.level) is not None:
        processes.print_once(
            f"Suggested: diversity {level:g} (dft.json): the model's mean entropy is "
            f"{profile.by_level[level]:.2f} nats at it, {profile.model_mean:.2f} without; the "
            f"target's is {profile.target_mean:.2f}."
        )
    return info


def _restore(config: Any, original: Any) -> None:
    """Undo in a model's configuration what the Trainer set."""
    for ours, theirs in (
        (config, original),
        (config.get_text_config(), original.get_text_config()),
    ):
        for name in SET_BY_TRAINER:
            if hasattr(theirs, name):
                setattr(ours, name, getattr(theirs, name))
            elif hasattr(ours, name):
                delattr(ours, name)


def _data_of(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """What the run read, for run.json: the model, digests of the stores, and the packing."""
    material = prepared.material
    return {
        "model": Path(config.model).name,
        "weights": material.weights,
        **_store_digests(material.stores),
        "packing": {
            "used": material.collate.packing,
            "refused_because": prepared.not_packed_because,
        },
    }


def _store_digests(stores: Sequence[NamedStore]) -> dict[str, Any]:
    """Digests of the targets, the corpus and the tokenizer; those of several stores by name."""
    plans = {each.name: each.store.manifest.plan for each in stores}
    digests = {
        "targets": {each.name: targets_digest(each.store.folder) for each in stores},
        "corpus": {name: plan.corpus_blake3 for name, plan in plans.items()},
    }
    if len(stores) == 1:
        digests = {what: next(iter(by_name.values())) for what, by_name in digests.items()}
    return {**digests, "tokenizer": stores[0].store.manifest.plan.tokenizer}


def measure_profile(
    language_model: lm.LanguageModel, config: TrainConfig, material: Material
) -> EntropyProfile:
    """The model's profile on held-out text; with several stores, their weighted mean."""
    weights = [each.weight for each in material.stores]
    parts = [
        _profile_of(language_model, config, material, part, share=weight)
        for part, weight in zip(material.heldout.parts, weights, strict=True)
    ]
    return parts[0] if len(parts) == 1 else EntropyProfile.mixed(parts, weights)


def _profile_of(
    language_model: lm.LanguageModel,
    config: TrainConfig,
    material: Material,
    rows: Rows,
    *,
    share: float,
) -> EntropyProfile:
    device = language_model.model.device
    tokens = share * PROFILE_TOKENS
    loader = DataLoader(
        some_rows(rows, tokens),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        collate_fn=material.collate,
    )
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in loader)
    end: Any = material.tokenizer.eos_token_id
    stops: frozenset[int] = frozenset() if end is None else frozenset({end})
    return measure(language_model, batches, stop_ids=stops, tokens=tokens, share=share)


def checkpoint_info(
    config: TrainConfig, profile: EntropyProfile, source: Mapping[str, Any]
) -> CheckpointInfo:
    """The content of the checkpoint's dft.json.

    Held-out targets are the mixture's own even if the mixture is refused. Then they are neither
    what was trained on nor known to be nearer to the text than the model is, so they are not used.
    """
    recipe = f"{config.divergence.name} toward {json.dumps(source, ensure_ascii=False)}"
    if not len(profile.model_T):
        return CheckpointInfo(recipe=recipe)
    refused = is_refused(source)
    reads = DIVERGENCES[config.divergence.name].reads_target and not refused
    return CheckpointInfo(
        recipe=recipe,
        diversity=None if refused else profile.suggested,
        target_entropy=round(profile.target_mean, 4) if reads else None,
        model_entropy=round(profile.model_mean, 4),
        target_deciles=profile.target_deciles if reads else None,
        model_deciles=profile.model_deciles,
    )
