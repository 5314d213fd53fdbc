"""Repeated sequences of one text, on the host.

A place i of the text matches by n tokens where the n tokens up to i are those that the text ends
with, and none of them is a breaker. The token behind it would make the repetition longer, and is
penalised by

    multiplier · base^(n − allowed_length)      nats, where n >= allowed_length

with the longest match of all places that it stands behind, and never if it is a breaker itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.spec import DRY_BOUNDS, Dry

HISTORY = 32768
"""Tokens at a text's end that are looked at."""
LONGEST_MATCH = int(DRY_BOUNDS["dry_allowed_length"].high)
"""Tokens of a match that are counted."""
MAX_PENALTY = 100.0
"""Nats: e^−100 is nothing, and no logit overflows."""

Ids = NDArray[np.int64]
Nats = NDArray[np.float32]
NOTHING = np.empty(0, np.int64), np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class DryControls:
    """One request's DRY, its breakers as tokens."""

    multiplier: float
    base: float
    allowed_length: int
    breaks_V: NDArray[np.bool_]
    """Of each token, whether it ends a sequence; tokens beyond do not."""

    @classmethod
    def of(cls, dry: Dry, breaks_V: NDArray[np.bool_]) -> "DryControls":
        return cls(dry.multiplier, dry.base, dry.allowed_length, breaks_V)

    def penalty(self, length_K: Any) -> NDArray[np.float64]:
        """Nats, of matches of at least `allowed_length` tokens."""
        beyond_K = np.asarray(length_K) - self.allowed_length
        return np.minimum(self.multiplier * np.power(self.base, beyond_K), MAX_PENALTY)

    @cached_property
    def longest(self) -> int:
        """Tokens from which on a longer match changes nothing."""
        penalty_L = self.penalty(np.arange(self.allowed_length, LONGEST_MATCH + 1))
        return self.allowed_length + int(np.argmax(penalty_L == penalty_L[-1]))

    def breaks(self, token_K: NDArray[Any]) -> NDArray[np.bool_]:
        known_K = (token_K >= 0) & (token_K < len(self.breaks_V))
        return known_K & self.breaks_V[np.where(known_K, token_K, 0)]


def penalties(tokens_N: NDArray[np.int32], dry: DryControls) -> tuple[Ids, Nats]:
    """The tokens that are penalised after a text, each once, and by how many nats: one comparison
    of the text, and work for each place where its last token stands."""
    ending = tokens_N[: -dry.longest - 1 : -1]
    stops_L = dry.breaks(ending)
    limit = int(stops_L.argmax()) if stops_L.any() else len(ending)
    if limit < dry.allowed_length:
        return NOTHING
    place_K = np.flatnonzero(tokens_N[:-1] == tokens_N[-1])
    length_K = np.ones(len(place_K), np.int64)
    alive_K = np.arange(len(place_K))
    for back in range(1, limit):
        alive_K = alive_K[place_K[alive_K] >= back]
        alive_K = alive_K[tokens_N[place_K[alive_K] - back] == ending[back]]
        if not len(alive_K):
            break
        length_K[alive_K] += 1
    chosen_K = length_K >= dry.allowed_length
    token_K, length_K = tokens_N[place_K[chosen_K] + 1], length_K[chosen_K]
    free_K = ~dry.breaks(token_K) & (token_K >= 0)
    return _longest_of_each(token_K[free_K], length_K[free_K], dry)


def _longest_of_each(
    token_K: NDArray[np.int32], length_K: Ids, dry: DryControls
) -> tuple[Ids, Nats]:
    descending_K = np.argsort(-length_K, kind="stable")
    unique_K, first_K = np.unique(token_K[descending_K], return_index=True)
    value_K = dry.penalty(length_K[descending_K][first_K])
    return unique_K.astype(np.int64), value_K.astype(np.float32)


class TokenHistory:
    """The end of a request's text, as its output grows; `HISTORY` tokens of it, or more."""

    def __init__(self, prompt: Sequence[int]) -> None:
        begin = list(prompt[-HISTORY:])
        self._tokens_N = np.empty(max(2 * len(begin), 256), np.int32)
        self._tokens_N[: len(begin)] = begin
        self._length = len(begin)
        self._taken = 0

    def after(self, output: Sequence[int]) -> NDArray[np.int32]:
        """The text's last tokens, at most `HISTORY`, after the whole output so far; which has all
        of what it had the last time."""
        new = output[max(self._taken, len(output) - HISTORY) :]
        self._make_room(len(new))
        self._tokens_N[self._length : self._length + len(new)] = new
        self._length += len(new)
        self._taken = len(output)
        return self._tokens_N[max(self._length - HISTORY, 0) : self._length]

    def _make_room(self, more: int) -> None:
        if self._length + more <= len(self._tokens_N):
            return
        kept_N = self._tokens_N[max(self._length - HISTORY, 0) : self._length]
        larger_N = np.empty(2 * (len(kept_N) + more), np.int32)
        larger_N[: len(kept_N)] = kept_N
        self._tokens_N, self._length = larger_N, len(kept_N)


def together(rows: Sequence[tuple[Ids, Nats]]) -> tuple[Ids, Nats]:
    """Rows of penalties as two matrices [P, K]; where a row has fewer, 0 nats of token 0. K is a
    power of two, so that few shapes come up."""
    longest = max((len(token_K) for token_K, _ in rows), default=0)
    width = 1 << max(longest - 1, 0).bit_length()
    token_PK = np.zeros((len(rows), width), np.int64)
    value_PK = np.zeros((len(rows), width), np.float32)
    for place, (token_K, value_K) in enumerate(rows):
        token_PK[place, : len(token_K)] = token_K
        value_PK[place, : len(value_K)] = value_K
    return token_PK, value_PK
