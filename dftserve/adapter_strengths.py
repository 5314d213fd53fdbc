"""Write one LoRA adapter at several strengths, for engines without a strength per request. Each
strength becomes a separate adapter with a scaled `lora_alpha`, which scales its change of every
weight."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.bounded_files import FileError, chunks, inner_path, open_file, read_json
from dftserve.model_folder import ADAPTER_CONFIG as CONFIG
from dftserve.model_folder import LARGEST_WEIGHTS
from dftserve.spec import Bounds

WEIGHTS = "adapter_model.safetensors"
LARGEST_CONFIG = 1 << 20
"""Maximum bytes of an adapter_config.json, which has some 1,000."""
MOST_STRENGTHS = 32
"""Copies of the adapter that one command may write."""
STRENGTHS = Bounds(low=0, high=1, low_included=False)

_NOT_SCALED = {
    "use_dora": "DoRA, whose magnitudes do not follow lora_alpha",
    "modules_to_save": "whole modules (modules_to_save), which lora_alpha does not scale",
    "lora_bias": "biases of the adapter (lora_bias), which vLLM does not serve",
    "trainable_token_indices": "whole embeddings of tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "Activated LoRA (alora_invocation_tokens)",
}
"""Settings whose effect is not proportional to lora_alpha, or that vLLM refuses."""


def scale(adapter: Path, strengths: Sequence[float], out: Path) -> list[Path]:
    """Write the adapter at each strength to its own folder in `out`, which must not exist.

    Args:
        strengths: above 0 and up to 1, which is the adapter as trained.

    Returns:
        The folders, named after the adapter and the strength.

    Raises:
        ValueError: a strength out of range, or an adapter that is not a LoRA in safetensors whose
            whole effect scales with `lora_alpha`.
        OSError: from the disk, or `out` exists.
    """
    _check_strengths(strengths)
    settings = _settings(adapter)
    names = [f"{adapter.resolve().name}-{strength:g}" for strength in strengths]
    with atomic.folder(out) as staging:
        for name, strength in zip(names, strengths, strict=True):
            (staging / name).mkdir()
            text = json.dumps(_scaled(settings, strength), indent=2)
            (staging / name / CONFIG).write_text(text + "\n", encoding="utf-8")
            _copy(adapter, staging / name / WEIGHTS)
    return [out / name for name in names]


def flags(folders: Sequence[Path]) -> str:
    """The options of `vllm serve` that serve these adapters.

    There is one slot more than adapters: on a CPU, vLLM applies the adapter in the last slot to
    requests for the base model in the same step (vllm-project/vllm#48421), so it must stay empty.
    """
    config = read_json(folders[0] / CONFIG, largest=LARGEST_CONFIG)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    modules = " ".join(shlex.quote(f"{each.name}={each.resolve()}") for each in folders)
    # The values that vLLM accepts for --max-lora-rank.
    accepted = next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
    return (
        f"--enable-lora --max-loras {len(folders) + 1} --max-lora-rank {accepted} "
        f"--lora-modules {modules}"
    )


def _check_strengths(strengths: Sequence[float]) -> None:
    named = [f"{each:g}" for each in strengths]
    if not 0 < len(strengths) <= MOST_STRENGTHS or len(set(named)) < len(named):
        accepted = f"1 to {MOST_STRENGTHS}, each once"
        raise ValueError(f"--strengths: got {', '.join(named) or 'none'}; accepted: {accepted}.")
    for each in strengths:
        if each not in STRENGTHS:
            raise ValueError(f"--strengths: got {each:g}; accepted: {STRENGTHS}.")


def _settings(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG
    if not os.path.lexists(path):
        advice = "name the folder of a LoRA adapter, such as run/final/adapter of a run with `lora`"
        raise FileError(f"{path}: there is no such file", advice)
    settings = read_json(path, within=adapter, largest=LARGEST_CONFIG)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else settings
        raise FileError(f"{path}: got {kind!r:.80}; accepted: a LoRA adapter", "name another")
    for name, what in _NOT_SCALED.items():
        if settings.get(name):
            raise FileError(f"{path}: got {what}; accepted: plain LoRA or rsLoRA", "name another")
    if settings.get("bias", "none") != "none":
        raise FileError(f"{path}: got trained biases (bias); accepted: none", "name another")
    patterns = [settings.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    if not all(isinstance(each, dict) for each in patterns):
        raise FileError(f"{path}: got patterns that are no objects", "name another")
    alphas = [settings.get("lora_alpha"), *patterns[0].values()]
    ranks = [settings.get("r"), *patterns[1].values()]
    for each in (*alphas, *ranks):
        if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
            got = f"{path}: got {each!r:.80} as lora_alpha or r"
            raise FileError(f"{got}; accepted: numbers", "name another")
    if not all(isinstance(each, int) and each > 0 for each in ranks):
        raise FileError(f"{path}: got ranks {ranks!r:.80}; accepted: above 0", "name another")
    return settings


def _scaled(settings: dict[str, Any], strength: float) -> dict[str, Any]:
    pattern = settings.get("alpha_pattern") or {}
    return settings | {
        "lora_alpha": settings["lora_alpha"] * strength,
        "alpha_pattern": {name: alpha * strength for name, alpha in pattern.items()},
    }


def _copy(adapter: Path, to: Path) -> None:
    path = adapter / inner_path(WEIGHTS, str(adapter))
    try:
        source = open_file(path, largest=LARGEST_WEIGHTS, within=adapter)
    except FileNotFoundError:
        problem = f"{adapter}: got no {WEIGHTS}; accepted: an adapter of safetensors"
        raise FileError(problem, "save it with peft's safe_serialization") from None
    with source, to.open("wb") as copy:
        for chunk in chunks(source, path, largest=LARGEST_WEIGHTS):
            copy.write(chunk)
