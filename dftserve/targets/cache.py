"""A cache model as a source: words that occurred recently in the document are likely again.

    source = Cache(decay=0.98, vocabulary=len(tokenizer))

Counts the tokens of the document so far; the weight of a token decays by the factor `decay` with
every token after it (Kuhn and De Mori 1990; used with its own weight in a mixture, as by Grave et
al. 2017):

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
"""Tokens whose weight has decayed below this are not counted."""
_NONE = np.zeros(0, dtype=np.int64)


class Cache(AdditiveSource):
    """Uses all tokens before a position, of prompt and answer. Tokens that have not occurred in the
    document have the log-probability −inf, so this is only useful as a component of a mixture."""

    def __init__(self, *, decay: float, vocabulary: int) -> None:
        """Raises ValueError: a decay outside (0, 1)."""
        if not 0 < decay < 1:
            raise ValueError(f"decay: got {decay}; accepted: above 0, below 1.")
        self.decay, self.vocabulary = decay, vocabulary
        self._reach = math.ceil(math.log(FORGOTTEN) / math.log(decay))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "cache", "decay": self.decay, "vocabulary": self.vocabulary}

    def adds(self, documents: Sequence[Document]) -> list[Adds]:
        return [self._adds(document) for document in documents]

    def token_logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Computed without building dense rows."""
        return [self._of_own_tokens(document) for document in documents]

    def _of_own_tokens(self, document: Document) -> np.ndarray:
        mass_T = np.zeros(document.trained)
        for row, position in enumerate(document.positions_T.tolist()):
            before, weight = self._before(document, position)
            mass_T[row] = weight[before == document.tokens_N[position]].sum()
        with np.errstate(divide="ignore"):
            return np.log(mass_T)

    def _adds(self, document: Document) -> Adds:
        def add(mass_RV: Tensor, start: int, weight_R: Tensor) -> None:
            positions = document.positions_T[start : start + len(mass_RV)].tolist()
            summed = [self._summed(document, position) for position in positions]
            row_E = np.repeat(np.arange(len(summed)), [len(tokens) for tokens, _ in summed])
            tokens = np.concatenate([_NONE, *(tokens for tokens, _ in summed)])
            share_E = torch.from_numpy(np.concatenate([[], *(share for _, share in summed)]))
            at = tuple(torch.from_numpy(each).to(mass_RV.device) for each in (row_E, tokens))
            mass_RV[at] += share_E.float().to(mass_RV.device) * weight_R[at[0]]

        return Adds(add)

    def _summed(self, document: Document, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct tokens before a position, and the probability of each."""
        before, weight = self._before(document, position)
        tokens, which = np.unique(before, return_inverse=True)
        return tokens.astype(np.int64), np.bincount(which, weight)

    def _before(self, document: Document, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before a position, nearest first, and the weight of each; weights sum to 1."""
        before = document.tokens_N[max(position - self._reach, 0) : position][::-1]
        weight = self.decay ** np.arange(len(before))
        return before, weight / weight.sum()
