"""Near-duplicates: texts that share most of their word 5-grams with an earlier one.

MinHash with locality-sensitive hashing (Broder 1997; datasketch), with 128 permutations and a fixed
seed: the same texts in the same order always give the same duplicates.
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
"""Of the MinHashes of a text, whose number is `PERMUTATIONS`: fixed, so that a corpus is always
split alike."""
WEIGHTS = (0.02, 0.98)
"""Costs of false and of missed candidates when the tables are tuned. False ones cost less, since
every candidate is compared again."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""Excludes the underscores of emphasis. In a script without spaces each character counts as a
word; otherwise a whole clause would."""
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufe00-\ufe0f\ufeff]"
)
"""Soft hyphens, joiners, direction marks and the like."""
_MIX = np.array(
    [0x9E3779B97F4A7C15 * (2 * i + 1) % 2**64 for i in range(GRAM + 1)], dtype=np.uint64
)
"""An odd multiplier for each position in a 5-gram, so that word order matters, and one for
`within`."""


class Duplicates:
    """Remembers the texts it has been given, and finds repetitions of them."""

    def __init__(self, threshold: float | None) -> None:
        """threshold: Jaccard similarity, in (0, 1]; with None nothing is a duplicate."""
        self._threshold = threshold
        self._kept: dict[str, MinHash] = {}
        self._equal: dict[tuple[str, str], str] = {}
        self._near = None
        if threshold is not None and threshold < 1:
            self._near = MinHashLSH(threshold, PERMUTATIONS, weights=WEIGHTS)

    def of(self, content: str, name: str, *, within: str = "") -> str | None:
        """The name of the earlier text of which this one is a near-duplicate, or None.

        Only texts with the same `within` are compared: two answers to one prompt may be duplicates,
        the same answer to two prompts is not. A text that is no duplicate is remembered under
        `name`, which must be new.
        """
        if self._threshold is None:
            return None
        equal = self._equal.setdefault((within, content), name)
        if equal != name or self._near is None:
            return None if equal == name else equal
        signature = signature_of(content, within)
        near = [str(each) for each in self._near.query(signature)]
        # The hash tables also return some pairs below the threshold.
        near = [each for each in near if self._kept[each].jaccard(signature) >= self._threshold]
        if near:
            # Not inserted; later texts equal to this one resolve to the same earlier text.
            self._equal[within, content] = min(near)
            return min(near)
        self._near.insert(name, signature)
        self._kept[name] = signature
        return None


def shingles(content: str, within: str = "") -> np.ndarray:
    """uint32: hashes of the runs of five words, each combined with `within`.

    Case, punctuation, invisible characters and Unicode composition make no difference.
    """
    folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", content)).casefold()
    # A text of punctuation alone is split at whitespace; an empty one is one empty unit.
    units = _WORD.findall(folded) or folded.split() or [""]
    words_W = np.array([zlib.crc32(unit.encode()) for unit in units], dtype=np.uint64)
    size = min(GRAM, len(words_W))
    grams = np.lib.stride_tricks.sliding_window_view(words_W, size)
    within_1 = np.array([zlib.crc32(within.encode())], dtype=np.uint64)
    hashes = (grams * _MIX[:size]).sum(axis=1) + within_1 * _MIX[-1:]
    # The high half of a product depends on every bit of its factors.
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def signature_of(content: str, within: str = "") -> MinHash:
    """The MinHash from which similarity is estimated."""
    signature = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=int)
    signature.update_batch(shingles(content, within))  # type: ignore[arg-type]
    return signature
