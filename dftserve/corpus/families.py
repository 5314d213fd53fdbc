"""Which texts are copies of one another in part, also by way of a third.

    families = Families(0.25)
    for text in texts:
        families.add(pieces_of(text))
    families.firsts()           # of each text the first one of its family

Two texts are of one family where one of them, or one of their pieces, has enough of its word
5-grams in the other: so are an edition with another foreword, an excerpt, an anthology, paragraphs
in another order, a copy with one word in six changed. 5-grams are compared as they are, by sorting
them; a corpus of more than `MOST` is compared by a part of them.
"""

from collections.abc import Iterable

import numpy as np

from dftserve.corpus.duplicates import shingles

MOST = 1 << 26
"""5-grams that are held and sorted, at some 25 bytes each."""
NEIGHBOURS = 16
"""Of all that have a 5-gram, those that each is compared with: the next ones. Where a phrase is in
many texts they are a chain, so that time stays linear."""
FEWEST = 10
"""5-grams that two texts share at least, or half of the shorter one's: a run of 14 words is not a
saying."""


class Families:
    """Texts in their order, and what joins them."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: share of the smaller one's 5-grams, in (0, 1); None: no likeness counts."""
        self._threshold = threshold
        self._first: list[int] = []
        """Of each text an earlier one of its family, or itself."""
        self._grams: list[np.ndarray] = []
        """uint32, of each piece; of a text of several pieces also of the whole."""
        self._owners: list[int] = []
        self._held, self._kept_share = 0, 1.0

    def add(self, contents: Iterable[str]) -> None:
        """The next text, in pieces."""
        number = len(self._first)
        self._first.append(number)
        if self._threshold is None:
            return
        pieces = [self._sampled(shingles(content)) for content in contents]
        if len(pieces) > 1:
            pieces.append(np.unique(np.concatenate(pieces)))
        self._grams += pieces
        self._owners += [number] * len(pieces)
        self._held += sum(map(len, pieces))
        while self._held > MOST:
            self._kept_share /= 2
            self._grams = [self._sampled(grams) for grams in self._grams]
            self._held = sum(map(len, self._grams))

    def join(self, one: int, other: int) -> None:
        """Two texts are of one family, whatever is in them."""
        low, high = sorted((self._root(one), self._root(other)))
        self._first[high] = low

    def firsts(self) -> list[int]:
        """Of each text the first one of its family, by their numbers in order."""
        for one, other in self._alike():
            self.join(one, other)
        self._grams, self._owners = [], []
        return [self._root(number) for number in range(len(self._first))]

    def _root(self, number: int) -> int:
        while self._first[number] != number:
            number = self._first[number]
        return number

    def _sampled(self, grams: np.ndarray) -> np.ndarray:
        return grams[grams < self._kept_share * 2**32]

    def _alike(self) -> Iterable[tuple[int, int]]:
        """Pairs of texts that share enough."""
        if self._threshold is None or not self._grams:
            return ()
        sizes_P = np.array([len(grams) for grams in self._grams])
        pairs_K, shared_K = _shared(self._grams, sizes_P)
        one_K, other_K = np.divmod(pairs_K, len(sizes_P))
        small_K = np.minimum(sizes_P[one_K], sizes_P[other_K])
        fewest_K = np.minimum(FEWEST * self._kept_share, small_K / 2)
        alike_K = shared_K >= np.maximum(self._threshold * small_K, fewest_K)
        owners_P = np.array(self._owners)
        return zip(
            owners_P[one_K[alike_K]].tolist(), owners_P[other_K[alike_K]].tolist(), strict=True
        )


def _shared(grams: list[np.ndarray], sizes_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pieces as one number each, first · P + second, and how many 5-grams they share."""
    grams_G = np.concatenate(grams)
    order_G = np.argsort(grams_G, kind="stable")
    grams_G = grams_G[order_G]
    pieces_G = np.repeat(np.arange(len(sizes_P)), sizes_P)[order_G]
    found = [np.empty(0, dtype=np.int64)]
    for step in range(1, min(NEIGHBOURS, len(grams_G) - 1) + 1):
        same = grams_G[step:] == grams_G[:-step]
        found.append(pieces_G[:-step][same] * len(sizes_P) + pieces_G[step:][same])
    return np.unique(np.concatenate(found), return_counts=True)
