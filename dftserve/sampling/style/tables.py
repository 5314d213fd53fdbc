"""The profiles of an engine, packed into one set of arrays on a device.

States are numbered through all profiles: those of profile p begin at `root_P[p]`, its root. All
profiles belong to one tokenizer; a shorter vocabulary is padded with tokens that lead to the root,
with factor 1 and no tilt.

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
    """What decoding reads of a profile, checked by whoever made it: `styles.profile.Profile`.

    The state after a text must be the longest of its endings that begins a phrase, so that the
    last `StyleTables.depth` tokens alone say it.
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
"""Phrases that share a token multiply their factors; none becomes rarer than e^-20."""


@dataclass(frozen=True)
class StyleTables:
    """The packed arrays; see the module's docstring. int32 and float32, contiguous."""

    root_P: Tensor
    root_next_PV: Tensor
    root_log_factor_PV: Tensor
    row_start_A: Tensor
    """[A + 1]: the entries of each state, tokens rising; they replace the root's."""
    row_token_N: Tensor
    row_next_N: Tensor
    row_log_factor_N: Tensor
    unigram_PV: Tensor
    bigram_start_X: Tensor
    """[P·V + 1]: the entries of token u of profile p begin at p·V + u; tokens rise."""
    bigram_token_M: Tensor
    bigram_delta_M: Tensor
    depth: int
    """Tokens of a text that its state depends on, at most."""
    search_steps: int
    """Halvings that find a token in the longest row or context."""

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
            made = [
                np.pad(array, (0, vocabulary - len(array)), constant_values=value)
                for array, value in zip(arrays, fill, strict=True)
            ]
            return np.stack(made)

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
        # A tensor made in inference mode could not be used outside of it.
        with torch.inference_mode(mode=False):
            tensors = [torch.from_numpy(_plain(array)).to(device) for array in arrays]
        return cls(
            *tensors,
            depth=depth_of(profiles),
            search_steps=max(longest, 1).bit_length(),
        )

    @property
    def vocabulary(self) -> int:
        return self.unigram_PV.shape[1]

    def arrays(self) -> tuple[Tensor, ...]:
        """In the order of their fields, as kernels take them."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if isinstance(value, Tensor))

    def step(self, profile_X: Tensor, state_X: Tensor, token_X: Tensor) -> tuple[Tensor, Tensor]:
        """The state that each token leads to from each state, and its log factor at strength 1.
        Shapes broadcast; a token beyond the vocabulary leads to the root."""
        is_known_X = (token_X >= 0) & (token_X < self.vocabulary)
        token_X = torch.where(is_known_X, token_X, 0)
        place_X = profile_X * self.vocabulary + token_X
        entry_X, found_X = _find(self.row_start_A, self.row_token_N, state_X, token_X)
        next_X = self.root_next_PV.view(-1)[place_X]
        factor_X = self.root_log_factor_PV.view(-1)[place_X]
        if len(self.row_token_N):
            next_X = torch.where(found_X, self.row_next_N[entry_X], next_X)
            factor_X = torch.where(found_X, self.row_log_factor_N[entry_X], factor_X)
        next_X = torch.where(is_known_X, next_X, self.root_P[profile_X])
        return next_X.long(), torch.where(is_known_X, factor_X, 0.0)

    def delta(self, profile_X: Tensor, context_X: Tensor, token_X: Tensor) -> Tensor:
        """δ of each token behind each other one, in nats; shapes broadcast."""
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
"""Tokens of the longest phrase that an engine takes: each row looks that far back."""


def depth_of(profiles: Sequence[ProfileArrays]) -> int:
    """Tokens of a text that its state depends on, at most; more than `DEEPEST` are not counted."""
    return max(_depth(profile) for profile in profiles)


def _find(start: Tensor, tokens: Tensor, row_X: Tensor, token_X: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token stands among the entries of each row, and whether it is there."""
    if not len(tokens):
        return torch.zeros_like(token_X), torch.zeros_like(token_X, dtype=torch.bool)
    row_of = torch.repeat_interleave(start.diff().long())
    key_N, stride = row_of * _STRIDE + tokens, _STRIDE
    key_X = row_X * stride + token_X
    entry_X = torch.searchsorted(key_N, key_X.contiguous()).clamp_max(len(tokens) - 1)
    return entry_X, key_N[entry_X] == key_X


_STRIDE = 1 << 32
"""More than there are token ids."""


def _joined(starts: Sequence[NDArray]) -> NDArray:
    """One list of starts for all profiles, whose entries follow each other."""
    counts = np.concatenate([np.diff(each) for each in starts])
    return np.concatenate([[0], np.cumsum(counts)])


def _dense_contexts(profile: ProfileArrays, vocabulary: int) -> NDArray:
    """[V + 1]: the starts of all tokens' bigrams."""
    counts = np.zeros(vocabulary, np.int64)
    counts[profile.bigram_context_C] = np.diff(profile.bigram_start_C)
    return np.concatenate([[0], np.cumsum(counts)])


def _depth(profile: ProfileArrays) -> int:
    """The tokens that lead from the root to the farthest state."""
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


def _plain(array: NDArray) -> NDArray:
    """int32 or float32, contiguous, in memory of its own."""
    kind = np.float32 if array.dtype.kind == "f" else np.int32
    return np.array(array, dtype=kind, order="C")
