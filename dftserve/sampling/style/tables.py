"""The profiles of an engine, packed into one set of arrays on a device.

States are numbered consecutively over all profiles: those of profile p begin at `root_P[p]`, its
root. All profiles belong to one tokenizer; a shorter vocabulary is padded with tokens that lead to
the root, with factor 1 and no tilt.

Shapes: P profiles, V token ids of the longest vocabulary, A states of all profiles, N entries of
their rows, M bigrams, R rows, W columns of the logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class ProfileArrays(Protocol):
    """The parts of a profile that decoding reads; its creator (`styles.profile.Profile`) validates
    them.

    The state after a text must be its longest suffix that is a prefix of a phrase, so that it is
    determined by the last `StyleTables.depth` tokens.
    """

    @property
    def vocabulary(self) -> int: ...
    @property
    def root_next_V(self) -> NDArray[np.int32]: ...
    @property
    def root_log_factor_V(self) -> NDArray[np.float32]: ...
    @property
    def row_start_A(self) -> NDArray[np.int32]: ...
    @property
    def row_token_N(self) -> NDArray[np.int32]: ...
    @property
    def row_next_N(self) -> NDArray[np.int32]: ...
    @property
    def row_log_factor_N(self) -> NDArray[np.float32]: ...
    @property
    def unigram_V(self) -> NDArray[np.float32]: ...
    @property
    def bigram_context_C(self) -> NDArray[np.int32]: ...
    @property
    def bigram_start_C(self) -> NDArray[np.int32]: ...
    @property
    def bigram_token_M(self) -> NDArray[np.int32]: ...
    @property
    def bigram_delta_M(self) -> NDArray[np.float32]: ...


LOWEST_LOG_FACTOR = -20.0
"""Lower limit of a token's log factor, which is a sum over all phrases that the token continues."""


@dataclass(frozen=True)
class StyleTables:
    """The packed arrays; see the module's docstring. int32 and float32, contiguous."""

    root_P: Tensor
    root_next_PV: Tensor
    root_log_factor_PV: Tensor
    row_start_A: Tensor
    """[A + 1]: where each state's entries begin. They are sorted by token, and override the root's.
    """
    row_token_N: Tensor
    row_next_N: Tensor
    row_log_factor_N: Tensor
    unigram_PV: Tensor
    bigram_start_X: Tensor
    """[P·V + 1]: where the entries of token u of profile p begin, at index p·V + u. They are sorted
    by token."""
    bigram_token_M: Tensor
    bigram_delta_M: Tensor
    depth: int
    """Maximum number of preceding tokens on which a state depends."""
    search_steps: int
    """Steps of a binary search in the longest row or context."""

    @classmethod
    def of(
        cls, profiles: Sequence[ProfileArrays], device: torch.device | str = "cpu"
    ) -> "StyleTables":
        """The tables of these profiles, in their order."""
        vocabulary = max(profile.vocabulary for profile in profiles)
        roots = np.cumsum([0, *(len(each.row_start_A) - 1 for each in profiles)])
        rows = _joined([each.row_start_A for each in profiles])
        bigrams = _joined([_dense_contexts(each, vocabulary) for each in profiles])
        longest = int(max(np.diff(rows).max(initial=0), np.diff(bigrams).max(initial=0)))

        def padded(arrays: Sequence[NDArray], fill: Sequence[float]) -> NDArray:
            padded_arrays = [
                np.pad(array, (0, vocabulary - len(array)), constant_values=value)
                for array, value in zip(arrays, fill, strict=True)
            ]
            return np.stack(padded_arrays)

        numbered = list(zip(profiles, roots[:-1].tolist(), strict=True))
        zeros = [0.0] * len(profiles)
        factors = padded([each.root_log_factor_V for each in profiles], zeros)
        arrays = (
            roots[:-1].astype(np.int32),
            padded([each.root_next_V + root for each, root in numbered], roots[:-1].tolist()),
            np.maximum(factors, LOWEST_LOG_FACTOR),
            rows,
            np.concatenate([each.row_token_N for each in profiles]),
            np.concatenate([each.row_next_N + root for each, root in numbered]),
            np.maximum(
                np.concatenate([each.row_log_factor_N for each in profiles]), LOWEST_LOG_FACTOR
            ),
            padded([each.unigram_V for each in profiles], zeros),
            bigrams,
            np.concatenate([each.bigram_token_M for each in profiles]),
            np.concatenate([each.bigram_delta_M for each in profiles]),
        )
        # A tensor created in inference mode could not be used outside of it.
        with torch.inference_mode(mode=False):
            tensors = [torch.from_numpy(_copy_as_32_bit(array)).to(device) for array in arrays]
        return cls(
            *tensors,
            depth=depth_of(profiles),
            search_steps=max(longest, 1).bit_length(),
        )

    @property
    def vocabulary(self) -> int:
        return self.unigram_PV.shape[1]

    def arrays(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of their fields, which is that of the kernels' arguments."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Tensor))

    def step(self, profile_X: Tensor, state_X: Tensor, token_X: Tensor) -> tuple[Tensor, Tensor]:
        """The state after each token from each state, and the token's log factor at strength 1.
        Shapes broadcast; a token beyond the vocabulary leads to the root."""
        is_known_X = (token_X >= 0) & (token_X < self.vocabulary)
        token_X = torch.where(is_known_X, token_X, 0)
        root_entry_X = profile_X * self.vocabulary + token_X
        entry_X, found_X = _find(self.row_start_A, self.row_token_N, state_X, token_X)
        next_X = self.root_next_PV.view(-1)[root_entry_X]
        factor_X = self.root_log_factor_PV.view(-1)[root_entry_X]
        if len(self.row_token_N):
            next_X = torch.where(found_X, self.row_next_N[entry_X], next_X)
            factor_X = torch.where(found_X, self.row_log_factor_N[entry_X], factor_X)
        next_X = torch.where(is_known_X, next_X, self.root_P[profile_X])
        return next_X.long(), torch.where(is_known_X, factor_X, 0.0)

    def delta(self, profile_X: Tensor, context_X: Tensor, token_X: Tensor) -> Tensor:
        """δ of each token after each context token, in nats; shapes broadcast."""
        is_known_X = token_X < self.vocabulary
        token_X = torch.where(is_known_X, token_X, 0)
        delta_X = self.unigram_PV.view(-1)[profile_X * self.vocabulary + token_X]
        has_context_X = (context_X >= 0) & (context_X < self.vocabulary)
        row_X = profile_X * self.vocabulary + torch.where(has_context_X, context_X, 0)
        entry_X, found_X = _find(self.bigram_start_X, self.bigram_token_M, row_X, token_X)
        if len(self.bigram_token_M):
            found_X = found_X & has_context_X
            delta_X = torch.where(found_X, self.bigram_delta_M[entry_X], delta_X)
        return torch.where(is_known_X, delta_X, 0.0)


DEEPEST = 256
"""Maximum phrase length in tokens that an engine accepts: each row reads that many tokens back."""


def depth_of(profiles: Sequence[ProfileArrays]) -> int:
    """Maximum number of preceding tokens that determine a state; not counted beyond `DEEPEST`."""
    return max(_depth(profile) for profile in profiles)


def _find(start: Tensor, tokens: Tensor, row_X: Tensor, token_X: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each token among the entries of each row, and whether it was found."""
    if not len(tokens):
        return torch.zeros_like(token_X), torch.zeros_like(token_X, dtype=torch.bool)
    row_of = torch.repeat_interleave(start.diff().long())
    key_N, stride = row_of * _STRIDE + tokens, _STRIDE
    key_X = row_X * stride + token_X
    entry_X = torch.searchsorted(key_N, key_X.contiguous()).clamp_max(len(tokens) - 1)
    return entry_X, key_N[entry_X] == key_X


_STRIDE = 1 << 32
"""Larger than any token id."""


def _joined(starts: Sequence[NDArray]) -> NDArray:
    """One list of start offsets for the concatenated entries of all profiles."""
    counts = np.concatenate([np.diff(each) for each in starts])
    return np.concatenate([[0], np.cumsum(counts)])


def _dense_contexts(profile: ProfileArrays, vocabulary: int) -> NDArray:
    """[V + 1]: where each token's bigrams begin."""
    counts = np.zeros(vocabulary, np.int64)
    counts[profile.bigram_context_C] = np.diff(profile.bigram_start_C)
    return np.concatenate([[0], np.cumsum(counts)])


def _depth(profile: ProfileArrays) -> int:
    """The number of tokens on the shortest path from the root to the farthest state."""
    states = len(profile.row_start_A) - 1
    source_N = np.repeat(np.arange(states), np.diff(profile.row_start_A))
    is_seen = np.zeros(states, bool)
    is_seen[0] = True
    reached, depth = np.unique(profile.root_next_V), 0
    while len(reached := reached[~is_seen[reached]]) and depth <= DEEPEST:
        depth += 1
        is_seen[reached] = True
        is_from = np.zeros(states, bool)
        is_from[reached] = True
        reached = np.unique(profile.row_next_N[is_from[source_N]])
    return depth


def _copy_as_32_bit(array: NDArray) -> NDArray:
    """A contiguous copy as int32 or float32."""
    kind = np.float32 if array.dtype.kind == "f" else np.int32
    return np.array(array, dtype=kind, order="C")
