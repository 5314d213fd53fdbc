"""A tilt of word choice: how much likelier people are to choose each token than the model is, on
its own and given the previous token.

    tilt = fit(human, model, vocabulary=len(tokenizer), human_units=…, model_units=…)

δ(v) = ln p⁺(v) − ln p⁻(v) and δ(v|u) likewise, with p⁺ of the corpus and p⁻ of the model's own
answers. Both use Witten and Bell's interpolation (1991): after a context u followed by c(u) tokens
of T(u) kinds, p(v|u) = (c(uv) + T(u)·p(v)) / (c(u) + T(u)), and p(v) is itself interpolated with
the uniform distribution in the same way.

A token that is frequent under few prompts is a topic, not a choice. The variance of a rate is
therefore that of a ratio over all answers to each prompt, Σ_d (c_d − r·n_d)² / (Σ_d c_d)², and at
least Poisson's. A token is kept if its δ is more than `Z` standard errors from 0 (a bigram's: from
its unigram's) and it occurs under at least `LEAST_GROUPS` prompts; its δ is then shrunk by a prior
with a standard deviation of `PRIOR_SD` nats.

Shapes: V token ids, C contexts, M bigrams.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dftserve.styles.profile import LARGEST_DELTA

Z = 3.0
"""Standard errors by which a δ must differ from 0 (a bigram's: from its token's) to be kept."""
LEAST_GROUPS = 5
"""Minimum number of groups of texts, on either side, that contain the token or bigram."""
PRIOR_SD = 0.5
"""Nats: the typical difference between people's choices and the model's."""
MOST_BIGRAMS = 1_000_000
"""Maximum number of bigrams; those farthest from 0 are kept."""


@dataclass(frozen=True, eq=False)
class Tilt:
    """The tilt in the form of a `Profile`'s arrays."""

    unigram_V: NDArray[np.float32]
    context_C: NDArray[np.int32]
    start_C: NDArray[np.int32]
    token_M: NDArray[np.int32]
    delta_M: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Counts:
    """Tokens and bigrams of the texts of one side.

    Bigrams are coded as context·V + token; `pair_*` are those that occur, in ascending order.
    """

    token_V: NDArray[np.int64]
    token_variance_V: NDArray[np.float64]
    """Variance of the logarithm of each token's rate, over groups of texts."""
    token_groups_V: NDArray[np.int64]
    context_V: NDArray[np.int64]
    """How often a counted token follows each token."""
    kinds_V: NDArray[np.int64]
    """How many different counted tokens follow each token."""
    pair_P: NDArray[np.int64]
    count_P: NDArray[np.int64]
    pair_variance_P: NDArray[np.float64]
    pair_groups_P: NDArray[np.int64]


def count(
    texts: Sequence[NDArray[np.int64]],
    counted: Sequence[NDArray[np.bool_]],
    groups: Sequence[int],
    *,
    vocabulary: int,
) -> Counts:
    """The counts of tokens and bigrams of one side, and how much they vary between groups.

    Args:
        counted: which tokens of each text to count; others still serve as contexts.
        groups: the group of each text, from 0; texts of one group are not independent.
    """
    V, D = vocabulary, max(groups, default=0) + 1
    lengths = [len(text) for text in texts]
    text_N = np.repeat(np.arange(len(texts)), lengths)
    group_N = np.repeat(np.asarray(groups, np.int64), lengths)
    token_N = _joined(texts)
    chosen = np.flatnonzero(np.concatenate([*counted, np.zeros(0, bool)]))
    token_V = np.bincount(token_N[chosen], minlength=V)
    size_D = np.bincount(group_N[chosen], minlength=D).astype(float)
    token_U, group_U, times_U = _by_group(token_N[chosen], group_N[chosen], D)
    second = chosen[(chosen > 0) & (text_N[chosen] == text_N[chosen - 1])]
    context_N = token_N[second - 1]
    pair_P, pair_index_N, count_P = np.unique(
        context_N * V + token_N[second], return_inverse=True, return_counts=True
    )
    context_V = np.bincount(context_N, minlength=V)
    exposed_X, exposed_group_X, exposed_times_X = _by_group(context_N, group_N[second], D)
    squared_V = np.bincount(exposed_X, exposed_times_X.astype(float) ** 2, minlength=V)
    pair_U, pair_group_U, pair_times_U = _by_group(pair_index_N, group_N[second], D)
    context_P = pair_P // V
    exposure_U = exposed_times_X[
        np.searchsorted(exposed_X * D + exposed_group_X, context_P[pair_U] * D + pair_group_U)
    ]
    return Counts(
        token_V=token_V,
        token_variance_V=_log_rate_variance(
            token_U, times_U, size_D[group_U], token_V, size_D.sum(), (size_D**2).sum()
        ),
        token_groups_V=np.bincount(token_U, minlength=V),
        context_V=context_V,
        kinds_V=np.bincount(context_P, minlength=V),
        pair_P=pair_P,
        count_P=count_P,
        pair_variance_P=_log_rate_variance(
            pair_U, pair_times_U, exposure_U, count_P, context_V[context_P], squared_V[context_P]
        ),
        pair_groups_P=np.bincount(pair_U, minlength=len(pair_P)),
    )


def _joined(texts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([*texts, np.zeros(0, np.int64)]).astype(np.int64)


def _by_group(
    item_N: NDArray[np.int64], group_N: NDArray[np.int64], groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(item, group, times) of each pair that occurs, in order."""
    code_U, times_U = np.unique(item_N * groups + group_N, return_counts=True)
    return code_U // groups, code_U % groups, times_U


def _log_rate_variance(
    item_U: NDArray,
    times_U: NDArray,
    exposure_U: NDArray,
    count_I: NDArray,
    exposure_I: NDArray | float,
    squared_I: NDArray | float,
) -> NDArray[np.float64]:
    """Σ_d (c_d − r·n_d)² / c² of each item, r = c/n, over groups; at least 1/c.

    Args:
        item_U, times_U, exposure_U: for each (item, group) that occurs: the item, c_d and n_d.
        count_I, exposure_I, squared_I: for each item: c, n and Σ_d n_d².
    """
    size = len(count_I)
    count_I = np.maximum(count_I, 0.5)
    rate_I = count_I / np.maximum(exposure_I, 1)
    own_I = np.bincount(item_U, times_U.astype(float) ** 2, minlength=size)
    cross_I = np.bincount(item_U, times_U * exposure_U.astype(float), minlength=size)
    spread_I = own_I - 2 * rate_I * cross_I + rate_I**2 * squared_I
    return np.maximum(spread_I / count_I**2, 1 / count_I)


# ── Rates ────────────────────────────────────────────────────────────────────────────────────────


def token_rates(counts: Counts) -> NDArray[np.float64]:
    """float64 [V], summing to 1: p(v), interpolated with the uniform distribution."""
    V, kinds = len(counts.token_V), np.count_nonzero(counts.token_V)
    if not kinds:
        return np.full(V, 1 / V)
    return (counts.token_V + kinds / V) / (counts.token_V.sum() + kinds)


def pair_rates(counts: Counts, pair_Q: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [Q]: p(v|u) of bigrams, interpolated with p(v)."""
    context_Q, token_Q = np.divmod(pair_Q, len(counts.token_V))
    kinds_Q, seen_Q = counts.kinds_V[context_Q], counts.context_V[context_Q]
    base_Q = token_rates(counts)[token_Q]
    count_Q = _looked_up(counts.pair_P, counts.count_P, pair_Q, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_Q = (count_Q + kinds_Q * base_Q) / (seen_Q + kinds_Q)
    return np.where(kinds_Q > 0, rate_Q, base_Q)


def _looked_up(
    keys_P: NDArray, values_P: NDArray, wanted_Q: NDArray, missing: float
) -> NDArray[np.float64]:
    found_Q = np.full(len(wanted_Q), float(missing))
    if len(keys_P):
        index_Q = np.minimum(np.searchsorted(keys_P, wanted_Q), len(keys_P) - 1)
        known_Q = keys_P[index_Q] == wanted_Q
        found_Q[known_Q] = values_P[index_Q[known_Q]]
    return found_Q


# ── The tilt ─────────────────────────────────────────────────────────────────────────────────────


def fit(human: Counts, model: Counts, allowed_V: NDArray[np.bool_]) -> Tilt:
    """The tilt from the model's word choice toward people's.

    Args:
        allowed_V: tokens that may be tilted; special tokens and names may not.
    """
    raw_V = np.log(token_rates(human)) - np.log(token_rates(model))
    variance_V = human.token_variance_V + model.token_variance_V
    groups_V = np.maximum(human.token_groups_V, model.token_groups_V)
    keep_V = allowed_V & (groups_V >= LEAST_GROUPS) & (np.abs(raw_V) > Z * np.sqrt(variance_V))
    unigram_V = np.where(keep_V, _shrunk(raw_V, variance_V), 0.0)
    pair_M, delta_M = _pairs(human, model, allowed_V, raw_V, unigram_V)
    V = len(allowed_V)
    context_C, start_C = np.unique(pair_M // V, return_index=True)
    return Tilt(
        unigram_V=_bounded(unigram_V),
        context_C=context_C.astype(np.int32),
        start_C=np.append(start_C, len(pair_M)).astype(np.int32),
        token_M=(pair_M % V).astype(np.int32),
        delta_M=_bounded(delta_M),
    )


def _pairs(
    human: Counts,
    model: Counts,
    allowed_V: NDArray[np.bool_],
    raw_V: NDArray[np.float64],
    unigram_V: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bigrams that differ from their unigram, in ascending order, and their δ."""
    pair_P = np.union1d(human.pair_P, model.pair_P)
    token_P = pair_P % len(allowed_V)
    raw_P = np.log(pair_rates(human, pair_P)) - np.log(pair_rates(model, pair_P))
    # A bigram that one side lacks has there the variance of half an occurrence.
    variance_P = sum(
        _looked_up(side.pair_P, side.pair_variance_P, pair_P, 2.0) for side in (human, model)
    )
    groups_P = np.maximum(
        *(_looked_up(side.pair_P, side.pair_groups_P, pair_P, 0) for side in (human, model))
    )
    beyond_P = raw_P - raw_V[token_P]
    far_P = np.abs(beyond_P) / np.sqrt(variance_P)
    keep_P = allowed_V[token_P] & (groups_P >= LEAST_GROUPS) & (far_P > Z)
    kept = np.flatnonzero(keep_P)
    if len(kept) > MOST_BIGRAMS:
        kept = np.sort(kept[np.argsort(-far_P[kept], kind="stable")[:MOST_BIGRAMS]])
    delta_M = unigram_V[token_P[kept]] + _shrunk(beyond_P[kept], np.asarray(variance_P)[kept])
    return pair_P[kept], delta_M


def _shrunk(raw: NDArray, variance: NDArray) -> NDArray[np.float64]:
    """The posterior mean under a normal prior around 0."""
    return raw * PRIOR_SD**2 / (PRIOR_SD**2 + variance)


def _bounded(delta: NDArray) -> NDArray[np.float32]:
    return np.clip(delta, -LARGEST_DELTA, LARGEST_DELTA).astype(np.float32)
