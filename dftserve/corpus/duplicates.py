"""Near-duplicates: texts that share most of their word 5-grams with an earlier one.

MinHash with locality-sensitive hashing (Broder 1997; datasketch), 128 permutations of a fixed seed:
the same texts in the same order always lose the same ones.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np
from datasketch import MinHash, MinHashLSH

from dftserve.corpus.filters import GRAM
from dftserve.corpus.text import UNSPACED

PERMUTATIONS = 128
SEED = 1
WEIGHTS = (0.02, 0.98)
"""Of false and of missed candidates in the tables: the former are compared once more."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
"""Of a script without blanks a character counts as a word, else a clause would."""
_MIX = np.array(
    [0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64 for i in range(GRAM + 1)], dtype=np.uint64
)
"""An odd multiplier for each place of a 5-gram, and one more: the order of its words counts."""


class Duplicates:
    """Remembers the texts that it was shown, and tells which come again."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: Jaccard similarity, in (0, 1]; None: nothing is a duplicate."""
        self._threshold = threshold
        self._kept: dict[str, MinHash] = {}
        self._equal: dict[tuple[str, str], str] = {}
        self._near = None
        if threshold is not None and threshold < 1:
            self._near = MinHashLSH(threshold, PERMUTATIONS, weights=WEIGHTS)

    def of(self, content: str, name: str, *, within: str = "") -> str | None:
        """The name of the earlier text that this is a near-duplicate of.

        Only texts `within` the same count: two answers to one prompt may be duplicates, one answer
        to two prompts is not. Where there is none, the text is remembered under `name`,
        which must be new.
        """
        if self._threshold is None:
            return None
        equal = self._equal.setdefault((within, content), name)
        if equal != name or self._near is None:
            return None if equal == name else equal
        signature = signature_of(content, within)
        near = [str(each) for each in self._near.query(signature)]
        # The tables of the hash let some pairs below the threshold through.
        near = [each for each in near if self._kept[each].jaccard(signature) >= self._threshold]
        if near:
            return min(near)
        self._near.insert(name, signature)
        self._kept[name] = signature
        return None


def shingles(content: str, within: str = "") -> np.ndarray:
    """uint32: a hash of each run of five words, without case and punctuation, with `within`."""
    folded = content.casefold()
    # A text of marks alone is told by these, an empty one by nothing.
    units = _WORD.findall(folded) or folded.split() or [""]
    words_W = np.array([zlib.crc32(unit.encode()) for unit in units], dtype=np.uint64)
    size = min(GRAM, len(words_W))
    grams = np.lib.stride_tricks.sliding_window_view(words_W, size)
    within_1 = np.array([zlib.crc32(within.encode())], dtype=np.uint64)
    hashes = (grams * _MIX[:size]).sum(axis=1) + within_1 * _MIX[-1:]
    # The high half of a product depends on every bit of its factors.
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


class Families:
    """Which texts are copies of one another, changed in some words, also by way of a third."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: Jaccard similarity, in (0, 1); None: each text is a family of its own."""
        self._threshold = threshold
        self._signatures: dict[str, MinHash] = {}
        self._first: list[int] = []
        """Of each text, an earlier one of its family, or itself."""
        self._near = None
        if threshold is not None:
            self._near = MinHashLSH(threshold, PERMUTATIONS, weights=WEIGHTS)

    def add(self, contents: Iterable[str]) -> None:
        """The next text, in pieces."""
        number = len(self._first)
        self._first.append(number)
        if self._near is None or self._threshold is None:
            return
        for piece, content in enumerate(contents):
            signature = signature_of(content)
            for near in map(str, self._near.query(signature)):
                if self._signatures[near].jaccard(signature) >= self._threshold:
                    self._join(number, int(near.split()[0]))
            name = f"{number} {piece}"
            self._near.insert(name, signature)
            self._signatures[name] = signature

    def first(self, number: int) -> int:
        """The first text of the family that a text is of; by their numbers in order."""
        while self._first[number] != number:
            number = self._first[number]
        return number

    def _join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._first[high] = low


def signature_of(content: str, within: str = "") -> MinHash:
    """What similarity is estimated from."""
    signature = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
    signature.update_batch(shingles(content, within))  # type: ignore[arg-type]
    return signature
