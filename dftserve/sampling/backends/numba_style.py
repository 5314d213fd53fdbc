"""Styles on a CPU: one kernel that processes row by row; the reference is `style.stage`.

All computation is done on the survivors of the guard only. The tokens left finite in a row are
listed, so that the law after the style reads and writes only these. Shapes: see `numba.py` and
`style/tables.py`.
"""

# Type checkers cannot analyse numba kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

import math

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling.backends.numba import (
    _ABSENT,
    _NEGATIVE_INFINITY,
    Array,
    _check_rows,
    _content,
    _exp,
    _kernel,
    _maxima,
    _reduction,
    _stop_count,
    _survivors,
    row_arguments,
    scratch,
)
from dftserve.sampling.backends.numba_slots import NumbaSlots, check_slots
from dftserve.sampling.controls import NO_LAW, NO_STYLE
from dftserve.sampling.slots import COLUMNS, COUNT, KL, TILT_KL, Slots
from dftserve.sampling.step import FiniteTokens, Step
from dftserve.sampling.style.stage import WEAKEST
from dftserve.sampling.style.strength import STEPS
from dftserve.sampling.style.tables import StyleTables

_LOWEST = float(np.finfo(np.float32).min)
_TINY = 1e-30

LISTED = 16
"""The lists of all rows together have room for one in `LISTED` tokens. A row whose list does not
fit is read by the law as a whole; the extra cost is small compared with its many survivors."""


class NumbaStyleStage:
    """`StyleStage` with its own scratch buffers, allocated on first use; not thread-safe."""

    def __init__(self, tables: StyleTables) -> None:
        self._depth = tables.depth
        self._tables = tuple(each.numpy() for each in tables.arrays())
        self._scratch = scratch(0)
        self._stops_E = np.empty(0, np.float32)
        self._rows_R = np.empty(0, np.int64)
        self._style_stats_RF = np.empty((0, COLUMNS - KL), np.float32)
        self.finite_tokens: FiniteTokens | None = None

    def __call__(self, logits_XV: Tensor, step: Step, slots: Slots) -> Tensor:
        assert isinstance(slots, NumbaSlots)
        texts, stop_ids_SE = step.texts, step.controls.stop_ids_RE.numpy()
        assert texts is not None
        finite = self._make_room(logits_XV.shape[1], len(step.slot_R), stop_ids_SE.shape[1])
        _restyle(
            *row_arguments(logits_XV, step, self._rows_R),
            np.ascontiguousarray(texts.tokens_SL.numpy()),
            texts.begin_S.numpy(),
            texts.at_R.numpy(),
            texts.input_R.numpy(),
            step.controls.numbers_RF.numpy(),
            stop_ids_SE,
            self._tables,
            self._depth,
            (*self._scratch, self._stops_E),
            slots.arrays(),
            *finite,
            self._style_stats_RF,
        )
        return torch.from_numpy(self._style_stats_RF)

    def _make_room(self, vocabulary: int, rows: int, width: int) -> FiniteTokens:
        if len(self._scratch[1]) != vocabulary:
            self._scratch = scratch(vocabulary)
        if len(self._stops_E) < width:
            self._stops_E = np.empty(width, np.float32)
        if len(self._rows_R) != rows:
            self._rows_R = np.arange(rows)
            self._style_stats_RF = np.empty((rows, COLUMNS - KL), np.float32)
        room = rows * max(vocabulary // LISTED, 1)
        finite = self.finite_tokens
        if finite is None or len(finite.token_N) < room or len(finite.start_R) != rows + 1:
            self.finite_tokens = finite = FiniteTokens(
                np.empty(room, np.int32), np.zeros(rows + 1, np.int64)
            )
        return finite


@_kernel
def _restyle(
    logits: Array,
    stride: int,
    vocabulary: int,
    rows_R: Array,
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    tokens_SL: Array,
    begin_S: Array,
    at_R: Array,
    input_R: Array,
    numbers_SF: Array,
    stop_ids_SE: Array,
    tables: tuple[Array, ...],
    depth: int,
    scratch: tuple[Array, Array, Array, Array],
    state: tuple[Array, ...],
    finite_N: Array,
    finite_start_R: Array,
    style_stats_RF: Array,
) -> None:
    check_slots(slot_R, offset_R, state[5])
    _check_rows(rows_R, stride, vocabulary, logits)
    finite_start_R[0] = 0
    for r in range(len(rows_R)):
        finite_start_R[r + 1] = finite_start_R[r]
        style_stats_RF[r] = 0.0
        numbers_F = numbers_SF[slot_R[r]]
        if numbers_F[columns.LAW] == NO_LAW or numbers_F[columns.STYLE] == NO_STYLE:
            continue
        row_V = logits[rows_R[r] * stride : rows_R[r] * stride + vocabulary]
        peak = _maxima(row_V.view(np.int32), scratch[0])
        if not math.isfinite(peak):
            continue
        text_state = _state_before(
            r, slot_R[r], offset_R, tokens_SL, begin_S, at_R, input_R, numbers_F, tables, depth
        )
        allowance = _allowance(state, slot_R[r], position_R[r] - offset_R[r], numbers_F)
        finite_start_R[r + 1] += _restyle_row(
            row_V,
            peak,
            numbers_F,
            stop_ids_SE[slot_R[r]],
            text_state,
            np.int64(input_R[r]),
            allowance,
            tables,
            scratch,
            finite_N[finite_start_R[r] :],
            style_stats_RF[r],
        )


@_kernel
def _state_before(
    r: int,
    s: int,
    offset_R: Array,
    tokens_SL: Array,
    begin_S: Array,
    at_R: Array,
    input_R: Array,
    numbers_F: Array,
    tables: tuple[Array, ...],
    depth: int,
) -> int:
    """stage.states_before, for one row."""
    profile = np.int64(numbers_F[columns.STYLE])
    state = np.int64(tables[0][profile])
    for back in range(min(depth, at_R[r] - begin_S[s] + 1) - 1, -1, -1):
        is_input = offset_R[r] >= back
        token = input_R[r - back] if is_input else tokens_SL[s, at_R[r] - back]
        state = _follow(profile, state, np.int64(token), tables)[0]
    return state


@_kernel
def _allowance(state: tuple[Array, ...], s: int, first: int, numbers_F: Array) -> float:
    """stage.allowances, for one row; `first`: the position of its request's first row."""
    base_S, sums_SF, waiting_SKF = state[3], state[4], state[5]
    rows_per_request = waiting_SKF.shape[1]
    max_kl = float(numbers_F[columns.STYLE_MAX_KL])
    count, spent = float(sums_SF[s, COUNT]), float(sums_SF[s, TILT_KL])
    for k in range(min(max(first - base_S[s], 0), rows_per_request)):
        count += waiting_SKF[s, k, COUNT]
        spent += waiting_SKF[s, k, TILT_KL]
    return max(max_kl + (max_kl * count - spent) / rows_per_request, 0.0)


@_kernel
def _follow(profile: int, state: int, token: int, tables: tuple[Array, ...]) -> tuple[int, float]:
    """StyleTables.step, for one token."""
    root_P, root_next_PV, root_log_factor_PV = tables[0], tables[1], tables[2]
    start_A, token_N = tables[3], tables[4]
    if token < 0 or token >= root_next_PV.shape[1]:
        return np.int64(root_P[profile]), np.float32(0.0)
    entry = _find(token_N, start_A[state], start_A[state + 1], token)
    if entry >= 0:
        return np.int64(tables[5][entry]), tables[6][entry]
    return np.int64(root_next_PV[profile, token]), root_log_factor_PV[profile, token]


@_kernel
def _find(token_N: Array, low: int, end: int, token: int) -> int:
    """The index of a token in the sorted range [low, end), or -1."""
    high = end
    while low < high:
        middle = (low + high) // 2
        if token_N[middle] < token:
            low = middle + 1
        else:
            high = middle
    return low if low < end and token_N[low] == token else -1


@_kernel
def _log_factors(
    profile: int, state: int, tokens_K: Array, tables: tuple[Array, ...], factor_K: Array
) -> None:
    """StyleTables.step's log factors, for sorted tokens."""
    _gather(tables[2][profile], tokens_K, factor_K)
    _overwrite_listed(
        tables[4], tables[6], tables[3][state], tables[3][state + 1], tokens_K, factor_K
    )


@_kernel
def _deltas(
    profile: int, context: int, tokens_K: Array, tables: tuple[Array, ...], delta_K: Array
) -> None:
    """StyleTables.delta, for sorted tokens."""
    unigram_V, start_X = tables[7][profile], tables[8]
    _gather(unigram_V, tokens_K, delta_K)
    if 0 <= context < len(unigram_V):
        row = profile * len(unigram_V) + context
        _overwrite_listed(tables[9], tables[10], start_X[row], start_X[row + 1], tokens_K, delta_K)


@_kernel
def _gather(value_V: Array, tokens_K: Array, value_K: Array) -> None:
    """Gathers each token's value; 0 for tokens beyond the table."""
    for k in range(len(tokens_K)):
        token = tokens_K[k]
        value_K[k] = value_V[token] if token < len(value_V) else np.float32(0.0)


@_kernel
def _overwrite_listed(
    token_N: Array, value_N: Array, start: int, end: int, tokens_K: Array, value_K: Array
) -> None:
    """Overwrites the values of listed tokens that have an entry. The shorter of the two sorted
    lists is looked up in the longer one."""
    if end - start < len(tokens_K):
        for entry in range(start, end):
            k = _find(tokens_K, 0, len(tokens_K), token_N[entry])
            if k >= 0:
                value_K[k] = value_N[entry]
    else:
        for k in range(len(tokens_K)):
            entry = _find(token_N, start, end, tokens_K[k])
            if entry >= 0:
                value_K[k] = value_N[entry]


@_kernel
def _restyle_row(
    row_V: Array,
    peak: float,
    numbers_F: Array,
    stop_ids_E: Array,
    state: int,
    context: int,
    allowance: float,
    tables: tuple[Array, ...],
    scratch: tuple[Array, Array, Array, Array],
    finite_L: Array,
    style_stats_F: Array,
) -> int:
    """stage.restyled, for one valid row. Lists the tokens left finite, and returns their number; 0
    if there is no room for them."""
    maxima_J, tokens_K, weights_4K, stops_E = scratch
    stop_ids_E = stop_ids_E[: _stop_count(stop_ids_E)]
    below_K, weight_K, delta_K, bias_K = weights_4K[0], weights_4K[1], weights_4K[2], weights_4K[3]
    temperature = float(numbers_F[columns.TEMPERATURE])
    divisor = numbers_F[columns.LOGITS_DIVISOR]
    strength = float(numbers_F[columns.STYLE_STRENGTH])
    profile = np.int64(numbers_F[columns.STYLE])

    # 1. The guard, and the content without the stop tokens, whose logits are restored below.
    log_guard = float(numbers_F[columns.STYLE_LOG_GUARD])
    threshold = np.float32(max(peak + log_guard / divisor, _LOWEST))
    plausible = _survivors(row_V, peak, threshold, divisor, maxima_J, tokens_K, below_K)
    kept_E = stops_E[: len(stop_ids_E)]
    for e in range(len(stop_ids_E)):
        is_known = stop_ids_E[e] < len(row_V)
        kept_E[e] = row_V[stop_ids_E[e]] if is_known else _NEGATIVE_INFINITY
    stop_z_below = _stop_weights(row_V, peak, divisor, temperature, stop_ids_E)
    count, content_peak = _content(row_V, threshold, tokens_K, below_K, plausible)
    tokens_K, weight_K, delta_K, bias_K = (
        tokens_K[:count],
        weight_K[:count],
        delta_K[:count],
        bias_K[:count],
    )

    style_stats_F[3] = strength
    if count > 0:
        # 2. The weights at T, the phrases' factors, δ.
        _log_factors(profile, state, tokens_K, tables, bias_K)
        _deltas(profile, context, tokens_K, tables, delta_K)
        for k in range(count):
            weight_K[k] = (below_K[k] - content_peak) / temperature
            if strength < 1.0 and bias_K[k] != 0.0:
                bias_K[k] = math.log1p(strength * math.expm1(bias_K[k]))
        z, z_once, z_twice = _phrase_sums(weight_K, bias_K)
        content_log_z = content_peak / temperature + math.log(z)
        share = 1.0 / (1.0 + math.exp(stop_z_below - content_log_z))
        for k in range(count):
            below_K[k] = weight_K[k] + bias_K[k]
        held_back = (z_twice / z_once - z_once / z) / max(strength, WEAKEST)

        # 3. The tilt.
        base_K = below_K[:count]
        within = allowance / max(share, _TINY)  # The share is 0 far below a stop token.
        reached = _largest_strength(base_K, delta_K, z_once, strength, within)
        tilt_kl, log_rise = _divergence(base_K, delta_K, z_once, reached)
        shift = math.log(z_once / z) + log_rise
        for k in range(count):
            bias_K[k] = bias_K[k] + reached * delta_K[k] - shift
        kl = _mean_bias(weight_K, bias_K) / z
        style_stats_F[0] = share * max(kl, 0.0)
        style_stats_F[1] = share * tilt_kl
        style_stats_F[2] = share * max(held_back, 0.0)
        style_stats_F[3] = reached

        # 4. Each survivor's new logit, stored over its weight, since the row is cleared first.
        scale = temperature / divisor
        for k in range(count):
            below_K[k] = row_V[tokens_K[k]] + np.float32(bias_K[k] * scale)
    for v in range(len(row_V)):
        row_V[v] = _NEGATIVE_INFINITY
    for k in range(count):
        row_V[tokens_K[k]] = below_K[k]
    for e in range(len(stop_ids_E)):
        if stop_ids_E[e] < len(row_V):
            row_V[stop_ids_E[e]] = kept_E[e]
    return _list(row_V, tokens_K, stop_ids_E, finite_L)


@_kernel
def _list(row_V: Array, tokens_K: Array, stop_ids_E: Array, finite_L: Array) -> int:
    """Lists the content, then the stop tokens that are not -inf; returns their number."""
    count = len(tokens_K)
    if count + len(stop_ids_E) > len(finite_L):
        return 0
    finite_L[:count] = tokens_K
    for e in range(len(stop_ids_E)):
        if stop_ids_E[e] < len(row_V) and row_V[stop_ids_E[e]] > _NEGATIVE_INFINITY:
            finite_L[count] = stop_ids_E[e]
            count += 1
    return count


@_kernel
def _stop_weights(
    row_V: Array, peak: float, divisor: float, temperature: float, stop_ids_E: Array
) -> float:
    """Sets the stop tokens of the row to -inf; returns ln of their sum at T, relative to the row's
    maximum."""
    highest, z = float(_ABSENT), 0.0
    for e in range(len(stop_ids_E)):
        if stop_ids_E[e] < len(row_V) and row_V[stop_ids_E[e]] > _NEGATIVE_INFINITY:
            highest = max(highest, (row_V[stop_ids_E[e]] - peak) * divisor / temperature)
    for e in range(len(stop_ids_E)):
        if stop_ids_E[e] < len(row_V) and row_V[stop_ids_E[e]] > _NEGATIVE_INFINITY:
            z += math.exp((row_V[stop_ids_E[e]] - peak) * divisor / temperature - highest)
            row_V[stop_ids_E[e]] = _NEGATIVE_INFINITY
    return highest + math.log(z) if z > 0 else float(_ABSENT)


@_reduction
def _phrase_sums(weight_K: Array, log_factor_K: Array) -> tuple[float, float, float]:
    """Σ e^w, Σ e^w·F and Σ e^w·F²."""
    z, z_once, z_twice = 0.0, 0.0, 0.0
    for k in range(len(weight_K)):
        z += _exp(weight_K[k])
        z_once += _exp(weight_K[k] + log_factor_K[k])
        z_twice += _exp(weight_K[k] + np.float32(2.0) * log_factor_K[k])
    return z, z_once, z_twice


@_reduction
def _mean_bias(weight_K: Array, bias_K: Array) -> float:
    """Σ e^(w + b)·b."""
    total = 0.0
    for k in range(len(weight_K)):
        total += _exp(weight_K[k] + bias_K[k]) * bias_K[k]
    return total


@_reduction
def _tilted_sums(base_K: Array, delta_K: Array, s: float) -> tuple[float, float]:
    """Σ e^(w + sδ) and Σ δ·e^(w + sδ)."""
    z, a = 0.0, 0.0
    for k in range(len(base_K)):
        share = _exp(base_K[k] + np.float32(s) * delta_K[k])
        z += share
        a += share * delta_K[k]
    return z, a


@_kernel
def _divergence(base_K: Array, delta_K: Array, z_once: float, s: float) -> tuple[float, float]:
    """K(s), and ln E_p[e^{sδ}]."""
    z, a = _tilted_sums(base_K, delta_K, s)
    log_rise = math.log(z / z_once)
    return max(s * a / z - log_rise, 0.0), log_rise


@_kernel
def _largest_strength(
    base_K: Array, delta_K: Array, z_once: float, requested: float, allowance: float
) -> float:
    """strength.largest_strength, for one row."""
    goal = math.sqrt(allowance)
    at_high = math.sqrt(_divergence(base_K, delta_K, z_once, requested)[0]) - goal
    if at_high <= 0:
        return requested
    low, high, at_low, side, strength = 0.0, requested, -goal, 0, requested
    for _ in range(STEPS):
        strength = high - at_high * (high - low) / (at_high - at_low)
        at = math.sqrt(_divergence(base_K, delta_K, z_once, strength)[0]) - goal
        if at > 0:
            at_low = 0.5 * at_low if side > 0 else at_low
            high, at_high, side = strength, at, 1
        else:
            at_high = 0.5 * at_high if side < 0 else at_high
            low, at_low, side = strength, at, -1
    return strength
