"""The Style Diversity Score (SDS): 0 for copies and word salad, above 90 for held-out human text.

    SDS = 100 · min(1, q) · min(1, V) · clip(P, 0, 1)

    V = √(v / v_human)              reliable style variance between texts: what both halves of a
                                    text agree on. Copies have none; the halves of word salad agree
                                    on nothing.
    P = ln o / ln o_human           phrases that texts have in common (`overlap`)
    q = pass rate / human's         pass rate: the share of texts whose word order carries at least
                                    half of its information in human text (`coherence`)

Texts shorter than the window are left out; their number is reported.

v and o are computed on the texts that pass, so that word salad does not count as variety. They
compare the answers to one prompt if at least half of the texts belong to prompts with eight or
more; otherwise they compare all texts, and also include differences due to the prompts. If people
answered each prompt once, their values within prompts are estimated (`Spread.within_prompts`).
The score measures how varied the style is, not how good: read it with the distance to human text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.metrics.coherence import CoherenceFilter
from dftserve.evaluate.metrics.intervals import Estimate, estimate, resamples
from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.stylometry import Scale, features
from dftserve.evaluate.text.tokenize import tokens, words
from dftserve.evaluate.text.windows import LEAST_TEXTS, Windows

LEAST_OVERLAP = 1e-4
"""Lower bound of o, so that short texts that share nothing by chance are not infinitely varied."""

WITHIN_VARIANCE = 0.91
"""v of people within topics over v of people between all texts: .91 [.86, .97] for 615 speakers
on 98 topics (bench/within_topics.py). How a person writes depends little on the prompt."""
WITHIN_WORDING = 0.93
"""The same ratio for ln o: .93 [.90, .97]."""


@dataclass(frozen=True)
class Spread:
    """How much texts differ: arrays of one value for each resample.

    variance: v, the reliable style variance. sharing: o, in [0, 1]. passed: the pass rate.
    """

    variance: NDArray[np.float64]
    sharing: NDArray[np.float64]
    passed: NDArray[np.float64]

    def within_prompts(self) -> "Spread":
        """Estimate between answers to one prompt, for people with this spread between all texts."""
        return Spread(WITHIN_VARIANCE * self.variance, self.sharing**WITHIN_WORDING, self.passed)


@dataclass(frozen=True)
class SDSReference:
    """What the score needs from human text, fitted once and then fixed."""

    words: int
    """Length of the windows; other windows cannot be scored."""
    scale: Scale
    coherence_filter: CoherenceFilter
    by_prompt: bool
    """Whether most human texts belong to prompts with enough answers (`come_in_prompts`)."""
    human: Spread
    """The spread of human texts that neither the scale nor the bigrams were fitted on: within
    prompts if `by_prompt`, else between all texts."""

    @classmethod
    def fit(cls, reference: Windows, calibration: Windows) -> "SDSReference":
        """Fit on two disjoint sets of human texts.

        Raises:
            ValueError: the calibration texts do not vary in style, or share every phrase.
        """
        first, second = reference.halves()
        scale = Scale.fit(features(first), features(second))
        coherence_filter = CoherenceFilter.fit(_words(reference), _words(calibration))
        by_prompt = come_in_prompts(calibration)
        observed = _Observed.of(calibration, scale, coherence_filter, by_prompt)
        human = observed.spread(np.ones((1, observed.units)))
        if not (human.variance > 0 and human.sharing < 1 and human.passed > 0):
            raise ValueError(
                f"human texts: style variance {float(human.variance[0]):.4f}, shared phrases "
                f"{float(human.sharing[0]):.4f}, {float(human.passed[0]):.0%} coherent; accepted: "
                "different texts by different people, in English."
            )
        return cls(reference.words, scale, coherence_filter, by_prompt, human)


@dataclass(frozen=True)
class Score:
    """The score with its parts, which are not capped, and 95 % intervals over texts or prompts."""

    sds: Estimate
    variety: Estimate
    """V."""
    wording: Estimate
    """P."""
    coherence: Estimate
    """q."""
    texts: int
    short: int
    """How many of these are shorter than the window, and left out."""
    by_prompt: bool
    drawn: tuple[float, ...] = field(default=(), repr=False)
    """The score of each bootstrap resample. Two runs over the same prompts have the same resamples,
    so they can be compared in pairs."""


def score(texts: Windows, reference: SDSReference) -> Score:
    """The score of a system's texts.

    Raises:
        ValueError: windows of another length, fewer than eight texts that are long enough, or no
            prompt with as many.
    """
    if texts.words != reference.words:
        raise ValueError(
            f"windows: got {texts.words} words; accepted: {reference.words}, as the human texts."
        )
    by_prompt = reference.by_prompt or come_in_prompts(texts)
    human = reference.human
    if by_prompt and not reference.by_prompt:
        human = human.within_prompts()
    observed = _Observed.of(texts, reference.scale, reference.coherence_filter, by_prompt)
    here = _parts(observed.spread(np.ones((1, observed.units))), human)
    drawn = _parts(observed.spread(resamples(observed.units)), human)
    sds, variety, wording, coherence = (
        estimate(float(value[0]), draws_D, observed.units)
        for value, draws_D in zip(here, drawn, strict=True)
    )
    scores = tuple(round(float(draw), 3) for draw in drawn[0])
    return Score(sds, variety, wording, coherence, len(texts), texts.short, by_prompt, scores)


def come_in_prompts(texts: Windows) -> bool:
    """Whether at least half of the texts answer prompts with `LEAST_TEXTS` answers or more."""
    return 2 * sum(map(len, texts.indices_by_prompt().values())) >= len(texts)


def _parts(spread: Spread, human: Spread) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """SDS, V, P, q."""
    variety = np.sqrt(np.maximum(0.0, spread.variance) / human.variance)
    wording = _negative_log(spread.sharing) / _negative_log(human.sharing)
    coherence = spread.passed / human.passed
    capped = np.minimum(1, coherence) * np.minimum(1, variety) * np.clip(wording, 0, 1)
    return 100 * capped, variety, wording, coherence


def _negative_log(sharing: NDArray) -> NDArray:
    """−ln o: 0 if every phrase is shared."""
    return np.abs(np.log(np.maximum(sharing, LEAST_OVERLAP)))


@dataclass(frozen=True)
class _Observed:
    """Style features and overlaps of T texts in groups. Units of resampling are the groups, or the
    texts if there is only one group."""

    first_TF: NDArray[np.float64]
    second_TF: NDArray[np.float64]
    """z of the halves, scaled so that their inner product is the reliable covariance."""
    overlap_TT: NDArray[np.float64]
    long_T: NDArray[np.float64]
    """1 if the text is as long as the window, else 0: shorter texts are ignored."""
    passed_T: NDArray[np.float64]
    groups: Sequence[NDArray[np.intp]]

    @classmethod
    def of(
        cls, texts: Windows, scale: Scale, coherence_filter: CoherenceFilter, by_prompt: bool
    ) -> "_Observed":
        groups = _groups(texts, by_prompt)
        weight_F = np.sqrt(scale.reliability_F / scale.reliability_F.sum())
        first_TF, second_TF = (scale.z(features(half)) * weight_F for half in texts.halves())
        passed = [coherence_filter.passes(text) for text in _words(texts)]
        overlap_TT = ngram_overlap([tokens(text) for text in texts.texts])
        np.fill_diagonal(overlap_TT, 0.0)
        long = [text != "" for text in texts.texts]
        passed_T, long_T = np.array(passed, float), np.array(long, float)
        return cls(first_TF, second_TF, overlap_TT, long_T, passed_T, groups)

    @property
    def units(self) -> int:
        return len(self.groups) if len(self.groups) > 1 else len(self.groups[0])

    def spread(self, weights_DU: NDArray[np.float64]) -> Spread:
        """The spread under weights of the units. No text is paired with its copy in a resample."""
        if len(self.groups) == 1:
            return self._of(self.groups[0], weights_DU)
        each = [self._of(group, np.ones((1, len(group)))) for group in self.groups]
        variance_G, sharing_G = (
            np.concatenate([getattr(spread, name) for spread in each])
            for name in ("variance", "sharing")
        )
        long_G, passed_G = (
            np.array([each_T[group].sum() for group in self.groups])
            for each_T in (self.long_T, self.passed_T)
        )
        return Spread(
            variance=_mean(variance_G, weights_DU * np.maximum(passed_G - 1, 0), default=0.0),
            sharing=_mean(sharing_G, weights_DU * passed_G * (passed_G - 1), default=1.0),
            passed=_mean(passed_G / np.maximum(long_G, 1), weights_DU * long_G, default=0.0),
        )

    def _of(self, group: NDArray[np.intp], weights_DN: NDArray[np.float64]) -> Spread:
        first_NF, second_NF = self.first_TF[group], self.second_TF[group]
        w_DN = weights_DN * self.passed_T[group]
        total_D = w_DN.sum(axis=1)
        pairs_D = total_D**2 - (w_DN**2).sum(axis=1)
        products_D = w_DN @ (first_NF * second_NF).sum(axis=1)
        means_D = ((w_DN @ first_NF) * (w_DN @ second_NF)).sum(axis=1)
        shared_D = ((w_DN @ self.overlap_TT[np.ix_(group, group)]) * w_DN).sum(axis=1)
        some_D = pairs_D > 0
        pairs_D = np.where(some_D, pairs_D, 1.0)
        return Spread(
            variance=np.where(some_D, (total_D * products_D - means_D) / pairs_D, 0.0),
            sharing=np.where(some_D, shared_D / pairs_D, 1.0),
            passed=_mean(self.passed_T[group], weights_DN * self.long_T[group], default=0.0),
        )


def _mean(values_G: NDArray, weights_DG: NDArray, default: float) -> NDArray[np.float64]:
    """The weighted mean of each draw; `default` if all weights are 0."""
    total_D = weights_DG.sum(axis=1)
    return np.where(total_D > 0, weights_DG @ values_G / np.where(total_D > 0, total_D, 1), default)


def _groups(texts: Windows, by_prompt: bool) -> list[NDArray[np.intp]]:
    if len(texts) - texts.short < LEAST_TEXTS:
        raise ValueError(
            f"texts: got {len(texts)}, {texts.short} of them shorter than {texts.words} words; "
            f"accepted: {LEAST_TEXTS} or more that are long enough."
        )
    if not by_prompt:
        return [np.arange(len(texts))]
    groups = [np.array(indices) for indices in texts.indices_by_prompt().values()]
    if not groups:
        raise ValueError(
            f"texts: no prompt has {LEAST_TEXTS} of them, and the human texts are compared "
            f"within prompts; accepted: {LEAST_TEXTS} or more answers to each prompt."
        )
    return groups


def _words(texts: Windows) -> Sequence[Sequence[str]]:
    return [words(text) for text in texts.texts]
