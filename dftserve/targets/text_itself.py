"""The text's own tokens as a source, for plain fine-tuning from a target store.

Shapes: T trained positions of a document.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dftserve.targets.document import Document
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets


class TextItself(Source):
    """Probability 1 for the text's own token: one top entry, and no tail."""

    def __init__(self, *, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "text itself", "vocabulary": self.vocabulary}

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        """Raises ValueError: a k other than 1, or draws."""
        if k != 1 or draws:
            raise ValueError(f"got k {k}, draws {draws}; accepted: 1 and 0.")
        return [_certain(document.labels_T.astype(np.int64)) for document in documents]


def _certain(labels_T: np.ndarray) -> Targets:
    zeros_T = np.zeros(len(labels_T), dtype=np.float32)
    return Targets(
        top_ids_TK=labels_T[:, None],
        top_logprobs_TK=zeros_T[:, None],
        tail_ids_TM=np.zeros((len(labels_T), 0), dtype=np.int64),
        tail_logprob_T=np.full(len(labels_T), -np.inf, dtype=np.float32),
        token_logprob_T=zeros_T,
        entropy_T=zeros_T,
    )
