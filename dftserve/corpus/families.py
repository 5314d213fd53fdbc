"""Groups texts that are partial copies of one another, directly or through other texts.

    families = Families(0.25)
    for text in texts:
        families.add(pieces_of(text))
    families.firsts()           # for each text, the first text of its family

Two texts belong to one family if one of them, or one of its pieces, has enough of its word 5-grams
in the other. This finds an edition with another foreword, an excerpt, an anthology, paragraphs in
another order, and a copy with one word in six changed (all of 287 passages from novels; with one in
five 281, with one in four 125). 5-grams are compared exactly, by sorting them. A corpus with more
than `MOST` of them is compared by a sample, which misses more of the short excerpts.
"""

from collections.abc import Iterable

import numpy as np

from dftserve.corpus.duplicates import shingles

MOST = 1 << 26
"""Most 5-grams in memory: 4 bytes each while collected, 20 to 40 while sorted, and some 70 for each
pair of pieces that share any (at most NEIGHBOURS pairs per 5-gram)."""
NEIGHBOURS = 16
"""A piece is compared with at most this many of the following pieces that contain the same 5-gram.
Texts that share a common phrase are thus linked as a chain, and time stays linear."""
FEWEST = 10
"""Two texts must share at least this many 5-grams, or half of the shorter text's: a run of 14 words
is more than a common saying. Samples need as many, since fewer could all be from one phrase."""
WHOLE = 64
"""Fewest 5-grams that sampling leaves a piece, so that short texts are compared in full. Lower if
these alone would exceed half of `MOST`."""


class Families:
    """Collects texts in order and groups them into families."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: share of the smaller text's 5-grams, in (0, 1); None: only `join` groups."""
        self._threshold = threshold
        self._first: list[int] = []
        """For each text, an earlier one of its family, or itself."""
        self._grams: list[np.ndarray] = []
        """uint32, ascending, for each piece, and for the whole of a text with several pieces. A
        sample keeps the lowest."""
        self._owners: list[int] = []
        self._sizes: list[int] = []
        """All 5-grams of each piece, sampled or not."""
        self._held, self._share = 0, 1.0

    @property
    def share(self) -> float:
        """The share of 5-grams by which long texts are compared: 1 up to `MOST`."""
        return self._share

    def add(self, contents: Iterable[str]) -> None:
        """Add the next text, given in pieces."""
        number = len(self._first)
        self._first.append(number)
        if self._threshold is None:
            return
        pieces = [shingles(content) for content in contents]
        if len(pieces) > 1:
            pieces.append(np.unique(np.concatenate(pieces)))
        self._owners += [number] * len(pieces)
        self._sizes += map(len, pieces)
        pieces = [self._sampled(grams) for grams in pieces]
        self._grams += pieces
        self._held += sum(map(len, pieces))
        while self._held > MOST:
            self._share /= 2
            self._grams = [self._sampled(grams) for grams in self._grams]
            self._held = sum(map(len, self._grams))

    def join(self, one: int, other: int) -> None:
        """Put two texts into one family, whatever they contain."""
        low, high = sorted((self._root(one), self._root(other)))
        self._first[high] = low

    def firsts(self) -> list[int]:
        """For each text, the number of the first text of its family."""
        for one, other in self._similar_pairs():
            self.join(one, other)
        return [self._root(number) for number in range(len(self._first))]

    def _root(self, number: int) -> int:
        while self._first[number] != number:
            number = self._first[number]
        return number

    def _sampled(self, grams: np.ndarray) -> np.ndarray:
        """Those below the limit, but at least the lowest few; the same ones for equal texts."""
        if self._share == 1:
            return grams
        below = int(np.searchsorted(grams, self._share * 2**32))
        fewest = min(WHOLE, MOST // 2 // len(self._sizes))
        # A copy: a slice would keep the whole array in memory.
        return grams[: max(below, fewest)].copy()

    def _similar_pairs(self) -> Iterable[tuple[int, int]]:
        """Pairs of texts that share enough 5-grams."""
        if self._threshold is None or not self._grams:
            return ()
        sizes_P, owners_P = np.array(self._sizes), np.array(self._owners)
        sampled_P = np.array([self._sampled_share(*each) for each in enumerate(self._grams)])
        grams, self._grams = self._grams, []
        pairs_K, shared_K = _shared(grams, owners_P)
        one_K, other_K = np.divmod(pairs_K, len(sizes_P))
        # What both samples contain lies below the lower of their two limits.
        sampled_K = np.minimum(sampled_P[one_K], sampled_P[other_K])
        small_K = np.minimum(sizes_P[one_K], sizes_P[other_K])
        enough_K = np.maximum(self._threshold * small_K, np.minimum(FEWEST, small_K / 2))
        enough_K = np.where(sampled_K < 1, np.maximum(sampled_K * enough_K, FEWEST), enough_K)
        similar_K = shared_K >= enough_K
        one_S, other_S = owners_P[one_K[similar_K]], owners_P[other_K[similar_K]]
        return zip(one_S.tolist(), other_S.tolist(), strict=True)

    def _sampled_share(self, piece: int, grams: np.ndarray) -> float:
        """The share of all possible 5-gram hashes below the limit up to which a piece is
        complete."""
        if len(grams) == self._sizes[piece]:
            return 1.0
        return max(self._share, (int(grams[-1]) + 1) / 2**32) if len(grams) else self._share


def _shared(grams: list[np.ndarray], owners_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pieces of different texts, and how many 5-grams each pair shares.

    A pair is encoded as one number, first · P + second.
    """
    sizes_P = np.array([len(each) for each in grams])
    grams_G = np.concatenate(grams)
    grams.clear()
    order_G = np.argsort(grams_G, kind="stable")
    grams_G = grams_G[order_G]
    pieces_G = np.repeat(np.arange(len(sizes_P), dtype=np.int32), sizes_P)[order_G]
    del order_G
    pairs_K, shared_K = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for step in range(1, min(NEIGHBOURS, len(grams_G) - 1) + 1):
        same = grams_G[step:] == grams_G[:-step]
        one_S, other_S = pieces_G[:-step][same], pieces_G[step:][same]
        # A piece shares everything with the whole of its own text.
        others = owners_P[one_S] != owners_P[other_S]
        found_S = one_S[others].astype(np.int64) * len(sizes_P) + other_S[others]
        pairs_K, shared_K = _with(pairs_K, shared_K, *np.unique(found_S, return_counts=True))
    return pairs_K, shared_K


def _with(
    pairs_K: np.ndarray, shared_K: np.ndarray, more_L: np.ndarray, counts_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two lists of pairs and add their counts; each pair appears once."""
    merged_M, where = np.unique(np.concatenate((pairs_K, more_L)), return_inverse=True)
    counts_M = np.zeros(len(merged_M), dtype=np.int64)
    np.add.at(counts_M, where, np.concatenate((shared_K, counts_L)))
    return merged_M, counts_M
