"""Interleave the rows of several target stores, so that each has its share of the trained tokens.

    rows = MixedRows([stories, answers], weights=[0.7, 0.3], seed=0)
    store, row = next(rows.order())

The order is infinite, and depends only on the rows, the weights and the seed. A store is eligible
for the next row if it has not had more than its share so far; among the eligible stores, the one
whose next row would fill its share first is taken (WF²Q, Bennett and Zhang 1996). So after every
row, each store's trained tokens are within one row of its share of the total. A store's own rows
come in passes: all of them in a random order, then all of them in another one.
"""

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import chain, count, islice

from torch.utils.data import Dataset, Sampler

from dftserve.targets.document import Document
from dftserve.targets.sparse import Targets
from dftserve.train.data import ReadCounts, Row, Rows

Key = tuple[int, int]
"""The index of a store, and of a row in it."""


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of the weights, read as decimals: .7 is exactly seven tenths."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in exact))
    shares = [int(each * scale) for each in exact]
    common = math.gcd(*shares)
    return [share // common for share in shares]


def passes(rows: int, seed: int, store: int) -> Iterator[int]:
    """A store's rows in endless passes; each pass has every row once, in its own random order."""
    for number in count():
        yield from random.Random(f"{seed} {store} {number}").sample(range(rows), rows)


def mixed_order(
    trained: Sequence[Sequence[int]], weights: Sequence[float], seed: int
) -> Iterator[Key]:
    """The infinite order of the rows of all stores.

    Args:
        trained: for each store, the trained tokens of each of its rows; at least one row.
    """
    shares = whole_shares(weights)
    whole, scale = sum(shares), math.lcm(*shares)
    # A store has exactly its share if its tokens times this factor are `scale · total / whole`.
    factors = [scale // share for share in shares]
    orders = [passes(len(of_store), seed, store) for store, of_store in enumerate(trained)]
    waiting = [next(order) for order in orders]
    tokens_read, total = [0] * len(shares), 0
    while True:
        eligible = [
            store
            for store, factor in enumerate(factors)
            if tokens_read[store] * factor * whole <= total * scale
        ]
        filled = {store: tokens_read[store] + trained[store][waiting[store]] for store in eligible}
        store = min(eligible, key=lambda store: filled[store] * factors[store])
        yield store, waiting[store]
        total += filled[store] - tokens_read[store]
        tokens_read[store] = filled[store]
        waiting[store] = next(orders[store])


class MixedRows(Dataset):
    """The rows of one split of several stores; items are the same as those of `Rows`.

    Its length is that of an epoch, which ends when the first store has been read once.
    """

    def __init__(self, parts: Sequence[Rows], *, weights: Sequence[float], seed: int) -> None:
        self.parts = tuple(parts)
        self.weights = tuple(weights)
        self._seed = seed

    @property
    def packing(self) -> bool:
        return self.parts[0].packing

    @property
    def rows(self) -> list[Row]:
        """The rows of all stores, one store after the other."""
        return list(chain.from_iterable(part.rows for part in self.parts))

    def order(self) -> Iterator[Key]:
        """The infinite sequence of row keys."""
        return mixed_order([part.trained for part in self.parts], self.weights, self._seed)

    def items(self) -> Iterator[tuple[list[tuple[Document, Targets]], int]]:
        """Each row of the first epoch, read lazily, with its number of tokens."""
        for store, row in islice(self.order(), len(self)):
            yield self[store, row], sum(map(len, self.parts[store].rows[row]))

    def sizes(self) -> list[ReadCounts]:
        """What the first epoch reads from each store."""
        counts = [ReadCounts(0, 0, 0)] * len(self.parts)
        for store, row in islice(self.order(), len(self)):
            part, before = self.parts[store], counts[store]
            tokens = before.tokens + sum(map(len, part.rows[row]))
            counts[store] = ReadCounts(before.rows + 1, tokens, before.trained + part.trained[row])
        return counts

    @cached_property
    def _epoch(self) -> int:
        left = [len(part) for part in self.parts]
        if not all(left):
            return 0
        for length, (store, _) in enumerate(self.order(), 1):
            left[store] -= 1
            if not left[store]:
                return length
        raise AssertionError("the order is infinite")

    def __len__(self) -> int:
        return self._epoch

    def __getitem__(self, key: Key) -> list[tuple[Document, Targets]]:
        store, row = key
        return self.parts[store][row]


class MixedSampler(Sampler[Key]):
    """The keys of one epoch after another; supports one iterator at a time."""

    def __init__(self, rows: MixedRows) -> None:
        self._rows, self._epoch = rows, 0
        self._order, self._at = rows.order(), 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the next epoch; its order continues where the epoch before it ends."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Key]:
        start = self._epoch * len(self)
        if self._at > start:
            self._order, self._at = self._rows.order(), 0
        while self._at < start + len(self):
            key, self._at = next(self._order), self._at + 1
            if self._at > start:
                yield key
