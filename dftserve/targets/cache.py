"""A document's own words as a source: what it said a while ago it says again.

    source = Cache(decay=0.98, vocabulary=len(tokenizer))

Counts of the document so far, each token's worth falling by `decay` with every token after it
(Kuhn and De Mori 1990; with a weight of its own in a mixture, as Grave et al. 2017 use theirs):

    p(w | x_<t) ∝ Σ_{s<t} decay^(t−1−s) · [x_s = w]

Shapes: T trained positions of a document, R of them in one chunk, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.source import AdditiveSource, Adds

FORGOTTEN = 1e-4
"""A token worth less than this is no longer counted."""
_NONE = np.zeros(0, dtype=np.int64)


class Cache(AdditiveSource):
    """Reads the tokens before a position, prompt and answer alike, and nothing behind it. Words
    that the document has not said have the log-probability −inf: a component of a mixture."""

    def __init__(self, *, decay: float, vocabulary: int) -> None:
        """Raises ValueError: a decay that is not above 0 and below 1."""
        if not 0 < decay < 1:
            raise ValueError(f"decay: got {decay}; accepted: above 0, below 1.")
        self.decay, self.vocabulary = decay, vocabulary
        self._reach = math.ceil(math.log(FORGOTTEN) / math.log(decay))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "cache", "decay": self.decay, "vocabulary": self.vocabulary}

    def adds(self, documents: Sequence[Document]) -> list[Adds]:
        return [self._adds(document) for document in documents]

    def token_logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """No row is made dense."""
        return [self._of_own_tokens(document) for document in documents]

    def _of_own_tokens(self, document: Document) -> np.ndarray:
        mass_T = np.zeros(document.trained)
        for row, place in enumerate(document.positions_T.tolist()):
            before, worth = self._before(document, place)
            mass_T[row] = worth[before == document.tokens_N[place]].sum()
        with np.errstate(divide="ignore"):
            return np.log(mass_T)

    def _adds(self, document: Document) -> Adds:
        def add(mass_RV: Tensor, start: int, weight_R: Tensor) -> None:
            places = document.positions_T[start : start + len(mass_RV)].tolist()
            summed = [self._summed(document, place) for place in places]
            row_E = np.repeat(np.arange(len(summed)), [len(tokens) for tokens, _ in summed])
            tokens = np.concatenate([_NONE, *(tokens for tokens, _ in summed)])
            share_E = torch.from_numpy(np.concatenate([[], *(share for _, share in summed)]))
            at = tuple(torch.from_numpy(each).to(mass_RV.device) for each in (row_E, tokens))
            mass_RV[at] += share_E.float().to(mass_RV.device) * weight_R[at[0]]

        return Adds(add)

    def _summed(self, document: Document, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The different tokens before a position, and the share of each."""
        before, worth = self._before(document, place)
        tokens, which = np.unique(before, return_inverse=True)
        return tokens.astype(np.int64), np.bincount(which, worth)

    def _before(self, document: Document, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before a position, the nearest first, and the share of each."""
        before = document.tokens_N[max(place - self._reach, 0) : place][::-1]
        worth = self.decay ** np.arange(len(before))
        return before, worth / worth.sum()
