"""Which texts are copies of one another in part, also by way of a third.

    families = Families(0.25)
    for text in texts:
        families.add(pieces_of(text))
    families.firsts()           # of each text the first one of its family

Two texts are of one family where one of them, or one of their pieces, has enough of its word
5-grams in the other: so are an edition with another foreword, an excerpt, an anthology, paragraphs
in another order, a copy with one word in six changed (all of 287 passages from novels; one in five:
281; one in four: 125). 5-grams are compared as they are, by sorting them; a corpus of more than
`MOST` is compared by a part of them, and finds fewer of the excerpts that are short.
"""

from collections.abc import Iterable

import numpy as np

from dftserve.corpus.duplicates import shingles

MOST = 1 << 26
"""5-grams that are held and sorted: 4 bytes each until then, 20 to 40 while they are, and some 70
for each pair of pieces that share any (at most NEIGHBOURS pairs a 5-gram)."""
NEIGHBOURS = 16
"""Of all that have a 5-gram, those that each is compared with: the next ones. Where a phrase is in
many texts they are a chain, so that time stays linear."""
FEWEST = 10
"""5-grams that two texts share at least, or half of the shorter one's: a run of 14 words is not a
saying. Of a sample as many, since fewer of it may all be of one phrase."""
WHOLE = 64
"""5-grams of a piece that a sample leaves it, so that short texts are compared by all they have.
Fewer where these alone would be half of `MOST`."""


class Families:
    """Texts in their order, and what joins them."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: share of the smaller one's 5-grams, in (0, 1); None: no likeness counts."""
        self._threshold = threshold
        self._first: list[int] = []
        """Of each text an earlier one of its family, or itself."""
        self._grams: list[np.ndarray] = []
        """uint32, ascending, of each piece; of a text of several pieces also of the whole. Of each
        the lowest ones are held."""
        self._owners: list[int] = []
        self._sizes: list[int] = []
        """5-grams of each piece, held or not."""
        self._held, self._share = 0, 1.0

    @property
    def share(self) -> float:
        """Of the 5-grams, the part by which long texts are compared: 1 up to `MOST`."""
        return self._share

    def add(self, contents: Iterable[str]) -> None:
        """The next text, in pieces."""
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
        """Two texts are of one family, whatever is in them."""
        low, high = sorted((self._root(one), self._root(other)))
        self._first[high] = low

    def firsts(self) -> list[int]:
        """Of each text the first one of its family, by their numbers in order."""
        for one, other in self._alike():
            self.join(one, other)
        return [self._root(number) for number in range(len(self._first))]

    def _root(self, number: int) -> int:
        while self._first[number] != number:
            number = self._first[number]
        return number

    def _sampled(self, grams: np.ndarray) -> np.ndarray:
        """Those below the limit, and the lowest ones at least: of equal texts the same ones."""
        if self._share == 1:
            return grams
        below = int(np.searchsorted(grams, self._share * 2**32))
        fewest = min(WHOLE, MOST // 2 // len(self._sizes))
        # A copy: a part would hold all of it in memory.
        return grams[: max(below, fewest)].copy()

    def _alike(self) -> Iterable[tuple[int, int]]:
        """Pairs of texts that share enough."""
        if self._threshold is None or not self._grams:
            return ()
        sizes_P, owners_P = np.array(self._sizes), np.array(self._owners)
        sampled_P = np.array([self._sampled_share(*each) for each in enumerate(self._grams)])
        grams, self._grams = self._grams, []
        pairs_K, shared_K = _shared(grams, owners_P)
        one_K, other_K = np.divmod(pairs_K, len(sizes_P))
        # What both hold is below the lower limit of the two.
        sampled_K = np.minimum(sampled_P[one_K], sampled_P[other_K])
        small_K = np.minimum(sizes_P[one_K], sizes_P[other_K])
        enough_K = np.maximum(self._threshold * small_K, np.minimum(FEWEST, small_K / 2))
        enough_K = np.where(sampled_K < 1, np.maximum(sampled_K * enough_K, FEWEST), enough_K)
        alike_K = shared_K >= enough_K
        return zip(
            owners_P[one_K[alike_K]].tolist(), owners_P[other_K[alike_K]].tolist(), strict=True
        )

    def _sampled_share(self, piece: int, grams: np.ndarray) -> float:
        """The share of all 5-grams that are below the limit up to which a piece holds its own."""
        if len(grams) == self._sizes[piece]:
            return 1.0
        return max(self._share, (int(grams[-1]) + 1) / 2**32) if len(grams) else self._share


def _shared(grams: list[np.ndarray], owners_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of pieces of different texts, and how many 5-grams they share.

    A pair is one number, first · P + second.
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
        # A text of several pieces shares everything with its own whole.
        others = owners_P[one_S] != owners_P[other_S]
        found_S = one_S[others].astype(np.int64) * len(sizes_P) + other_S[others]
        pairs_K, shared_K = _with(pairs_K, shared_K, *np.unique(found_S, return_counts=True))
    return pairs_K, shared_K


def _with(
    pairs_K: np.ndarray, shared_K: np.ndarray, more_L: np.ndarray, counts_L: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with their counts, and more pairs with theirs, each pair once."""
    merged_M, where = np.unique(np.concatenate((pairs_K, more_L)), return_inverse=True)
    counts_M = np.zeros(len(merged_M), dtype=np.int64)
    np.add.at(counts_M, where, np.concatenate((shared_K, counts_L)))
    return merged_M, counts_M
