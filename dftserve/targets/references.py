"""Reference answers to one prompt as a source: the distribution of their next tokens.

    source = References(answers, vocabulary=len(tokenizer))

Shapes: T trained positions of a document, R of them in one chunk, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows

Question = tuple[str, tuple[int, ...]]
"""As `Document.question`."""


TRIES = 32
"""Prompts whose answers' prefixes are in memory at once, at some 300 bytes a token."""


@dataclass(slots=True)
class Node:
    """A prefix shared by references of one prompt."""

    count: int = 0
    """How many references have it."""
    children: dict[int, "Node"] = field(default_factory=dict)
    """By the next token."""

    @property
    def next_counts(self) -> dict[int, int]:
        """How many references continue with each token."""
        return {token: child.count for token, child in self.children.items()}


class References(DenseSource):
    """The references' empirical distribution, given the prompt and the answer so far.

    Each reference that shares the prefix counts equally, and equal references count several times.
    Tokens with which none continues have the log-probability −inf. Once all other references have
    diverged, only the document's own token remains: mix with a broader source (`combine.Mix`). In a
    plain text, which has no prompt, this is the case from the first token.
    """

    def __init__(self, answers: Sequence[Document], *, vocabulary: int) -> None:
        """
        Args:
            answers: documents; those with a prompt and an equal `Document.question` belong
                together.

        Raises:
            ValueError: no prompt has two references, or tokens beyond the vocabulary.
        """
        by_question: dict[Question, list[Document]] = defaultdict(list)
        for answer in answers:
            highest = int(answer.tokens_N.max())
            if highest >= vocabulary:
                raise ValueError(
                    f"a reference holds the token {highest}; accepted: below the vocabulary of "
                    f"{vocabulary}. Give the vocabulary of the tokenizer that made it."
                )
            if answer.has_prompt:
                by_question[answer.question].append(answer)
        if all(len(group) < 2 for group in by_question.values()):
            count = sum(map(len, by_question.values()))
            raise ValueError(
                f"got {count} references to {len(by_question)} prompts, and no two to the same; "
                "accepted: two or more for at least one prompt; plain texts have none. With one "
                "answer each, the target is the text itself: train without a source (sft)."
            )
        self.vocabulary = vocabulary
        self._answers = dict(by_question)
        # Built when read: those of all prompts would take hundreds of bytes a token of the corpus.
        self._root = lru_cache(maxsize=TRIES)(self._trie_of)
        digests = sorted(each.digest for group in by_question.values() for each in group)
        self._blake3 = blake3(b"".join(digests)).hexdigest()

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "references",
            "answers_blake3": self._blake3,
            "prompts": len(self._answers),
            "answers": sum(map(len, self._answers.values())),
            "vocabulary": self.vocabulary,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        """Raises ValueError for a document that diverges from every reference of its prompt."""
        return [self._rows(self._walk(document)) for document in documents]

    def _walk(self, document: Document) -> list[dict[int, int]]:
        """The counts of the references' next tokens at each trained position."""
        if not document.has_prompt:
            return [{int(token): 1} for token in document.labels_T]
        prompt, question = document.prompt, document.question
        answers = self._answers.get(question, [])
        if len(answers) == 1 and _is_same(document, answers[0]):
            return [{int(token): 1} for token in document.labels_T]
        node = self._root(question)
        next_tokens = []
        end = len(document.tokens_N) if document.trained_N.any() else 0
        for position in range(len(prompt), end):
            if node is None or not node.children:
                raise ValueError(
                    f"the {position - len(prompt)} first tokens of an answer are no reference's "
                    f"(its prompt has {len(answers)}); accepted: documents that "
                    "are references themselves. Give the source all answers that will be read."
                )
            if document.trained_N[position]:
                next_tokens.append(node.next_counts)
            node = node.children.get(int(document.tokens_N[position]))
        return next_tokens

    def _trie_of(self, question: Question) -> Node:
        return _trie(question[1], self._answers.get(question, []))

    def _rows(self, next_tokens: list[dict[int, int]]) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            logprobs_RV = torch.full((stop - start, self.vocabulary), -torch.inf)
            for row, counts in enumerate(next_tokens[start:stop]):
                share = torch.tensor(list(counts.values()), dtype=torch.float64)
                share /= share.sum()
                logprobs_RV[row, list(counts)] = share.log().float()
            return logprobs_RV

        return rows


def _trie(prompt: tuple[int, ...], answers: Sequence[Document]) -> Node:
    root = Node()
    for answer in answers:
        if not answer.trained_N.any():
            continue
        node = root
        for token in answer.tokens_N[len(prompt) :].tolist():
            node = node.children.setdefault(token, Node())
            node.count += 1
    return root


def _is_same(one: Document, other: Document) -> bool:
    return np.array_equal(one.tokens_N, other.tokens_N) and np.array_equal(
        one.trained_N, other.trained_N
    )
