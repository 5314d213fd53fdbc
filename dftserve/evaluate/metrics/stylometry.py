"""Stylometric features of a text, independent of its topic, and the space they are compared in.

Shares of English function words and punctuation marks, lengths of sentences and words, richness of
the vocabulary, endings, contractions, capitals, digits, paragraphs. Shares enter as
√(100·count/words), which makes the noise of a count nearly the same for frequent and rare ones
(Anscombe 1948).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.metrics.two_sample import median_distance
from dftserve.evaluate.text.tokenize import paragraphs, sentences, tokens, words
from dftserve.evaluate.text.windows import Windows

_ENGLISH = """
the a an this that these those some any no every each all both either neither another other such
i me my mine myself you your yours he him his himself she her hers herself it its itself we us our
they them their themselves who whom whose which what someone something nothing everything one
and but or nor so yet for if because although though while when where until unless since as than
whether before after once
of in to with at by from on into onto over under about through between against during without
within upon around behind beside beyond across toward towards down up out off
be am is are was were been being have has had having do does did will would shall should can
could may might must
not never always often sometimes perhaps very too quite rather almost just only even still
already again also more most much many little few less here there now then how why yes oh well
however
"""
FUNCTION_WORDS = tuple(_ENGLISH.split())
MARKS = (".", ",", ";", ":", "!", "?", '"', "(", "—", "-", "...")
SUFFIXES = ("ly", "ing", "ed", "tion", "ness", "ful", "ous")
LENGTHS = ((1, 3), (4, 6), (7, 9), (10, 99))
NAMES = (
    *(f"word {word}" for word in FUNCTION_WORDS),
    *(f"mark {mark}" for mark in MARKS),
    *(f"suffix -{suffix}" for suffix in SUFFIXES),
    *(f"words of {low} to {high}" for low, high in LENGTHS),
    "contractions",
    "capitals",
    "digits",
    "paragraphs",
    "sentence length",
    "sentence length spread",
    "distinct words",
    "words said once",
)
_CAPITAL = re.compile(r"[A-Z]")
_DIGIT = re.compile(r"\d")
_CONTRACTION = re.compile(r".*(?:n't|'(?:s|m|re|ve|ll|d|em))$")


def features(texts: Sequence[str]) -> NDArray[np.float64]:
    """float64 [T, F] of normalised texts, F = len(NAMES); a text without words is all zeros.

    The distinct words depend on the length of a text: compare texts of equal length.
    """
    return np.array([_features(text) for text in texts]).reshape(len(texts), len(NAMES))


def function_share(texts: Sequence[str]) -> float:
    """The share of words that are English function words: .4 to .6 in English prose."""
    function_words = set(FUNCTION_WORDS)
    all_words = [word for text in texts for word in words(text)]
    return sum(word in function_words for word in all_words) / max(1, len(all_words))


@lru_cache(maxsize=8192)
def _features(text: str) -> NDArray[np.float64]:
    """Cached, because the same human texts are compared with several sets of texts."""
    text_words = words(text)
    if not text_words:
        return np.zeros(len(NAMES))
    counts = Counter(text_words)
    kinds = counts.items()
    marks = Counter(tokens(text))
    counted = [
        *(counts[word] for word in FUNCTION_WORDS),
        *(marks[mark] for mark in MARKS),
        *(sum(n for word, n in kinds if word.endswith(suffix)) for suffix in SUFFIXES),
        *(sum(n for word, n in kinds if low <= len(word) <= high) for low, high in LENGTHS),
        sum(n for word, n in kinds if "'" in word and _CONTRACTION.match(word)),
        len(_CAPITAL.findall(text)),
        len(_DIGIT.findall(text)),
        len(paragraphs(text)) - 1,
    ]
    sentence_lengths = np.array([len(words(each)) for each in sentences(text)] or [0])
    return np.array(
        [
            *np.sqrt(100 * np.array(counted) / len(text_words)),
            np.log1p(sentence_lengths.mean()),
            np.log1p(sentence_lengths.std()),
            len(counts) / len(text_words),
            sum(count == 1 for count in counts.values()) / len(text_words),
        ]
    )


@dataclass(frozen=True)
class Scale:
    """Mean, spread and reliability of each style feature in human text.

    mean_F, spread_F: float64, of half windows of the reference texts.
    reliability_F: float64 in [0, 1], the covariance of the two halves of a text after
        standardisation; 0 for a feature that does not vary in human texts.
    """

    mean_F: NDArray[np.float64]
    spread_F: NDArray[np.float64]
    reliability_F: NDArray[np.float64]

    @classmethod
    def fit(cls, first_TF: NDArray[np.float64], second_TF: NDArray[np.float64]) -> "Scale":
        """Fit on the features of the two halves of each reference text."""
        both_NF = np.concatenate((first_TF, second_TF))
        mean_F = both_NF.mean(axis=0)
        # For a constant feature, std can be a rounding error instead of 0.
        spread_F = np.where(np.ptp(both_NF, axis=0) > 0, both_NF.std(axis=0), 0.0)
        scale = cls(mean_F, spread_F, np.ones_like(mean_F))
        first_TF, second_TF = scale.z(first_TF), scale.z(second_TF)
        agreement_F = (first_TF * second_TF).mean(axis=0) - first_TF.mean(0) * second_TF.mean(0)
        reliability_F = np.clip(agreement_F * len(first_TF) / (len(first_TF) - 1), 0.0, 1.0)
        return cls(mean_F, spread_F, np.where(spread_F > 0, reliability_F, 0.0))

    def z(self, features_TF: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standardised features, clipped to ±3; 0 where human texts do not vary at all."""
        z_TF = np.clip((features_TF - self.mean_F) / (self.spread_F + 0.001), -3.0, 3.0)
        return np.where(self.spread_F > 0, z_TF, 0.0)


@dataclass(frozen=True)
class StyleSpace:
    """Standardised style features of whole windows, fitted on human text and then frozen, so that
    every system is measured in the same space.

    scale: of whole windows; its reliabilities are all 1, as halves are not compared.
    sigma: the median distance between two human texts, the kernel width of `two_sample.mmd2`.
    words: the length L of the windows.
    """

    scale: Scale
    sigma: float
    words: int

    @classmethod
    def fit(cls, reference: Windows) -> "StyleSpace":
        """Fit the space on human texts.

        Raises:
            ValueError: fewer than two that are long enough, or all have the same features.
        """
        features_TF = features(reference.whole().texts)
        if len(features_TF) < 2:
            raise ValueError(
                f"human texts: got {len(features_TF)} of {reference.words} words; accepted: at "
                "least 2."
            )
        ones_F = np.ones(features_TF.shape[1])
        scale = Scale(features_TF.mean(axis=0), features_TF.std(axis=0), ones_F)
        return cls(scale, median_distance(scale.z(features_TF)), reference.words)

    def features(self, texts: Windows) -> NDArray[np.float64]:
        """z, float64 [T, F], clipped to ±3, of the T texts that are long enough.

        Raises:
            ValueError: windows of another length.
        """
        if texts.words != self.words:
            raise ValueError(
                f"windows: got {texts.words} words; accepted: {self.words}, as the human texts."
            )
        return self.scale.z(features(texts.whole().texts))
