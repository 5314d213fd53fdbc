"""Near-duplicates: texts that share most of their word 5-grams with an earlier one.

MinHash with locality-sensitive hashing (Broder 1997; datasketch), 128 permutations of a fixed seed:
the same texts in the same order always lose the same ones.
"""

import re
import unicodedata
import zlib

import numpy as np
from datasketch import MinHash, MinHashLSH

from dftserve.corpus.filters import GRAM
from dftserve.corpus.text import UNSPACED

PERMUTATIONS = 128
SEED = 1
WEIGHTS = (0.02, 0.98)
"""Of false and of missed candidates in the tables: the former are compared once more."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""Without the underscores of emphasis. In a script without blanks a character counts as a word,
else a clause would."""
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufe00-\ufe0f\ufeff]"
)
"""Soft hyphens, joiners, marks of direction and the like."""
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
            # What equals this one later on is like that one too: this one is not remembered.
            self._equal[within, content] = min(near)
            return min(near)
        self._near.insert(name, signature)
        self._kept[name] = signature
        return None


def shingles(content: str, within: str = "") -> np.ndarray:
    """uint32: a hash of each run of five words, without case and punctuation, with `within`.

    However its characters are composed, and whatever stands invisible between them.
    """
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", content)).casefold()
    # A text of marks alone is told by these, an empty one by nothing.
    units = _WORD.findall(folded) or folded.split() or [""]
    words_W = np.array([zlib.crc32(unit.encode()) for unit in units], dtype=np.uint64)
    size = min(GRAM, len(words_W))
    grams = np.lib.stride_tricks.sliding_window_view(words_W, size)
    within_1 = np.array([zlib.crc32(within.encode())], dtype=np.uint64)
    hashes = (grams * _MIX[:size]).sum(axis=1) + within_1 * _MIX[-1:]
    # The high half of a product depends on every bit of its factors.
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def signature_of(content: str, within: str = "") -> MinHash:
    """What similarity is estimated from."""
    signature = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
    signature.update_batch(shingles(content, within))  # type: ignore[arg-type]
    return signature
