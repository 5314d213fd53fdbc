"""The configuration of a training run: a frozen dataclass from YAML and `--set` overrides.

config = load(Path("run.yaml"), {"divergence.target_weight": "0.8"})
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dftserve import settings
from dftserve.train import divergences
from dftserve.train.divergences import DIVERGENCES, Divergence, Projections

AUTO = "auto"
ALL_LINEAR = "all-linear"
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd")
"""Optimizers of transformers that need no additional package."""
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""transformers' name of each schedule; the one that it calls `constant` ignores the warm-up."""
ATTENTIONS = ("eager", "sdpa", "flex_attention")
FLASH = (
    " Flash attention's own packages support only half precision, in which a model cannot be "
    "checked here, and keep the documents of a row separate only if a batch is one row; sdpa uses "
    "the kernels that torch has."
)
REPORTS = ("none", "tensorboard", "trackio")
MOST = 1 << 30
"""Maximum of a count of steps, rows or checkpoints; a larger one is a mistake, and memory would be
allocated for it."""
MOST_MATCHING = 1e4
"""Maximal weight of feature matching."""
LEAST_WEIGHT, MOST_WEIGHT = 1e-9, 1e9
"""Bounds of a store's weight, which keep the integers that represent weights small and their sum
finite."""
MOST_TOKENS = 1 << 20
"""Maximal tokens of a row."""
MOST_SEED = (1 << 32) - 1
"""The largest seed that numpy's generator accepts."""


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """The divergence and its parameters."""

    name: str = "forward_kl"
    target_weight: float | str | None = None
    """λ; `auto` tries `candidates` and uses the one with the lowest held-out human NLL."""
    candidates: tuple[float, ...] | None = None
    """None: 0 (the text alone), .3, .6 and .9; for reverse_kl, whose λ cannot be 0, the last
    three."""
    probe_steps: int = 50
    """Maximal optimizer steps of each candidate of `auto`; all together take no more than a third
    of the run's steps, or one each."""
    skew: float | None = None
    share: float | None = None
    projections: int = 8
    """Number of lines of sliced_w1."""
    epsilon: float | None = None
    strength: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            accepted = settings.accepted_names(self.name, DIVERGENCES)
            raise ValueError(f"name: got {self.name!r}; accepted: {accepted}.")
        if isinstance(self.target_weight, str) and self.target_weight != AUTO:
            raise ValueError(
                f"target_weight: got {self.target_weight!r}; accepted: a number from 0 to 1, or "
                f"{AUTO!r}."
            )
        target_weight = self.target_weight
        weights = [
            *self.to_try,
            *([target_weight] if isinstance(target_weight, float | int) else []),
        ]
        for weight in weights:
            if not 0 <= weight <= 1 or (self.name == "reverse_kl" and weight == 0):
                least = "above 0" if self.name == "reverse_kl" else "from 0"
                where = "target_weight" if weight == self.target_weight else "candidates"
                raise ValueError(f"{where}: got {weight:g}; accepted: a number {least} to 1.")
        _between(1, MOST, self, "probe_steps")
        _between(1, 1 << 16, self, "projections")
        if not self.to_try:
            raise ValueError("candidates: got none; accepted: weights to try.")
        takes = TAKES[self.name]
        for name in sorted({one for each in TAKES.values() for one in each} - set(takes)):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: {self.name} does not take it; it takes {', '.join(takes) or 'none'}."
                )
        if self.target_weight != AUTO and self.name != "sliced_w1":
            self.build(None)

    @property
    def to_try(self) -> tuple[float, ...]:
        """The values of λ that `auto` tries."""
        if self.candidates is not None:
            return self.candidates
        return (0.3, 0.6, 0.9) if self.name == "reverse_kl" else (0.0, 0.3, 0.6, 0.9)

    def build(self, embeddings_VD: torch.Tensor | None, seed: int = 0) -> Divergence:
        """The divergence; only sliced_w1 needs `embeddings_VD`.

        Raises:
            ValueError: a value out of its bounds.
        """
        settings = {n: getattr(self, n) for n in TAKES[self.name] if getattr(self, n) is not None}
        if "target_weight" in settings:
            settings["weight"] = float(settings.pop("target_weight"))
        if self.name == "sliced_w1":
            assert embeddings_VD is not None, "sliced_w1 needs the model's embeddings"
            lines = Projections.of(embeddings_VD, lines=self.projections, seed=seed)
            return divergences.SlicedW1(projections=lines, **settings)
        return DIVERGENCES[self.name](**settings)


TAKES: Mapping[str, tuple[str, ...]] = {
    "forward_kl": ("target_weight",),
    "reverse_kl": ("target_weight",),
    "skew_kl": ("target_weight", "skew"),
    "jsd": ("target_weight", "share"),
    "sliced_w1": ("target_weight",),
    "sft": (),
    "label_smoothing": ("epsilon",),
    "entropy_bonus": ("strength",),
    "gem": ("temperature",),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, merged into the weights at the end and also saved separately."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    modules: str | tuple[str, ...] = ALL_LINEAR
    """A module name such as `q_proj`, or a list of names; the output layer is always left out."""

    def __post_init__(self) -> None:
        _between(1, 1 << 16, self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; accepted: from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class FeatureMatchingConfig:
    """An additional loss: the distance of the model's own continuations from the text's, in the
    features of the model before the run (`feature_matching`)."""

    weight: float = 0.1
    """Weight of an anchor's mean distance, added to a token's mean divergence."""
    samples: int = 4
    """Continuations of an anchor."""
    length: int = 8
    """Tokens of a continuation."""
    every: int = 32
    """Trained tokens from one anchor to the next."""
    layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Layers whose hidden states are the features, as fractions of the depth."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= MOST_MATCHING:
            raise ValueError(
                f"weight: got {self.weight:g}; accepted: above 0, to {MOST_MATCHING:g}."
            )
        # The baseline of a sample compares the other samples with each other, so it needs two.
        _between(3, 1 << 10, self, "samples")
        _between(1, MOST_TOKENS, self, "length", "every")
        if not self.layers:
            raise ValueError("layers: got none; accepted: shares of the depth.")
        for share in self.layers:
            if not 0 < share <= 1:
                raise ValueError(
                    f"layers: got {share:g}; accepted: shares of the depth, above 0 to 1."
                )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """One of several target stores that a run mixes."""

    path: str
    """The folder of a target store."""
    weight: float
    """Its share of the trained tokens is this divided by the sum of all weights."""

    def __post_init__(self) -> None:
        if not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise ValueError(
                f"weight: got {self.weight:g}; accepted: a number from {LEAST_WEIGHT:g} to "
                f"{MOST_WEIGHT:g}."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    model: str = field(
        metadata={"kind": "a folder, a .gguf file, or a name on the hub (--set model=BASE)"}
    )
    """A Hugging Face causal LM: a folder, or a name on the hub."""
    targets: str | tuple[StoreConfig, ...] = field(
        metadata={"kind": "a path, or a list of {path, weight}"}
    )
    """The folder of a target store, or several with weights. A list of one means that store."""
    output: str = field(metadata={"kind": "a folder (--set output=FOLDER)"})
    """Folder of the checkpoints: `checkpoint-N` to resume from, `final` to serve."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    feature_matching: FeatureMatchingConfig | None = None
    steps: int | None = None
    """Optimizer steps; None: determined by `epochs`."""
    epochs: float = 1.0
    max_length: int = 1024
    """Tokens of a row; longer documents are cut into windows."""
    packing: bool = True
    batch_size: int = 8
    """Rows of one batch of one process."""
    accumulation: int = 1
    """Batches of one optimizer step."""
    optim: str = "adamw_torch_fused"
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    """Fraction of the steps."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Maximal norm of the gradient; 0: any."""
    precision: str = "fp32"
    """Precision of the computation."""
    weights: str = "fp32"
    """Precision in which the model's own weights are stored; bf16 only with `lora`, whose adapters
    are float32. The final checkpoint is merged and saved in float32 either way."""
    attention: str | None = None
    """The attention implementation; None leaves the choice to transformers."""
    torch_compile: bool = False
    """Compile the model; the first steps then take minutes."""
    workers: int = 0
    """Processes that read batches; 0 reads them between steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. transformers from 5.23 on calls it
    `activation_checkpointing`; the name of this key does not depend on the version."""
    lora: LoraConfig | None = None
    fsdp: bool = False
    """Shard weights, gradients and optimizer over the processes of torchrun."""
    save_every: int = 500
    """Optimizer steps between checkpoints to resume from."""
    keep: int = 2
    """Number of checkpoints to resume from that are kept."""
    evaluate_every: int = 100
    """Optimizer steps between evaluations on the held-out text."""
    evaluate_tokens: int = 200_000
    """Maximal number of tokens of the held-out text to evaluate."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out human NLL, and keep the best."""
    log_every: int = 10
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_targets()
        for name, known in (
            ("precision", PRECISIONS),
            ("weights", PRECISIONS),
            ("report_to", REPORTS),
            ("optim", OPTIMIZERS),
            ("attention", (None, *ATTENTIONS)),
            ("schedule", tuple(SCHEDULES)),
        ):
            value = getattr(self, name)
            if value not in known:
                accepted = settings.accepted_names(
                    value, [each for each in known if each is not None]
                )
                why = FLASH if str(value).startswith("flash") else ""
                raise ValueError(f"{name}: got {value!r}; accepted: {accepted}.{why}")
        if self.weights == "bf16":
            self._check_bf16_weights()
        if self.feature_matching is not None:
            self._check_feature_matching(self.feature_matching)
        _between(1, 1 << 16, self, "batch_size", "accumulation")
        _between(1, MOST, self, "save_every", "keep", "evaluate_every", "log_every")
        _between(1, 1 << 40, self, "evaluate_tokens")
        _between(0, 256, self, "workers")
        _between(2, MOST_TOKENS, self, "max_length")
        _between(0, MOST_SEED, self, "seed")
        _between(0, math.inf, self, "weight_decay", "clip")
        for name in ("patience", "steps"):
            if getattr(self, name) is not None:
                _between(1, MOST, self, name)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: got {self.warmup}; accepted: a share from 0 to below 1.")
        if not 0 < self.epochs <= 1e6:
            raise ValueError(f"epochs: got {self.epochs}; accepted: above 0, to a million.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(
                f"learning_rate: got {self.learning_rate}; accepted: above 0, below 1."
            )

    @property
    def stores(self) -> tuple[StoreConfig, ...]:
        """`targets` as a list, even if it is one path."""
        if isinstance(self.targets, str):
            return (StoreConfig(path=self.targets, weight=1.0),)
        return self.targets

    def _check_targets(self) -> None:
        if not self.targets and not isinstance(self.targets, str):
            raise ValueError(
                "targets: got an empty list; accepted: a path, or a list of {path: PATH, weight: "
                "NUMBER}."
            )
        seen: set[str] = set()
        for store in self.stores:
            path = os.path.realpath(store.path)
            if path in seen:
                raise ValueError(
                    f"targets: got {store.path} twice; accepted: each store once. Add up its "
                    "weights."
                )
            seen.add(path)

    def _check_feature_matching(self, matching: FeatureMatchingConfig) -> None:
        for name in ("fsdp", "torch_compile"):
            if getattr(self, name):
                raise ValueError(f"{name}: got true with feature_matching; accepted: false.")
        if self.attention not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attention: got {self.attention!r} with feature_matching; accepted: eager or "
                "sdpa, which take a mask."
            )
        if matching.length >= self.max_length:
            raise ValueError(
                f"feature_matching.length: got {matching.length}, and a row has {self.max_length} "
                "tokens (max_length); accepted: fewer."
            )

    def _check_bf16_weights(self) -> None:
        if self.lora is None:
            raise ValueError(
                "weights: got bf16 without lora; accepted: fp32, since bf16 rounds away an update "
                "of less than 1/256 of a weight; or train adapters, which are float32 (lora)."
            )
        if self.precision != "bf16":
            raise ValueError(
                f"precision: got {self.precision!r} with weights bf16; accepted: bf16."
            )
        if self.fsdp:
            raise ValueError(
                "fsdp: got true with weights bf16; accepted: false, since adapters in float32 "
                "cannot be sharded together with weights in bf16."
            )


def _between(least: int, most: float, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not least <= value <= most:
            accepted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name}: got {value}; accepted: {accepted}.")


def load(path: Path | None, overrides: Mapping[str, str]) -> TrainConfig:
    """The configuration of a YAML file, overridden by `key=value` and `key.inner=value`.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong value.
    """
    content: dict[str, Any] = {}
    if path is not None:
        content = settings.read_yaml(path)
        settings.check_mapping(content, str(path))
    for name, text in overrides.items():
        *outer, last = name.split(".")
        section = content
        for key in outer:
            if section.get(key) is None:  # `lora: null` is off, until one of its keys is given.
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise ValueError(f"{name}: {key} is a value there, not a section with keys.")
        section[last] = settings.parse_yaml(text, name)
    return settings.load(TrainConfig, content, "train")
