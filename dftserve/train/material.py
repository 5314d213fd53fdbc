"""The inputs of a training run: its stores, tokenizer and rows, checked against each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve import lm, pretrained
from dftserve.targets.calibrated import is_refused
from dftserve.targets.document import load_tokenizer
from dftserve.train import processes
from dftserve.train.config import AUTO, TrainConfig
from dftserve.train.data import Collator, Rows
from dftserve.train.mixed import MixedRows
from dftserve.train.stores import NamedStore, open_stores, source_of, store_names
from dftserve.train.trainer import HeldOut

REFUSED = (
    "The mixture of these targets is refused (`dftserve target inspect` says why): dft.json will "
    "name no target entropy and suggest no diversity."
)


@dataclass(frozen=True, eq=False)
class Material:
    """The inputs of a run."""

    tokenizer: PreTrainedTokenizerBase
    stores: tuple[NamedStore, ...]
    train: Rows | MixedRows
    heldout: Rows | MixedRows
    collate: Collator
    model_files: pretrained.ModelFiles
    weights: str
    """`pretrained.model_digest` of the model."""

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

    def as_text(self) -> str:
        """The amount of training text, in one line per store."""
        rows_of = zip(self.stores, self.train.parts, strict=True)
        lines = [_store_text(each, rows) for each, rows in rows_of]
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


def _store_text(named: NamedStore, rows: Rows) -> str:
    counts = named.store.manifest.plan.corpus
    trained, tokens = (counts.get(what, {}).get("train") for what in ("trained", "tokens"))
    of_tokens = "" if trained is None else f", {tokens:,} tokens, {trained:,} of them trained"
    shown = f"{named.store.count('train'):,} documents in {len(rows):,} rows{of_tokens}."
    return shown if (cut := cut_text([rows])) is None else f"{shown} {cut}."


def cut_text(parts: Sequence[Rows]) -> str | None:
    """A description of the documents that are longer than a row; None if there are none."""
    documents = sum(part.cut.documents for part in parts)
    if not documents:
        return None
    trained = sum(part.cut.trained for part in parts)
    are = "1 document is" if documents == 1 else f"{documents:,} documents are"
    return (
        f"{are} longer than a row (max_length) and cut into windows: {trained:,} of the trained "
        "tokens do not see the beginning of their document, though their targets may depend on it"
    )


def read(config: TrainConfig) -> Material:
    """Read the stores and the tokenizer, and check them against each other and the configuration.

    Raises:
        ValueError: no store, a store of another tokenizer or template, or a lumped tail if the
            divergence needs draws.
    """
    files = pretrained.examine(config.model)
    tokenizer = load_tokenizer(config.model)
    files.check_tokenizer(tokenizer)
    stores = open_stores(config, tokenizer, vocabulary=files.vocabulary)
    has_heldout = stores[0].store.count("heldout") > 0  # All stores have some, or none has.
    if config.steps:
        check_patience(config, config.steps)
    if config.patience is not None and not has_heldout:
        raise ValueError("patience: the store has no held-out text to stop by; build it with some.")
    if config.divergence.target_weight == AUTO and not has_heldout:
        raise ValueError("target_weight: auto needs held-out text; build the store with some.")
    rows = {
        split: _rows(stores, split, config, packing=config.packing)
        for split in ("train", "heldout")
    }
    collate = Collator(packing=config.packing)
    weights = pretrained.model_digest(files)
    material = Material(tokenizer, stores, rows["train"], rows["heldout"], collate, files, weights)
    files.check_length(material.longest, "max_length")
    return material


def check_patience(config: TrainConfig, steps: int) -> None:
    """Raises ValueError if a run ends before it could stop early."""
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
    order: dict[str, Any] = {"packing": packing, "seed": config.seed}
    parts = [Rows(each.store, split, longest=config.max_length, **order) for each in stores]
    for each, part in zip(stores, parts, strict=True):
        if each.store.count(split) and not len(part):
            advice = "Leave it out, or build" if len(stores) > 1 else "Build"
            raise ValueError(
                f"targets: {each.store.folder} has no {split} token to train on; accepted: "
                f"stores with some. {advice} it from other text."
            )
    if len(parts) == 1:
        return parts[0]
    return MixedRows(parts, weights=[each.weight for each in config.stores], seed=config.seed)


def heldout_parts(config: TrainConfig, material: Material) -> list[HeldOut]:
    """The held-out rows of each store, up to its share of `evaluate_tokens`; empty if there is no
    held-out text."""
    if not len(material.heldout):
        return []
    return [
        HeldOut(some_rows(part, config.evaluate_tokens * each.weight), each.name, each.weight)
        for each, part in zip(material.stores, material.heldout.parts, strict=True)
    ]


def steps_of(config: TrainConfig, material: Material) -> int:
    """Optimizer steps of the run."""
    return config.steps or math.ceil(steps_of_epoch(config, material) * config.epochs)


def steps_of_epoch(config: TrainConfig, material: Material) -> int:
    """Optimizer steps that read all rows once; the last may be partly filled."""
    return -(-len(material.train) // (config.batch_size * processes.count() * config.accumulation))


def warmup_of(config: TrainConfig, material: Material) -> float:
    """Warm-up as a fraction of the steps; 0 if it is shorter than one step."""
    return config.warmup if config.warmup * steps_of(config, material) >= 1 else 0.0


def some_rows(rows: Rows | MixedRows, tokens: float) -> list:
    """The first rows that together have at least `tokens` tokens."""
    some, total = [], 0
    for item, size in rows.items():
        some.append(item)
        total += size
        if total >= tokens:
            break
    return some
