"""The target stores of a run: opened, and checked against the model, the run and each other."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve.bounded_files import shaped_as
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.targets.conversation import NO_STOP
from dftserve.targets.limits import LARGEST_KEPT
from dftserve.targets.store import MANIFEST, TargetStore
from dftserve.train import processes
from dftserve.train.config import TrainConfig
from dftserve.train.divergences import DIVERGENCES

MOST_SHARED = 0.01
"""The share of a store's held-out documents that another store may train on."""


@dataclass(frozen=True, eq=False)
class NamedStore:
    """A target store among those of a run."""

    store: TargetStore
    name: str
    """Its name in metrics: the folder's name, plus its index in `targets` if that is not unique."""
    weight: float
    """Its share of the trained tokens; those of all stores sum to 1."""

    @property
    def source(self) -> Mapping[str, Any]:
        return self.store.manifest.plan.source

    @property
    def warning(self) -> str | None:
        """A problem recorded when the store was built."""
        where = f"{self.store.folder / MANIFEST}: plan.corpus.noted"
        with shaped_as(where, "a count for each note"):
            noted = self.store.manifest.plan.corpus.get("noted", {}).get(NO_STOP)
            count = int(noted["count"]) if noted else 0
        if not count:
            return None
        return (
            f"in {count:,} conversations {NO_STOP}. End the template's generation marks "
            "after the token that ends a turn, and build the store again."
        )


def open_stores(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int
) -> tuple[NamedStore, ...]:
    """Open every store that the configuration names.

    Raises:
        ValueError: names a folder that is not a store, has a different tokenizer or template, or
            lacks the draws from the tail that the divergence needs; or stores that cannot be mixed.
    """
    opened = [TargetStore(Path(each.path)) for each in config.stores]
    for store in opened:
        store.belongs_to(
            tokenizer=tokenizer_fingerprint(tokenizer),
            template=template_fingerprint(tokenizer),
            vocabulary=vocabulary,
        )
        _check_tail(config, store)
    _check_together(opened)
    names = store_names([each.path for each in config.stores])
    total = math.fsum(each.weight for each in config.stores)
    return tuple(
        NamedStore(store, name, each.weight / total)
        for store, name, each in zip(opened, names, config.stores, strict=True)
    )


def _check_tail(config: TrainConfig, store: TargetStore) -> None:
    name, plan = config.divergence.name, store.manifest.plan
    if not DIVERGENCES[name].needs_draws:
        return
    if plan.tail == "lumped":
        raise ValueError(
            f"{name} needs draws from the tail and {store.folder} has a lumped one; use "
            "reverse_kl, skew_kl or jsd, or build the store from a source that samples its tail."
        )
    if not plan.draws and plan.k < plan.vocabulary:
        raise ValueError(
            f"{name} needs draws from the tail and {store.folder} keeps 0 of them; use "
            "reverse_kl, skew_kl or jsd, or build the store with some (store.draws of its recipe)."
        )


def _check_together(stores: Sequence[TargetStore]) -> None:
    with_heldout = [store for store in stores if store.count("heldout")]
    without = [store for store in stores if not store.count("heldout")]
    if with_heldout and without:
        raise ValueError(
            f"targets: {without[0].folder} has no held-out text and {with_heldout[0].folder} has "
            "some; accepted: held-out text in each store, or in none. Build the one with "
            "--heldout, or the other with --heldout 0."
        )
    draws = sorted({store.manifest.plan.draws for store in stores} - {0})
    if math.lcm(*draws) > LARGEST_KEPT:
        raise ValueError(
            f"targets: got stores of {', '.join(map(str, draws))} draws, whose least common "
            f"multiple is above {LARGEST_KEPT}; accepted: a least common multiple up to it. "
            "Build one of them again (store.draws of its recipe)."
        )
    if len(stores) > 1:
        _check_splits(stores)


def _check_splits(stores: Sequence[TargetStore]) -> None:
    """Refuse stores of which one trains on documents that another holds out: metrics on held-out
    text would be measured on text that is trained on. A few, as short texts may be equal by chance,
    are reported instead."""
    held_out = {store.folder: frozenset(store.token_digests("heldout")) for store in stores}
    if not any(held_out.values()):
        return
    for trained in stores:
        shared: dict[Path, set[bytes]] = {
            each: set() for each in held_out if each != trained.folder
        }
        for digest in trained.token_digests("train"):
            for folder, digests in shared.items():
                if digest in held_out[folder]:
                    digests.add(digest)
        for folder, digests in shared.items():
            if not digests:
                continue
            problem = (
                f"targets: {trained.folder} trains on {len(digests):,} of the documents that "
                f"{folder} holds out"
            )
            if len(digests) <= MOST_SHARED * len(held_out[folder]):
                processes.print_once(f"{problem}; metrics on held-out text include them.")
                continue
            raise ValueError(
                f"{problem}; accepted: stores that hold out the same texts. Build both with the "
                "same corpus, --heldout and --seed, or one with the texts that the other holds out "
                "as --heldout-from."
            )


def store_names(paths: Sequence[str]) -> list[str]:
    """The folders' names; those that are not unique get their index in `targets` appended."""
    names = [os.path.basename(os.path.abspath(path)) or path for path in paths]
    # Repeat, since a folder's name may equal another one with its index: `a`, `a`, `a[0]`. This
    # terminates: two names with their indices differ.
    while len(set(names)) < len(names):
        names = [
            name if names.count(name) == 1 else f"{name}[{number}]"
            for number, name in enumerate(names)
        ]
    return names


def source_of(stores: Sequence[NamedStore]) -> Mapping[str, Any]:
    """The source of a run's targets, as recorded in a checkpoint."""
    if len(stores) == 1:
        return stores[0].source
    mixed = [
        {"name": each.name, "weight": round(each.weight, 6), "source": each.source}
        for each in stores
    ]
    return {"kind": "stores", "stores": mixed}
