"""Weight interpolation: a model between a tuned one and another of the same architecture.

    interpolate("run/final", "models/base", share=0.5, out=Path("between"))

Each weight is share · tuned + (1 − share) · other, computed in float32. If `other` is the model
that the tuning started from, this is WiSE-FT (arXiv 2109.01903), which keeps part of what tuning
changed and restores part of what it damaged. Everything but the weights and their dtype is the
tuned model's.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dftserve import atomic, checkpoint, pretrained
from dftserve.library_writes import writing
from dftserve.pretrained import ModelFiles
from dftserve.spec import FINAL, CheckpointInfo
from dftserve.targets.document import load_tokenizer
from dftserve.train.save import copy_companions, try_save

WITHOUT_EFFECT = (
    "_attn_implementation_internal",
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "max_position_embeddings",
    "transformers_version",
    "use_cache",
)
"""Settings of a config.json that may differ between the two models: they do not change what the
weights compute. So may token ids and dropout."""


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The run.json of an interpolated model: how it was made."""

    share: float
    """Of the tuned model's weights."""
    models: Mapping[str, Mapping[str, str]]
    """Name and digest of the weights of `tuned` and of `other`."""
    argv: tuple[str, ...]
    versions: Mapping[str, str]


def interpolate(tuned: str, other: str, *, share: float, out: Path) -> None:
    """Write a checkpoint with interpolated weights, in the wider dtype of the two models.

    Both models are in memory at once. The written weights are read back and compared.

    Args:
        tuned, other: a folder, a GGUF file, or a name on the Hugging Face hub.
        share: of the tuned model, between 0 and 1.
        out: the folder of the checkpoint, which must not exist.

    Raises:
        ValueError: a share that is not between 0 and 1; a model that cannot be loaded or saved;
            models that differ in their configuration, their tokens or the shape of a weight;
            weights that are the same, or whose saved form is read back otherwise.
        OSError: `out` exists or cannot be written.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"share: got {share:g}; accepted: a number above 0 and below 1, such as .5."
        )
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder.")
    atomic.check_writable(out)
    models = {"tuned": pretrained.examine(tuned), "other": pretrained.examine(other)}
    _check_configurations(models["tuned"], models["other"])
    tokenizer = load_tokenizer(tuned)
    _check_tokens(tokenizer, load_tokenizer(other), tuned, other)
    made_from = {
        role: {"name": _short_name(found.name), "weights": pretrained.model_digest(found)}
        for role, found in models.items()
    }
    if made_from["tuned"]["weights"] == made_from["other"]["weights"]:
        raise ValueError(f"{tuned} and {other} have the same weights; accepted: two models.")
    record = Interpolation(
        share=share, models=made_from, argv=tuple(sys.argv), versions=checkpoint.versions()
    )
    info = _info(models["tuned"], record)
    # Not "auto", which replaces half precision by float32 on some CPUs. Half precision would round
    # away what one model learnt in float32, so the wider of both is kept.
    dtypes = [found.config.dtype or torch.float32 for found in models.values()]
    dtype = torch.promote_types(*dtypes)
    model = pretrained.load(models["tuned"], dtype=dtype)
    try_save(model, tokenizer, tuned)
    _mix(model, pretrained.load(models["other"], dtype=dtype), share)
    with atomic.folder(out) as made, writing(out):
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        copy_companions(models["tuned"].folder, made)
        _check_saved(model, made)
        checkpoint.write_description(made, info, record, _card(info, record))
        checkpoint.seal(made)


# ── What two models must have in common ──────────────────────────────────────────────────────────


def _check_configurations(tuned: ModelFiles, other: ModelFiles) -> None:
    ours, theirs = (_settings(found.config.to_dict()) for found in (tuned, other))
    differing = [
        f"{name} ({_short(ours.get(name))} and {_short(theirs.get(name))})"
        for name in ours.keys() | theirs.keys()
        if not _is_same(ours.get(name), theirs.get(name))
    ]
    if differing:
        raise ValueError(
            f"{tuned.name} and {other.name} differ in their config.json: "
            f"{pretrained.named(differing)}; accepted: models of one architecture, such as a tuned "
            "model and the one that it was tuned from."
        )


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that decide what the weights compute; of nested ones, by path."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in WITHOUT_EFFECT or name.endswith("_token_id") or "dropout" in name:
            continue
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            found |= _settings(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        # GGUF files store settings in float32.
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _short(value: Any) -> str:
    return f"{json.dumps(value, default=str):.40}"


def _check_tokens(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, tuned: str, other: str
) -> None:
    """The embedding's rows must belong to the same tokens; how text is split is the tuned
    model's."""
    mine, others = ours.get_vocab(), theirs.get_vocab()
    differing = [
        repr(token) for token in mine.keys() | others.keys() if mine.get(token) != others.get(token)
    ]
    if differing:
        raise ValueError(
            f"{tuned} and {other} give other ids to {len(differing):,} tokens "
            f"({pretrained.named(differing)}); accepted: models with the same tokens, as a row of "
            "the embedding must mean the same in both."
        )


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def _mix(model: Any, other: Any, share: float) -> None:
    """Replace the weights of `model`."""
    theirs = other.state_dict()
    mixed = set()
    for name, weight in model.state_dict().items():
        # A tied weight has two names, and must be replaced once.
        place = (weight.data_ptr(), weight.shape)
        if weight.numel() and place not in mixed:
            weight.copy_(_mixed(name, weight, theirs[name], share))
            mixed.add(place)


def _mixed(name: str, mine: Tensor, theirs: Tensor, share: float) -> Tensor:
    """The interpolated tensor, in float32 or wider; raises ValueError where there is none."""
    if mine.shape != theirs.shape:
        raise ValueError(
            f"{name}: got shapes {list(mine.shape)} and {list(theirs.shape)}; accepted: models "
            "with weights of the same shapes."
        )
    if not mine.is_floating_point():
        if not torch.equal(mine, theirs):
            raise ValueError(
                f"{name}: got different {mine.dtype} values, which have no values between them; "
                "accepted: models that differ in floating-point weights only."
            )
        return mine
    wide = torch.promote_types(mine.dtype, torch.float32)
    return share * mine.to(wide) + (1 - share) * theirs.to(wide)


def _check_saved(model: Any, folder: Path) -> None:
    """Read the saved weights back and compare them. Raises ValueError if they differ."""
    saved = pretrained.load(pretrained.examine(folder), dtype=model.dtype).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, saved[name]):
            raise ValueError(
                f"{folder}: {name} was read back with other values than were written; please "
                "report this with the name of the model."
            )


# ── Description ──────────────────────────────────────────────────────────────────────────────────


def _short_name(model: str) -> str:
    """The last part of a model's path; of a run's checkpoint, the run's name too."""
    path = Path(model)
    return f"{path.parent.name}/{FINAL}" if path.name == FINAL else path.name


def _info(tuned: ModelFiles, record: Interpolation) -> CheckpointInfo:
    """The dft.json: without the tuned model's entropies and diversity, which were measured on
    other weights."""
    recipe = (
        f"weights: {record.share:g} of {record.models['tuned']['name']} and "
        f"{1 - record.share:g} of {record.models['other']['name']}"
    )
    try:
        former = CheckpointInfo.read(tuned.folder).recipe
    except FileNotFoundError:
        return CheckpointInfo(recipe=recipe)
    return CheckpointInfo(recipe=f"{recipe}; the former: {former}")


def _card(info: CheckpointInfo, record: Interpolation) -> str:
    tuned, other = (checkpoint.unformatted(record.models[role]["name"]) for role in record.models)
    return f"""---
library_name: transformers
tags: [weight-interpolation, dftserve]
---

# Between {tuned} and {other}

Each weight is {record.share:g} times that of the first plus {1 - record.share:g} times that of the
second.

- Made from: {checkpoint.unformatted(info.recipe)}

Made with dftserve {record.versions["dftserve"]} by

    {shlex.join([Path(record.argv[0]).name, *record.argv[1:]])}
"""
