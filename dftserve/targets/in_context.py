"""A teacher that reads other documents of the corpus before each document.

    source = InContext(teacher, documents, number=3, tokens=768)

The other documents are drawn with the document's digest as seed, so they are the same in every
build. They never include the document itself, a copy of it or a piece of the same text.

Shapes: N tokens of a document, T trained positions, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from blake3 import blake3
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows
from dftserve.targets.store import batches_of
from dftserve.targets.teacher import Teacher

DRAWS_EACH = 32
"""Draws per context document: some hit the document itself, or one that was drawn already."""


class InContext(DenseSource):
    """A teacher's predictions with `number` documents of the corpus put before each document."""

    def __init__(
        self, teacher: Teacher, corpus: Sequence[Document], *, number: int, tokens: int
    ) -> None:
        """
        Args:
            corpus: the documents to draw from.
            number: most documents put before each.
            tokens: most tokens of these together; fewer if the model's context is too short. The
                last of them is truncated.

        Raises:
            ValueError: no corpus, or a number or tokens below 1.
        """
        if not corpus:
            raise ValueError("got no documents to put in the context; accepted: a corpus.")
        if number < 1 or tokens < 1:
            raise ValueError(f"got number {number}, tokens {tokens}; accepted: 1 or more.")
        self.vocabulary = teacher.vocabulary
        self._teacher, self._corpus = teacher, corpus
        self._number, self._tokens = number, tokens
        self._digests = [document.tokens_digest for document in corpus]

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "in_context",
            "teacher": self._teacher.describe(),
            "corpus_blake3": blake3(b"".join(sorted(self._digests))).hexdigest(),
            "documents": self._number,
            "tokens": self._tokens,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        opened = [self._with_context(document) for document in documents]
        states: dict[int, Tensor] = {}
        for indices in batches_of(opened):
            some = [opened[index] for index in indices]
            read = self._teacher.states(
                [each.tokens_N for each in some], [each.positions_T for each in some]
            )
            states |= zip(indices, read, strict=True)
        return [self._rows(states[index]) for index in range(len(documents))]

    def _rows(self, states_TD: Tensor) -> Rows:
        return lambda start, stop: self._teacher.logprobs(states_TD[start:stop])

    def _with_context(self, document: Document) -> Document:
        """The document with its context documents before it; nothing in these is trained."""
        before_N = self.before(document)
        return Document(
            np.concatenate([before_N, document.tokens_N]),
            np.concatenate([np.zeros(len(before_N), dtype=bool), document.trained_N]),
        )

    def before(self, document: Document) -> np.ndarray:
        """int32: the context tokens put before a document."""
        room = self._tokens
        if self._teacher.positions is not None:
            room = min(room, self._teacher.positions - len(document.tokens_N))
        parts: list[np.ndarray] = []
        for other in self._others(document):
            if room <= 0:
                break
            parts.append(other.tokens_N[:room])
            room -= len(parts[-1])
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

    def _others(self, document: Document) -> list[Document]:
        digest = document.tokens_digest
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        drawn: dict[bytes, Document] = {}
        for index in random.integers(len(self._corpus), size=DRAWS_EACH * self._number).tolist():
            other = self._corpus[index]
            is_same_text = bool(document.group) and other.group == document.group
            if self._digests[index] != digest and not is_same_text:
                drawn[self._digests[index]] = other
            if len(drawn) == self._number:
                break
        return list(drawn.values())
