"""How much two texts share in wording: the phrases that come back from text to text.

    o_ij = ½·|G_i ∩ G_j| / min(|G_i|, |G_j|) + ½·|M_i ∩ M_j| / min(|M_i|, |M_j|)

G: a text's runs of 4 tokens. M: its runs of 6 tokens with every content word masked to `#` and its
last two letters, so that a sentence pattern counts though its nouns change.
"""

from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dftserve.evaluate.metrics.stylometry import FUNCTION_WORDS
from dftserve.evaluate.text.tokenize import ngrams

PHRASE = 4
PATTERN = 6
_KNOWN = frozenset(FUNCTION_WORDS)


def ngram_overlap(texts: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """o, float64 [T, T], of tokenised texts; 1 where two texts have the same phrases.

    Two matrices of 8·T² bytes are held at once: bound T.
    """
    both_TT = _shared([set(ngrams(list(said), PHRASE)) for said in texts])
    both_TT += _shared([set(ngrams([_masked(t) for t in said], PATTERN)) for said in texts])
    both_TT /= 2
    return both_TT


def _masked(token: str) -> str:
    return token if token in _KNOWN or not token[0].isalnum() else f"#{token[-2:]}"


def _shared(sets: Sequence[Collection[Hashable]]) -> NDArray[np.float64]:
    """|A ∩ B| / min(|A|, |B|) of every pair; 0 where one is empty."""
    columns: dict[Hashable, int] = {}
    places = [[columns.setdefault(item, len(columns)) for item in each] for each in sets]
    size_T = np.array([len(each) for each in places], np.int32)
    ends = np.concatenate(([0], np.cumsum(size_T, dtype=np.int64)))
    flat = np.fromiter((place for each in places for place in each), np.int64, ends[-1])
    has = sparse.csr_matrix(
        (np.ones(len(flat)), flat, ends), shape=(len(sets), max(1, len(columns)))
    )
    shared_TT = (has @ has.T).toarray()
    shared_TT /= np.maximum(1, np.minimum.outer(size_T, size_T))
    return shared_TT
