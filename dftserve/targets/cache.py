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
from dftserve.targets.source import DenseSource, Rows

FORGOTTEN = 1e-4
"""A token worth less than this is no longer counted."""


class Cache(DenseSource):
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

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        return [self._rows(document) for document in documents]

    def token_logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """No row is made dense."""
        return [self._of_own_tokens(document) for document in documents]

    def _of_own_tokens(self, document: Document) -> np.ndarray:
        mass_T = np.zeros(len(document.positions_T))
        for row, place in enumerate(document.positions_T.tolist()):
            before, worth = self._before(document, place)
            mass_T[row] = worth[before == document.tokens_N[place]].sum()
        with np.errstate(divide="ignore"):
            return np.log(mass_T)

    def _rows(self, document: Document) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            dense_RV = np.zeros((stop - start, self.vocabulary), dtype=np.float32)
            for row, place in enumerate(document.positions_T[start:stop].tolist()):
                before, worth = self._before(document, place)
                np.add.at(dense_RV[row], before, worth.astype(np.float32))
            with np.errstate(divide="ignore"):
                return torch.from_numpy(np.log(dense_RV, out=dense_RV))

        return rows

    def _before(self, document: Document, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before a position, the nearest first, and the share of each."""
        before = document.tokens_N[max(place - self._reach, 0) : place][::-1]
        worth = self.decay ** np.arange(len(before))
        return before, worth / worth.sum()
