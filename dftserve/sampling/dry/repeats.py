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

LENGTH_BITS = 8

Ids = NDArray[np.int64]
Nats = NDArray[np.float32]


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


class TextRepeats:
    """The end of a request's text as its output grows, and by how many tokens each place of it
    matches its end.

    A token more makes of the n tokens that the place before matched by n + 1, where it is that
    place's token, else none: one vector operation of the text that is looked at, however it repeats
    itself. After a fault of the engine's the output may be shorter than before; the text is then
    read anew.
    """

    def __init__(self, prompt: Sequence[int], dry: DryControls) -> None:
        self._dry = dry
        self._prompt_N = np.array(prompt[-HISTORY:], np.int32)
        self._begin()

    def _begin(self) -> None:
        self._tokens_N = np.empty(max(2 * len(self._prompt_N), 256), np.int32)
        self._matched_N = np.zeros(len(self._tokens_N), np.uint8)
        self._length = self._taken = 0
        self._take(self._prompt_N)

    def after(self, output: Sequence[int]) -> tuple[Ids, Nats]:
        """The tokens that are penalised after the whole output so far, each once, and by how many
        nats."""
        if len(output) < self._taken:
            self._begin()
        new_N = np.array(output[max(self._taken, len(output) - HISTORY) :], np.int32)
        self._take(new_N)
        self._taken = len(output)
        return self._penalties()

    def _take(self, new_N: NDArray[np.int32]) -> None:
        """No match of more than `longest` tokens counts, so that these alone are taken one by one
        where there are more."""
        self._make_room(len(new_N))
        at_once = max(len(new_N) - self._dry.longest, 0)
        self._tokens_N[self._length : self._length + at_once] = new_N[:at_once]
        self._length += at_once
        if at_once:
            self._matched_N[: self._length] = 0
        for token, breaks in zip(new_N[at_once:], self._dry.breaks(new_N[at_once:]), strict=True):
            self._take_one(token, breaks=bool(breaks))

    def _take_one(self, token: np.int32, *, breaks: bool) -> None:
        length = self._length
        self._tokens_N[length] = token
        self._length += 1
        begin = max(self._length - HISTORY, 0)
        matched_N = self._matched_N[begin : self._length]
        if breaks:
            matched_N[:] = 0
            return
        before_N = np.zeros_like(matched_N)
        before_N[1:] = matched_N[:-1]
        np.minimum(before_N + 1, self._dry.longest, out=matched_N)
        matched_N *= self._tokens_N[begin : self._length] == token

    def _penalties(self) -> tuple[Ids, Nats]:
        begin = max(self._length - HISTORY, 0)
        tokens_N = self._tokens_N[begin : self._length]
        matched_N = self._matched_N[begin : self._length][:-1]
        place_K = np.flatnonzero(matched_N >= self._dry.allowed_length)
        # What is before the text that is looked at matches nothing.
        length_K = np.minimum(matched_N[place_K], place_K + 1)
        token_K = tokens_N[place_K + 1]
        counts_K = (length_K >= self._dry.allowed_length) & (token_K >= 0)
        token_K, length_K = _longest_of_each(token_K[counts_K], length_K[counts_K])
        free_K = ~self._dry.breaks(token_K)
        return token_K[free_K], self._dry.penalty(length_K[free_K]).astype(np.float32)

    def _make_room(self, more: int) -> None:
        if self._length + more <= len(self._tokens_N):
            return
        kept = slice(max(self._length - HISTORY, 0), self._length)
        tokens_N, matched_N = self._tokens_N[kept], self._matched_N[kept]
        self._length = len(tokens_N)
        self._tokens_N = np.empty(2 * (self._length + more), np.int32)
        self._tokens_N[: self._length] = tokens_N
        self._matched_N = np.zeros(len(self._tokens_N), np.uint8)
        self._matched_N[: self._length] = matched_N


def _longest_of_each(token_K: NDArray[np.int32], length_K: Ids) -> tuple[Ids, Ids]:
    """Each token once, with the longest of its matches: by one sort of both together."""
    both_K = np.sort((token_K.astype(np.int64) << LENGTH_BITS) | length_K)
    sorted_K = both_K >> LENGTH_BITS
    is_last_K = np.ones(len(both_K), bool)
    is_last_K[:-1] = sorted_K[1:] != sorted_K[:-1]
    return sorted_K[is_last_K], both_K[is_last_K] & ((1 << LENGTH_BITS) - 1)


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
