r"""The first measurement of the law: what each sampling method costs in validity for its variety.

    OMP_NUM_THREADS=1 python bench/first_law.py
    OMP_NUM_THREADS=1 python bench/first_law.py --stage well-trained --sequences 200 \
      --dev-sequences 0

The stories' model, at two stages of its training, writes stories whose validity the grammar
decides. The constants of the law and of each rival are searched on a development split (its own
prompts and seed) by one criterion, the lead: the mean gain of diversity, at equal validity, over
the best of any fixed guard and temperature. On the other prompts the families are compared with
equal numbers of settings. Prints a table, then one JSON document, which is also written to
bench/results.

Shapes: R sequences of a batch, V vocabulary, N sequences of a setting, C choices seen of all
slots, S slots, B bootstrap resamples (the first is the sample itself), P settings of a family.
"""

import hashlib
import inspect
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from dftserve import spec
from dftserve.sampling import Controls, LawConstants, control_row, get_backend, transform
from dftserve.sampling.token_classes import TokenClasses
from dftserve.stories import grammar
from dftserve.stories.model import STEPS, build

from provenance import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "first_law.json"

STAGES = {"under-trained": 3 * STEPS // 4, "well-trained": STEPS}
"""Training steps; both are stages of one run."""
PROMPTS = {"dev": list(grammar.PROMPTS)[1::2], "confirm": list(grammar.PROMPTS)[::2]}
SEEDS = {"dev": 1, "confirm": 2, "bootstrap": 3}
RESAMPLES = 1000

LONGEST_STORY = 160
"""Tokens; a text that has not ended by then is invalid."""
MANY, COUNTABLE = 20, 100
"""A slot with at least `MANY` options is free; one with fewer is a few-way choice. With more than
`COUNTABLE` options, one setting has too few valid texts to estimate the entropy."""

DEV_LEVELS = (0.25, 0.5, 1.0)
LEVELS = (0.1, 0.25, 0.5, 0.65, 0.8, 1.0)
TOP_PS = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7)
TEMPERATURES = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5)
"""For min-p after the temperature; every family has six settings."""
DEV_TEMPERATURES = (1.25, 1.5, 2.0)
REFERENCE = list(itertools.product((0.1, 0.05, 0.02, 0.01), (1.0, 1.5, 2.0, 3.0)))
"""(min_p, temperature): the fixed settings; every lead is measured against their front."""


# ── Settings: how the logits are rewritten ───────────────────────────────────────────────────────

Rewrite = Callable[[Tensor, Tensor, int], Tensor]
"""(logits_RV, last_R, the end token) → logits_RV to sample from at temperature 1; `last_R`: int64,
the last token of each row."""


def described(constants: LawConstants) -> str:
    guard = f"guard {constants.guard_start:g}→{constants.guard_end:g}"
    return f"{guard}, c {constants.strength:g}, power {constants.gate_power:g}"


SEARCHED: Mapping[str, Sequence[float]] = {
    "guard_start": (0.1, 0.05, 0.03),
    "guard_end": (0.05, 0.02, 0.01, 0.005),
    "strength": (1.0, 1.5, 2.0, 3.0),
    "gate_power": (1.0, 2.0, 3.0),
}


def searched(constants: LawConstants) -> dict[str, float]:
    return {name: getattr(constants, name) for name in SEARCHED}


@dataclass(frozen=True)
class Setting:
    family: str
    label: str
    """Unique: equal labels mean equal texts."""
    rewrite: Rewrite


def by_transform(
    diversity: object,
    constants: LawConstants | None = None,
    temperature: float = 1.0,
    token_classes: TokenClasses | None = None,
) -> Rewrite:
    """The rewrite of a request with this `diversity` and temperature; `words` needs classes."""
    wanted = spec.parse(diversity)
    backend = get_backend("cpu", constants or LawConstants(), token_classes)

    @cache
    def controls(rows: int, end: int) -> Controls:
        row = control_row(
            wanted, temperature=temperature, logits_divisor=temperature, stop_ids=frozenset({end})
        )
        return Controls.stack([row] * rows)

    def rewrite(logits_RV: Tensor, last_R: Tensor, end: int) -> Tensor:
        logits_RV = (logits_RV / temperature).contiguous()
        step_controls = controls(len(logits_RV), end)
        if token_classes is not None:
            step_controls = step_controls.after(last_R)
        transform(logits_RV, step_controls, None, backend)
        return logits_RV

    return rewrite


def stock() -> Setting:
    return Setting("stock", "T=1", lambda logits_RV, last_R, end: logits_RV)


def gated(constants: LawConstants, level: float, family: str = "gated") -> Setting:
    label = f"level {level:g} ({described(constants)})"
    return Setting(family, label, by_transform(level, constants))


def one_temperature(constants: LawConstants, level: float) -> Setting:
    """The same guard, and one temperature exp(c·level) for all steps: a gate of power 0 is 1."""
    return gated(replace(constants, gate_power=0.0), level, "one temperature, same guard")


def fixed(min_p: float, temperature: float) -> Setting:
    """min-p at temperature 1, then a temperature: dynatemp with range 0."""
    diversity = {"law": "dynatemp", "dynatemp_range": 0.0, "min_p": min_p}
    label = f"min_p={min_p:g} then T={temperature:g}"
    return Setting("fixed", label, by_transform(diversity, temperature=temperature))


def dynatemp(half_width: float, level: float) -> Setting:
    diversity = {"law": "dynatemp", "dynatemp_range": half_width, "level": level}
    return Setting("dynatemp", f"range {half_width:g}, level {level:g}", by_transform(diversity))


def min_p_last(min_p: float, temperature: float) -> Setting:
    """vLLM's order: temperature first, then min-p."""

    def rewrite(logits_RV: Tensor, last_R: Tensor, end: int) -> Tensor:
        logits_RV = logits_RV / temperature
        floor_R1 = logits_RV.amax(dim=1, keepdim=True) + math.log(min_p)
        return logits_RV.masked_fill(logits_RV < floor_R1, -math.inf)

    return Setting("min-p, vLLM's order", f"T={temperature:g} then min_p={min_p:g}", rewrite)


def top_p(share: float) -> Setting:
    """The smallest set of likeliest tokens that holds `share` of the probability."""

    def rewrite(logits_RV: Tensor, last_R: Tensor, end: int) -> Tensor:
        p_RV, index_RV = logits_RV.softmax(dim=1).sort(dim=1, descending=True)
        beyond_RV = p_RV.cumsum(dim=1) - p_RV >= share
        cut_RV = torch.zeros_like(beyond_RV).scatter_(1, index_RV, beyond_RV)
        return logits_RV.masked_fill(cut_RV, -math.inf)

    return Setting("top-p", f"top_p={share:g}", rewrite)


# ── Sampling ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Writer:
    """One stage of the model."""

    stage: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizer

    @property
    def cache_argument(self) -> str:
        """transformers 5.24 renamed it."""
        taken = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in taken else "past_key_values"

    def question(self, prompt: str) -> Tensor:
        """int64 [1, N]: the prompt through the chat template."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    ended: bool
    entropy: float
    """Mean over its tokens of the entropy of the distribution sampled from, in nats."""


class _PreallocatedLayer(DynamicLayer):
    """A cache layer allocated once: DynamicLayer copies all of its content at every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        rows, heads, tokens, width = key_states.shape
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffer = key_states.new_empty(2, rows, heads, tokens + LONGEST_STORY, width)
            self._length = 0
        end = self._length + tokens
        self._buffer[0, :, :, self._length : end] = key_states
        self._buffer[1, :, :, self._length : end] = value_states
        self._length = end
        self.keys, self.values = self._buffer[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Copies only the rows whose index changes."""
        moved = (indices != torch.arange(len(indices))).nonzero()[:, 0]
        self._buffer[:, moved] = self._buffer[:, indices[moved]]
        self._buffer = self._buffer[:, : len(indices)]


@torch.inference_mode()
def sample(
    writer: Writer, prompt: str, rows: int, rewrite: Rewrite, generator: torch.Generator
) -> list[Sample]:
    """Texts that answer one prompt. The prompt is the same for all rows, so nothing is padded.

    Each row draws one uniform number per step and inverts its CDF, so that settings share their
    random numbers.
    """
    end = writer.tokenizer.eos_token_id
    layers = writer.model.config.num_hidden_layers
    cache = Cache(layers=[_PreallocatedLayer() for _ in range(layers)])
    tokens_RN = torch.full((rows, LONGEST_STORY), end)
    entropy_R, length_R = torch.zeros(rows), torch.zeros(rows)
    row_R = torch.arange(rows)
    """The sequence of each row of the batch; a row is removed when its text ends."""
    next_RN = writer.question(prompt).expand(rows, -1)
    argument = writer.cache_argument
    for step in range(LONGEST_STORY):
        output = writer.model(next_RN, logits_to_keep=1, **{argument: cache})
        p_RV = rewrite(output.logits[:, -1], next_RN[:, -1], end).softmax(dim=1)
        entropy_R[row_R] -= (p_RV * p_RV.clamp_min(1e-30).log()).sum(dim=1)
        length_R[row_R] += 1
        cdf_RV = p_RV.cumsum(dim=1, dtype=torch.float64)
        uniform_R = torch.rand(rows, dtype=torch.float64, generator=generator)[row_R]
        next_RN = torch.searchsorted(cdf_RV, uniform_R[:, None] * cdf_RV[:, -1:], right=True)
        tokens_RN[row_R, step] = next_RN[:, 0]
        going_R = next_RN[:, 0] != end
        if not bool(going_R.all()):
            index_R = closed_up(going_R)
            cache.batch_select_indices(index_R)
            row_R, next_RN = row_R[index_R], next_RN[index_R]
        if not len(row_R):
            break
    unfinished = set(row_R.tolist())
    means = (entropy_R / length_R).tolist()
    lengths = length_R.int().tolist()
    rows_of_tokens = [row[:n] for row, n in zip(tokens_RN.tolist(), lengths, strict=True)]
    texts = writer.tokenizer.batch_decode(rows_of_tokens)
    return [
        Sample(prompt, text.removesuffix(writer.tokenizer.eos_token), n not in unfinished, mean)
        for n, (text, mean) in enumerate(zip(texts, means, strict=True))
    ]


def closed_up(going_R: Tensor) -> Tensor:
    """The indices of the rows that are not finished; the last ones fill the gaps before them."""
    count = int(going_R.sum())
    index_R = torch.arange(count)
    index_R[~going_R[:count]] = going_R[count:].nonzero()[:, 0] + count
    return index_R


def draw(writer: Writer, setting: Setting, split: str, sequences: int) -> list[Sample]:
    """The same number of texts for each prompt of the split, `sequences` in all."""
    prompts = PROMPTS[split]
    generator = torch.Generator().manual_seed(SEEDS[split])
    each = math.ceil(sequences / len(prompts))
    return [
        text
        for prompt in prompts
        for text in sample(writer, prompt, each, setting.rewrite, generator)
    ]


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────

METRICS = ("validity", "distinct_valid", "openings", "diversity", "few_way", "entropy")
"""validity       share of texts that are stories and contain what the prompt asks for
distinct_valid  different valid texts per 1,000 sequences
openings        different first sentences of valid texts per 1,000 sequences
diversity       entropy of the choice at free slots of valid texts, share of uniform
few_way         the same for slots of few options
entropy         mean entropy of the next-token distribution sampled from, nats"""


@cache
def free_slots() -> frozenset[str]:
    """Slots with many options that most stories have; rarer slots give too few choices to count."""
    rng = random.Random(0)
    stories = [grammar.generate(rng) for _ in range(500)]
    seen = Counter(slot for story in stories for slot, _ in story.choices)
    return frozenset(
        slot
        for slot, times in seen.items()
        if times >= 0.75 * len(stories) and MANY <= grammar.options(slot) <= COUNTABLE
    )


def measure(samples: Sequence[Sample], weights_BN: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric under every weighting of the samples: values_B by name.

    Weights of 1 give the estimates. The credit of a text for being distinct, 1 / (its copies), is
    computed on the whole sample: the additional copies in a resample carry no information.
    """
    stories = [grammar.parse(s.text) if is_valid(s) else None for s in samples]
    texts = [story and story.text for story in stories]
    openings = [story and story.opening for story in stories]
    total_B = weights_BN.sum(axis=1)

    def mean(values) -> np.ndarray:
        return weights_BN @ np.asarray(values, dtype=np.float64) / total_B

    choices = [open_choices(s.prompt, story) for s, story in zip(samples, stories, strict=True)]
    free, few = free_slots(), {name for c in choices for name in c if grammar.options(name) < MANY}
    return {
        "validity": mean([story is not None for story in stories]),
        "distinct_valid": 1000 * mean(credits(texts)),
        "openings": 1000 * mean(credits(openings)),
        "diversity": share_of_uniform(choices, free, weights_BN),
        "few_way": share_of_uniform(choices, few, weights_BN),
        "entropy": mean([s.entropy for s in samples]),
    }


def is_valid(sample: Sample) -> bool:
    return sample.ended and grammar.valid(sample.prompt, sample.text)


def credits(texts: Sequence[str | None]) -> list[float]:
    """1 / (number of copies) for each text, 0 for None: they add up to the different texts."""
    copies = Counter(texts)
    return [0.0 if text is None else 1 / copies[text] for text in texts]


def open_choices(prompt: str, story: grammar.Story | None) -> dict[str, str]:
    """The choices of a story that its prompt left open, the narrator among them."""
    if story is None:
        return {}
    chosen = {"narrator": story.narrator, **dict(story.choices)}
    return {slot: word for slot, word in chosen.items() if slot not in grammar.PROMPTS[prompt]}


def share_of_uniform(
    choices: Sequence[Mapping[str, str]], slots: set[str] | frozenset[str], weights_BN: np.ndarray
) -> np.ndarray:
    """Mean over the slots of entropy of the choice / ln(options); NaN where nothing was chosen."""
    shares_SB = [
        entropy(np.array(counts_CB).T) / math.log(grammar.options(slot))
        for slot in sorted(slots)
        if (counts_CB := _counts(choices, slot, weights_BN))
    ]
    return np.mean(shares_SB, axis=0) if shares_SB else np.full(len(weights_BN), math.nan)


def _counts(
    choices: Sequence[Mapping[str, str]], slot: str, weights_BN: np.ndarray
) -> list[np.ndarray]:
    """How often each word was chosen for the slot, by word."""
    chosen: dict[str, list[int]] = {}
    for number, words in enumerate(choices):
        if slot in words:
            chosen.setdefault(words[slot], []).append(number)
    return [weights_BN[:, numbers].sum(axis=1) for numbers in chosen.values()]


def entropy(counts_BC: np.ndarray) -> np.ndarray:
    """Grassberger's estimate (arXiv physics/0307138) of the entropy behind counts, in nats.

        H = ln n − Σ nᵢ·G(nᵢ) / n,   G(n) = ψ(n) + (−1)ⁿ/2·(ψ((n+1)/2) − ψ(n/2))

    The plug-in estimate is too low by (options − 1)/2n and would reward a setting with more valid
    texts; this one is accurate to .002 of uniform from n = 2·options on. NaN if nothing was
    counted.
    """
    counts_BC = counts_BC.astype(np.int64)
    n_B = counts_BC.sum(axis=1)
    g = _grassberger(int(counts_BC.max()))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(n_B) - (counts_BC * g[counts_BC]).sum(axis=1) / n_B


def _grassberger(largest: int) -> np.ndarray:
    n = torch.arange(1, largest + 1, dtype=torch.float64)
    sign = 1 - 2 * (n % 2)
    g = n.digamma() + sign / 2 * (((n + 1) / 2).digamma() - (n / 2).digamma())
    return np.concatenate(([0.0], g.numpy()))


def resampled(sequences: int, resamples: int = RESAMPLES) -> np.ndarray:
    """weights_BN: all ones, then how often each sequence occurs in each bootstrap resample."""
    rng = np.random.default_rng(SEEDS["bootstrap"])
    drawn_BN = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=resamples)
    return np.concatenate((np.ones((1, sequences)), drawn_BN)).astype(np.float32)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float

    @classmethod
    def of(cls, values_B: np.ndarray) -> "Interval":
        """The percentiles' distances from the resamples' mean, added to the estimate: entropies of
        resamples lie below the estimate, as a resample has fewer distinct texts."""
        estimate, drawn_B = values_B[0], values_B[1:]
        low, high = estimate + np.percentile(drawn_B - drawn_B.mean(), (2.5, 97.5))
        return cls(*(round(float(value), 4) for value in (estimate, low, high)))

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


# ── Curves: diversity against validity ───────────────────────────────────────────────────────────


def front(validity_P: np.ndarray, diversity_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Pareto front: the points that no other beats in both, by ascending validity."""
    order_P = np.lexsort((-diversity_P, -validity_P))
    best, kept = -math.inf, []
    for index in order_P:
        if diversity_P[index] > best:
            best = diversity_P[index]
            kept.append(index)
    return validity_P[kept[::-1]], diversity_P[kept[::-1]]


def lead(
    validity_P: np.ndarray,
    diversity_P: np.ndarray,
    other_validity_P: np.ndarray,
    other_diversity_P: np.ndarray,
) -> float:
    """How much more diverse a front is than another: the mean over the validities that both reach.

    NaN if they share none.
    """
    validity, diversity = front(validity_P, diversity_P)
    other_validity, other_diversity = front(other_validity_P, other_diversity_P)
    low, high = max(validity[0], other_validity[0]), min(validity[-1], other_validity[-1])
    if low > high:
        return math.nan
    at = np.linspace(low, high, 101)
    gain = np.interp(at, validity, diversity) - np.interp(at, other_validity, other_diversity)
    return float(gain.mean())


def gain_at(
    validity_P: np.ndarray, diversity_P: np.ndarray, validity: float, diversity: float
) -> float:
    """How much more diverse a front is than a point, at the point's validity.

    Below the validity of the front's least valid point, that point is used: it is more valid, so
    the comparison is fair. NaN if the point is more valid than all of the front.
    """
    known, height = front(validity_P, diversity_P)
    return float(np.interp(validity, known, height, right=math.nan)) - diversity


def curve(results: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """validity_PB and diversity_PB of a family's settings."""
    return np.stack([f["validity"] for f in results]), np.stack([f["diversity"] for f in results])


def lead_interval(
    results: Sequence[Mapping[str, np.ndarray]], others: Sequence[Mapping[str, np.ndarray]]
) -> Interval | None:
    """The lead of one family's curve over another's; None if they share no validity."""
    leads_B = _leads(results, others)
    return None if math.isnan(leads_B[0]) else Interval.of(leads_B[~np.isnan(leads_B)])


def _leads(results, others) -> np.ndarray:
    columns = zip(*(values_PB.T for values_PB in (*curve(results), *curve(others))), strict=True)
    return np.array([lead(*column) for column in columns])


# ── The search and the confirmation ──────────────────────────────────────────────────────────────


class Measurements:
    """Results by (stage, split, setting), each sampled once."""

    def __init__(self, writers: Sequence[Writer], sequences: Mapping[str, int]) -> None:
        self.writers = writers
        self._sequences = sequences
        self._known: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}

    def __call__(self, writer: Writer, split: str, setting: Setting) -> dict[str, np.ndarray]:
        key = (writer.stage, split, setting.label)
        if key not in self._known:
            samples = draw(writer, setting, split, self._sequences[split])
            resamples = RESAMPLES if split == "confirm" else RESAMPLES // 5
            self._known[key] = measure(samples, resampled(len(samples), resamples))
            estimates = {name: float(values_B[0]) for name, values_B in self._known[key].items()}
            print(f"{writer.stage}, {split}: {setting.label:52}{row(estimates)}", flush=True)
        return self._known[key]

    def all(self, writer: Writer, split: str, settings: Sequence[Setting]) -> list[dict]:
        return [self(writer, split, setting) for setting in settings]


@dataclass(frozen=True)
class Trial:
    """The results of one candidate on the development split, both stages weighted equally."""

    candidate: str
    leads_B: np.ndarray
    admissible: bool
    points: dict[str, list[list[float]]]
    """By stage: [validity, diversity] of each setting."""

    def as_dict(self) -> dict:
        return {
            "candidate": self.candidate,
            "lead": self._interval(),
            "admissible": self.admissible,
            "points": self.points,
        }

    def _interval(self) -> Interval | None:
        known_B = self.leads_B[~np.isnan(self.leads_B)]
        return None if math.isnan(self.leads_B[0]) else Interval.of(known_B)


def attempt(measured: Measurements, candidate: str, settings: Sequence[Setting]) -> Trial:
    """Measure a candidate. It is admissible if each setting gives more distinct valid texts than
    stock, and the last, strongest one is at least as diverse as stock."""
    leads, points, admissible = [], {}, True
    for writer in measured.writers:
        reference = measured.all(writer, "dev", [fixed(*pair) for pair in REFERENCE])
        plain = measured(writer, "dev", stock())
        results = measured.all(writer, "dev", settings)
        leads.append(_leads(results, reference))
        points[writer.stage] = np.round(np.array(curve(results))[:, :, 0].T, 4).tolist()
        distinct = [f["distinct_valid"][0] for f in results]
        admissible &= min(distinct) > plain["distinct_valid"][0]
        admissible &= bool(results[-1]["diversity"][0] >= plain["diversity"][0])
    return Trial(candidate, np.mean(leads, axis=0), bool(admissible), points)


def best(trials: Mapping) -> object:
    """The admissible candidate with the highest lead; if none is admissible, the best of all."""
    admissible = [key for key in trials if trials[key].admissible] or list(trials)
    return max(admissible, key=lambda key: np.nan_to_num(trials[key].leads_B[0], nan=-1.0))


def search(measured: Measurements) -> dict[LawConstants, Trial]:
    """Vary each constant alone, then try every combination of the best two values of each; of
    `guard_start` only the best one."""
    trials: dict[LawConstants, Trial] = {}

    def attempt_once(constants: LawConstants) -> float:
        if constants not in trials:
            settings = [gated(constants, level) for level in DEV_LEVELS]
            trials[constants] = attempt(measured, described(constants), settings)
        trial = trials[constants]
        return trial.leads_B[0] if trial.admissible else -math.inf

    attempt_once(LawConstants())
    ranked = {
        name: sorted(
            values, key=lambda v: attempt_once(replace(LawConstants(), **{name: v})), reverse=True
        )
        for name, values in SEARCHED.items()
    }
    pairs = [ranked[name][: 1 if name == "guard_start" else 2] for name in SEARCHED]
    for values in itertools.product(*pairs):
        attempt_once(LawConstants(**dict(zip(SEARCHED, values, strict=True))))
    return trials


def rivals(measured: Measurements, constants: LawConstants) -> dict[str, dict[object, Trial]]:
    """Search the rivals' constants in the same way."""

    def each(values, settings: Callable[[float], list[Setting]]) -> dict[object, Trial]:
        return {value: attempt(measured, f"{value:g}", settings(value)) for value in values}

    return {
        "one_temperature_strength": each(
            (0.5, 0.75, 1.0),
            lambda c: [one_temperature(replace(constants, strength=c), d) for d in DEV_LEVELS],
        ),
        "min_p": each((0.05, 0.1, 0.2), lambda a: [min_p_last(a, t) for t in DEV_TEMPERATURES]),
        "dynatemp_range": each((0.5, 1.0, 2.0), lambda r: [dynatemp(r, d) for d in DEV_LEVELS]),
    }


def families(
    constants: LawConstants, candidate: LawConstants, chosen: Mapping[str, float]
) -> dict[str, list[Setting]]:
    """The families compared on the confirmation split, with six settings each, stock with one."""
    slower = replace(constants, strength=chosen["one_temperature_strength"])
    compared = {
        "stock": [stock()],
        "top-p": [top_p(share) for share in TOP_PS],
        "one temperature, same guard": [one_temperature(slower, level) for level in LEVELS],
        "min-p, vLLM's order": [min_p_last(chosen["min_p"], t) for t in TEMPERATURES],
        "dynatemp": [dynatemp(chosen["dynatemp_range"], level) for level in LEVELS],
        "gated": [gated(constants, level) for level in LEVELS],
    }
    if candidate != constants:
        compared["gated, best of dev"] = [
            gated(candidate, level, "gated, best of dev") for level in LEVELS
        ]
    return compared


def claims(results: Mapping[str, list[dict]]) -> dict:
    """The two claims for one stage, each with the numbers that it is based on."""
    plain, law = results["stock"][0], results["gated"]
    nucleus = results["top-p"][TOP_PS.index(0.95)]
    more_distinct = {
        f"{level:g}": Interval.of(f["distinct_valid"] - plain["distinct_valid"])
        for level, f in zip(LEVELS, law, strict=True)
    }
    upper = [f for level, f in zip(LEVELS, law, strict=True) if level >= 0.5]
    columns = zip(
        *(values_PB.T for values_PB in curve(upper)),
        nucleus["validity"],
        nucleus["diversity"],
        strict=True,
    )
    gains_B = np.array([gain_at(*column) for column in columns])
    at_equal = None if math.isnan(gains_B[0]) else Interval.of(gains_B[~np.isnan(gains_B)])
    against = {
        f"{level:g}": {
            name: Interval.of(f[name] - nucleus[name]) for name in ("validity", "diversity")
        }
        for level, f in zip([level for level in LEVELS if level >= 0.5], upper, strict=True)
    }
    dominates = all(gain.low > 0 for both in against.values() for gain in both.values())
    return {
        "more_distinct_valid_than_stock_at_every_level": {
            "holds": all(gain.low > 0 for gain in more_distinct.values()),
            "gain_per_1000_by_level": more_distinct,
        },
        "more_diverse_than_top_p_.95_at_equal_validity_from_.5": {
            "holds": dominates or (at_equal is not None and at_equal.low > 0),
            "dominates_at_each_level": dominates,
            "gain_by_level": against,
            "diversity_gain_at_top_p_validity": at_equal,
        },
    }


# ── The run ──────────────────────────────────────────────────────────────────────────────────────


SOURCES = ("words", "narrators", "grammar", "model")
"""The modules that determine the model."""


def writers(stages: Sequence[str]) -> list[Writer]:
    """The stages of the model, trained unless a folder for the current sources exists."""
    sources = [ROOT / "dftserve" / "stories" / f"{name}.py" for name in SOURCES]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folders = {s: ROOT / "build" / "first_law" / f"{digest}-{n}" for s, n in STAGES.items()}
    if not all(folder.exists() for folder in folders.values()):
        build({folders[stage]: steps for stage, steps in STAGES.items()})
    return [
        Writer(
            stage,
            AutoModelForCausalLM.from_pretrained(folders[stage]).eval(),
            AutoTokenizer.from_pretrained(folders[stage]),
        )
        for stage in stages
    ]


HEADINGS = {
    "validity": "valid",
    "distinct_valid": "distinct",
    "openings": "openings",
    "diversity": "diversity",
    "few_way": "few-way",
    "entropy": "H/nats",
}


def row(estimates: Mapping[str, float]) -> str:
    digits = {"distinct_valid": 0, "openings": 0}
    return "".join(f"{estimates[name]:>10.{digits.get(name, 3)}f}" for name in METRICS)


def table(
    stage: str, compared: Mapping[str, list[Setting]], results: Mapping[str, list[dict]]
) -> None:
    print(f"\n{stage}: {'':67}{''.join(f'{HEADINGS[name]:>10}' for name in METRICS)}")
    for family, settings in compared.items():
        for setting, values in zip(settings, results[family], strict=True):
            estimates = {name: float(values_B[0]) for name, values_B in values.items()}
            print(f"{family:28}{setting.label:52}{row(estimates)}")


def confirm(measured: Measurements, compared: Mapping[str, list[Setting]]) -> dict[str, dict]:
    """By stage: every setting's results, the leads between families, and the claims."""
    stages = {}
    for writer in measured.writers:
        results = {f: measured.all(writer, "confirm", settings) for f, settings in compared.items()}
        table(writer.stage, compared, results)
        leads = {
            f"{law} over {family}": lead_interval(results[law], results[family])
            for law in compared
            if law.startswith("gated")
            for family in compared
            if family not in ("stock", law)
        }
        for name, gain in leads.items():
            print(f"{name:62}{gain or 'no validity in common'}")
        stages[writer.stage] = {
            "settings": [
                {"family": family, "setting": setting.label}
                | {name: Interval.of(values_B) for name, values_B in values.items()}
                for family, settings in compared.items()
                for setting, values in zip(settings, results[family], strict=True)
            ],
            "lead_in_diversity_at_equal_validity": leads,
            "claims": claims(results),
        }
    return stages


@click.command()
@click.option("--stage", type=click.Choice(list(STAGES)), help="One stage instead of both.")
@click.option("--sequences", default=1000, show_default=True, help="Per setting, confirmation.")
@click.option("--dev-sequences", default=500, show_default=True, help="Per setting; 0: no search.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, help="The JSON file.")
def main(stage: str | None, sequences: int, dev_sequences: int, out: Path) -> None:
    """Compare the law with its rivals on the stories' model."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    measured = Measurements(
        writers([stage] if stage else list(STAGES)), {"dev": dev_sequences, "confirm": sequences}
    )
    constants = candidate = LawConstants()
    chosen = {"one_temperature_strength": 0.75, "min_p": 0.1, "dynatemp_range": 1.0}
    trials, others = {}, {}
    if dev_sequences:
        trials = search(measured)
        candidate = best(trials)
        others = rivals(measured, constants)
        chosen = {name: best(tried) for name, tried in others.items()}
    stages = confirm(measured, families(constants, candidate, chosen))
    document = {
        "bench": "first_law",
        "versions": versions("transformers", "numpy"),
        "machine": machine(),
        "seeds": SEEDS,
        "prompts": PROMPTS,
        "training_steps": STAGES,
        "sequences_per_setting": {"dev": dev_sequences, "confirm": sequences},
        "free_slots": sorted(free_slots()),
        "constants": {
            "in_force": searched(constants),
            "best_of_dev": searched(candidate),
            "rivals": chosen,
        },
        "dev": {
            "gated": [trial.as_dict() for trial in trials.values()],
            **{name: [trial.as_dict() for trial in t.values()] for name, t in others.items()},
        },
        "confirm": stages,
    }
    text = json.dumps(document, default=asdict, ensure_ascii=False, allow_nan=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
