"""Chooses λ, `divergence.target_weight`, where it is `auto`: the one with the lowest held-out human
NLL after a short run of each candidate."""

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from dftserve import atomic
from dftserve.bounded_files import shaped_as
from dftserve.train import processes
from dftserve.train.config import AUTO, TrainConfig
from dftserve.train.material import Material, steps_of
from dftserve.train.prepare import cast_frozen_weights, load_model, make_trainer, matching_of
from dftserve.train.run_folder import WEIGHTS
from dftserve.train.trainer import HUMAN_NLL


def of_first_candidate(config: TrainConfig) -> TrainConfig:
    """The configuration, with the first candidate as weight if it is still to be chosen."""
    is_auto = config.divergence.target_weight == AUTO
    return _with_weight(config, config.divergence.to_try[0]) if is_auto else config


def choose(
    config: TrainConfig, material: Material, output: Path, tried: dict[str, Any]
) -> TrainConfig:
    """The configuration with the candidate whose held-out human NLL is the lowest after a short
    run.

    Args:
        tried: the results of an earlier start, which are not computed again; the same in every
            process.

    Raises:
        ValueError: an earlier start wrote something else, or used other batches.
    """
    path = output / WEIGHTS
    candidates = {f"{weight:g}": weight for weight in config.divergence.to_try}
    steps = probe_steps(config, material)
    for name, weight in candidates.items():
        if name in tried:
            continue
        gc.collect()  # A model has reference cycles, so the previous one is not freed by itself.
        processes.print_once(f"Trying target_weight {name}, steps: {steps}")
        tried[name] = _probe(_with_weight(config, weight), material, steps)
        if processes.is_first():
            atomic.write_text(path, json.dumps(tried, indent=2) + "\n")
    gc.collect()
    best = _best(path, {name: tried[name] for name in candidates})
    return _with_weight(config, candidates[best])


def _probe(config: TrainConfig, material: Material, steps: int) -> dict[str, Any]:
    """The held-out human NLL after a short run, in total and (nats, tokens) of each batch.

    Raises:
        ValueError: the NLL is not finite; the same in every process.
    """
    probe = replace(config, steps=steps, evaluate_every=1 << 30, patience=None, report_to="none")
    set_seed(config.seed)
    loaded = cast_frozen_weights(load_model(probe, material), probe)
    matching = matching_of(probe, loaded, material)
    trainer = make_trainer(probe, loaded.model, material, matching=matching)
    trainer.args.save_strategy = "no"
    trainer.train()
    nll = trainer.evaluate()[f"eval_{HUMAN_NLL}"]
    if not math.isfinite(nll):
        raise ValueError(
            f"target_weight {config.divergence.target_weight:g}: the held-out NLL is {nll} after "
            f"{steps} steps. Lower learning_rate, or look for a damaged model."
        )
    result = {HUMAN_NLL: nll, "batches": trainer.batch_nll}
    if len(material.stores) > 1:
        result["stores"] = trainer.batches_of_stores
    return result


def _best(path: Path, results: Mapping[str, Any]) -> str:
    """The candidate with the lowest NLL. Prints all of them, and a warning if others are not
    significantly different."""
    with shaped_as(path, "likelihoods for each weight"):
        nll_by_weight = {name: float(result[HUMAN_NLL]) for name, result in results.items()}
        batches = _batches_by_candidate(
            path, {name: result["batches"] for name, result in results.items()}
        )
        counts = [int(count) for count in next(iter(results.values())).get("stores", ())]
    best = min(nll_by_weight, key=lambda name: nll_by_weight[name])
    processes.print_once(candidates_text(nll_by_weight, best))
    indistinct = [
        name
        for name in nll_by_weight
        if name != best and not differs(batches[best], batches[name], counts)
    ]
    if indistinct:
        processes.print_once(
            "Warning: on this held-out text the best one is not significantly different from "
            f"{', '.join(indistinct)} (two standard errors over its batches). Use more steps, more "
            "divergence.probe_steps or more held-out text, or choose target_weight yourself."
        )
    return best


def probe_steps(config: TrainConfig, material: Material) -> int:
    """Optimizer steps of each candidate of `auto`."""
    third = steps_of(config, material) // (3 * len(config.divergence.to_try))
    return min(config.divergence.probe_steps, max(1, third))


def candidates_text(tried: Mapping[str, float], best: str) -> str:
    """The likelihood of each candidate of `auto`, one per line."""
    width = max(map(len, tried))
    lines = (
        f"  {weight:<{width}}  {nll:.4f}{'  taken' if weight == best else ''}"
        for weight, nll in tried.items()
    )
    return "\n".join(("Held-out human NLL by target_weight, nats a token:", *lines))


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


def differs(ours_B2: np.ndarray, theirs_B2: np.ndarray, counts: Sequence[int]) -> bool:
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


def _with_weight(config: TrainConfig, weight: float) -> TrainConfig:
    return replace(config, divergence=replace(config.divergence, target_weight=weight))
