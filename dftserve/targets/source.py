"""What a target comes from: anything that says, for each trained position, what may stand there.

Shapes: T trained positions of a document, R of them in one chunk, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.sparse import Targets, sparsify

CHUNK_ELEMENTS = 1 << 25
"""Elements of one [R, V] chunk: 128 MiB in float32."""


class Source(ABC):
    """Gives the targets of documents."""

    vocabulary: int
    """V: one more than the largest token id that it may name."""
    tail: Literal["sampled", "lumped"] = "sampled"
    """Lumped: the tail's mass is known and nothing of what is in it."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """What it is, in JSON: two sources of equal descriptions give equal targets."""

    @abstractmethod
    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        """The targets of each document's trained positions, drawn by a seed of its own."""


class Rows(Protocol):
    """The dense targets of one document."""

    def __call__(self, start: int, stop: int) -> Tensor:
        """ln q, float32 [R, V], for trained positions `start` to `stop`; each row sums to 1."""
        ...


class DenseSource(Source):
    """A source that knows the probability of every token: what combinators can work on."""

    @abstractmethod
    def read(self, documents: Sequence[Document]) -> list[Rows]:
        """The rows of each document, computed when asked for: [R, V] is made chunk by chunk."""

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        found = []
        for document, rows, seed in zip(documents, self.read(documents), seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            labels_T = torch.from_numpy(document.labels_T.astype("int64"))
            parts = [
                sparsify(
                    rows(start, min(start + size, len(labels_T))),
                    labels_T[start : start + size],
                    k=k,
                    draws=draws,
                    generator=generator,
                )
                for start in range(0, len(labels_T), size)
            ]
            found.append(Targets.joined(parts))
        return found
