"""A filter for word salad: does the order of the words carry information?

    gain(text) = mean over t of ln p(w_t | w_{t-1}) / p(w_t)

under a bigram model of human text with Witten–Bell smoothing (Witten and Bell 1991). Word salad
gains nothing, whatever its words are, although diversity metrics rate it highly for its novelty.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class Bigrams:
    """Witten–Bell: p(w|h) = (c(h, w) + n(h)·p(w)) / (c(h) + n(h)), n(h) the number of different
    successors of h; p(w) likewise, over a uniform vocabulary with one entry for unknown words."""

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        """Fit on the words of human texts."""
        self._words: Counter[str] = Counter()
        self._pairs: dict[str, Counter[str]] = defaultdict(Counter)
        for words in texts:
            self._words.update(words)
            for first, second in pairwise(words):
                self._pairs[first][second] += 1
        self._after = {first: seconds.total() for first, seconds in self._pairs.items()}
        self._total = self._words.total()

    def gain(self, words: Sequence[str]) -> float:
        """In nats per word; 0 for a text of fewer than two words."""
        pairs = list(pairwise(words))
        if not pairs:
            return 0.0
        return sum(self._pair_gain(first, second) for first, second in pairs) / len(pairs)

    def _pair_gain(self, first: str, second: str) -> float:
        successors = self._pairs.get(first)
        if successors is None:
            return 0.0
        unigram = self._unigram(second)
        kinds, seen = len(successors), self._after[first]
        return math.log((successors[second] + kinds * unigram) / ((seen + kinds) * unigram))

    def _unigram(self, word: str) -> float:
        kinds = len(self._words)
        return (self._words[word] + kinds / (kinds + 1)) / (self._total + kinds)


PASS = 0.5
"""A text passes with this share of the gain that word order brings in human text."""
LEAST_GAIN = 0.1
"""Minimum gain of human text over shuffled text, in nats per word: .26 or more in 48 stories of 80
words, below .04 in word salad."""


@dataclass(frozen=True)
class CoherenceFilter:
    """The bigram model and the two ends of its scale, in nats per word."""

    bigrams: Bigrams
    human: float
    """The mean gain of human texts that the bigrams were not fitted on."""
    shuffled: float
    """The mean gain of the same texts with their words shuffled."""

    @classmethod
    def fit(
        cls, reference: Sequence[Sequence[str]], calibration: Sequence[Sequence[str]], seed: int = 0
    ) -> "CoherenceFilter":
        """Fit bigrams on the words of reference texts, and the scale on other human texts.

        Raises:
            ValueError: word order carries no information in these texts.
        """
        bigrams, draw = Bigrams(reference), np.random.default_rng(seed)
        human = float(np.mean([bigrams.gain(words) for words in calibration]))
        soups = [[words[int(i)] for i in draw.permutation(len(words))] for words in calibration]
        shuffled = float(np.mean([bigrams.gain(words) for words in soups]))
        if not human - shuffled > LEAST_GAIN:
            raise ValueError(
                f"human texts: their word order gains {human:.3f} nats a word, shuffled "
                f"{shuffled:.3f}; accepted: prose, and more of it."
            )
        return cls(bigrams, human, shuffled)

    def passes(self, words: Sequence[str]) -> bool:
        """Whether a text counts as coherent; one without words does not."""
        return bool(words) and self.coherence(words) >= PASS

    def coherence(self, words: Sequence[str]) -> float:
        """0 for word salad, about 1 for human text."""
        return (self.bigrams.gain(words) - self.shuffled) / (self.human - self.shuffled)
