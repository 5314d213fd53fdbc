"""The transform on a CPU: one kernel, compiled by numba when an engine starts.

For each row: compute the maxima of its chunks; skip the chunks whose maximum is below the guard's
threshold, since they contain no plausible token; list the survivors of the others; compute on the
survivors only; write -inf everywhere and the survivors' new values. In a row rewritten by a style,
only the tokens that it left finite are read and written. The maths is that of `transform.py`, which
is the reference.

numba is a dependency of vLLM. Shapes: V vocabulary, J chunks, K survivors of one row, L tokens of
it that a style has left finite, E stop tokens, C constants.
"""

# Type checkers cannot analyse numba kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import draws, entropy, guard, stops, token_classes, words
from dftserve.sampling.backends.base import Backend
from dftserve.sampling.backends.numba_slots import (
    NumbaSlots,
    check_slots,
    put_level_in_force,
    settle,
    stage_row,
)
from dftserve.sampling.controls import (
    DEFAULT_CONSTANTS,
    LAW_CODES,
    NO_LAW,
    Controls,
    LawConstants,
)
from dftserve.sampling.slots import COLUMNS, KL, Slots
from dftserve.sampling.step import Step
from dftserve.sampling.token_classes import TokenClasses
from dftserve.sampling.transform import Statistics

Array = np.ndarray[Any, Any]

CHUNK = 64
"""Wide enough that a maximum is cheap, narrow enough that few tokens are read a second time."""


class NumbaBackend(Backend):
    """The transform with its own scratch buffers; not thread-safe."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        constants: LawConstants = DEFAULT_CONSTANTS,
        token_classes: TokenClasses | None = None,
    ) -> None:
        super().__init__(device, constants, token_classes)
        # Without classes every token is `other`; rows that need classes were rejected before.
        no_classes_V = np.zeros(0, np.uint8)
        self._classes_V = no_classes_V if token_classes is None else token_classes.packed_V.copy()
        self._constants_C = np.array(constants.packed)
        self._scratch = scratch(0)
        self._result = _Result(0)
        self._stops_2E = np.empty((2, 0), np.float32)

    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        self._make_room(logits_XV.shape[1], *controls.stop_ids_RE.shape)
        _transform(
            _flat(logits_XV).numpy(),
            logits_XV.stride(0),
            logits_XV.shape[1],
            self._result.all_rows_R if rows_R is None else np.ascontiguousarray(rows_R.numpy()),
            controls.numbers_RF.contiguous().numpy(),
            controls.stop_ids_RE.contiguous().numpy(),
            self._result.no_tokens_R
            if controls.last_token_R is None
            else np.ascontiguousarray(controls.last_token_R.numpy()),
            self._result.zero_R
            if controls.position_R is None
            else np.ascontiguousarray(controls.position_R.numpy()),
            self._classes_V,
            self._constants_C,
            (*self._scratch, self._stops_2E),
            self._result.values_FR,
            self._result.valid_R,
        )
        return self._result.statistics

    def step(self, logits_XV: Tensor, step: Step, slots: Slots) -> Statistics:
        """As `Backend.step`, in one kernel."""
        assert isinstance(slots, NumbaSlots)
        stop_ids_SE = step.controls.stop_ids_RE.numpy()
        self._make_room(logits_XV.shape[1], step.slot_R.shape[0], stop_ids_SE.shape[1])
        result, last_token_R, known_S = self._result, step.last_token_R, step.known_S
        style_stats_RF = step.style_stats_RF
        _step(
            *row_arguments(logits_XV, step, result.all_rows_R),
            result.no_ids_R if last_token_R is None else last_token_R.numpy(),
            slots.nothing_known_S if known_S is None else known_S.numpy(),
            step.controls.numbers_RF.numpy(),
            stop_ids_SE,
            self._classes_V,
            self._constants_C,
            (*self._scratch, self._stops_2E),
            slots.arrays(),
            result.no_style_stats_RF if style_stats_RF is None else style_stats_RF.numpy(),
            *(result.no_finite_tokens if step.finite_tokens is None else step.finite_tokens),
            result.values_FR,
            result.valid_R,
        )
        return result.statistics

    def _make_room(self, vocabulary: int, rows: int, width: int) -> None:
        if len(self._scratch[1]) != vocabulary:
            self._scratch = scratch(vocabulary)
        if len(self._result.valid_R) != rows:
            self._result = _Result(rows)
        if self._stops_2E.shape[1] < width:
            self._stops_2E = np.empty((2, width), np.float32)

    def create_slots(self, slots: int, rows_per_request: int) -> NumbaSlots:
        return NumbaSlots(slots, rows_per_request, self.device, self.constants)


def row_arguments(
    logits_XV: Tensor, step: Step, all_rows_R: Array
) -> tuple[Array, int, int, Array, Array, Array, Array]:
    """The first arguments of a step's kernels: the flattened logits, their stride and width, and
    each row's index in them, slot, position and offset."""
    stride, vocabulary = logits_XV.stride(0), logits_XV.shape[1]
    is_whole = stride == vocabulary
    return (
        logits_XV.numpy().reshape(-1) if is_whole else _flat(logits_XV).numpy(),
        stride,
        vocabulary,
        all_rows_R if step.rows_R is None else step.rows_R.numpy(),
        step.slot_R.numpy(),
        step.position_R.numpy(),
        step.offset_R.numpy(),
    )


def scratch(vocabulary: int) -> tuple[Array, Array, Array]:
    """Scratch for one row's chunk maxima, survivors' ids and survivors' weights: everything whose
    size depends on the vocabulary."""
    maxima_J = np.empty(-(-vocabulary // CHUNK), np.float32)
    return maxima_J, np.empty(vocabulary, np.int32), np.empty((4, vocabulary), np.float32)


class _Result:
    """The output arrays of a call with a given number of rows, and its default inputs."""

    def __init__(self, rows: int) -> None:
        self.all_rows_R = np.arange(rows)
        self.no_tokens_R = np.full(rows, -1)
        self.zero_R = np.zeros(rows, np.int64)
        self.no_ids_R = np.full(rows, -1, np.int32)
        self.no_style_stats_RF = np.zeros((rows, COLUMNS - KL), np.float32)
        self.no_finite_tokens = np.empty(0, np.int32), np.zeros(rows + 1, np.int64)
        self.values_FR = np.empty((4, rows), np.float32)
        self.valid_R = np.empty(rows, np.bool_)
        self.statistics = Statistics(
            *torch.from_numpy(self.values_FR), valid_R=torch.from_numpy(self.valid_R)
        )


def _flat(logits_XV: Tensor) -> Tensor:
    """The memory of all rows as one vector, including gaps between them: the rows are slices of
    wider ones in an engine that pads its vocabulary."""
    rows, vocabulary = logits_XV.shape
    size = (rows - 1) * logits_XV.stride(0) + vocabulary if rows else 0
    return logits_XV.as_strided((size,), (1,))


# Globals are compiled into kernels as constants, so only values that never change may be globals;
# the laws' constants are passed as an argument. Weights are float32, as the logits are; the few
# scalars of a row are float64.
_ABSENT = np.float32(entropy.ABSENT)
_FARTHEST = np.float32(guard.FARTHEST)
_LOWEST = float(np.finfo(np.float32).min)
_DYNATEMP, _WORDS = LAW_CODES["dynatemp"], LAW_CODES["words"]
_TOP_N_SIGMA, _XTC = LAW_CODES["top_n_sigma"], LAW_CODES["xtc"]
_WORD, _FIRST, _SECOND = draws.WORD, draws.FIRST, draws.SECOND
_SHIFT, _UNIT = 32 - draws.DRAW_BITS, np.float32(2.0**-draws.DRAW_BITS)
_START, _INSIDE = token_classes.START, token_classes.INSIDE
_STATE_SHIFT, _CLASS_MASK = token_classes.STATE_SHIFT, token_classes.CLASS_MASK
_COOLEST = words.COOLEST
_NEARLY, _NEWTON_STEPS = stops.NEARLY, stops.NEWTON_STEPS
_RESOLUTION = 1e-8
"""Below the resolution of float32: another Newton step would change nothing."""
_NEGATIVE_INFINITY = np.float32(-np.inf)

# fastmath=False is explicit, because a function would otherwise inherit it from its first caller.
_kernel = njit(error_model="numpy", fastmath=False)
_inlined = njit(error_model="numpy", fastmath=False, inline="always")
"""Inlining propagates constant arguments, so that loops have a known length."""
_reduction = njit(error_model="numpy", fastmath={"reassoc", "nsz"})
"""Sums may be reordered for speed; values of single elements do not depend on the order."""


@_kernel
def _transform(
    logits: Array,
    stride: int,
    vocabulary: int,
    rows_R: Array,
    numbers_RF: Array,
    stop_ids_RE: Array,
    last_token_R: Array,
    position_R: Array,
    classes_V: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
    values_FR: Array,
    valid_R: Array,
) -> None:
    rows = len(rows_R)
    if rows != len(numbers_RF) or rows != len(last_token_R) or rows != len(position_R):
        raise ValueError("rows: their number differs from that of the rows of controls.")
    _check_rows(rows_R, stride, vocabulary, logits)
    nothing_L = np.empty(0, np.int32)
    for r in range(len(rows_R)):
        row_V = logits[rows_R[r] * stride : rows_R[r] * stride + vocabulary]
        valid_R[r], values = _rewrite_if_valid(
            row_V,
            numbers_RF[r],
            stop_ids_RE[r],
            last_token_R[r],
            position_R[r],
            nothing_L,
            classes_V,
            constants_C,
            scratch,
        )
        for f in range(len(values)):
            values_FR[f, r] = values[f]


@_kernel
def _step(
    logits: Array,
    stride: int,
    vocabulary: int,
    rows_R: Array,
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    last_token_R: Array,
    known_S: Array,
    numbers_SF: Array,
    stop_ids_SE: Array,
    classes_V: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
    state: tuple[Array, ...],
    style_stats_RF: Array,
    finite_N: Array,
    finite_start_R: Array,
    values_FR: Array,
    valid_R: Array,
) -> None:
    """A whole step: settle each request's slot, rewrite its rows, stage their statistics."""
    check_slots(slot_R, offset_R, state[5])
    _check_rows(rows_R, stride, vocabulary, logits)
    # 1. Commit the previous step's rows, once per request: all its rows share the level.
    for r in range(len(rows_R)):
        s = slot_R[r]
        if offset_R[r] == 0 and numbers_SF[s, columns.LAW] != NO_LAW:
            settle(state, s, position_R[r], numbers_SF[s], constants_C)
    numbers_F = np.empty(numbers_SF.shape[1], numbers_SF.dtype)
    for r in range(len(rows_R)):
        s = slot_R[r]
        valid_R[r] = False
        values_FR[:, r] = 0.0
        if numbers_SF[s, columns.LAW] == NO_LAW:
            continue
        # 2. Rewrite the row, at the current level. Copied by a loop: a slice assignment would also
        #    compile the error message for unequal lengths, which takes seconds.
        for f in range(len(numbers_F)):
            numbers_F[f] = numbers_SF[s, f]
        put_level_in_force(state, s, numbers_F, constants_C)
        row_V = logits[rows_R[r] * stride : rows_R[r] * stride + vocabulary]
        valid_R[r], values = _rewrite_if_valid(
            row_V,
            numbers_F,
            stop_ids_SE[s],
            np.int64(last_token_R[r]),
            position_R[r],
            finite_N[finite_start_R[r] : finite_start_R[r + 1]],
            classes_V,
            constants_C,
            scratch,
        )
        for f in range(len(values)):
            values_FR[f, r] = values[f]
        # 3. Stage its statistics until its token is accepted.
        samples = position_R[r] + 1 >= known_S[s]
        stage_row(
            state, s, offset_R[r], position_R[r], samples, valid_R[r], values, style_stats_RF[r]
        )


@_kernel
def _check_rows(rows_R: Array, stride: int, vocabulary: int, logits: Array) -> None:
    """Raise IndexError for row indices out of range; kernels do not check any others."""
    for row in rows_R:
        if row < 0 or row * stride + vocabulary > len(logits):
            raise IndexError("rows: an index is outside the rows of the logits.")


@_kernel
def _rewrite_if_valid(
    row_V: Array,
    numbers_F: Array,
    stop_ids_E: Array,
    last_token: int,
    position: int,
    finite_L: Array,
    classes_V: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
) -> tuple[bool, tuple[float, float, float, float]]:
    """Whether the row is valid, and its statistics, in the order of `Statistics`.

    `finite_L`: all tokens that are not -inf; empty if unknown, in which case the whole row is read.
    """
    peak = _peak(row_V, finite_L, scratch[0])
    if not math.isfinite(peak):
        return False, (0.0, 0.0, 0.0, 0.0)
    if numbers_F[columns.LAW] == _WORDS:
        state = 0
        if 0 <= last_token < len(classes_V):
            state = np.int64(classes_V[last_token]) >> _STATE_SHIFT
        return True, _rewrite_by_class(
            row_V, peak, numbers_F, stop_ids_E, state, finite_L, classes_V, constants_C, scratch
        )
    return True, _rewrite(
        row_V, peak, numbers_F, stop_ids_E, position, finite_L, constants_C, scratch
    )


@_kernel
def _peak(row_V: Array, finite_L: Array, maxima_J: Array) -> float:
    """The row's maximum; also computes its chunks' maxima if the whole row is read. NaN counts as
    +inf."""
    if len(finite_L) == 0:
        return _maxima(row_V.view(np.int32), maxima_J)
    peak = _NEGATIVE_INFINITY
    for token in finite_L:
        if math.isnan(row_V[token]):
            return np.float32(np.inf)
        peak = max(peak, row_V[token])
    return peak


@_kernel
def _maxima(bits_V: Array, maxima_J: Array) -> float:
    """Each chunk's maximum, and the row's. NaN counts as +inf: either makes a row invalid."""
    peak = _NEGATIVE_INFINITY
    whole = len(bits_V) // CHUNK
    for j in range(whole):
        maxima_J[j] = _maximum(bits_V, j * CHUNK, CHUNK)
        peak = max(peak, maxima_J[j])
    if whole < len(maxima_J):
        maxima_J[whole] = _maximum(bits_V, whole * CHUNK, len(bits_V) - whole * CHUNK)
        peak = max(peak, maxima_J[whole])
    return peak


@_inlined
def _maximum(bits_V: Array, start: int, length: int) -> float:
    """Works on the bits: an integer maximum is vectorised; a float one is not, because of NaN."""
    highest, farthest = np.int32(-(2**31)), np.int32(0)
    for v in range(start, start + length):
        highest = max(highest, np.int32(_sortable_bits(bits_V[v])))
        farthest = max(farthest, np.int32(bits_V[v] & 0x7FFFFFFF))
    is_nan = farthest > 0x7F800000
    return np.float32(np.inf) if is_nan else np.int32(_sortable_bits(highest)).view(np.float32)


@_kernel
def _sortable_bits(bits: int) -> int:
    """Maps a float's bits to an integer with the same ordering, and back: if the sign bit is set,
    all other bits are inverted."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@_kernel
def _guard_and_content(
    row_V: Array,
    peak: float,
    numbers_F: Array,
    stop_ids_E: Array,
    finite_L: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
) -> tuple[float, int, float, int, float, float]:
    """The first stage of every law; `stop_ids_E` is without padding.

    Returns H0, the number of plausible tokens, the highest stop token's weight, the number of
    content tokens and their maximum, and ln Z of the plausible tokens. The scratch then contains
    the content's tokens, its log-weights at temperature 1 and those of the stop tokens; in the row
    the stop tokens are set to -inf.
    """
    maxima_J, tokens_K, weights_4K, stops_2E = scratch
    below_K, hot_K, below_E = weights_4K[0], weights_4K[3], stops_2E[0][: len(stop_ids_E)]
    divisor = numbers_F[columns.LOGITS_DIVISOR]

    # The plausible tokens, and their entropy, stop tokens included.
    log_guard = _log_guard(row_V, peak, numbers_F, constants_C)
    threshold = np.float32(max(peak + log_guard / divisor, _LOWEST))
    if len(finite_L) > 0:
        plausible = _survivors_of(row_V, peak, threshold, divisor, finite_L, tokens_K, below_K)
    else:
        plausible = _survivors(row_V, peak, threshold, divisor, maxima_J, tokens_K, below_K)
    z, a = _sums(below_K[:plausible], hot_K)
    log_z = math.log(z)
    entropy_before = log_z - a / z

    # Set stop tokens to -inf; the remaining survivors are content.
    stop_peak = _take_stops(row_V, peak, divisor, stop_ids_E, below_E)
    count, content_peak = _content(row_V, threshold, tokens_K, below_K, plausible)
    return entropy_before, plausible, stop_peak, count, content_peak, log_z


@_kernel
def _rewrite(
    row_V: Array,
    peak: float,
    numbers_F: Array,
    stop_ids_E: Array,
    position: int,
    finite_L: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
) -> tuple[float, float, float, float]:
    """One valid row; returns its statistics, in the order of `Statistics`."""
    _, tokens_K, weights_4K, stops_2E = scratch
    # Indexed instead of unpacked: numba does not treat unpacked rows of an array as contiguous.
    below_K, weight_K, cool_K, hot_K = weights_4K[0], weights_4K[1], weights_4K[2], weights_4K[3]
    stop_ids_E = stop_ids_E[: _stop_count(stop_ids_E)]
    below_E, weight_E = stops_2E[0][: len(stop_ids_E)], stops_2E[1][: len(stop_ids_E)]
    temperature, divisor = (
        float(numbers_F[columns.TEMPERATURE]),
        numbers_F[columns.LOGITS_DIVISOR],
    )

    # 1. The guard, H0, and the content without the stop tokens.
    entropy_before, plausible, stop_peak, count, content_peak, log_plausible_z = _guard_and_content(
        row_V, peak, numbers_F, stop_ids_E, finite_L, constants_C, scratch
    )

    # 2. The law's temperature.
    wanted = _temperature(numbers_F, entropy_before, plausible, constants_C)

    # 3. The content at T (cool) and at T' (hot), both relative to the content's own maximum.
    below_K, exists = below_K[:count], count > 0
    top = content_peak if exists else np.float32(0.0)
    cool_z, _ = _sums_at(temperature, below_K, top, weight_K, cool_K)
    cool_log_z = top / temperature + math.log(cool_z)
    is_xtc, excluded = numbers_F[columns.LAW] == _XTC, 0.0
    if is_xtc and exists and _draw(numbers_F, position) < numbers_F[columns.XTC_PROBABILITY]:
        # Remove the top choices from the content and the list, which may change the maximum.
        least = np.float32(log_plausible_z + numbers_F[columns.LOG_XTC_THRESHOLD])
        count, top, excluded = _exclude_top(below_K, least, tokens_K, cool_K)
        below_K = below_K[:count]
    hot_z, hot_a = _sums_at(wanted, below_K, top, weight_K, hot_K)

    # 4. Content and the most likely stop token may tie, but their order must not reverse:
    #    stops.apply_temperature. Under `xtc` the temperature is T, and either may lead.
    reached = wanted
    argmax_bound = cool_log_z - stop_peak / temperature
    leads = content_peak >= stop_peak or is_xtc
    leads_hot = math.log(hot_z) <= argmax_bound
    if exists and stop_peak > _ABSENT and leads != leads_hot and not is_xtc:
        reached = _temperature_at_bound(
            below_K, top, weight_K, hot_K, temperature, wanted, argmax_bound
        )
        hot_z, hot_a = _sums_at(reached, below_K, top, weight_K, hot_K)
    hot_log_z = top / reached + math.log(hot_z)

    # 5. Rescale the stop tokens, which keep their probability; ln Z of content and stop tokens.
    lift = np.float32(top / reached)
    shift = hot_log_z - cool_log_z if exists else 0.0
    stop_top = _rescale_stop_tokens(
        exists and leads and not is_xtc,
        content_peak,
        lift,
        temperature,
        reached,
        shift,
        below_E,
        weight_E,
    )
    log_z, stop_entropy = _combined_log_z(hot_log_z, exists, stop_top, weight_E)

    # 6. The statistics of the final distribution.
    entropy_after, moved = stop_entropy, 0.0
    if exists:
        content_log_p = hot_log_z - log_z
        content_share = math.exp(content_log_p)
        entropy_after += content_share * (math.log(hot_z) - hot_a / hot_z - content_log_p)
        moved = _moved(cool_K[:count], hot_K[:count], 1 / cool_z, 1 / hot_z)
        moved = content_share * (moved + excluded / cool_z)

    # 7. Write: -inf, the content (clamped to the most likely stop token if that leads), the stop
    #    tokens.
    held = np.float32(np.inf) if leads else stop_top
    base, scale = np.float32(log_z), np.float32(temperature / divisor)
    _clear(row_V, finite_L)
    for k in range(count):
        row_V[tokens_K[k]] = (min(weight_K[k] + lift, held) - base) * scale
    for e in range(len(stop_ids_E)):
        if below_E[e] > _ABSENT:
            row_V[stop_ids_E[e]] = (weight_E[e] - base) * scale
    return entropy_before, entropy_after, reached, moved


@_kernel
def _rewrite_by_class(
    row_V: Array,
    peak: float,
    numbers_F: Array,
    stop_ids_E: Array,
    state: int,
    finite_L: Array,
    classes_V: Array,
    constants_C: Array,
    scratch: tuple[Array, Array, Array, Array],
) -> tuple[float, float, float, float]:
    """One valid row of the law `words`; returns its statistics, in the order of `Statistics`."""
    _, tokens_K, weights_4K, stops_2E = scratch
    below_K, weight_K, cool_K, hot_K = weights_4K[0], weights_4K[1], weights_4K[2], weights_4K[3]
    stop_ids_E = stop_ids_E[: _stop_count(stop_ids_E)]
    below_E, weight_E = stops_2E[0][: len(stop_ids_E)], stops_2E[1][: len(stop_ids_E)]
    temperature, divisor = (
        float(numbers_F[columns.TEMPERATURE]),
        numbers_F[columns.LOGITS_DIVISOR],
    )

    # 1. The guard, H0, and the content without the stop tokens.
    entropy_before, _, _, count, _, _ = _guard_and_content(
        row_V, peak, numbers_F, stop_ids_E, finite_L, constants_C, scratch
    )

    # 2. Each class: its maximum, then its sums at T and at its own temperature, relative to that
    #    maximum.
    temperatures_3 = _class_temperatures(numbers_F, constants_C)
    tops_3 = np.full(3, _ABSENT)
    for k in range(count):
        c = _class_after(state, tokens_K[k], classes_V)
        tops_3[c] = max(tops_3[c], below_K[k])
    cool_3, hot_3, hot_a_3 = np.zeros(3), np.zeros(3), np.zeros(3)
    for k in range(count):
        c = _class_after(state, tokens_K[k], classes_V)
        below = below_K[k] - tops_3[c]
        weight_K[k] = below / temperatures_3[c]
        cool_K[k] = _exp(np.float32(below / temperature))
        hot_K[k] = _exp(weight_K[k])
        cool_3[c] += cool_K[k]
        hot_3[c] += hot_K[k]
        hot_a_3[c] += hot_K[k] * weight_K[k]

    # 3. ln Z of the classes and the stop tokens together, all at T: no class's share changes.
    log_z_3 = np.full(3, float(_ABSENT))
    highest = float(_ABSENT)
    for c in range(3):
        if cool_3[c] > 0:
            log_z_3[c] = tops_3[c] / temperature + math.log(cool_3[c])
        highest = max(highest, log_z_3[c])
    for e in range(len(stop_ids_E)):
        weight_E[e] = below_E[e] / temperature
        highest = max(highest, weight_E[e])
    highest = float(np.float32(highest))
    stop_z, stop_a = _stop_sums(weight_E, np.float32(highest))
    total = float(stop_z)
    for c in range(3):
        total += math.exp(log_z_3[c] - highest)
    log_z = highest + math.log(total)

    # 4. The statistics; the temperature is the mean over the content.
    entropy_after = math.exp(highest - log_z) * ((log_z - highest) * stop_z - stop_a)
    moved, content_share, mean = 0.0, 0.0, 0.0
    lifts_3, moved_3 = np.zeros(3), np.zeros(3)
    for k in range(count):
        c = _class_after(state, tokens_K[k], classes_V)
        moved_3[c] += max(cool_K[k] / cool_3[c] - hot_K[k] / hot_3[c], 0.0)
    for c in range(3):
        if cool_3[c] > 0:
            log_share = log_z_3[c] - log_z
            share = math.exp(log_share)
            entropy_after += share * (math.log(hot_3[c]) - hot_a_3[c] / hot_3[c] - log_share)
            moved += share * moved_3[c]
            content_share += share
            mean += share * temperatures_3[c]
            lifts_3[c] = log_share - math.log(hot_3[c])
    reached = mean / content_share if content_share > 0 else temperature

    # 5. Write: -inf, the content class by class, the stop tokens.
    scale = np.float32(temperature / divisor)
    _clear(row_V, finite_L)
    for k in range(count):
        c = _class_after(state, tokens_K[k], classes_V)
        row_V[tokens_K[k]] = (weight_K[k] + np.float32(lifts_3[c])) * scale
    base = np.float32(log_z)
    for e in range(len(stop_ids_E)):
        if below_E[e] > _ABSENT:
            row_V[stop_ids_E[e]] = (weight_E[e] - base) * scale
    return entropy_before, entropy_after, reached, moved


@_kernel
def _class_temperatures(numbers_F: Array, constants_C: Array) -> Array:
    """words.class_temperatures."""
    temperature, level = float(numbers_F[columns.TEMPERATURE]), float(numbers_F[columns.LEVEL])
    temperatures_3 = np.full(3, temperature)
    start = temperature * (1.0 + constants_C[columns.WORD_START_RISE] * level)
    temperatures_3[_START] = min(start, max(temperature, numbers_F[columns.MAX_TEMPERATURE]))
    fall = 1.0 - constants_C[columns.WORD_INSIDE_FALL] * level
    temperatures_3[_INSIDE] = temperature * max(fall, _COOLEST)
    return temperatures_3


@_kernel
def _class_after(state: int, token: int, classes_V: Array) -> int:
    """words.row_classes, for one token."""
    if token >= len(classes_V):
        return 0
    return (np.int64(classes_V[token]) >> (2 * state)) & _CLASS_MASK


@_kernel
def _log_guard(row_V: Array, peak: float, numbers_F: Array, constants_C: Array) -> float:
    """laws.log_guard, or top_n_sigma.log_guard."""
    if numbers_F[columns.LAW] == _TOP_N_SIGMA:
        deviation = _deviation(row_V, peak) * numbers_F[columns.LOGITS_DIVISOR]
        return -numbers_F[columns.N_SIGMA] * deviation
    if math.isnan(numbers_F[columns.LOG_MIN_P]):
        level = min(max(numbers_F[columns.LEVEL], 0.0), 1.0)
        return constants_C[columns.LOG_GUARD_START] + constants_C[columns.LOG_GUARD_STEP] * level
    return numbers_F[columns.LOG_MIN_P]


@_reduction
def _deviation(row_V: Array, peak: float) -> float:
    """top_n_sigma: σ of the finite logits, in units of the row."""
    count, total = 0, 0.0
    for v in range(len(row_V)):
        is_finite = row_V[v] > _NEGATIVE_INFINITY
        count += is_finite
        total += np.float64(row_V[v] - peak) if is_finite else 0.0
    mean, squares = total / count, 0.0
    for v in range(len(row_V)):
        from_mean = np.float64(row_V[v] - peak) - mean
        squares += from_mean * from_mean if row_V[v] > _NEGATIVE_INFINITY else 0.0
    return math.sqrt(squares / count)


@_kernel
def _draw(numbers_F: Array, position: int) -> float:
    """draws.uniform."""
    high = np.int64(numbers_F[columns.DRAW_KEY_HIGH])
    low = np.int64(numbers_F[columns.DRAW_KEY_LOW])
    bits = _mixed(_mixed((position + low) & _WORD) ^ high)
    return np.float32(bits >> _SHIFT) * _UNIT


@_kernel
def _mixed(bits: int) -> int:
    bits = ((bits ^ (bits >> 16)) * _FIRST) & _WORD
    bits = ((bits ^ (bits >> 15)) * _SECOND) & _WORD
    return bits ^ (bits >> 16)


@_kernel
def _exclude_top(
    below_K: Array, least: float, tokens_K: Array, cool_K: Array
) -> tuple[int, float, float]:
    """xtc.ceilings: removes the top choices (log-weight of at least `least`) from the lists, except
    the least probable. Returns the number of remaining tokens, their maximum, and the sum of
    `cool_K` over the removed ones."""
    ceiling = np.float32(np.inf)
    for k in range(len(below_K)):
        if below_K[k] >= least:
            ceiling = min(ceiling, below_K[k])
    count, highest, gone = 0, _ABSENT, 0.0
    for k in range(len(below_K)):
        if below_K[k] > ceiling:
            gone += cool_K[k]
        else:
            highest = max(highest, below_K[k])
            tokens_K[count], below_K[count], cool_K[count] = tokens_K[k], below_K[k], cool_K[k]
            count += 1
    return count, highest, gone


@_kernel
def _survivors(
    row_V: Array,
    peak: float,
    threshold: float,
    divisor: float,
    maxima_J: Array,
    tokens_K: Array,
    below_K: Array,
) -> int:
    """Lists the plausible tokens, in order, and their log-weights; returns their number."""
    count = 0
    for j in range(len(maxima_J)):
        if maxima_J[j] >= threshold:
            for token in range(j * CHUNK, min((j + 1) * CHUNK, len(row_V))):
                # Written unconditionally: a mispredicted branch would cost more.
                tokens_K[count] = token
                below_K[count] = (row_V[token] - peak) * divisor
                count += row_V[token] >= threshold
    return count


@_kernel
def _survivors_of(
    row_V: Array,
    peak: float,
    threshold: float,
    divisor: float,
    finite_L: Array,
    tokens_K: Array,
    below_K: Array,
) -> int:
    """`_survivors` for a row in which all tokens but `finite_L` are -inf."""
    count = 0
    for token in finite_L:
        tokens_K[count] = token
        below_K[count] = (row_V[token] - peak) * divisor
        count += row_V[token] >= threshold
    return count


@_kernel
def _clear(row_V: Array, finite_L: Array) -> None:
    """Fills the row with -inf; tokens not in `finite_L` are -inf already."""
    if len(finite_L) > 0:
        for token in finite_L:
            row_V[token] = _NEGATIVE_INFINITY
    else:
        for v in range(len(row_V)):
            row_V[v] = _NEGATIVE_INFINITY


@_reduction
def _sums(weight_K: Array, share_K: Array) -> tuple[float, float]:
    """Σ e^w and Σ w·e^w (1 and 0 for an empty list); stores e^w in `share_K`."""
    z, a = 0.0, 0.0
    for k in range(len(weight_K)):
        share_K[k] = _exp(weight_K[k])
        z += share_K[k]
        a += share_K[k] * weight_K[k]
    return (z, a) if len(weight_K) else (1.0, 0.0)


@_kernel
def _exp(x: float) -> float:
    """e^x for x <= 0, within two ulps; unlike math.exp, it can be vectorised.

    2^k·e^r with |r| <= ln 2 / 2; the polynomial is that of Cephes' expf.
    """
    within = max(x, np.float32(-87.0))
    k = math.floor(within * np.float32(1.44269504) + np.float32(0.5))
    r = within - np.float32(k) * np.float32(0.693359375)
    r = r - np.float32(k) * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power if x > np.float32(-87.0) else np.float32(0.0)


@_kernel
def _temperature(
    numbers_F: Array, entropy_before: float, plausible: int, constants_C: Array
) -> float:
    """laws.temperature."""
    temperature, level = float(numbers_F[columns.TEMPERATURE]), float(numbers_F[columns.LEVEL])
    if numbers_F[columns.LAW] == _DYNATEMP:
        if plausible < 2:
            return temperature
        half_width = numbers_F[columns.DYNATEMP_RANGE] * level
        coolest = max(temperature - half_width, 0.0)
        share = min(max(entropy_before / math.log(plausible), 0.0), 1.0)
        share = share ** numbers_F[columns.DYNATEMP_EXPONENT]
        wanted = coolest + (temperature + half_width - coolest) * share
        return max(wanted, constants_C[columns.LOWEST_TEMPERATURE])
    gate = _power(entropy_before / (entropy_before + 1.0), constants_C[columns.GATE_POWER])
    wanted = temperature * math.exp(constants_C[columns.STRENGTH] * level * gate)
    return min(wanted, max(temperature, numbers_F[columns.MAX_TEMPERATURE]))


@_kernel
def _power(base: float, exponent: float) -> float:
    """base^exponent; squares are computed as products, as for an exponent known at compile time."""
    return base * base if exponent == 2.0 else base**exponent


@_kernel
def _stop_count(stop_ids_E: Array) -> int:
    """The number of the row's own stop tokens, without padding."""
    count = 0
    while count < len(stop_ids_E) and stop_ids_E[count] >= 0:
        count += 1
    return count


@_kernel
def _take_stops(
    row_V: Array, peak: float, divisor: float, stop_ids_E: Array, below_E: Array
) -> float:
    """Sets the stop tokens of the row to -inf and stores their weights: `_ABSENT` for a token that
    is not in the vocabulary or that the grammar forbids. Returns the highest weight."""
    highest = _ABSENT
    for e in range(len(stop_ids_E)):
        below_E[e] = _ABSENT
        if stop_ids_E[e] < len(row_V) and row_V[stop_ids_E[e]] > _NEGATIVE_INFINITY:
            below_E[e] = max((row_V[stop_ids_E[e]] - peak) * divisor, _FARTHEST)
            row_V[stop_ids_E[e]] = _NEGATIVE_INFINITY
        highest = max(highest, below_E[e])
    return highest


@_kernel
def _content(
    row_V: Array, threshold: float, tokens_K: Array, below_K: Array, listed: int
) -> tuple[int, float]:
    """Removes from the list the tokens that were set to -inf; returns the number of remaining
    tokens and their maximum."""
    count, highest = 0, _ABSENT
    for k in range(listed):
        if row_V[tokens_K[k]] >= threshold:
            tokens_K[count], below_K[count] = tokens_K[k], below_K[k]
            highest = max(highest, below_K[k])
            count += 1
    return count, highest


@_kernel
def _sums_at(
    temperature: float, below_K: Array, top: float, weight_K: Array, share_K: Array
) -> tuple[float, float]:
    """`_sums` at a temperature, relative to the maximum `top`; stores the weights in `weight_K`."""
    inverse = np.float32(1 / temperature)
    for k in range(len(below_K)):
        weight_K[k] = (below_K[k] - top) * inverse
    return _sums(weight_K[: len(below_K)], share_K)


@_kernel
def _temperature_at_bound(
    below_K: Array,
    top: float,
    weight_K: Array,
    share_K: Array,
    temperature: float,
    wanted: float,
    argmax_bound: float,
) -> float:
    """stops.temperature_at_bound."""
    low, high = 1 / max(temperature, wanted), 1 / min(temperature, wanted)
    beta = low
    for _ in range(_NEWTON_STEPS):
        z, a = _sums_at(1 / beta, below_K, top, weight_K, share_K)
        slope = min(a / z / beta, -1e-12)
        before, beta = beta, min(max(beta + (argmax_bound - math.log(z)) / slope, low), high)
        if abs(beta - before) < _RESOLUTION * beta:
            break
    return 1 / beta


@_kernel
def _rescale_stop_tokens(
    leads: bool,
    content_peak: float,
    lift: float,
    temperature: float,
    reached: float,
    shift: float,
    below_E: Array,
    weight_E: Array,
) -> float:
    """stops.rescale_stop_tokens; returns the highest weight."""
    tied_at = content_peak if abs(reached / temperature - 1) < _NEARLY else np.float32(np.nan)
    highest = _ABSENT
    for e in range(len(below_E)):
        weight_E[e] = below_E[e] / temperature + shift
        if leads:
            weight_E[e] = lift if below_E[e] == tied_at else min(weight_E[e], lift)
        highest = max(highest, weight_E[e])
    return highest


@_kernel
def _combined_log_z(
    content: float, exists: bool, highest: float, weight_E: Array
) -> tuple[float, float]:
    """ln Z of the content and the stop tokens together, and the stop tokens' part of the entropy:
    −Σ p·ln p over them."""
    top = np.float32(max(content, highest) if exists else highest)
    z, a = _stop_sums(weight_E, top)
    log_z = top + math.log(z + (math.exp(content - top) if exists else 0.0))
    return log_z, math.exp(top - log_z) * ((log_z - top) * z - a)


@_reduction
def _stop_sums(weight_E: Array, top: float) -> tuple[float, float]:
    """Σ e^w and Σ w·e^w over the stop tokens, with w relative to `top`."""
    z, a = 0.0, 0.0
    for e in range(len(weight_E)):
        below = weight_E[e] - top
        share = _exp(below)
        z += share
        a += share * below
    return z, a


@_reduction
def _moved(cool_K: Array, hot_K: Array, cool_scale: float, hot_scale: float) -> float:
    """Σ max(p before − p after, 0)."""
    moved = 0.0
    for k in range(len(cool_K)):
        moved += max(cool_K[k] * cool_scale - hot_K[k] * hot_scale, 0.0)
    return moved
