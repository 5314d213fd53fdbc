"""Repeated sequences of one text, on the host.

Position i of the text has a match of length n if the n tokens up to and including i equal the last
n tokens of the text, and none of them is a breaker. The token at i + 1 would extend the repetition,
and is penalised by

    multiplier · base^(n − allowed_length)      nats, if n >= allowed_length

where n is the longest match among all positions that this token follows. Breakers are not
penalised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.spec import DRY_BOUNDS, Dry

HISTORY = 32768
"""Number of tokens at a text's end that are searched."""
LONGEST_MATCH = int(DRY_BOUNDS["dry_allowed_length"].high)
"""Maximum match length in tokens; longer matches count as this long."""
MAX_PENALTY = 100.0
"""In nats: e^−100 is practically zero, and no logit overflows."""

LENGTH_BITS = 8
"""A token and a match length are sorted as one number, with the length in these low bits."""

Ids = NDArray[np.int64]
Nats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DryControls:
    """One request's DRY parameters, with breakers as tokens."""

    multiplier: float
    base: float
    allowed_length: int
    breaks_V: NDArray[np.bool_]
    """Whether each token ends a sequence; False for tokens beyond the mask."""

    @classmethod
    def of(cls, dry: Dry, breaks_V: NDArray[np.bool_]) -> "DryControls":
        return cls(dry.multiplier, dry.base, dry.allowed_length, breaks_V)

    def penalty(self, length_K: Any) -> NDArray[np.float64]:
        """The penalties in nats for matches of at least `allowed_length` tokens."""
        beyond_K = np.asarray(length_K) - self.allowed_length
        return np.minimum(self.multiplier * np.power(self.base, beyond_K), MAX_PENALTY)

    @cached_property
    def longest(self) -> int:
        """The match length above which the penalty no longer changes."""
        penalty_L = self.penalty(np.arange(self.allowed_length, LONGEST_MATCH + 1))
        return self.allowed_length + int(np.argmax(penalty_L == penalty_L[-1]))

    def breaks(self, token_K: NDArray[Any]) -> NDArray[np.bool_]:
        known_K = (token_K >= 0) & (token_K < len(self.breaks_V))
        return known_K & self.breaks_V[np.where(known_K, token_K, 0)]


class TextRepeats:
    """Keeps the end of a request's text, and the match length of each position, as its output
    grows.

    When a token is appended, the match length of a position becomes that of the previous position
    plus 1 if the position holds the same token, else 0: one vector operation over the searched
    text, whatever its repetitions. If the output is shorter than before, as after an engine fault,
    the text is read again from the beginning.
    """

    def __init__(self, prompt: Sequence[int], dry: DryControls) -> None:
        self._dry = dry
        self._prompt_N = np.array(prompt[-HISTORY:], np.int32)
        self._begin()

    def _begin(self) -> None:
        self._tokens_N = np.empty(max(2 * len(self._prompt_N), 256), np.int32)
        self._matched_N = np.zeros(len(self._tokens_N), np.uint8)
        self._length = self._output_length = 0
        self._append(self._prompt_N)

    def after(self, output: Sequence[int]) -> tuple[Ids, Nats]:
        """The tokens penalised after the output so far, without duplicates, and their penalties in
        nats."""
        if len(output) < self._output_length:
            self._begin()
        new_N = np.array(output[max(self._output_length, len(output) - HISTORY) :], np.int32)
        self._append(new_N)
        self._output_length = len(output)
        return self._penalties()

    def _append(self, new_N: NDArray[np.int32]) -> None:
        """Append tokens. Since matches longer than `longest` do not count, only the last `longest`
        tokens need to be processed one by one."""
        self._make_room(len(new_N))
        at_once = max(len(new_N) - self._dry.longest, 0)
        self._tokens_N[self._length : self._length + at_once] = new_N[:at_once]
        self._length += at_once
        if at_once:
            self._matched_N[: self._length] = 0
        for token, breaks in zip(new_N[at_once:], self._dry.breaks(new_N[at_once:]), strict=True):
            self._append_one(token, breaks=bool(breaks))

    def _append_one(self, token: np.int32, *, breaks: bool) -> None:
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
        index_K = np.flatnonzero(matched_N >= self._dry.allowed_length)
        # Tokens before the searched text do not count towards a match.
        length_K = np.minimum(matched_N[index_K], index_K + 1)
        token_K = tokens_N[index_K + 1]
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
    """The distinct tokens, each with its longest match; sorts token and length together, packed in
    one integer."""
    both_K = np.sort((token_K.astype(np.int64) << LENGTH_BITS) | length_K)
    sorted_K = both_K >> LENGTH_BITS
    is_last_K = np.ones(len(both_K), bool)
    is_last_K[:-1] = sorted_K[1:] != sorted_K[:-1]
    return sorted_K[is_last_K], both_K[is_last_K] & ((1 << LENGTH_BITS) - 1)


def together(rows: Sequence[tuple[Ids, Nats]]) -> tuple[Ids, Nats]:
    """Rows of penalties as two matrices [P, K], padded with token 0 and 0 nats. K is a power of
    two, so that few different shapes occur."""
    longest = max((len(token_K) for token_K, _ in rows), default=0)
    width = 1 << max(longest - 1, 0).bit_length()
    token_PK = np.zeros((len(rows), width), np.int64)
    value_PK = np.zeros((len(rows), width), np.float32)
    for place, (token_K, value_K) in enumerate(rows):
        token_PK[place, : len(token_K)] = token_K
        value_PK[place, : len(value_K)] = value_K
    return token_PK, value_PK
