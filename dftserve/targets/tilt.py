"""A source with the rates of chosen words and phrases moved to the human ones.

    phrases = phrases_of(tokenizer, ["a testament to", "delve into"])
    source = Tilt(teacher, phrases, human=human_documents, samples=texts_of_the_teacher)

Of all distributions over texts with the human rates, the one nearest to the base a (smallest
KL(p‖a)) is p(x) ∝ a(x)·exp(Σ_f λ_f φ_f(x)) (GDC, arXiv 2012.11635). Here φ_f is the phrase's count
less what the human rate makes of the text's length, so E_p[φ_f] = 0 says that the rates are equal,
and λ is where log E_a[exp(λ·φ)], which is convex, is least. The expectations are importance
sampling's: over texts that the base wrote, with the weights exp(λ·φ).

How it is applied is an approximation. A source speaks of one token at a time, and the exact next
token of p would need the expectation over everything that may still be written. We multiply by e^λ
where a token would complete the phrase, that is where the rest of it stands right before, and
renormalise. The base is not led away earlier, from a phrase's first words, and what e^λ pushes
aside may go on otherwise. For phrases of one token that is a logit bias; what the tilt is for is
phrases of several. Measure the rates of what was trained.

Shapes: S samples, F phrases, T trained positions, R of them in one chunk, V vocabulary.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dftserve.targets.combine import dense
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows, Source

LARGEST = 5.0
"""|λ|: no phrase is made more than 148 times likelier or rarer."""
LEAST_EFFECTIVE = 0.1
"""Share of the samples below which the fit is doubted."""
LEAST_SAMPLES = 2.0
"""Effective samples below which it is refused: the rates would be one text's."""

Phrases = Mapping[str, Sequence[Sequence[int]]]
"""Name → its tokenisations."""


@dataclass(frozen=True)
class Fit:
    """What was found on the samples."""

    strengths: Mapping[str, float]
    """λ by phrase, in nats."""
    human_rates: Mapping[str, float]
    """Counts per 1,000 trained tokens."""
    base_rates: Mapping[str, float]
    """The samples' own."""
    tilted_rates: Mapping[str, float]
    """The samples', weighted; other than the human rate where λ stopped at its limit."""
    effective_samples: float
    """(Σw)² / Σw²."""
    samples: int
    unseen: tuple[str, ...]
    """Phrases that no sample holds: nothing to weigh, so λ is 0."""


class Tilt(DenseSource):
    """The base's rows, e^λ times likelier where a token completes a phrase, renormalised."""

    def __init__(
        self,
        base: Source,
        phrases: Phrases,
        *,
        human: Sequence[Document],
        samples: Sequence[Document],
        largest: float = LARGEST,
    ) -> None:
        """
        Args:
            phrases: name → token sequences; completing any of them counts once. See `phrases_of`.
            human: documents whose rates are wanted.
            samples: documents whose trained tokens the base wrote, at its own temperature.
            largest: |λ| stays at or below this.

        Warns:
            UserWarning: fewer effective samples than a tenth of the samples, or unseen phrases.

        Raises:
            ValueError: a lumped source, phrases that are not accepted, no trained tokens, or fewer
                than two effective samples.
        """
        self._base = dense(base, "tilt")
        self.vocabulary = base.vocabulary
        self._phrases = _checked(phrases, base.vocabulary)
        if not 0 < largest < np.inf:
            raise ValueError(f"tilt: got the limit {largest}; accepted: a number above 0.")
        self.fit = fit(self._phrases, human=human, samples=samples, largest=largest)
        _judge(self.fit)

    @property
    def effective_samples(self) -> float:
        """(Σw)² / Σw² of the fit, between 1 and the number of samples."""
        return self.fit.effective_samples

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "tilt",
            "base": self._base.describe(),
            "phrases": {name: list(map(list, them)) for name, them in self._phrases.items()},
            "strengths": dict(self.fit.strengths),
            "human_rates": dict(self.fit.human_rates),
            "base_rates": dict(self.fit.base_rates),
            "effective_samples": self.fit.effective_samples,
            "samples": self.fit.samples,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        base_rows = self._base.read(documents)
        return [
            self._rows(document, rows) for document, rows in zip(documents, base_rows, strict=True)
        ]

    def _rows(self, document: Document, base: Rows) -> Rows:
        place_E, token_E, strength_E = self._completions(document)

        def rows(start: int, stop: int) -> Tensor:
            first, last = np.searchsorted(place_E, [start, stop])
            span = slice(int(first), int(last))
            at = (torch.from_numpy(place_E[span] - start), torch.from_numpy(token_E[span]))
            added = torch.from_numpy(strength_E[span])
            logprobs_RV = base(start, stop)
            at, added = tuple(each.to(logprobs_RV.device) for each in at), added.to(logprobs_RV)
            shift_RV = torch.zeros_like(logprobs_RV).index_put(at, added, accumulate=True)
            return (logprobs_RV + shift_RV).log_softmax(dim=1)

        return rows

    def _completions(self, document: Document) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where which token would complete a phrase: its place among the trained, rising; the
        token; and λ."""
        found: list[tuple[int, int, float]] = []
        for name, tokenisations in self._phrases.items():
            ends: set[tuple[int, int]] = set()
            for *before, last in tokenisations:
                after_N = _stands_before(document.tokens_N, before)
                places = np.flatnonzero(after_N[document.positions_T])
                ends.update((place, last) for place in places.tolist())
            found += [(place, token, self.fit.strengths[name]) for place, token in ends]
        found.sort()
        place, token, strength = zip(*found, strict=True) if found else ((), (), ())
        return (
            np.array(place, np.int64),
            np.array(token, np.int64),
            np.array(strength, np.float32),
        )


def phrases_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, list[tuple[int, ...]]]:
    """Each text's tokenisations, at the start of a line and after a space."""
    found = {}
    for text in texts:
        ways = {
            tuple(tokenizer(way, add_special_tokens=False, truncation=False)["input_ids"])
            for way in (text, f" {text}")
        }
        found[text] = sorted(ways)
    return found


def count(document: Document, tokenisations: Sequence[Sequence[int]]) -> int:
    """How many trained tokens complete one of the tokenisations."""
    ends_N = np.zeros(len(document.tokens_N), dtype=bool)
    for *before, last in tokenisations:
        ends_N |= _stands_before(document.tokens_N, before) & (document.tokens_N == last)
    return int((ends_N & document.trained_N).sum())


def fit(
    phrases: Phrases, *, human: Sequence[Document], samples: Sequence[Document], largest: float
) -> Fit:
    """λ that brings the weighted samples to the human rates.

    Raises:
        ValueError: no trained tokens on either side.
    """
    human_SF, human_S = _counts(phrases, human, "human")
    sample_SF, sample_S = _counts(phrases, samples, "samples")
    rate_F = human_SF.sum(axis=0) / human_S.sum()
    excess_SF = sample_SF - rate_F * sample_S[:, None]
    unseen_F = sample_SF.sum(axis=0) == 0
    # Rounded: the description must not hang on an optimiser's last digits.
    strength_F = _least(excess_SF, np.where(unseen_F, 0.0, largest)).round(5)
    weight_S = _weights(excess_SF, strength_F)[0]
    tilted_F = weight_S @ sample_SF / (weight_S @ sample_S)
    base_F = sample_SF.sum(axis=0) / sample_S.sum()

    def named(values_F: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(phrases, values_F, strict=True)}

    return Fit(
        strengths=named(strength_F),
        human_rates=named((1000 * rate_F).round(6)),
        base_rates=named((1000 * base_F).round(6)),
        tilted_rates=named((1000 * tilted_F).round(6)),
        effective_samples=round(float(1 / (weight_S**2).sum()), 3),
        samples=len(samples),
        unseen=tuple(name for name, none in zip(phrases, unseen_F, strict=True) if none),
    )


def _counts(
    phrases: Phrases, documents: Sequence[Document], who: str
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [S, F] counts and [S] trained tokens."""
    lengths_S = np.array([document.trained for document in documents], dtype=np.float64)
    if not lengths_S.sum():
        raise ValueError(
            f"tilt: {who}: got {len(documents)} documents without trained tokens; accepted: "
            "documents with text to count in."
        )
    counts = [[count(document, ways) for ways in phrases.values()] for document in documents]
    return np.array(counts, dtype=np.float64).reshape(len(documents), len(phrases)), lengths_S


def _least(excess_SF: np.ndarray, limit_F: np.ndarray) -> np.ndarray:
    """argmin over |λ| ≤ limit of log mean exp(λ·φ); at an inner minimum E_w[φ] = 0."""

    def value_and_gradient(strength_F: np.ndarray) -> tuple[float, np.ndarray]:
        weight_S, log_mean = _weights(excess_SF, strength_F)
        return log_mean, weight_S @ excess_SF

    found = minimize(
        value_and_gradient,
        np.zeros(excess_SF.shape[1]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-limit, limit) for limit in limit_F],
        options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9},
    )
    return found.x


def _weights(excess_SF: np.ndarray, strength_F: np.ndarray) -> tuple[np.ndarray, float]:
    """w ∝ exp(λ·φ), summing to 1, and log mean exp(λ·φ)."""
    log_weight_S = excess_SF @ strength_F
    highest = log_weight_S.max()
    weight_S = np.exp(log_weight_S - highest)
    return weight_S / weight_S.sum(), float(highest + np.log(weight_S.mean()))


def _stands_before(tokens_N: np.ndarray, before: Sequence[int]) -> np.ndarray:
    """bool [N]: the tokens right before each position are `before`."""
    stands_N = np.zeros(len(tokens_N), dtype=bool)
    stands_N[len(before) :] = True
    for back, token in enumerate(reversed(before), 1):
        stands_N[back:] &= tokens_N[:-back] == token
    return stands_N


def _checked(phrases: Phrases, vocabulary: int) -> dict[str, list[tuple[int, ...]]]:
    if not phrases:
        raise ValueError("tilt: got no phrases; accepted: one or more.")
    checked = {}
    for name, ways in phrases.items():
        checked[name] = [tuple(int(token) for token in way) for way in ways]
        if not ways or not all(
            way and all(0 <= token < vocabulary for token in way) for way in checked[name]
        ):
            raise ValueError(
                f"tilt: phrase {name!r}: got {checked[name]}; accepted: one sequence or more of "
                f"token ids from 0 to {vocabulary - 1}, none empty. Use phrases_of(tokenizer, …)."
            )
    return checked


def _judge(found: Fit) -> None:
    share = found.effective_samples / found.samples
    said = f"tilt: {found.effective_samples:.1f} of {found.samples} samples are effective"
    advice = (
        "Give more samples of the base, fewer phrases or a smaller limit on λ; a base whose rates "
        "lie nearer to the human ones needs less tilt."
    )
    if found.effective_samples < LEAST_SAMPLES:
        raise ValueError(f"{said}; accepted: {LEAST_SAMPLES:.0f} or more. {advice}")
    if share < LEAST_EFFECTIVE:
        warnings.warn(
            f"{said}, under {LEAST_EFFECTIVE:.0%}: the rates rest on a few texts. {advice}",
            stacklevel=3,
        )
    if found.unseen:
        warnings.warn(
            f"tilt: no sample holds {', '.join(map(repr, found.unseen))}; left as the base has "
            "it. Give more samples, or leave it out.",
            stacklevel=3,
        )
