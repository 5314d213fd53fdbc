"""Many answers to one prompt as a source: what they say next, as often as they say it.

    source = References(answers, vocabulary=len(tokenizer))

Shapes: T trained positions of a document, R of them in one chunk, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows

Question = tuple[str, tuple[int, ...]]
"""As `Document.question`."""


@dataclass
class Node:
    """A beginning that references of one prompt share."""

    passing: dict[int, int] = field(default_factory=dict)
    """How many references go on with each token."""
    children: dict[int, "Node"] = field(default_factory=dict)


class References(DenseSource):
    """The references' empirical distribution, given the prompt and the answer so far.

    Each reference that shares the beginning has an equal share, also where two are equal; tokens
    that none goes on with have the log-probability −inf. Where all references went other ways, the
    document's own goes on alone: mix with a source that knows more (`combine.Mix`). So it does from
    the first token of a plain text, which answers nothing.
    """

    def __init__(self, answers: Sequence[Document], *, vocabulary: int) -> None:
        """
        Args:
            answers: documents; those of an equal `Document.question` belong together, of those that
                have a prompt.

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
                "accepted: two or more for a prompt somewhere; plain texts have none. With one "
                "answer each, the target is the text itself: train without a source (sft)."
            )
        self.vocabulary = vocabulary
        self._roots = {asked: _trie(asked[1], group) for asked, group in by_question.items()}
        self._sizes = {asked: len(group) for asked, group in by_question.items()}
        digests = sorted(_identity(each) for group in by_question.values() for each in group)
        self._blake3 = blake3(b"".join(digests)).hexdigest()

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "references",
            "answers_blake3": self._blake3,
            "prompts": len(self._roots),
            "answers": sum(self._sizes.values()),
            "vocabulary": self.vocabulary,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        """Raises ValueError for a document that leaves every reference of its prompt."""
        return [self._rows(self._walk(document)) for document in documents]

    def _walk(self, document: Document) -> list[dict[int, int]]:
        """What the references go on with at each trained position."""
        if not document.has_prompt:
            return [{int(token): 1} for token in document.labels_T]
        prompt, asked = document.prompt, document.question
        node = self._roots.get(asked)
        going_on = []
        for place in range(len(prompt), len(document.tokens_N)) if document.trained_N.any() else ():
            if node is None or not node.passing:
                raise ValueError(
                    f"the {place - len(prompt)} first tokens of an answer are no reference's "
                    f"(its prompt has {self._sizes.get(asked, 0)}); accepted: documents that are "
                    "references themselves. Give the source all answers that are to be read."
                )
            if document.trained_N[place]:
                going_on.append(node.passing)
            node = node.children.get(int(document.tokens_N[place]))
        return going_on

    def _rows(self, going_on: list[dict[int, int]]) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            logprobs_RV = torch.full((stop - start, self.vocabulary), -torch.inf)
            for row, passing in enumerate(going_on[start:stop]):
                share = torch.tensor(list(passing.values()), dtype=torch.float64)
                share /= share.sum()
                logprobs_RV[row, list(passing)] = share.log().float()
            return logprobs_RV

        return rows


def _trie(prompt: tuple[int, ...], answers: Sequence[Document]) -> Node:
    root = Node()
    for answer in answers:
        if not answer.trained_N.any():
            continue
        node = root
        for token in answer.tokens_N[len(prompt) :].tolist():
            node.passing[token] = node.passing.get(token, 0) + 1
            node = node.children.setdefault(token, Node())
    return root


def _identity(answer: Document) -> bytes:
    content = answer.tokens_N.astype(np.int32).tobytes() + answer.trained_N.tobytes()
    return blake3(content).digest()
