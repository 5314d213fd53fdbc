"""How close each training method comes to a source whose next-token distribution is known exactly.

    OMP_NUM_THREADS=1 python bench/known_source.py
    OMP_NUM_THREADS=1 python bench/known_source.py --seeds 2 --out build/known_source.json

A hidden narrator writes each document by a probabilistic grammar of slots; every narrator has its
own transitions and words. The forward algorithm gives the true next-token distribution, so that the
error of a model is a number: KL(source ‖ model), in nats per token, on unseen documents.

Each seed draws a source, pre-trains a small base model on other narrators, and trains a larger
teacher on a large amount of the source's own text. Every method then starts from the base, is
trained on the same few documents in the same order, and has its constants, its stopping point and
its sampling temperature tuned on a validation split. "sft", "sft_temperature" and
"renormalised_top_k_untuned" train to the end, so all other methods should be compared with
"sft_early_stopping". Prints a table after each seed and finally one JSON document, which is also
written to bench/results.

Shapes: D documents, N tokens of each, V vocabulary, K narrators, S slots of the grammar, R = D·N
predicted positions.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from dftserve.lm import LanguageModel
from dftserve.targets.combine import Mix
from dftserve.targets.document import Document
from dftserve.targets.principles import Principles
from dftserve.targets.source import DenseSource
from dftserve.targets.sparse import Targets, sparsify
from dftserve.targets.teacher import Teacher
from dftserve.train.config import FeatureMatchingConfig
from dftserve.train.divergences import (
    GEM,
    JSD,
    SFT,
    Divergence,
    EntropyBonus,
    ForwardKL,
    LabelSmoothing,
    Projections,
    ReverseKL,
    SkewKL,
    SlicedW1,
    TargetRows,
)
from dftserve.train.feature_matching import FeatureMatching, FeatureNetwork
from dftserve.train.model import attach

from provenance import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "known_source.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the seed."""

    narrators: int = 8
    slots: int = 6
    words: int = 96
    language: float = 2.0
    """Spread of the log-odds of words that all narrators share."""
    own_voice: float = 2.0
    """Spread of each narrator's own log-odds."""
    length: int = 32
    """Words of a document."""
    train_documents: int = 256
    validation_documents: int = 256
    test_documents: int = 512
    base_documents: int = 6400
    teacher_documents: int = 64_000
    base_hidden: int = 48
    teacher_hidden: int = 96
    layers: int = 2
    batch: int = 16
    epochs: int = 16
    shorter: tuple[int, ...] = (4, 8)
    """Further schedules, in epochs, for SFT with early stopping; in each the rate falls to 0."""
    base_rate: float = 4e-3
    teacher_rate: float = 3e-3
    rate: float = 2e-3
    top_k: int = 6
    draws: int = 6
    temperatures: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)
    target_weights: tuple[float, ...] = (0.5, 0.8, 1.0)
    """λ."""
    epsilons: tuple[float, ...] = (0.02, 0.05, 0.1)
    bonuses: tuple[float, ...] = (0.02, 0.05, 0.2)
    gem_temperatures: tuple[float, ...] = (0.7, 0.9, 1.2)
    interpolations: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 0.95)
    """The fine-tuned model's share; the base has the rest."""
    matching_weights: tuple[float, ...] = (0.2, 0.5, 1.0)
    """Weights of feature matching."""
    matching_samples: int = 8
    matching_tokens: int = 4
    """Tokens of a continuation, and between the starts of two continuations."""


# ── The source ───────────────────────────────────────────────────────────────────────────────────

BEGIN = 0
"""The first token of every document. In the vocabulary the words follow, then the narrators'
names."""


@dataclass(frozen=True, eq=False)
class KnownSource:
    """Narrators × grammar: a document is a walk over hidden slots, each of which emits one word."""

    start_KS: Tensor
    """float64: narrator k's distribution of the first slot."""
    move_KST: Tensor
    """float64: narrator k's distribution of the next slot T after slot S."""
    say_KSV: Tensor
    """float64: narrator k's distribution of the word in a slot."""

    @property
    def narrators(self) -> int:
        return len(self.start_KS)

    @property
    def vocabulary(self) -> int:
        return self.say_KSV.shape[2]

    def part(self, index: slice) -> "KnownSource":
        """The source restricted to some of the narrators."""
        return KnownSource(self.start_KS[index], self.move_KST[index], self.say_KSV[index])

    def sample(
        self, documents: int, length: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(tokens int64 [D, 1 + N], narrator int64 [D]); all narrators are equally likely."""
        who_D = torch.randint(self.narrators, (documents,), generator=generator)
        slot_D = _draw(self.start_KS[who_D], generator)
        tokens = [torch.full((documents,), BEGIN)]
        for _ in range(length):
            tokens.append(_draw(self.say_KSV[who_D, slot_D], generator))
            slot_D = _draw(self.move_KST[who_D, slot_D], generator)
        return torch.stack(tokens, dim=1), who_D

    def next_token(self, tokens_DN: Tensor) -> Tensor:
        """p(x_t | x_<t), float64 [D, N, V], by the forward algorithm over (narrator, slot).

        Args:
            tokens_DN: int64, without the begin token.
        """
        belief_DKS = (self.start_KS / self.narrators).expand(len(tokens_DN), -1, -1)
        rows = []
        for token_D in tokens_DN.T:
            rows.append(torch.einsum("dks,ksv->dv", belief_DKS, self.say_KSV))
            seen_DKS = belief_DKS * self.say_KSV[:, :, token_D].permute(2, 0, 1)
            seen_DKS = seen_DKS / seen_DKS.sum(dim=(1, 2), keepdim=True)
            belief_DKS = torch.einsum("dks,kst->dkt", seen_DKS, self.move_KST)
        return torch.stack(rows, dim=1)


def _draw(p_DX: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p_DX, 1, generator=generator)[:, 0]


def make_source(settings: Settings, narrators: int, generator: torch.Generator) -> KnownSource:
    """A language that all narrators share, and their deviations from it.

    A slot prefers some followers; a word belongs to one slot and is rare in the others.
    """
    slots, words = settings.slots, settings.words

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    follows_ST = 2.0 * normal(slots, slots)
    home_SV = torch.where(torch.arange(words) % slots == torch.arange(slots)[:, None], 0.0, -4.0)
    common_SV = home_SV + settings.language * normal(slots, words)
    spoken_KSV = common_SV + settings.own_voice * normal(narrators, slots, words)
    said_KSV = torch.zeros(narrators, slots, vocabulary_of(settings), dtype=torch.float64)
    said_KSV[:, :, 1 : 1 + words] = spoken_KSV.softmax(dim=2)
    return KnownSource(
        normal(narrators, slots).softmax(dim=1),
        (follows_ST + 0.7 * normal(narrators, slots, slots)).softmax(dim=2),
        said_KSV,
    )


def vocabulary_of(settings: Settings) -> int:
    return 1 + settings.words + settings.narrators


@dataclass(frozen=True, eq=False)
class Texts:
    """Documents and the truth about each of their R positions."""

    tokens_DN: Tensor
    """int64, the begin token first."""
    p_RV: Tensor
    """float64: the source's distribution of the next token."""

    @staticmethod
    def of(source: KnownSource, documents: int, length: int, generator: torch.Generator) -> "Texts":
        tokens_DN, _ = source.sample(documents, length, generator)
        return Texts(tokens_DN, source.next_token(tokens_DN[:, 1:]).flatten(0, 1))

    @property
    def labels_R(self) -> Tensor:
        return self.tokens_DN[:, 1:].flatten()

    @property
    def documents(self) -> list[Document]:
        """The documents as input for the project's target sources."""
        trained_N = np.arange(self.tokens_DN.shape[1]) > 0
        return [Document(t.numpy().astype(np.int32), trained_N) for t in self.tokens_DN]


def true_kl(p_RV: Tensor, logprobs_RV: Tensor) -> float:
    """Mean KL(source ‖ model) in nats: exact over the next token at each position."""
    cross_RV = torch.where(p_RV > 0, p_RV * logprobs_RV.double(), 0.0)
    return float((torch.xlogy(p_RV, p_RV) - cross_RV).sum(dim=1).mean())


# ── Models ───────────────────────────────────────────────────────────────────────────────────────


def new_model(settings: Settings, hidden: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary_of(settings),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=settings.length + 2,
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of the weights in a model without an attached divergence."""
    made = LlamaForCausalLM(model.config)
    made.load_state_dict(model.state_dict())
    return made


@dataclass(frozen=True, eq=False)
class Batch:
    tokens_BN: Tensor
    predicted_from: Tensor
    """int64 [R]: positions in the flattened batch that predict the targets' tokens."""
    target: TargetRows

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs for a model that `attach` has given a divergence."""
        position_N = torch.arange(self.tokens_BN.shape[1])
        return {
            "input_ids": self.tokens_BN,
            "position_ids": position_N.expand_as(self.tokens_BN),
            "positions_T": self.predicted_from,
            **vars(self.target),
        }


Matching = Callable[[LanguageModel], FeatureMatching]


def fit(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    divergence: Divergence,
    steps: int,
    rate: float,
    matching_of: Matching | None = None,
) -> Iterator[int]:
    """Train in place, yielding the number of steps after each step. The rate falls to 0.

    Args:
        matching_of: makes the feature matching for the model; None: no feature matching.
    """
    language_model = attach(model, divergence)
    matching = None if matching_of is None else matching_of(language_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / steps)
    )
    for step, batch in enumerate(batches, start=1):
        model.train()
        matched = None if matching is None else matching.match(batch.inputs, step)
        output = model(**batch.inputs, **(matched.inputs if matched else {}))
        (output.objective / len(batch.target)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


def predicted_from(rows: int, width: int, first: int = 0) -> Tensor:
    """Positions in a flattened [rows, width] whose next token is predicted."""
    positions = torch.arange(rows * width).view(rows, width)
    return positions[:, first : width - 1].flatten()


def plain_batches(
    source: KnownSource, settings: Settings, documents: int, generator: torch.Generator, named: bool
) -> Iterator[Batch]:
    """Batches of fresh text. `named`: every second batch includes the narrator's name."""
    size = 4 * settings.batch
    for number in range(documents // size):
        tokens_BN, who_B = source.sample(size, settings.length, generator)
        first = int(named and number % 2)
        if first:
            name_B1 = (1 + settings.words + who_B)[:, None]
            tokens_BN = torch.cat([tokens_BN[:, :1], name_B1, tokens_BN[:, 1:]], dim=1)
        where = predicted_from(size, tokens_BN.shape[1], first)
        labels = tokens_BN.flatten()[where + 1]
        yield Batch(tokens_BN, where, TargetRows.none(labels.numpy()))


def pretrained(
    source: KnownSource,
    settings: Settings,
    *,
    hidden: int,
    documents: int,
    rate: float,
    seed: int,
    named: bool,
) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    model = new_model(settings, hidden, seed)
    batches = plain_batches(source, settings, documents, generator, named)
    for _ in fit(model, batches, SFT(), documents // (4 * settings.batch), rate):
        pass
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel, texts: Texts) -> Tensor:
    """float32 [R, V]."""
    states_DNH = model.get_decoder()(texts.tokens_DN[:, :-1], use_cache=False).last_hidden_state
    return model.get_output_embeddings()(states_DNH.flatten(0, 1))


# ── Targets ──────────────────────────────────────────────────────────────────────────────────────


def bytes_a_token(settings: Settings) -> int:
    """The size in the project's store: 3 bytes per id, 2 per log-probability, 2 for each of 3
    further numbers, and 4 for the token with its position."""
    return settings.top_k * 5 + settings.draws * 3 + 3 * 2 + 4


def dense(source: DenseSource, documents: Sequence[Document]) -> Tensor:
    """ln q, float32 [R, V]."""
    rows = source.read(documents)
    return torch.cat([each(0, len(d.labels_T)) for each, d in zip(rows, documents, strict=True)])


def stored(targets: Targets) -> Targets:
    """The targets as read back from the store: probabilities rounded to float16."""
    return Targets(
        **{
            name: value.astype(np.float16).astype(np.float32) if value.dtype.kind == "f" else value
            for name, value in vars(targets).items()
        }
    )


def renormalised(targets: Targets, labels_R: Tensor) -> Targets:
    """The common mistake: the top k rescaled to sum to 1, without a tail."""
    top_TK = torch.from_numpy(targets.top_logprobs_TK).log_softmax(dim=1)
    is_own_TK = torch.from_numpy(targets.top_ids_TK == labels_R[:, None].numpy())
    own_T = torch.where(is_own_TK, top_TK, -torch.inf).amax(dim=1)
    return replace(
        targets,
        top_logprobs_TK=top_TK.numpy(),
        tail_logprob_T=np.full_like(targets.tail_logprob_T, -np.inf),
        token_logprob_T=own_T.numpy(),
        entropy_T=-(top_TK.exp() * top_TK).sum(dim=1).numpy(),
    )


# ── Tuning ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Candidate:
    """The logits of one model that a method may select."""

    setting: str
    validation_RV: Tensor
    test_RV: Tensor
    nll: float
    """NLL of the validation texts' own tokens, at the best sampling temperature."""


@dataclass(frozen=True)
class Outcome:
    """The result of a method with one seed."""

    true_kl: float
    """Nats per token, on the test texts."""
    setting: str
    temperature: float
    at_temperature_1: float


@dataclass(frozen=True, eq=False)
class Workshop:
    """Everything that the methods of one seed share."""

    settings: Settings
    base: LlamaForCausalLM
    train: Texts
    validation: Texts
    test: Texts
    seed: int

    def batches(self, target: TargetRows, epochs: int) -> Iterator[Batch]:
        """The same documents in the same order, whatever the target."""
        generator = torch.Generator().manual_seed(self.seed)
        length, size = self.settings.length, self.settings.batch
        where = predicted_from(size, length + 1)
        index_DN = torch.arange(len(target)).view(-1, length)
        for _ in range(epochs):
            order_D = torch.randperm(len(index_DN), generator=generator)
            for some_B in order_D.split(size):
                rows = target[index_DN[some_B].flatten()]  # type: ignore[index]
                yield Batch(self.train.tokens_DN[some_B], where, rows)

    def run(
        self,
        name: str,
        divergence: Divergence,
        target: TargetRows,
        epochs: int | None = None,
        matching_of: Matching | None = None,
    ) -> tuple[list[Candidate], LlamaForCausalLM]:
        """Train; a candidate for each epoch, and the final model."""
        model = copied(self.base)
        epochs = epochs or self.settings.epochs
        found, an_epoch = [], len(self.train.tokens_DN) // self.settings.batch
        batches = self.batches(target, epochs)
        steps, rate = epochs * an_epoch, self.settings.rate
        for step in fit(model, batches, divergence, steps, rate, matching_of):
            if step % an_epoch == 0:
                epoch = f"epoch {step // an_epoch}"
                found.append(self.candidate(f"{name}, {epoch}" if name else epoch, model))
        return found, model

    def matching(self, target: TargetRows, weight: float) -> Matching:
        """Feature matching of continuations, in the features of the base model."""
        settings, shares = self.settings, (0.5, 1.0)
        config = FeatureMatchingConfig(
            weight=weight,
            samples=settings.matching_samples,
            length=settings.matching_tokens,
            every=settings.matching_tokens,
            layers=shares,
        )
        epoch = (batch.inputs for batch in self.batches(target, 1))
        network = FeatureNetwork.of(LanguageModel(copied(self.base), "the base"), shares, epoch)
        return lambda model: FeatureMatching(config, model, network, self.seed)

    def candidate(self, setting: str, model: PreTrainedModel) -> Candidate:
        model.eval()
        validation_RV = logits(model, self.validation)
        labels_R = self.validation.labels_R
        nll = min(
            float(torch.nn.functional.cross_entropy(validation_RV / t, labels_R))
            for t in self.settings.temperatures
        )
        return Candidate(setting, validation_RV, logits(model, self.test), nll)

    def judge(self, candidates: Sequence[Candidate], *, tune_temperature: bool = True) -> Outcome:
        """The candidate with the lowest validation NLL, at the temperature with the lowest true KL
        on the validation texts. A user cannot tune by the true KL; it favours all methods
        equally."""
        chosen = min(candidates, key=lambda candidate: candidate.nll)

        def kl(logits_RV: Tensor, texts: Texts, temperature: float) -> float:
            return true_kl(texts.p_RV, (logits_RV / temperature).log_softmax(dim=1))

        tried = self.settings.temperatures if tune_temperature else (1.0,)
        best = min(tried, key=lambda t: kl(chosen.validation_RV, self.validation, t))
        return Outcome(
            kl(chosen.test_RV, self.test, best),
            chosen.setting,
            best,
            kl(chosen.test_RV, self.test, 1.0),
        )


# ── The methods ──────────────────────────────────────────────────────────────────────────────────

BASELINES = (
    "base",
    "sft",
    "sft_temperature",
    "sft_early_stopping",
    "label_smoothing",
    "entropy_bonus",
    "gem",
    "weight_interpolation",
    "feature_matching",
)
"""The methods that need no target. "base" is the model that all methods start from."""


def baselines(shop: Workshop) -> dict[str, Outcome]:
    settings = shop.settings
    target = TargetRows.none(shop.train.labels_R.numpy())
    epochs, last = shop.run("", SFT(), target)
    shorter = [
        each
        for number in settings.shorter
        for each in shop.run(f"of {number}", SFT(), target, number)[0]
    ]
    found = {
        "base": shop.judge([shop.candidate("", shop.base)]),
        "sft": shop.judge(epochs[-1:], tune_temperature=False),
        "sft_temperature": shop.judge(epochs[-1:]),
        "sft_early_stopping": shop.judge(epochs + shorter),
        "weight_interpolation": shop.judge(
            [
                shop.candidate(f"share {share:g}", between(shop.base, last, share))
                for share in settings.interpolations
            ]
        ),
    }
    tuned = {
        "label_smoothing": {f"ε {x:g}": LabelSmoothing(epsilon=x) for x in settings.epsilons},
        "entropy_bonus": {f"c {x:g}": EntropyBonus(strength=x) for x in settings.bonuses},
        "gem": {f"β {x:g}": GEM(temperature=x) for x in settings.gem_temperatures},
    }
    for method, grid in tuned.items():
        found[method] = shop.judge(
            [each for name, made in grid.items() for each in shop.run(name, made, target)[0]]
        )
    matched = {f"w {w:g}": shop.matching(target, w) for w in settings.matching_weights}
    found["feature_matching"] = shop.judge(
        [
            each
            for name, matching in matched.items()
            for each in shop.run(name, SFT(), target, matching_of=matching)[0]
        ]
    )
    return found


def between(base: LlamaForCausalLM, tuned: LlamaForCausalLM, share: float) -> LlamaForCausalLM:
    """The model with weights interpolated between the base and the fine-tuned model."""
    model, end = copied(base), tuned.state_dict()
    model.load_state_dict(
        {name: start.lerp(end[name], share) for name, start in base.state_dict().items()}
    )
    return model


def targeted(shop: Workshop, teacher: Teacher) -> dict[str, Outcome]:
    """The outcomes of the methods that train toward the teacher's distribution."""
    settings = shop.settings
    labels_R = shop.train.labels_R
    logprobs_RV = dense(teacher, shop.train.documents)

    def kept(k: int) -> Targets:
        generator = torch.Generator().manual_seed(shop.seed)
        return sparsify(logprobs_RV, labels_R, k=k, draws=settings.draws, generator=generator)

    sparse = stored(kept(settings.top_k))
    targets = {
        "dense_teacher": kept(teacher.vocabulary),
        "hybrid": sparse,
        "renormalised_top_k_mixed": renormalised(sparse, labels_R),
    }
    lines = Projections.of(shop.base.get_input_embeddings().weight, lines=8, seed=shop.seed)
    divergences: dict[str, Callable[..., Divergence]] = {
        **dict.fromkeys(targets, ForwardKL),
        "reverse_kl": ReverseKL,
        "skew_kl": SkewKL,
        "jsd": JSD,
        "sliced_w1": partial(SlicedW1, projections=lines),
    }
    found = {}
    for method, divergence in divergences.items():
        rows = TargetRows.of(labels_R.numpy(), targets.get(method, sparse))
        by_weight = {
            weight: shop.run(f"λ {weight:g}", divergence(weight=weight), rows)[0]
            for weight in settings.target_weights
        }
        found[method] = shop.judge([each for epochs in by_weight.values() for each in epochs])
        if method == "renormalised_top_k_mixed":
            alone = by_weight[1.0]
            found["renormalised_top_k"] = shop.judge(alone)
            found["renormalised_top_k_untuned"] = shop.judge(alone[-1:], tune_temperature=False)
    return found


# ── Personas ─────────────────────────────────────────────────────────────────────────────────────


class ExactTeacher(Teacher):
    """A reference that always follows the named narrator, whatever the text is."""

    def __init__(self, source: KnownSource, settings: Settings) -> None:
        self.vocabulary = source.vocabulary
        self._source, self._first_name = source, 1 + settings.words

    def states(self, texts: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[Tensor]:
        """ln p, in place of hidden states; a text is the begin token, a name, and words."""
        return [self._read(*pair) for pair in zip(texts, positions, strict=True)]

    def logprobs(self, states_RD: Tensor) -> Tensor:
        return states_RD.float()

    def _read(self, text: np.ndarray, positions_T: np.ndarray) -> Tensor:
        who = int(text[1]) - self._first_name
        words_DN = torch.from_numpy(text[None, 2:].astype(np.int64))
        p_NV = self._source.part(slice(who, who + 1)).next_token(words_DN)[0]
        return p_NV[torch.from_numpy(positions_T - 2)].log()


@dataclass(frozen=True)
class Personas:
    """True forward KL of two targets for texts with a hidden narrator, in nats per token."""

    posterior: float
    """KL of the target of dftserve.targets.principles."""
    fixed: float
    """KL of the plain mean of the reference's distributions under each name."""


def personas(teacher: Teacher, texts: Texts, settings: Settings) -> Personas:
    tokenizer = make_tokenizer(settings)
    names = {name: name for name in voices(settings)}
    single = [Principles(teacher, tokenizer, {name: name}) for name in names]
    return Personas(
        posterior=true_kl(
            texts.p_RV, dense(Principles(teacher, tokenizer, names), texts.documents)
        ),
        fixed=true_kl(texts.p_RV, dense(Mix(single, [1.0] * len(single)), texts.documents)),
    )


def voices(settings: Settings) -> list[str]:
    return [f"voice{number}" for number in range(settings.narrators)]


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """One token for each word, and for each narrator's name."""
    names = ["<begin>", *(f"w{number}" for number in range(settings.words)), *voices(settings)]
    made = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=names[BEGIN]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=names[BEGIN])


# ── One seed ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SeedResult:
    outcomes: Mapping[str, Outcome]
    exact_personas: Personas
    """With the source's own narrators as the reference."""
    trained_personas: Personas
    """With the teacher, given a narrator's name, as the reference."""
    teacher_kl: float
    """The teacher's own true KL, on the test texts."""
    source_entropy: float
    """Nats per token."""
    top_k_mass: float
    """The probability of the teacher's top k, on the training texts."""


def measure(settings: Settings, seed: int) -> SeedResult:
    generator = torch.Generator().manual_seed(seed)
    both = make_source(settings, 4 * settings.narrators, generator)
    source = both.part(slice(settings.narrators))
    others = both.part(slice(settings.narrators, None))
    base = pretrained(
        others,
        settings,
        hidden=settings.base_hidden,
        documents=settings.base_documents,
        rate=settings.base_rate,
        seed=seed + 1000,
        named=False,
    )
    network = pretrained(
        source,
        settings,
        hidden=settings.teacher_hidden,
        documents=settings.teacher_documents,
        rate=settings.teacher_rate,
        seed=seed + 2000,
        named=True,
    )
    teacher = Teacher(network, vocabulary=source.vocabulary, name="much text")
    train, validation, test = (
        Texts.of(source, documents, settings.length, generator)
        for documents in (
            settings.train_documents,
            settings.validation_documents,
            settings.test_documents,
        )
    )
    shop = Workshop(settings, base, train, validation, test, seed)
    taught_RV = dense(teacher, train.documents)
    return SeedResult(
        outcomes={**baselines(shop), **targeted(shop, teacher)},
        exact_personas=personas(ExactTeacher(source, settings), validation, settings),
        trained_personas=personas(teacher, validation, settings),
        teacher_kl=true_kl(test.p_RV, dense(teacher, test.documents)),
        source_entropy=-float(torch.xlogy(test.p_RV, test.p_RV).sum(dim=1).mean()),
        top_k_mass=float(taught_RV.exp().topk(settings.top_k).values.sum(dim=1).mean()),
    )


# ── Claims ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Interval":
        mean, n = float(np.mean(values)), len(values)
        reach = stats.t.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        return Interval(*(round(float(x), 4) for x in (mean, mean - reach, mean + reach)))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def claim(values: np.ndarray, at_least: float) -> dict:
    """A claim holds if the whole interval of the paired values is at or above `at_least`."""
    found = Interval.of(values.tolist())
    return {
        "holds": bool(found.low >= at_least),
        "value": found.mean,
        "low": found.low,
        "high": found.high,
        "mark": at_least,
        "per_seed": [round(x, 4) for x in values.tolist()],
    }


def claims(results: Sequence[SeedResult], settings: Settings) -> dict[str, dict]:
    kl = {
        name: np.array([result.outcomes[name].true_kl for result in results])
        for name in results[0].outcomes
    }
    best = min(BASELINES, key=lambda name: kl[name].mean())

    def closed(start: str) -> dict:
        share = (kl[start] - kl["hybrid"]) / (kl[start] - kl["dense_teacher"])
        return {**claim(share, 0.8), "from": start, "bytes_a_token": bytes_a_token(settings)}

    def above(start: str, method: str = "renormalised_top_k") -> dict:
        return {**claim(kl[method] - kl[start], 0.0), "method": method, "from": start}

    def blur(reference: str) -> dict:
        found = [getattr(result, reference) for result in results]
        return claim(np.array([each.fixed - each.posterior for each in found]), 0.3)

    return {
        "hybrid_closes_80_percent_of_the_gap_from_sft_to_the_dense_teacher": closed(
            "sft_early_stopping"
        ),
        "the_same_from_sft_trained_to_the_end": closed("sft_temperature"),
        "hybrid_is_15_percent_under_the_best_baseline": {
            **claim(1 - kl["hybrid"] / kl[best], 0.15),
            "best_baseline": best,
        },
        "renormalised_top_k_is_worse_than_sft": above("sft_early_stopping"),
        "the_same_against_sft_trained_to_the_end": above("sft_temperature"),
        "the_same_of_both_trained_to_the_end_and_sampled_at_1": above(
            "sft", "renormalised_top_k_untuned"
        ),
        "posterior_mixture_beats_fixed_weights_by_.3_nats": blur("exact_personas"),
        "the_same_with_a_trained_reference": blur("trained_personas"),
    }


# ── The run ──────────────────────────────────────────────────────────────────────────────────────


def methods(results: Sequence[SeedResult]) -> dict[str, dict]:
    """Results by method, the worst first."""
    found = {}
    for name in results[0].outcomes:
        outcomes = [result.outcomes[name] for result in results]
        found[name] = {
            **asdict(Interval.of([outcome.true_kl for outcome in outcomes])),
            "per_seed": [round(outcome.true_kl, 4) for outcome in outcomes],
            "above_hybrid": asdict(
                Interval.of(
                    [r.outcomes[name].true_kl - r.outcomes["hybrid"].true_kl for r in results]
                )
            ),
            "at_temperature_1": asdict(Interval.of([o.at_temperature_1 for o in outcomes])),
            "temperatures": [outcome.temperature for outcome in outcomes],
            "chosen": [outcome.setting for outcome in outcomes],
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["mean"]))


def table(document: Mapping) -> None:
    print(f"\n{'method':28}{'true forward KL, nats a token':34}{'above hybrid, paired':28}chosen")
    for name, found in document["methods"].items():
        own, above = (
            Interval(*(f[key] for key in ("mean", "low", "high")))
            for f in (found, found["above_hybrid"])
        )
        print(f"{name:28}{own!s:34}{above!s:28}{found['chosen'][0]}, T {found['temperatures'][0]}")
    for name, found in document["claims"].items():
        interval = Interval(found["value"], found["low"], found["high"])
        print(f"{'holds ' if found['holds'] else 'FAILS '}{name:70}{interval}")


def report(
    settings: Settings, seeds: Sequence[int], results: Sequence[SeedResult], seconds: float
) -> dict:
    return {
        "bench": "known_source",
        "versions": versions("transformers", "numpy", "scipy"),
        "machine": machine(),
        "seeds": list(seeds),
        "wall_sec": round(seconds),
        "settings": asdict(settings),
        "teacher": "a larger model trained on much text of the source, not the source itself",
        "bytes_a_token": bytes_a_token(settings),
        "source": {
            name: asdict(Interval.of([getattr(result, name) for result in results]))
            for name in ("source_entropy", "teacher_kl", "top_k_mass")
        },
        "methods": methods(results),
        "personas": {
            reference: {
                name: asdict(Interval.of([getattr(getattr(r, reference), name) for r in results]))
                for name in ("posterior", "fixed")
            }
            for reference in ("exact_personas", "trained_personas")
        },
        "claims": claims(results, settings),
    }


@click.command()
@click.option("--seeds", type=click.IntRange(min=2), default=6, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, help="The JSON file.")
def main(seeds: int, out: Path) -> None:
    """Measure how close each training method comes to a known source."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    settings, results, began = Settings(), [], time.monotonic()
    text = ""
    for seed in range(seeds):
        results.append(measure(settings, seed))
        if seed == 0:  # No interval yet.
            continue
        document = report(settings, range(seed + 1), results, time.monotonic() - began)
        table(document)
        print(f"{seed + 1} of {seeds} seeds, {document['wall_sec']} s", flush=True)
        text = json.dumps(document, ensure_ascii=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
