"""All metrics of a set of texts, some of them in comparison with a set of human texts.

Many depend on the length and the number of texts, which must be equal in both sets.
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
    PARTS,
    Estimate,
    as_if_equal_parts,
    from_left_out,
    has_several,
    jackknife,
    mean,
    part_numbers,
    parts_digest,
)
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.text.embeddings import Embedder
from dftserve.evaluate.text.tokenize import sentences, tokens, words
from dftserve.evaluate.text.windows import LEAST_TEXTS, Windows

T = TypeVar("T")

SAME_MEANING = 0.8
"""Cosine similarity of embeddings from which two texts count as one class."""


@dataclass(frozen=True)
class Measure:
    """The title of a measure, what its value means, and how it is rendered."""

    title: str
    about: str
    digits: int = 2
    least: float = 0.0
    most: float = math.inf
    """`least` and `most` are the range of the measure, to which intervals are clipped."""
    depends: tuple[str, ...] = ()
    """Fields of a result besides its texts on which the value depends: of two results that differ
    in one of them, the values cannot be compared."""


COMPARED, EMBEDDINGS, PHRASES = "compared", "embeddings", "phrases"

MEASURES = {
    "mmd_style": Measure(
        "style distance",
        "√MMD² of style features to held-out human text; 0 if chance explains it",
        3,
    ),
    "mmd_style_p": Measure(
        "style distance, p",
        "p-value of “same writers”, at least .001: 999 permutations",
        4,
        most=1,
        depends=(COMPARED,),
    ),
    "c2st_style": Measure(
        "style classifier",
        "AUC of a linear classifier on style; .5: no difference found, or too few texts to learn",
        3,
        most=1,
        depends=(COMPARED,),
    ),
    "mmd_meaning": Measure(
        "meaning distance",
        "√MMD² of embeddings to held-out human text",
        3,
        depends=(EMBEDDINGS,),
    ),
    "c2st_meaning": Measure(
        "meaning classifier",
        "AUC on embeddings; .5: no difference found",
        3,
        most=1,
        depends=(COMPARED, EMBEDDINGS),
    ),
    "token_l2": Measure("token L2", "‖f − f_human‖₂ of token frequencies", 4, depends=(COMPARED,)),
    "token_js": Measure(
        "token JS",
        "Jensen–Shannon divergence of token frequencies, nats",
        4,
        most=math.log(2),
        depends=(COMPARED,),
    ),
    "slop": Measure(
        "AI phrases", "per 1,000 words; should match the human rate", depends=(PHRASES,)
    ),
    "contrast": Measure("“not X, but Y”", "per 1,000 words; should match the human rate"),
    "distinct_1": Measure(
        "distinct-1",
        "different words / words; random words score best",
        3,
        most=1,
        depends=(COMPARED,),
    ),
    "distinct_3": Measure(
        "distinct-3",
        "different trigrams / trigrams; random words score best",
        3,
        most=1,
        depends=(COMPARED,),
    ),
    "self_bleu": Measure(
        "self-BLEU",
        "0 to 100, lower: less similar; random words score best",
        1,
        most=100,
        depends=(COMPARED,),
    ),
    "compression": Measure(
        "compression", "bytes / gzipped bytes; lower: less repetition", depends=(COMPARED,)
    ),
    "self_repetition": Measure(
        "self-repetition", "4-grams that occur in other texts too, ln", depends=(COMPARED,)
    ),
    "vendi_style": Measure(
        "Vendi, style", "effective number of styles among the texts", 1, depends=(COMPARED,)
    ),
    "vendi_meaning": Measure(
        "Vendi, meaning",
        "effective number of meanings among the texts",
        1,
        depends=(COMPARED, EMBEDDINGS),
    ),
    "distinct_8": Measure(
        "distinct of 8",
        "classes of meaning among eight answers to a prompt",
        least=1,
        most=8,
        depends=(EMBEDDINGS,),
    ),
    "zipf": Measure("Zipf slope", "ln frequency on ln rank", least=-math.inf, depends=(COMPARED,)),
    "burstiness": Measure("burstiness", "of sentence lengths, −1 to 1", least=-1, most=1),
}


@dataclass(frozen=True)
class Instruments:
    """What measuring needs in addition to the texts, fixed for a whole evaluation."""

    style_space: StyleSpace
    phrases: slop.Phrases
    embed: Embedder | None
    """None: meaning is not measured."""


def measure(texts: Windows, human: Windows, instruments: Instruments) -> dict[str, Estimate]:
    """Estimates by the names of `MEASURES`; measures whose inputs are missing are left out.

    Args:
        texts, human: windows of equal length, none short; the same number of each, so that
            `token_*` and all measures of a set are comparable.
    """
    space = instruments.style_space
    tokens_T = [tokens(text) for text in texts.texts]
    groups = (*texts.groups, *human.groups)
    style_TF, human_TF = space.features(texts), space.features(human)
    kernel_TT = np.exp(-squareform(pdist(style_TF, "sqeuclidean")) / (2 * space.sigma**2))
    estimates = {
        **_distances(style_TF, human_TF, groups, space.sigma, "style"),
        **_frequencies(texts, tokens_T, [tokens(text) for text in human.texts]),
        "slop": slop.rate(texts.texts, instruments.phrases, texts.groups),
        "contrast": slop.contrast_rate(texts.texts, texts.groups),
        **_wording(texts, tokens_T),
        "vendi_style": _of_set(texts, lambda at: lexical.vendi(_square(kernel_TT, at), q=2)),
        "burstiness": _burstiness(texts),
    }
    if instruments.embed is not None:
        meaning_TF, human_TF = instruments.embed(texts.texts), instruments.embed(human.texts)
        sigma = two_sample.median_distance(human_TF)
        estimates |= _distances(meaning_TF, human_TF, groups, sigma, "meaning")
        cosine_TT = np.clip(meaning_TF @ meaning_TF.T, -1.0, 1.0).astype(np.float64)
        estimates["vendi_meaning"] = _of_set(
            texts, lambda at: lexical.vendi(_square(cosine_TT, at))
        )
        estimates |= _classes(texts, cosine_TT)
    parts = parts_digest(texts.groups)
    return {
        name: _with_parts(_clipped(estimates[name], MEASURES[name]), parts)
        for name in MEASURES
        if name in estimates
    }


def _with_parts(estimate: Estimate, parts: str) -> Estimate:
    return replace(estimate, parts=parts) if estimate.left_out else estimate


def _clipped(estimate: Estimate, measure: Measure) -> Estimate:
    """Clip the jackknife's interval, which is symmetric, to the range of the measure."""
    low, high = (
        None if end is None else min(max(end, measure.least), measure.most)
        for end in (estimate.low, estimate.high)
    )
    return replace(estimate, low=low, high=high)


def _of_set(texts: Windows, statistic: Callable[[NDArray[np.intp]], float]) -> Estimate:
    return jackknife(len(texts), statistic, groups=texts.groups)


def _distances(
    x_TF: NDArray, human_TF: NDArray, groups: Sequence[str], sigma: float, space: str
) -> dict[str, Estimate]:
    """`groups`: of the texts, then of the human ones. If a side has only one prompt, there is
    nothing to permute and no fold to test a classifier on: p and AUC are then left out."""
    sides = groups[: len(x_TF)], groups[len(x_TF) :]
    squared = jackknife(
        len(x_TF), lambda at: two_sample.mmd2(x_TF[at], human_TF, sigma), groups=sides[0]
    )
    estimates = {f"mmd_{space}": two_sample.mmd_from_squared(squared)}
    if all(map(has_several, sides)):
        test = two_sample.mmd_test(x_TF, human_TF, sigma, groups=groups)
        estimates[f"mmd_{space}_p"] = Estimate(test.p, None, None)
        estimates[f"c2st_{space}"] = two_sample.c2st(x_TF, human_TF, groups=groups)
    return estimates


def _frequencies(
    texts: Windows, tokens_T: Sequence[Sequence[str]], human_T: Sequence[Sequence[str]]
) -> dict[str, Estimate]:
    part_T = part_numbers(len(texts), texts.groups)
    parts_T = np.concatenate((part_T, np.full(len(human_T), PARTS)))
    counts_KV = lexical.gram_counts([*tokens_T, *human_T], 1, parts_T)
    own_KV, human_V = counts_KV[:-1], counts_KV[-1]

    def of(index: int) -> Estimate:
        return _without_each(own_KV, lambda c: two_sample.frequency_distances(c, human_V)[index])

    return {"token_l2": of(0), "token_js": of(1)}


def _wording(texts: Windows, tokens_T: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    part_T = part_numbers(len(texts), texts.groups)
    words_KV = lexical.gram_counts([words(text) for text in texts.texts], 1, part_T)
    return {
        "distinct_1": _without_each(words_KV, lexical.distinct),
        "distinct_3": _without_each(lexical.gram_counts(tokens_T, 3, part_T), lexical.distinct),
        "self_bleu": _of_set(texts, lambda at: lexical.self_bleu(_pick(tokens_T, at))),
        "compression": _of_set(texts, lambda at: lexical.compression_ratio(_pick(texts.texts, at))),
        "self_repetition": _of_set(texts, lambda at: lexical.self_repetition(_pick(tokens_T, at))),
        "zipf": _without_each(words_KV, lexical.zipf_slope),
    }


def _without_each(counts_KG: NDArray, statistic: Callable[[NDArray], float]) -> Estimate:
    """The jackknife of a statistic of counts; empty parts are ignored."""
    counts_KG = counts_KG[counts_KG.any(axis=1)]
    total_G = counts_KG.sum(axis=0)
    value = statistic(total_G)
    left_out_K = np.array([statistic(total_G - part_G) for part_G in counts_KG])
    return from_left_out(value, as_if_equal_parts(value, left_out_K, counts_KG.sum(axis=1)))


def _pick(items: Sequence[T], at: NDArray[np.intp]) -> list[T]:
    return [items[int(index)] for index in at]


def _burstiness(texts: Windows) -> Estimate:
    lengths_T = [[len(words(each)) for each in sentences(text)] for text in texts.texts]
    return _of_set(texts, lambda at: lexical.burstiness(np.concatenate(_pick(lengths_T, at))))


def _classes(texts: Windows, cosine_TT: NDArray[np.float64]) -> dict[str, Estimate]:
    """Empty if no prompt has enough answers to compare."""
    kinds = [
        lexical.distinct_k(lexical.classes(_square(cosine_TT, at), SAME_MEANING), LEAST_TEXTS)
        for at in map(np.array, texts.indices_by_prompt().values())
    ]
    if not kinds:
        return {}
    return {"distinct_8": mean(kinds)}


def _square(similarity_TT: NDArray[np.float64], at: NDArray[np.intp]) -> NDArray[np.float64]:
    part_TT = similarity_TT[np.ix_(at, at)].copy()
    np.fill_diagonal(part_TT, 1.0)
    return part_TT
