"""All metrics of a set of texts, computed beside the same metrics of human text.

Many depend on the length and the number of texts: both sides are cut to the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

from dftserve.evaluate.metrics import lexical, slop, two_sample
from dftserve.evaluate.metrics.intervals import (
    GROUPS,
    Estimate,
    from_left_out,
    jackknife,
    mean,
    parts_of,
    tenths,
)
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.text.embeddings import Embedder
from dftserve.evaluate.text.tokenize import sentences, tokens, words
from dftserve.evaluate.text.windows import LEAST_TEXTS, Windows

T = TypeVar("T")

SAME_MEANING = 0.8
"""Texts with this cosine of their embeddings are one class."""


@dataclass(frozen=True)
class Measure:
    """What is measured, and how its number is read."""

    title: str
    about: str
    digits: int = 2
    least: float = 0.0
    most: float = math.inf
    """What the measure can be; an interval does not go beyond."""


MEASURES = {
    "mmd_style": Measure(
        "style distance",
        "√MMD² of style features to held-out human text; 0 where chance explains it",
        3,
    ),
    "mmd_style_p": Measure(
        "its p", "of “written by the same people”, at least .001: 999 permutations", 4, most=1
    ),
    "c2st_style": Measure(
        "told apart",
        "AUC of a linear classifier on style; .5: cannot tell, or has too few texts to learn",
        3,
        most=1,
    ),
    "mmd_meaning": Measure("meaning distance", "√MMD² of embeddings to held-out human text", 3),
    "c2st_meaning": Measure(
        "told apart by meaning", "AUC on embeddings; .5: cannot tell", 3, most=1
    ),
    "token_l2": Measure("token L2", "‖f − f_human‖₂ of token frequencies", 4),
    "token_js": Measure(
        "token JS", "Jensen–Shannon divergence of token frequencies, nats", 4, most=math.log(2)
    ),
    "slop": Measure("AI phrases", "per 1,000 words; to be as human"),
    "contrast": Measure("“not X, but Y”", "per 1,000 words; to be as human"),
    "distinct_1": Measure("distinct-1", "different words / words; soup wins it", 3, most=1),
    "distinct_3": Measure("distinct-3", "different trigrams / trigrams; soup wins it", 3, most=1),
    "self_bleu": Measure("self-BLEU", "0 to 100, lower: less alike; soup wins it", 1, most=100),
    "compression": Measure("compression", "bytes / gzipped bytes; lower: less repetition"),
    "self_repetition": Measure("self-repetition", "4-grams that come back in other texts, ln"),
    "vendi_style": Measure("Vendi, style", "effective number of styles among the texts", 1),
    "vendi_meaning": Measure("Vendi, meaning", "effective number of meanings among the texts", 1),
    "distinct_8": Measure(
        "distinct of 8", "classes of meaning among eight answers to a prompt", least=1, most=8
    ),
    "zipf": Measure("Zipf slope", "ln frequency on ln rank", least=-math.inf),
    "burstiness": Measure("burstiness", "of sentence lengths, −1 to 1", least=-1, most=1),
}


@dataclass(frozen=True)
class Instruments:
    """What measuring needs beside the texts, frozen for a whole evaluation."""

    style_space: StyleSpace
    phrases: slop.Phrases
    embed: Embedder | None
    """None: nothing is said about meaning."""


def measure(texts: Windows, human: Windows, with_: Instruments) -> dict[str, Estimate]:
    """By the names of `MEASURES`; those that need what is not there are left out.

    Args:
        texts, human: windows of equal length, none short; as many of each, for `token_*` and all
            measures of a set to be comparable.
    """
    said = [tokens(text) for text in texts.texts]
    prompts = (*texts.prompts, *human.prompts)
    style_TF, human_TF = with_.style_space.features(texts), with_.style_space.features(human)
    kernel_TT = np.exp(
        -squareform(pdist(style_TF, "sqeuclidean")) / (2 * with_.style_space.sigma**2)
    )
    found = {
        **_apart(style_TF, human_TF, prompts, with_.style_space.sigma, "style"),
        **_frequencies(said, [tokens(text) for text in human.texts]),
        "slop": slop.rate(texts.texts, with_.phrases, texts.prompts),
        "contrast": slop.contrast_rate(texts.texts, texts.prompts),
        **_wording(texts, said),
        "vendi_style": _of_set(texts, lambda at: lexical.vendi(_square(kernel_TT, at), q=2)),
        "burstiness": _burstiness(texts),
    }
    if with_.embed is not None:
        meaning_TF, human_TF = with_.embed(texts.texts), with_.embed(human.texts)
        sigma = two_sample.median_distance(human_TF)
        found |= _apart(meaning_TF, human_TF, prompts, sigma, "meaning")
        cosine_TT = np.clip(meaning_TF @ meaning_TF.T, -1.0, 1.0).astype(np.float64)
        found["vendi_meaning"] = _of_set(texts, lambda at: lexical.vendi(_square(cosine_TT, at)))
        found |= _classes(texts, cosine_TT)
    parts = parts_of(texts.prompts)
    return {
        name: _of_parts(_bounded(found[name], MEASURES[name]), parts)
        for name in MEASURES
        if name in found
    }


def _of_parts(found: Estimate, parts: str) -> Estimate:
    return replace(found, parts=parts) if found.left_out else found


def _bounded(found: Estimate, measure: Measure) -> Estimate:
    """The jackknife's interval is symmetrical, and would leave the measure's range."""
    low, high = (
        None if end is None else min(max(end, measure.least), measure.most)
        for end in (found.low, found.high)
    )
    return replace(found, low=low, high=high)


def _of_set(texts: Windows, statistic: Callable[[NDArray[np.intp]], float]) -> Estimate:
    return jackknife(len(texts), statistic)


def _apart(
    x_TF: NDArray, human_TF: NDArray, prompts: Sequence[str], sigma: float, space: str
) -> dict[str, Estimate]:
    """`prompts`: of the texts, then of the human ones. One prompt alone leaves nothing to permute,
    and no fold to test on for a classifier: both are then left out."""
    near = jackknife(len(x_TF), lambda at: _root(two_sample.mmd2(x_TF[at], human_TF, sigma)))
    found = {f"mmd_{space}": near}
    sides = prompts[: len(x_TF)], prompts[len(x_TF) :]
    if all("" in side or len(set(side)) > 1 for side in sides):
        mmd = two_sample.mmd_test(x_TF, human_TF, sigma, groups=prompts)
        found[f"mmd_{space}_p"] = Estimate(mmd.p, None, None)
        found[f"c2st_{space}"] = two_sample.c2st(x_TF, human_TF, groups=prompts)
    return found


def _root(mmd2: float) -> float:
    return float(np.sqrt(max(0.0, mmd2)))


def _frequencies(
    said: Sequence[Sequence[str]], human: Sequence[Sequence[str]]
) -> dict[str, Estimate]:
    parts_T = np.concatenate((tenths(len(said)), np.full(len(human), GROUPS)))
    counts_KV = lexical.gram_counts([*said, *human], 1, parts_T)
    own_KV, human_V = counts_KV[:-1], counts_KV[-1]

    def of(place: int) -> Estimate:
        return _without_each(own_KV, lambda c: two_sample.frequency_distances(c, human_V)[place])

    return {"token_l2": of(0), "token_js": of(1)}


def _wording(texts: Windows, said: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    tenth_T = tenths(len(said))
    words_KV = lexical.gram_counts([words(text) for text in texts.texts], 1, tenth_T)
    bleu_T, repetition_T = lexical.self_bleus(said), lexical.self_repetitions(said)
    return {
        "distinct_1": _without_each(words_KV, lexical.distinct),
        "distinct_3": _without_each(lexical.gram_counts(said, 3, tenth_T), lexical.distinct),
        "self_bleu": _of_set(texts, lambda at: bleu_T[at].mean()),
        "compression": _of_set(texts, lambda at: lexical.compression_ratio(_pick(texts.texts, at))),
        "self_repetition": _of_set(texts, lambda at: repetition_T[at].mean()),
        "zipf": _without_each(words_KV, lexical.slope_on_rank),
    }


def _without_each(counts_KG: NDArray, statistic: Callable[[NDArray], float]) -> Estimate:
    """The jackknife of what depends on counts alone; empty parts are none."""
    counts_KG = counts_KG[counts_KG.any(axis=1)]
    total_G = counts_KG.sum(axis=0)
    return from_left_out(statistic(total_G), [statistic(total_G - part_G) for part_G in counts_KG])


def _pick(items: Sequence[T], at: NDArray[np.intp]) -> list[T]:
    return [items[int(place)] for place in at]


def _burstiness(texts: Windows) -> Estimate:
    lengths_T = [[len(words(each)) for each in sentences(text)] for text in texts.texts]
    return _of_set(texts, lambda at: lexical.burstiness(np.concatenate(_pick(lengths_T, at))))


def _classes(texts: Windows, cosine_TT: NDArray[np.float64]) -> dict[str, Estimate]:
    """Only where prompts have enough answers to compare."""
    kinds = [
        lexical.distinct_k(lexical.classes(_square(cosine_TT, at), SAME_MEANING), LEAST_TEXTS)
        for at in map(np.array, texts.answered().values())
    ]
    if not kinds:
        return {}
    return {"distinct_8": mean(kinds)}


def _square(similarity_TT: NDArray[np.float64], at: NDArray[np.intp]) -> NDArray[np.float64]:
    part_TT = similarity_TT[np.ix_(at, at)].copy()
    np.fill_diagonal(part_TT, 1.0)
    return part_TT
