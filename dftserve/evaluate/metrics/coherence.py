"""A filter for word salad: does the order of the words carry information?

    gain(text) = mean over t of ln p(w_t | w_{t-1}) / p(w_t)

under a bigram model of human text with Witten–Bell smoothing (Witten and Bell 1991). Soup gains
nothing, whatever its words are; a text that diversity metrics adore for its novelty is found out.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class Bigrams:
    """Witten–Bell: p(w|h) = (c(h, w) + n(h)·p(w)) / (c(h) + n(h)), n(h) the number of different
    successors of h; p(w) likewise, over a uniform vocabulary with one place for unknown words."""

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        """From the words of human texts."""
        self._words: Counter[str] = Counter()
        self._pairs: dict[str, Counter[str]] = defaultdict(Counter)
        for said in texts:
            self._words.update(said)
            for first, second in pairwise(said):
                self._pairs[first][second] += 1
        self._after = {first: seconds.total() for first, seconds in self._pairs.items()}
        self._total = self._words.total()

    def gain(self, said: Sequence[str]) -> float:
        """Nats a word; 0 for a text of fewer than two words."""
        pairs = list(pairwise(said))
        if not pairs:
            return 0.0
        return sum(self._pair(first, second) for first, second in pairs) / len(pairs)

    def _pair(self, first: str, second: str) -> float:
        successors = self._pairs.get(first)
        if successors is None:
            return 0.0
        alone = self._alone(second)
        kinds, seen = len(successors), self._after[first]
        return math.log((successors[second] + kinds * alone) / ((seen + kinds) * alone))

    def _alone(self, word: str) -> float:
        kinds = len(self._words)
        return (self._words[word] + kinds / (kinds + 1)) / (self._total + kinds)


PASS = 0.5
"""A text passes with this share of the gain that word order brings in human text."""
LEAST_GAIN = 0.1
"""Nats a word that order must bring: .26 or more in 48 stories of 80 words, below .04 in soup."""


@dataclass(frozen=True)
class CoherenceFilter:
    """The bigram model and the two ends of its scale, in nats a word."""

    bigrams: Bigrams
    human: float
    """The mean gain of human texts that the bigrams were not made from."""
    shuffled: float
    """The same of these texts with their words in random order."""

    @classmethod
    def fit(
        cls, reference: Sequence[Sequence[str]], calibration: Sequence[Sequence[str]], seed: int = 0
    ) -> "CoherenceFilter":
        """From the words of reference texts, and of other human texts.

        Raises:
            ValueError: word order carries no information in these texts.
        """
        bigrams, draw = Bigrams(reference), np.random.default_rng(seed)
        human = float(np.mean([bigrams.gain(said) for said in calibration]))
        soups = [[said[int(i)] for i in draw.permutation(len(said))] for said in calibration]
        shuffled = float(np.mean([bigrams.gain(said) for said in soups]))
        if not human - shuffled > LEAST_GAIN:
            raise ValueError(
                f"human texts: their word order gains {human:.3f} nats a word, shuffled "
                f"{shuffled:.3f}; accepted: prose, and more of it."
            )
        return cls(bigrams, human, shuffled)

    def passes(self, said: Sequence[str]) -> bool:
        """Whether a text counts as coherent; one without words does not."""
        return bool(said) and self.coherence(said) >= PASS

    def coherence(self, said: Sequence[str]) -> float:
        """0 for word soup, about 1 for human text."""
        return (self.bigrams.gain(said) - self.shuffled) / (self.human - self.shuffled)
