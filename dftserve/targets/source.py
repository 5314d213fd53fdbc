"""Interfaces of sources, which compute a target distribution for each trained position.

Shapes: T trained positions of a document, R of them in one chunk, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.sparse import Targets, sparsify

CHUNK_ELEMENTS = 1 << 25
"""Elements of one [R, V] chunk: 128 MiB in float32."""


class Source(ABC):
    """Computes the targets of documents."""

    vocabulary: int
    """V: one more than the largest token id that its targets may contain."""
    tail: Literal["sampled", "lumped"] = "sampled"
    """Lumped: the tail's mass is known, but not its distribution."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """A description in JSON types; sources with equal descriptions give equal targets."""

    @abstractmethod
    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        """The targets of each document's trained positions; each document has its own seed."""


Documents = Mapping[str, Sequence[Document]]
"""The documents of a build, by split."""
MakeSource = Callable[[Documents], Source]
"""Makes a build's source in another process."""


class Rows(Protocol):
    """The dense targets of one document."""

    def __call__(self, start: int, stop: int) -> Tensor:
        """ln q, float32 [R, V], for trained positions `start` to `stop`, on any device; the
        probabilities of each row sum to 1."""
        ...


class DenseSource(Source):
    """A source that gives the probability of every token, as combinators require."""

    @abstractmethod
    def read(self, documents: Sequence[Document]) -> list[Rows]:
        """The rows of each document, computed lazily in chunks of [R, V]."""

    def token_logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """ln q of each document's own trained tokens, float64 [T]."""
        each = zip(documents, self.read(documents), strict=True)
        return [self._of_tokens(document, rows) for document, rows in each]

    def _of_tokens(self, document: Document, rows: Rows) -> np.ndarray:
        labels_T = torch.from_numpy(document.labels_T.astype("int64"))
        parts = [np.zeros(0)]
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        for start in range(0, len(labels_T), size):
            logprobs_RV = rows(start, min(start + size, len(labels_T)))
            labels_R1 = labels_T[start : start + size, None].to(logprobs_RV.device)
            parts.append(logprobs_RV.gather(1, labels_R1)[:, 0].double().cpu().numpy())
        return np.concatenate(parts)

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        each = zip(documents, self.read(documents), seeds, strict=True)
        return [self._sparse(*one, k, draws) for one in each]

    def _sparse(self, document: Document, rows: Rows, seed: int, k: int, draws: int) -> Targets:
        """Sparsify on the rows' device, so that only what the store keeps is copied. The random
        generator is the device's, so draws on a GPU differ from those on a CPU."""
        size = max(1, CHUNK_ELEMENTS // self.vocabulary)
        labels_T = torch.from_numpy(document.labels_T.astype("int64"))
        parts, generator = [], None
        for start in range(0, len(labels_T), size):
            logprobs_RV = rows(start, min(start + size, len(labels_T)))
            if generator is None:
                generator = torch.Generator(logprobs_RV.device).manual_seed(seed)
            labels_R = labels_T[start : start + size].to(logprobs_RV.device)
            parts.append(sparsify(logprobs_RV, labels_R, k=k, draws=draws, generator=generator))
        return Targets.concatenate(parts)


@dataclass(frozen=True)
class Adds:
    """Adds the dense targets of one document to a weighted sum."""

    add: Callable[[Tensor, int, Tensor], None]
    """(mass_RV, start, weight_R): adds weight · q of the trained positions from `start` to mass_RV,
    on the tensors' device."""


class AdditiveSource(DenseSource):
    """A source whose rows have a few own tokens and share one distribution for the rest, so that
    adding them to a sum is cheaper than building dense rows."""

    @abstractmethod
    def adds(self, documents: Sequence[Document]) -> list[Adds]:
        """An `Adds` for each document."""

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        return [self._dense_rows(adds) for adds in self.adds(documents)]

    def _dense_rows(self, adds: Adds) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            mass_RV = torch.zeros(stop - start, self.vocabulary)
            adds.add(mass_RV, start, torch.ones(stop - start))
            return mass_RV.log_()

        return rows
