"""Batches of a target store: documents packed into rows, with the targets of their trained tokens.

A row contains whole documents, or a window of one that is longer than a row. Positions restart at
each document, from which transformers derives a mask, so that no document attends to another. A
model that does not keep documents separate (`lm.LanguageModel.packing_leak`, which `run.prepare`
checks) gets one document per row, and a mask of the padding.

Shapes: B rows, N tokens of the longest, T trained positions of the batch, K top entries, M draws.
"""

import math
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dftserve.targets.document import Document, spans
from dftserve.targets.sparse import Targets
from dftserve.targets.store import TargetStore
from dftserve.train.divergences import TargetRows

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` of a document. All but the first are predicted."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Row = tuple[Piece, ...]


def cut_documents(lengths: Sequence[int], longest: int) -> list[Piece]:
    """All documents; those that are longer than a row are cut into windows."""
    return [
        Piece(document, start, stop)
        for document, length in enumerate(lengths)
        for start, stop in spans(length, longest)
    ]


def pack(parts: Sequence[Piece], longest: int, seed: int) -> list[Row]:
    """Rows of at most `longest` tokens: each piece goes into the fullest row that has room.

    Best fit, longest first; pieces of equal length are in a random order.
    """
    shuffled = random.Random(seed).sample(list(parts), len(parts))
    by_room: dict[int, list[list[Piece]]] = {}
    rooms: list[int] = []  # The amounts of room that some row has, ascending.
    for piece in sorted(shuffled, key=len, reverse=True):
        index = bisect_left(rooms, len(piece))
        room, row = longest, []
        if index < len(rooms):
            room = rooms[index]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[index]
        row.append(piece)
        same_room = by_room.setdefault(room - len(piece), [])
        if not same_room:
            insort(rooms, room - len(piece))
        same_room.append(row)
    rows = [tuple(row) for stack in by_room.values() for row in stack]
    return random.Random(seed).sample(rows, len(rows))


def one_per_row(parts: Sequence[Piece], seed: int) -> list[Row]:
    """One row per piece, in random order, so that the first rows sample all files of a corpus."""
    return [(part,) for part in random.Random(seed).sample(list(parts), len(parts))]


@dataclass(frozen=True)
class Cut:
    """Counts of documents that are longer than a row."""

    documents: int
    trained: int
    """Their trained tokens in later windows, without the beginning of their document."""


@dataclass(frozen=True)
class ReadCounts:
    """Counts of what is read from a store."""

    rows: int
    tokens: int
    trained: int
    """Trained tokens."""


class Rows(Dataset):
    """The packed rows of one split; an item is a row's pieces with their documents and targets.

    Rows without a trained token are left out: a batch with only such rows has no mean loss.
    """

    def __init__(
        self, store: TargetStore, split: str, *, longest: int, packing: bool, seed: int
    ) -> None:
        self._store, self._split = store, split
        self.packing = packing
        parts = cut_documents(store.lengths(split), longest)
        rows = pack(parts, longest, seed) if packing else one_per_row(parts, seed)
        trained = self._trained_tokens(parts)
        counted = [(row, sum(trained[part] for part in row)) for row in rows]
        self.rows = [row for row, count in counted if count]
        self.trained = [count for _, count in counted if count]
        """Trained tokens of each row."""
        later = {part: count for part, count in trained.items() if part.start > 0 and count}
        self.cut = Cut(len({part.document for part in later}), sum(later.values()))

    def __len__(self) -> int:
        return len(self.rows)

    def items(self) -> Iterator[tuple[list[tuple[Document, Targets]], int]]:
        """Each row, read lazily, with its number of tokens."""
        return ((self[index], sum(map(len, row))) for index, row in enumerate(self.rows))

    @property
    def parts(self) -> tuple["Rows", ...]:
        """The rows of each store: here of a single one, in `MixedRows` of several."""
        return (self,)

    def sizes(self) -> list[ReadCounts]:
        """What an epoch reads from each store."""
        tokens = sum(len(piece) for row in self.rows for piece in row)
        return [ReadCounts(len(self.rows), tokens, sum(self.trained))]

    def _trained_tokens(self, parts: Sequence[Piece]) -> dict[Piece, int]:
        """Trained tokens of each piece."""
        lengths, counts = self._store.lengths(self._split), self._store.trained(self._split)

        def of(piece: Piece) -> int:
            length, count = lengths[piece.document], counts[piece.document]
            if len(piece) == length:
                return count
            if count == length - 1:  # All tokens are trained: no need to count in each window.
                return len(piece) - 1
            where = (piece.document, piece.start + 1, piece.stop)
            return self._store.trained_within(self._split, *where)

        return {piece: of(piece) for piece in parts}

    def __getitem__(self, index: int) -> list[tuple[Document, Targets]]:
        return [self._read(piece) for piece in self.rows[index]]

    def _read(self, piece: Piece) -> tuple[Document, Targets]:
        document, targets = self._store[self._split, piece.document]
        positions_T = document.positions_T
        first, last = np.searchsorted(positions_T, [piece.start + 1, piece.stop])
        return document.window(piece.start, piece.stop), targets[int(first) : int(last)]


def merge_targets(parts: Sequence[Targets]) -> Targets:
    """The targets of one batch, which may come from stores with different numbers of top entries
    and draws.

    A missing top entry has the id −1 and probability 0. All draws of a row are repeated equally
    often until every row has as many, which does not change their mean.
    """
    kept = max(part.top_ids_TK.shape[1] for part in parts)
    draws = math.lcm(*(part.tail_ids_TM.shape[1] or 1 for part in parts))
    if all(part.tail_ids_TM.shape[1] == 0 for part in parts):
        draws = 0
    return Targets.concatenate([_pad(part, kept, draws) for part in parts])


def _pad(part: Targets, kept: int, draws: int) -> Targets:
    missing, (positions, drawn) = kept - part.top_ids_TK.shape[1], part.tail_ids_TM.shape
    if missing:
        widths = ((0, 0), (0, missing))
        part = replace(
            part,
            top_ids_TK=np.pad(part.top_ids_TK, widths, constant_values=-1),
            top_logprobs_TK=np.pad(part.top_logprobs_TK, widths, constant_values=-np.inf),
        )
    if drawn == draws:
        return part
    # A lumped tail has no draws; zeros do, as divergences that need draws refuse such a store.
    ids_TM = part.tail_ids_TM if drawn else np.zeros((positions, 1), np.int64)
    return replace(part, tail_ids_TM=np.tile(ids_TM, (1, draws // max(drawn, 1))))


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch that the model itself reads."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


@dataclass(frozen=True)
class Collator:
    """Makes a batch from items: tokens, positions, and the targets flattened to T rows.

    Rows are padded with their own last token, which is neither predicted nor attended to there. A
    padding token's embedding may be zero, where the square root in some norms has no gradient.
    """

    packing: bool = True
    """Return `position_ids` that restart at each document; otherwise an `attention_mask`."""

    def __call__(self, items: Sequence[Sequence[tuple[Document, Targets]]]) -> dict[str, Tensor]:
        longest = max(sum(len(document.tokens_N) for document, _ in item) for item in items)
        tokens_BN = np.zeros((len(items), longest), dtype=np.int64)
        position_BN = np.zeros((len(items), longest), dtype=np.int64)
        mask_BN = np.zeros((len(items), longest), dtype=np.int64)
        predicted_from: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for row, item in enumerate(items):
            end = 0
            for document, _ in item:
                start, end = end, end + len(document.tokens_N)
                tokens_BN[row, start:end] = document.tokens_N
                position_BN[row, start:end] = np.arange(end - start)
                predicted_from.append(row * longest + start + document.positions_T - 1)
                labels.append(document.labels_T)
            # The padding is a document of its own, after all others.
            position_BN[row, end:] = np.arange(longest - end)
            mask_BN[row, :end] = 1
            tokens_BN[row, end:] = tokens_BN[row, end - 1]
        targets = merge_targets([targets for item in items for _, targets in item])
        rows = TargetRows.of(np.concatenate(labels), targets)
        layout = {"position_ids": position_BN} if self.packing else {"attention_mask": mask_BN}
        return {
            "input_ids": torch.from_numpy(tokens_BN),
            **{name: torch.from_numpy(value) for name, value in layout.items()},
            "positions_T": torch.from_numpy(np.concatenate(predicted_from)),
            **{each.name: getattr(rows, each.name) for each in fields(rows)},
        }
