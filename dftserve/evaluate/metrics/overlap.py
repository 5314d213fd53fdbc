"""How much wording two texts share: the phrases that they have in common.

    o_ij = ½·|G_i ∩ G_j| / min(|G_i|, |G_j|) + ½·|M_i ∩ M_j| / min(|M_i|, |M_j|)

G: a text's runs of 4 tokens. M: its runs of 6 tokens with every content word masked to `#` and its
last two letters, so that a sentence pattern counts even if its nouns change.
"""

from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dftserve.evaluate.metrics.stylometry import FUNCTION_WORDS
from dftserve.evaluate.text.tokenize import ngrams

PHRASE = 4
PATTERN = 6
"""Words of a phrase (`PHRASE`), and of a sentence pattern, in which words that are no function
words are masked."""
_KNOWN = frozenset(FUNCTION_WORDS)


def ngram_overlap(texts: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """o, float64 [T, T], of tokenised texts; 1 where two texts have the same phrases.

    Two matrices of 8·T² bytes are in memory at once, so T must be limited.
    """
    both_TT = _shared([set(ngrams(list(text), PHRASE)) for text in texts])
    both_TT += _shared([set(ngrams([_masked(t) for t in text], PATTERN)) for text in texts])
    both_TT /= 2
    return both_TT


def _masked(token: str) -> str:
    return token if token in _KNOWN or not token[0].isalnum() else f"#{token[-2:]}"


def _shared(sets: Sequence[Collection[Hashable]]) -> NDArray[np.float64]:
    """|A ∩ B| / min(|A|, |B|) of every pair; 0 if one is empty."""
    columns: dict[Hashable, int] = {}
    rows = [[columns.setdefault(item, len(columns)) for item in each] for each in sets]
    size_T = np.array([len(row) for row in rows], np.int32)
    ends = np.concatenate(([0], np.cumsum(size_T, dtype=np.int64)))
    flat = np.fromiter((column for row in rows for column in row), np.int64, ends[-1])
    has = sparse.csr_matrix(
        (np.ones(len(flat)), flat, ends), shape=(len(sets), max(1, len(columns)))
    )
    shared_TT = (has @ has.T).toarray()
    shared_TT /= np.maximum(1, np.minimum.outer(size_T, size_T))
    return shared_TT
