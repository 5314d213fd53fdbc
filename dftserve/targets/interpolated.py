"""Sparse targets of rows that have their own mass on a few tokens and distribute the rest by one
shared distribution, computed without building dense rows.

    q_v = s_v + left·u_v      s: nonzero on the row's entries only; u: the same for all rows

Shapes: R rows, V vocabulary, E entries of all rows together, C candidates for the top, K, M draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dftserve.targets.sparse import Targets


@dataclass(frozen=True, eq=False)
class Shared:
    """u, with quantities that are reused for every row."""

    mass_V: np.ndarray
    """float64, above 0, sums to 1."""

    @cached_property
    def order_V(self) -> np.ndarray:
        """The tokens, likeliest first."""
        return np.argsort(-self.mass_V, kind="stable")

    @cached_property
    def cumulated_V(self) -> np.ndarray:
        return np.cumsum(self.mass_V)

    @cached_property
    def weighted_log(self) -> float:
        """Σ u ln u."""
        return float((self.mass_V * np.log(self.mass_V)).sum())


@dataclass(frozen=True, eq=False)
class Entries:
    """The rows' own masses, sorted by row and token; each pair occurs once."""

    row_E: np.ndarray
    token_E: np.ndarray
    mass_E: np.ndarray
    """float64, s."""
    left_R: np.ndarray
    """float64, above 0."""

    @staticmethod
    def of(
        levels: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        left_R: np.ndarray,
        vocabulary: int,
    ) -> "Entries":
        """From (rows, tokens, masses); masses of the same row and token are added."""
        keys_E = np.concatenate([_NONE, *(row * vocabulary + token for row, token, _ in levels)])
        masses_E = np.concatenate([_NONE.astype(float), *(mass for _, _, mass in levels)])
        keys, index_E = np.unique(keys_E, return_inverse=True)
        summed = np.bincount(index_E, masses_E, minlength=len(keys))
        return Entries(keys // vocabulary, keys % vocabulary, summed, left_R)

    def at(self, row_X: np.ndarray, token_X: np.ndarray, vocabulary: int) -> np.ndarray:
        """s of these pairs of row and token; 0 for pairs without an entry."""
        if not len(self.row_E):
            return np.zeros(len(row_X))
        keys, wanted = self.row_E * vocabulary + self.token_E, row_X * vocabulary + token_X
        index_X = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        return np.where(keys[index_X] == wanted, self.mass_E[index_X], 0.0)


_NONE = np.zeros(0, np.int64)


def sparsify(
    entries: Entries,
    shared: Shared,
    labels_R: np.ndarray,
    *,
    k: int,
    draws: int,
    random: np.random.Generator,
) -> Targets:
    """The same as `sparse.sparsify` of the dense rows, but with sums in float64."""
    rows, vocabulary = len(labels_R), len(shared.mass_V)
    k = min(k, vocabulary)
    # 1. Candidates: tokens without an entry can be in a row's top k only if in u's top k.
    row_C, token_C = _candidates(entries, shared, rows, k)
    u_C = shared.mass_V[token_C]
    s_C = entries.at(row_C, token_C, vocabulary)
    q_C = s_C + entries.left_R[row_C] * u_C
    # 2. The top k of each row; every row has at least k candidates.
    order_C = np.lexsort((token_C, -q_C, row_C))
    starts_R = np.searchsorted(row_C[order_C], np.arange(rows))
    top_RK = order_C[starts_R[:, None] + np.arange(k)]
    top_ids_RK = token_C[top_RK]
    is_top_C = np.zeros(len(row_C), dtype=bool)
    is_top_C[top_RK] = True
    # 3. The rest: the other candidates one by one, and all other tokens by sums over u.
    others_u_R = (1 - np.bincount(row_C, u_C, minlength=rows)).clip(min=0.0)
    tail_R = np.bincount(row_C, np.where(is_top_C, 0.0, q_C), minlength=rows)
    tail_R += entries.left_R * others_u_R
    others_log_R = shared.weighted_log - np.bincount(row_C, u_C * np.log(u_C), minlength=rows)
    entropy_R = -np.bincount(row_C, q_C * np.log(q_C), minlength=rows)
    entropy_R -= entries.left_R * (np.log(entries.left_R) * others_u_R + others_log_R)
    own_R = entries.at(np.arange(rows), labels_R, vocabulary)
    own_R = own_R + entries.left_R * shared.mass_V[labels_R]
    if k == vocabulary:
        tail_R[:] = 0.0
    with np.errstate(divide="ignore"):
        tail_logprob_R = np.log(tail_R)
    return Targets(
        top_ids_TK=top_ids_RK,
        top_logprobs_TK=np.log(q_C[top_RK]).astype(np.float32),
        tail_ids_TM=_drawn(entries, shared, top_ids_RK, draws, random),
        tail_logprob_T=tail_logprob_R.astype(np.float32),
        token_logprob_T=np.log(own_R).astype(np.float32),
        entropy_T=entropy_R.astype(np.float32),
    )


def _candidates(
    entries: Entries, shared: Shared, rows: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The row and the token of each candidate; every pair occurs once."""
    vocabulary = len(shared.mass_V)
    likeliest_RK = np.arange(rows)[:, None] * vocabulary + shared.order_V[:k]
    own_E = entries.row_E * vocabulary + entries.token_E
    keys_C = np.union1d(own_E, likeliest_RK.reshape(-1))
    return keys_C // vocabulary, keys_C % vocabulary


def _drawn(
    entries: Entries,
    shared: Shared,
    top_ids_RK: np.ndarray,
    draws: int,
    random: np.random.Generator,
) -> np.ndarray:
    """int64 [R, M]: draws from the tail; first whether from s or from u, then a token from it."""
    rows, k = top_ids_RK.shape
    vocabulary = len(shared.mass_V)
    if not draws or k == vocabulary:
        return np.zeros((rows, draws), dtype=np.int64)
    top_keys = np.sort((np.arange(rows)[:, None] * vocabulary + top_ids_RK).reshape(-1))
    own_keys = entries.row_E * vocabulary + entries.token_E
    mass_E = np.where(np.isin(own_keys, top_keys, assume_unique=True), 0.0, entries.mass_E)
    own_R = np.bincount(entries.row_E, mass_E, minlength=rows)
    shared_R = 1 - shared.mass_V[top_ids_RK].sum(axis=1)
    all_R = own_R + entries.left_R * shared_R
    by_own_RM = random.random((rows, draws)) * all_R[:, None] < own_R[:, None]
    uniform_RM = random.random((rows, draws))
    by_shared_RM = _drawn_of_shared(shared, top_ids_RK, uniform_RM * shared_R[:, None])
    return np.where(by_own_RM, _drawn_of_own(entries, mass_E, own_R, uniform_RM), by_shared_RM)


def _drawn_of_own(
    entries: Entries, mass_E: np.ndarray, own_R: np.ndarray, uniform_RM: np.ndarray
) -> np.ndarray:
    """In proportion to `mass_E` within each row; arbitrary if a row has none."""
    if not len(mass_E):
        return np.zeros(uniform_RM.shape, dtype=np.int64)
    cumulated_E = np.cumsum(mass_E)
    before_R = np.cumsum(own_R) - own_R
    index_RM = np.searchsorted(
        cumulated_E, before_R[:, None] + uniform_RM * own_R[:, None], "right"
    )
    return entries.token_E[index_RM.clip(max=len(mass_E) - 1)]


def _drawn_of_shared(shared: Shared, top_ids_RK: np.ndarray, at_RM: np.ndarray) -> np.ndarray:
    """The token at which the cumulative sum of u, skipping the row's top tokens, reaches
    `at_RM`."""
    at_RM = at_RM.copy()
    for token_R in np.sort(top_ids_RK, axis=1).T:
        mass_R = shared.mass_V[token_R]
        is_past_RM = at_RM >= (shared.cumulated_V[token_R] - mass_R)[:, None]
        at_RM += np.where(is_past_RM, mass_R[:, None], 0.0)
    found_RM = np.searchsorted(shared.cumulated_V, at_RM, "right")
    return found_RM.clip(max=len(shared.mass_V) - 1)
