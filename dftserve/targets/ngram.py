"""An n-gram source: what followed the same words elsewhere in the corpus.

    source = Ngram(documents, vocabulary=len(tokenizer))

It needs no model. It counts what follows each context in the *other* documents, or in those of
other groups, and interpolates from long contexts down to single tokens by Witten and Bell's method
C (1991; Chen and Goodman 1998, section 2.5). N is the number of continuations of a context and D
the number of distinct ones:

    p_n(w) = (count_n(w) + D_n · p_{n−1}(w)) / (N_n + D_n),    p_{−1} = 1/V

Contexts are found in a suffix array of the reversed text: sorted by the preceding tokens, each
position is next to those that share its context, and longer contexts are runs within shorter ones.

Shapes: M positions of the whole corpus, N tokens of a document, T trained positions, R of them in
one chunk, G contexts of one length, E pairs of context and next token, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.interpolated import Entries, Shared, sparsify
from dftserve.targets.source import AdditiveSource, Adds
from dftserve.targets.sparse import Targets

ROWS_AT_ONCE = 1024
"""Rows processed at once when computing sparsely."""
KEPT = 16
"""Groups whose counts are cached, since their documents are read many times."""


@dataclass(frozen=True, eq=False)
class Level:
    """All contexts of one length, and what follows them."""

    keys_G: np.ndarray
    """int64, rising: (index of the context without its first token) · (V + 1) + first token + 1."""
    starts_G: np.ndarray
    """int64 [G + 1]: the start of each context's pairs."""
    next_E: np.ndarray
    """int32: the next token, rising within a context."""
    counts_E: np.ndarray
    """int32: how often it follows, in all documents."""


@dataclass(frozen=True, eq=False)
class Own:
    """The part of the counts that is left out for a document: from itself, its copies and,
    depending on the source, its group."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    """For each level: int64, context · V + next token, rising; and their counts."""
    singles_V: np.ndarray
    """int64: how often each token is trained there."""


@dataclass(frozen=True, eq=False)
class _Text:
    """A text of the corpus, together with its copies."""

    tokens_N: np.ndarray
    marks_N: np.ndarray
    """int64: in how many copies each token is trained."""

    @staticmethod
    def of(document: Document, copy: "_Text | None") -> "_Text":
        marks_N = document.trained_N.astype(np.int64)
        return _Text(document.tokens_N, marks_N if copy is None else marks_N + copy.marks_N)


class Ngram(AdditiveSource):
    """Leave-one-out n-gram probabilities of a corpus.

    Only trained tokens are counted as continuations. Contexts may include all tokens of a document,
    but never reach into another. When a document of the corpus (recognised by the digest of its
    tokens) is read, its own counts and those of its copies are left out; with
    `leaves_out="group"` also those of documents with the same `Document.group`, and their copies.
    Every token keeps a positive probability.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        vocabulary: int,
        order: int = 6,
        min_count: int = 2,
        leaves_out: Literal["document", "group"] = "document",
    ) -> None:
        """
        Args:
            order: the longest context has `order` − 1 tokens; 1 uses no context.
            min_count: continuations that a context needs, outside what is left out, to be used.
            leaves_out: what is not counted for a document: itself, or its whole group.

        Raises:
            ValueError: no documents, nothing trained, an order or min_count below 1, or tokens
                beyond the vocabulary.
        """
        if not documents:
            raise ValueError("got no documents; accepted: a corpus of two or more.")
        if order < 1 or min_count < 1:
            raise ValueError(f"got order {order}, min_count {min_count}; accepted: 1 or more.")
        highest = max(int(document.tokens_N.max()) for document in documents)
        if highest >= vocabulary:
            raise ValueError(
                f"the corpus holds the token {highest}; accepted: below the vocabulary of "
                f"{vocabulary}. Give the vocabulary of the tokenizer that made the documents."
            )
        if not any(document.trained_N.any() for document in documents):
            raise ValueError("no token of the corpus is trained; accepted: some to count.")
        self.vocabulary, self.order, self.min_count = vocabulary, order, min_count
        self.leaves_out = leaves_out
        self._corpus = _digest(documents, grouped=leaves_out == "group")
        self._texts: dict[bytes, _Text] = {}
        self._groups: dict[str, list[bytes]] = {}
        for document in documents:
            name = document.tokens_digest
            self._texts[name] = _Text.of(document, self._texts.get(name))
            if document.group and leaves_out == "group":
                self._groups.setdefault(document.group, []).append(name)
        self._cached_own: OrderedDict[frozenset[bytes], Own] = OrderedDict()
        self._singles_V, self._levels = _count(documents, vocabulary, order - 1)

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "ngram",
            "corpus_blake3": self._corpus,
            "order": self.order,
            "min_count": self.min_count,
            "leaves_out": self.leaves_out,
            "vocabulary": self.vocabulary,
        }

    def at_order(self, order: int) -> "Ngram":
        """The same counts, but using contexts of at most `order` − 1 tokens.

        Raises:
            ValueError: an order below 1 or above this one's.
        """
        if not 1 <= order <= self.order:
            raise ValueError(f"order: got {order}; accepted: from 1 to {self.order}.")
        lower = copy(self)
        lower.order, lower._levels = order, self._levels[: order - 1]
        lower._cached_own = OrderedDict()  # Cached counts depend on the number of levels.
        return lower

    def matches(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """For each trained position, the length in tokens of the longest context that is used, and
        its number of continuations outside what is left out; int64 [T] each, 0 if none is used."""
        contexts, own, _ = self._lookup(document)
        rows = document.trained
        length_T, count_T = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for length, (level, found_T, (pairs, times)) in enumerate(
            zip(self._levels, contexts, own.pairs, strict=True), 1
        ):
            row_E, _, counts_E = self._elsewhere(level, found_T, pairs, times)
            total_T = np.bincount(row_E, counts_E, minlength=rows).astype(np.int64)
            used_T = total_T >= self.min_count
            length_T, count_T = (
                np.where(used_T, length, length_T),
                np.where(used_T, total_T, count_T),
            )
        return length_T, count_T

    def adds(self, documents: Sequence[Document]) -> list[Adds]:
        return [self._adds(document) for document in documents]

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        """Computed without dense rows: the mass left by all contexts goes to the unigram row."""
        each = zip(documents, seeds, strict=True)
        return [self._targets(*one, k, draws) for one in each]

    def _targets(self, document: Document, seed: int, k: int, draws: int) -> Targets:
        at_T, own, single_V = self._lookup(document)
        shared, random = Shared(single_V), np.random.default_rng(seed)
        labels_T = document.labels_T.astype(np.int64)
        parts = []
        for start in range(0, len(labels_T), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            levels, left_R = self._distributed([at[part] for at in at_T], own, len(labels_T[part]))
            entries = Entries.of(levels, left_R, self.vocabulary)
            parts.append(sparsify(entries, shared, labels_T[part], k=k, draws=draws, random=random))
        return Targets.concatenate(parts)

    def token_logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Computed without building dense rows."""
        return [self._of_own_tokens(document) for document in documents]

    def _of_own_tokens(self, document: Document) -> np.ndarray:
        at_T, own, single_V = self._lookup(document)
        labels_T = document.labels_T.astype(np.int64)
        parts = [np.zeros(0)]
        for start in range(0, len(labels_T), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            labels_R = labels_T[part]
            levels, left_R = self._distributed([at[part] for at in at_T], own, len(labels_R))
            mass_R = left_R * single_V[labels_R]
            for row_E, next_E, mass_E in levels:
                is_own_E = next_E == labels_R[row_E]
                mass_R += np.bincount(row_E[is_own_E], mass_E[is_own_E], minlength=len(mass_R))
            parts.append(np.log(mass_R))
        return np.concatenate(parts)

    def _adds(self, document: Document) -> Adds:
        at_T, own, single_V = self._lookup(document)
        rest_V = torch.from_numpy(single_V).float()

        def add(mass_RV: Tensor, start: int, weight_R: Tensor) -> None:
            rows, device = len(mass_RV), mass_RV.device
            levels, left_R = self._distributed([at[start : start + rows] for at in at_T], own, rows)
            for row_E, next_E, share_E in levels:
                # Each (row, token) pair occurs once per level, so the sum is deterministic.
                at = torch.from_numpy(row_E).to(device), torch.from_numpy(next_E).to(device)
                added_E = torch.from_numpy(share_E).float().to(device) * weight_R[at[0]]
                mass_RV[at] += added_E
            mass_RV.addr_(torch.from_numpy(left_R).float().to(device) * weight_R, rest_V.to(device))

        return Adds(add)

    def _lookup(self, document: Document) -> tuple[list[np.ndarray], Own, np.ndarray]:
        """For each level the contexts of the trained positions; the counts to leave out; and the
        unigram probabilities without these."""
        contexts = self._contexts(document.tokens_N)
        own = self._own(document, contexts)
        single_V = _method_c(self._singles_V - own.singles_V, 1 / self.vocabulary)
        return [contexts_N[document.positions_T] for contexts_N in contexts], own, single_V

    def _contexts(self, tokens_N: np.ndarray) -> list[np.ndarray]:
        """For each level, int64 [N]: the context before each token; −1 if not in the corpus."""
        tokens_N = tokens_N.astype(np.int64)
        found_N = np.zeros(len(tokens_N), dtype=np.int64)
        contexts = []
        for length, level in enumerate(self._levels, 1):
            before_N = np.full(len(tokens_N), -1)
            before_N[length:] = tokens_N[:-length]
            wanted_N = found_N * (self.vocabulary + 1) + before_N + 1
            at_N = np.searchsorted(level.keys_G, wanted_N).clip(max=len(level.keys_G) - 1)
            exists_N = (level.keys_G[at_N] == wanted_N) & (before_N >= 0) & (found_N >= 0)
            found_N = np.where(exists_N, at_N, -1)
            contexts.append(found_N)
        return contexts

    def _own(self, document: Document, contexts: Sequence[np.ndarray]) -> Own:
        itself = document.tokens_digest
        names = {itself, *self._groups.get(document.group, ())} & self._texts.keys()
        key = frozenset(names)
        if key not in self._cached_own:
            texts = [self._texts[name] for name in names]
            self._cached_own[key] = self._counted(
                texts,
                [
                    contexts if name == itself else self._contexts(text.tokens_N)
                    for name, text in zip(names, texts, strict=True)
                ],
            )
        self._cached_own.move_to_end(key)
        if len(self._cached_own) > KEPT:
            self._cached_own.popitem(last=False)
        return self._cached_own[key]

    def _counted(self, texts: "Sequence[_Text]", contexts: Sequence[Sequence[np.ndarray]]) -> Own:
        """The counts that come from these texts; `contexts` has an array per level for each
        text."""
        none = np.zeros(0, np.int64)
        tokens_N = np.concatenate([none, *(text.tokens_N.astype(np.int64) for text in texts)])
        marks_N = np.concatenate([none, *(text.marks_N for text in texts)])
        pairs = []
        for level in range(len(self._levels)):
            found_N = np.concatenate([none, *(each[level] for each in contexts)])
            counts_N = (marks_N > 0) & (found_N >= 0)
            keys = (found_N * self.vocabulary + tokens_N)[counts_N]
            unique, index = np.unique(keys, return_inverse=True)
            weights = np.bincount(index, marks_N[counts_N], minlength=len(unique))
            pairs.append((unique, weights.astype(np.int64)))
        singles = np.bincount(tokens_N, marks_N, minlength=self.vocabulary)
        return Own(pairs, singles.astype(np.int64))

    def _distributed(
        self, contexts: Sequence[np.ndarray], own: Own, rows: int
    ) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], np.ndarray]:
        """Distribute the mass of each row, from the longest context to the shortest.

        Returns (rows, tokens, masses) for each level, and the mass left to the unigram row for each
        row.
        """
        levels, left_R = [], np.ones(rows)
        for level, found_R, (pairs, times) in zip(
            reversed(self._levels), reversed(contexts), reversed(own.pairs), strict=True
        ):
            row_E, next_E, counts_E = self._elsewhere(level, found_R, pairs, times)
            total_R = np.bincount(row_E, counts_E, minlength=rows)
            different_R = np.bincount(row_E[counts_E > 0], minlength=rows)
            used_R = total_R >= self.min_count
            whole_R = np.where(used_R, total_R + different_R, 1)
            share_R = np.where(used_R, left_R / whole_R, 0.0)
            levels.append((row_E, next_E, share_R[row_E] * counts_E))
            left_R = np.where(used_R, left_R * different_R / whole_R, left_R)
        return levels, left_R

    def _elsewhere(
        self, level: Level, found_R: np.ndarray, pairs: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of each row's context: row, token, and count minus what is left out, which is
        given by `pairs` and their counts, `times`."""
        row_E, entry_E = _entries(level, found_R)
        next_E = level.next_E[entry_E].astype(np.int64)
        counts_E = level.counts_E[entry_E].astype(np.int64)
        if len(pairs):
            keys_E = found_R[row_E] * self.vocabulary + next_E
            at_E = np.searchsorted(pairs, keys_E).clip(max=len(pairs) - 1)
            counts_E -= np.where(pairs[at_E] == keys_E, times[at_E], 0)
        return row_E, next_E, counts_E


def _entries(level: Level, found_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of each row's context: the row, and the pair's index in the level."""
    first_R = level.starts_G[found_R.clip(min=0)]
    many_R = np.where(found_R >= 0, level.starts_G[found_R.clip(min=0) + 1] - first_R, 0)
    row_E = np.repeat(np.arange(len(found_R)), many_R)
    offset_R = first_R - (np.cumsum(many_R) - many_R)
    return row_E, np.arange(len(row_E)) + np.repeat(offset_R, many_R)


def _method_c(counts_V: np.ndarray, lower: float) -> np.ndarray:
    """float64 [V]: p_0 from unigram counts; uniform if all are 0."""
    total, different = counts_V.sum(), np.count_nonzero(counts_V)
    if not total:
        return np.full(len(counts_V), lower)
    return (counts_V + different * lower) / (total + different)


# ── Counting ─────────────────────────────────────────────────────────────────────────────────────


def _count(
    documents: Sequence[Document], vocabulary: int, longest: int
) -> tuple[np.ndarray, list[Level]]:
    """How often each token is trained, and the levels of contexts of 1 to `longest` tokens."""
    text_M, trained_M = _joined(documents)
    sorted_M = _by_context(text_M, longest)
    sorted_M = sorted_M[trained_M[sorted_M]]
    next_M = text_M[sorted_M] - 1
    context_M = np.zeros(len(sorted_M), dtype=np.int64)
    levels = []
    for length in range(1, longest + 1):
        # Contexts that cross a document's start contain its separator, so no lookup matches them.
        before_M = text_M[np.maximum(sorted_M - length, 0)]
        keys_M = context_M * (vocabulary + 1) + before_M
        new_M = np.diff(keys_M, prepend=-1) != 0
        context_M = np.cumsum(new_M) - 1
        pairs_E, counts_E = np.unique(context_M * vocabulary + next_M, return_counts=True)
        contexts = int(new_M.sum())
        starts_G = np.searchsorted(pairs_E, np.arange(contexts + 1) * vocabulary)
        next_E = (pairs_E % vocabulary).astype(np.int32)
        levels.append(Level(keys_M[new_M], starts_G, next_E, counts_E.astype(np.int32)))
    return np.bincount(next_M, minlength=vocabulary), levels


def _joined(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [M]: token ids plus 1, with a separator 0 before each document; and the trained
    marks."""
    text_M = np.concatenate([p for d in documents for p in ([0], d.tokens_N.astype(np.int64) + 1)])
    trained_M = np.concatenate([p for d in documents for p in ([False], d.trained_N)])
    return text_M, trained_M.astype(bool)


def _by_context(text_M: np.ndarray, longest: int) -> np.ndarray:
    """All positions, sorted by the `longest` tokens before each, nearest first.

    Prefix doubling (Manber and Myers 1993) on the reversed text: ranks by m tokens, combined with
    the ranks m positions earlier, give ranks by 2m tokens.
    """
    rank_M = np.zeros(len(text_M), dtype=np.int64)
    rank_M[1:] = text_M[:-1]
    reach = 1
    while reach < longest:
        earlier_M = np.zeros_like(rank_M)
        earlier_M[reach:] = rank_M[:-reach]
        key_M = rank_M * (int(rank_M.max()) + 1) + earlier_M
        order_M = np.argsort(key_M)
        new_M = np.diff(key_M[order_M], prepend=-1) != 0
        rank_M[order_M] = np.cumsum(new_M)
        reach *= 2
    return np.argsort(rank_M)


def _digest(documents: Sequence[Document], *, grouped: bool) -> str:
    """A digest of everything the counts depend on; independent of the groups' names."""
    digest = blake3()
    first: dict[str, int] = {}
    for index, document in enumerate(documents):
        digest.update(document.tokens_digest)
        digest.update(document.trained_N.tobytes())
        if grouped and document.group:
            digest.update(str(first.setdefault(document.group, index)).encode())
    return digest.hexdigest()
