"""The transform on a GPU: three Triton kernels, one read and one write of the rows.

    _maxima   streams the rows once, one program per tile, for the maxima of their chunks (and, for
              `top_n_sigma` rows, the moments of their tiles); in the same launch, one program per
              request commits the statistics that the previous step staged in its slot
    _decide   one program per row: removes the stop tokens, gathers the few chunks that can contain
              survivors, computes H0, the law's temperature and the stop tokens' probabilities, and
              stages the statistics in the request's slot
    _write    writes -inf and the rewritten survivors, reading again only the chunks that contain
              some, then the stop tokens

These three are a whole step: controls, token classes and slots stay on the device and are read by
index. A slot is settled one launch before it is read, because a request may have several rows,
whose programs run concurrently and cannot wait for each other.

The survivors of a peaked row are gathered from a few kilobytes that are still in cache; a flat row
takes the same path and is streamed again for each sum. Nothing blocks on the host, buffers are not
reallocated after the largest batch was seen (from then on CUDA graphs can be captured), and sums
have a fixed order, so that tensor-parallel ranks agree. The maths is that of `transform.py`, which
is the reference.

Each kernel is compiled twice, for aligned rows and for others. No other size, number or address
triggers a compilation, so nothing is compiled after an engine has started.
"""

# Type checkers cannot analyse Triton kernels.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import draws, entropy, guard, stops, token_classes, words
from dftserve.sampling.backends.base import Backend
from dftserve.sampling.backends.triton_slots import (
    EXACT,
    TritonSlots,
    level_in_force,
    settle,
    stage_row,
)
from dftserve.sampling.buffers import Buffer
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

CHUNK = 64
"""Tokens of a chunk; `_decide` reads only the chunks that have a token above the guard."""
TILE = 2048
"""Tokens per program of `_maxima` and of `_write`; a multiple of CHUNK."""
BLOCK = 1024
"""Values processed at a time in `_decide`; a multiple of CHUNK."""
STOPS = 128
"""Stop tokens processed at a time: more than most requests have."""
ALIGNMENT = 16
"""Rows whose address, stride and length are multiples of this are loaded 16 bytes at a time."""


class TritonBackend(Backend):
    """The transform with its own scratch buffers; use it on one stream at a time."""

    def __init__(
        self,
        device: torch.device | str = "cuda",
        constants: LawConstants = DEFAULT_CONSTANTS,
        token_classes: TokenClasses | None = None,
    ) -> None:
        super().__init__(device, constants, token_classes)
        device = self.device
        # A tensor created in inference mode could not be used outside of it.
        with torch.inference_mode(mode=False):
            self._constants_C = torch.tensor(constants.packed, dtype=torch.float32, device=device)
            # Without classes every token is `other`; rows that need classes were rejected before.
            none_V = torch.zeros(0, dtype=torch.uint8, device=device)
            self._classes_V = none_V if token_classes is None else token_classes.to(device)
        self._rows = _Rows(0, device)
        self._no_slots = TritonSlots(1, 1, device, constants)
        self._maxima = Buffer(device)
        self._moments = Buffer(device)
        self._active = Buffer(device, torch.int32)
        self._plan = Buffer(device)
        self._stop_value = Buffer(device)
        self._values = Buffer(device)
        self._valid = Buffer(device, torch.bool)

    def create_slots(self, slots: int, rows_per_request: int) -> TritonSlots:
        return TritonSlots(slots, rows_per_request, self.device, self.constants)

    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        rows = len(controls.stop_ids_RE)
        self._make_room(rows)
        last_token_R = controls.last_token_R
        if last_token_R is not None:
            last_token_R = last_token_R.to(torch.int32).contiguous()
        position_R = controls.position_R
        by_row = Step(
            Controls(controls.numbers_RF, controls.stop_ids_RE.contiguous()),
            slot_R=self._rows.index_R[:rows],
            position_R=self._rows.start_R[:rows] if position_R is None else position_R.contiguous(),
            offset_R=self._rows.zero_R[:rows],
            last_token_R=last_token_R,
            rows_R=None if rows_R is None else rows_R.contiguous(),
        )
        with torch.cuda.device_of(logits_XV):  # Triton launches on the current device.
            return self._launch(logits_XV, by_row, None)

    def step(self, logits_XV: Tensor, step: Step, slots: Slots) -> Statistics:
        """As `Backend.step`, in three launches."""
        assert isinstance(slots, TritonSlots)
        self._make_room(len(step.slot_R))
        with torch.cuda.device_of(logits_XV):
            return self._launch(logits_XV, step, slots)

    def _launch(self, logits_XV: Tensor, step: Step, slots: TritonSlots | None) -> Statistics:
        """Without slots, no statistics are committed or staged."""
        rows = len(step.slot_R)
        numbers_SF, stop_ids_SE = step.controls.numbers_RF, step.controls.stop_ids_RE
        stride, vocabulary, width = logits_XV.stride(0), logits_XV.shape[1], stop_ids_SE.shape[1]
        chunks, tiles = triton.cdiv(vocabulary, CHUNK), triton.cdiv(vocabulary, TILE)
        aligned = _is_aligned(logits_XV)
        has_slots, has_idle_rows = int(slots is not None), int(step.has_idle_rows)
        slots = slots or self._no_slots
        *counters, sums_SF, waiting_SKF, invalid = slots.state()
        level_S, steered_S, _tokens_S, base_S = counters
        known_S = slots.nothing_known_S if step.known_S is None else step.known_S
        rows_R = self._rows.index_R if step.rows_R is None else step.rows_R
        last_token_R = self._rows.none_R if step.last_token_R is None else step.last_token_R
        maxima_RJ = self._maxima.take(rows, chunks)
        moments_RX = self._moments.take(rows, 3 * tiles)
        plan_RP = self._plan.take(rows, _PLAN.value)
        stop_value_RE = self._stop_value.take(rows, width)
        values_FR, valid_R = self._values.take(4, rows), self._valid.take(1, rows)[0]
        _maxima[(rows, 1 + tiles)](
            logits_XV,
            rows_R,
            maxima_RJ,
            moments_RX,
            step.slot_R,
            step.position_R,
            step.offset_R,
            numbers_SF,
            self._constants_C,
            *counters,
            sums_SF,
            waiting_SKF,
            stride,
            vocabulary,
            chunks,
            tiles,
            slots.rows_per_request,
            has_slots,
            has_idle_rows,
            ALIGNED=aligned,
            CHUNK=CHUNK,
            TILE=TILE,
            **EXACT,
        )
        _decide[(rows,)](
            logits_XV,
            rows_R,
            maxima_RJ,
            moments_RX,
            step.slot_R,
            step.position_R,
            step.offset_R,
            last_token_R,
            numbers_SF,
            stop_ids_SE,
            self._classes_V,
            self._constants_C,
            level_S,
            steered_S,
            base_S,
            waiting_SKF,
            invalid,
            known_S,
            self._active.take(rows, chunks),
            plan_RP,
            stop_value_RE,
            values_FR,
            valid_R,
            values_FR if step.style_stats_RF is None else step.style_stats_RF,
            stride,
            vocabulary,
            chunks,
            tiles,
            width,
            rows,
            len(self._classes_V),
            slots.rows_per_request,
            has_slots,
            int(step.style_stats_RF is not None),
            ALIGNED=aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            STOPS=STOPS,
            num_warps=8,
            **EXACT,
        )
        _write[(rows, tiles)](
            logits_XV,
            rows_R,
            maxima_RJ,
            step.slot_R,
            plan_RP,
            stop_ids_SE,
            stop_value_RE,
            self._classes_V,
            stride,
            vocabulary,
            chunks,
            width,
            len(self._classes_V),
            ALIGNED=aligned,
            CHUNK=CHUNK,
            TILE=TILE,
            STOPS=STOPS,
            **EXACT,
        )
        return Statistics(*values_FR, valid_R=valid_R)

    def _make_room(self, rows: int) -> None:
        if rows > len(self._rows.index_R):
            with torch.inference_mode(mode=False):
                self._rows = _Rows(2 * rows, self.device)


class _Rows:
    """Default inputs for tensors that a step does not have."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.index_R = torch.arange(rows, device=device)
        self.start_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.zero_R = torch.zeros(rows, dtype=torch.int32, device=device)
        self.none_R = self.zero_R - 1


def _is_aligned(logits_XV: Tensor) -> bool:
    sizes = (logits_XV.data_ptr(), logits_XV.stride(0), logits_XV.shape[1])
    return all(size % ALIGNMENT == 0 for size in sizes)


# Globals that a kernel reads must be constexpr and are compiled into it, so only values that never
# change may be globals; the laws' constants are passed as an argument. At every launch Triton
# compares globals with their compiled values, so none may be NaN, which is not equal to itself.
_ABSENT = tl.constexpr(entropy.ABSENT)
_FARTHEST = tl.constexpr(guard.FARTHEST)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_DYNATEMP, _WORDS = tl.constexpr(LAW_CODES["dynatemp"]), tl.constexpr(LAW_CODES["words"])
_TOP_N_SIGMA, _XTC = tl.constexpr(LAW_CODES["top_n_sigma"]), tl.constexpr(LAW_CODES["xtc"])
_NO_LAW = tl.constexpr(NO_LAW)
_START, _INSIDE = tl.constexpr(token_classes.START), tl.constexpr(token_classes.INSIDE)
_OTHER = tl.constexpr(token_classes.OTHER)
_STATE_SHIFT = tl.constexpr(token_classes.STATE_SHIFT)
_CLASS_MASK = tl.constexpr(token_classes.CLASS_MASK)
_COOLEST = tl.constexpr(words.COOLEST)
_NEARLY = tl.constexpr(stops.NEARLY)
_NEWTON_STEPS = tl.constexpr(stops.NEWTON_STEPS)
_INFINITY = tl.constexpr(math.inf)
_WORD = tl.constexpr(draws.WORD)
_FIRST, _SECOND = tl.constexpr(draws.FIRST), tl.constexpr(draws.SECOND)
_SHIFT, _UNIT = tl.constexpr(32 - draws.DRAW_BITS), tl.constexpr(2.0**-draws.DRAW_BITS)
_ALIGNMENT = tl.constexpr(ALIGNMENT)

# Columns of the controls' numbers.
_NUMBERS = tl.constexpr(len(columns.NUMBERS))
_LAW, _TEMPERATURE = tl.constexpr(columns.LAW), tl.constexpr(columns.TEMPERATURE)
_DIVISOR, _LEVEL = tl.constexpr(columns.LOGITS_DIVISOR), tl.constexpr(columns.LEVEL)
_LOG_MIN_P = tl.constexpr(columns.LOG_MIN_P)
_MAX_TEMPERATURE = tl.constexpr(columns.MAX_TEMPERATURE)
_RANGE, _EXPONENT = tl.constexpr(columns.DYNATEMP_RANGE), tl.constexpr(columns.DYNATEMP_EXPONENT)
_N_SIGMA = tl.constexpr(columns.N_SIGMA)
_LOG_XTC_THRESHOLD = tl.constexpr(columns.LOG_XTC_THRESHOLD)
_XTC_PROBABILITY = tl.constexpr(columns.XTC_PROBABILITY)
_KEY_HIGH, _KEY_LOW = tl.constexpr(columns.DRAW_KEY_HIGH), tl.constexpr(columns.DRAW_KEY_LOW)

# Elements of the laws' constants.
_LOG_GUARD_START = tl.constexpr(columns.LOG_GUARD_START)
_LOG_GUARD_STEP = tl.constexpr(columns.LOG_GUARD_STEP)
_STRENGTH, _GATE_POWER = tl.constexpr(columns.STRENGTH), tl.constexpr(columns.GATE_POWER)
_LOWEST_TEMPERATURE = tl.constexpr(columns.LOWEST_TEMPERATURE)
_WORD_START_RISE = tl.constexpr(columns.WORD_START_RISE)
_WORD_INSIDE_FALL = tl.constexpr(columns.WORD_INSIDE_FALL)

_STYLE_STATS = tl.constexpr(COLUMNS - KL)
_PLAN = tl.constexpr(17)
"""Size of the plan: the numbers that `_decide` passes to `_write` for each row."""
_STATE = tl.constexpr(9)
"""Index in the plan: the state of the text of a `words` row (see `token_classes.py`), or -1 for
other laws. It is followed, for each of other, start and inside, by 1/T_c and the number to add to
weights at T_c."""
_CEILING = tl.constexpr(16)
"""Index in the plan: the log-weight above which content is excluded (`xtc`), else inf."""


@triton.jit
def _row(logits, rows, stride, vocabulary, ALIGNED: tl.constexpr):
    """The address of the program's row, and its length. If ALIGNED, both are expressed so that the
    compiler can infer their divisibility."""
    row = logits + tl.load(rows + tl.program_id(0)) * stride
    if ALIGNED:
        row = tl.multiple_of(row, _ALIGNMENT)
        vocabulary = vocabulary // _ALIGNMENT * _ALIGNMENT
    return row, vocabulary


# These tensors are small or allocated by callers and may have any alignment, which must not lead to
# another compilation.
_ANYWHERE = ["logits", "rows", "slot", "position", "offset", "numbers", "constants"]


@triton.jit(
    do_not_specialize=[
        *("stride", "vocabulary", "chunks", "tiles"),
        *("rows_per_request", "has_slots", "has_idle_rows"),
    ],
    do_not_specialize_on_alignment=_ANYWHERE,
)
def _maxima(
    logits,
    rows,
    maxima,
    moments,
    slot,
    position,
    offset,
    numbers,
    constants,
    level,
    steered,
    tokens,
    base,
    sums,
    waiting,
    stride,
    vocabulary,
    chunks,
    tiles,
    rows_per_request,
    has_slots,
    has_idle_rows,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program 0 of a request's first row settles its slot; every other program processes one tile
    of its row. NaN counts as +inf: either makes a row invalid."""
    r, tile = tl.program_id(0), tl.program_id(1) - 1
    is_busy = True
    if has_idle_rows != 0:
        is_busy = tl.load(numbers + tl.load(slot + r) * _NUMBERS + _LAW) != _NO_LAW
    if is_busy:
        if tile >= 0:
            row, vocabulary = _row(logits, rows, stride, vocabulary, ALIGNED)
            chunk = tile * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
            token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            logit = tl.load(row + token, mask=token < vocabulary, other=-_INFINITY)
            logit = tl.where(logit != logit, _INFINITY, logit)
            tl.store(maxima + r * chunks + chunk, tl.max(logit, axis=1), mask=chunk < chunks)
            if tl.load(numbers + tl.load(slot + r) * _NUMBERS + _LAW) == _TOP_N_SIGMA:
                _tile_moments(logit, moments + r * 3 * tiles + tile, tiles)
        elif (has_slots != 0) & (tl.load(offset + r) == 0):
            s = tl.load(slot + r)
            state = (level, steered, tokens, base, sums, waiting)
            own = numbers + s * _NUMBERS
            settle(state, s, tl.load(position + r), own, constants, rows_per_request)


@triton.jit
def _tile_moments(logit, moments, tiles):
    """The number of finite logits in a tile, their mean, and their sum of squared deviations from
    that mean. Using the tile's own mean avoids cancellation, whatever the offset of the logits."""
    is_finite = (logit > -_INFINITY) & (logit < _INFINITY)
    count = tl.sum(tl.sum(is_finite.to(tl.float32), axis=1), axis=0)
    total = tl.sum(tl.sum(tl.where(is_finite, logit, 0.0), axis=1), axis=0)
    mean = total / tl.maximum(count, 1.0)
    from_mean = tl.where(is_finite, logit - mean, 0.0)
    tl.store(moments, count)
    tl.store(moments + tiles, mean)
    tl.store(moments + 2 * tiles, tl.sum(tl.sum(from_mean * from_mean, axis=1), axis=0))


@triton.jit(
    do_not_specialize=[
        *("stride", "vocabulary", "chunks", "tiles", "width", "count", "classified"),
        *("rows_per_request", "has_slots", "has_styles"),
    ],
    do_not_specialize_on_alignment=[
        *_ANYWHERE,
        *("last_token", "stop_ids", "classes", "known", "style_stats"),
    ],
)
def _decide(
    logits,
    rows,
    maxima,
    moments,
    slot,
    position,
    offset,
    last_token,
    numbers,
    stop_ids,
    classes,
    constants,
    level,
    steered,
    base,
    waiting,
    invalid,
    known,
    active,
    plan,
    stop_value,
    values,
    valid_rows,
    style_stats,
    stride,
    vocabulary,
    chunks,
    tiles,
    width,
    count,
    classified,
    rows_per_request,
    has_slots,
    has_styles,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STOPS: tl.constexpr,
):
    r = tl.program_id(0)
    row, vocabulary = _row(logits, rows, stride, vocabulary, ALIGNED)
    maxima += r * chunks
    active += r * chunks
    stop_value += r * width
    plan += r * _PLAN
    s = tl.load(slot + r)
    stop_ids += s * width
    numbers += s * _NUMBERS
    temperature, divisor = tl.load(numbers + _TEMPERATURE), tl.load(numbers + _DIVISOR)
    law = tl.load(numbers + _LAW)
    own_level = tl.load(numbers + _LEVEL)
    if has_slots != 0:
        own_level = level_in_force(s, numbers, constants, level, steered)

    # 1. The guard: the chunks that contain the row's survivors. An invalid row has none; an idle
    #    row, whose maxima were not written, is treated as invalid.
    is_busy = law != _NO_LAW
    peak = _peak(maxima, chunks, BLOCK)
    valid = (peak > -_INFINITY) & (peak < _INFINITY) & is_busy
    peak = tl.where(valid, peak, 0.0)
    log_guard = _log_guard(own_level, numbers, constants)
    if valid & (law == _TOP_N_SIGMA):
        deviation = _deviation(moments + r * 3 * tiles, tiles, BLOCK)
        log_guard = -tl.load(numbers + _N_SIGMA) * (deviation * divisor)
    threshold = tl.maximum(peak + log_guard / divisor, _LOWEST)
    listed = _list_active(maxima, active, threshold, chunks, BLOCK)
    gathered = tl.where(valid, listed * CHUNK, 0)

    # 2. Set stop tokens to -inf, so that all survivors in the row are content.
    stops, stop_peak, stop_z, stop_a, plausible = _stop_weights(
        row, stop_ids, stop_value, width, vocabulary, peak, divisor, threshold, STOPS
    )
    tl.debug_barrier()  # All threads must have read the stop tokens before they are overwritten.
    _take_out(row, stop_ids, tl.where(valid, stops, 0), vocabulary, STOPS)
    tl.debug_barrier()
    source = (row, active, gathered, vocabulary, peak, divisor, threshold, _INFINITY)

    # 3. The entropy H0 of all plausible tokens, and the law's temperature.
    z_K = tl.zeros([BLOCK], tl.float32)
    a_K = tl.zeros([BLOCK], tl.float32)
    plausible_K = tl.zeros([BLOCK], tl.int32)
    content_peak_K = tl.full([BLOCK], _ABSENT, tl.float32)
    for start in range(0, gathered, BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        share_K = tl.where(is_content_K, tl.exp(below_K), 0.0)
        z_K += share_K
        a_K += share_K * below_K
        plausible_K += is_content_K.to(tl.int32)
        content_peak_K = tl.maximum(content_peak_K, tl.where(is_content_K, below_K, _ABSENT))
    z = tl.where(valid, tl.sum(z_K) + stop_z, 1.0)
    plausible += tl.sum(plausible_K)
    entropy_before = tl.log(z) - (tl.sum(a_K) + stop_a) / z
    wanted = _temperature(own_level, numbers, constants, entropy_before, plausible.to(tl.float32))

    # 4. The content at T (cool) and at T' (hot), with sums relative to its own maximum.
    content_peak = tl.max(content_peak_K)
    exists = content_peak > _ABSENT
    top = tl.where(exists, content_peak, 0.0)
    cool_z, _cool_a = _sums(source, top, 1 / temperature, exists, CHUNK, BLOCK)
    cool_log_z = top / temperature + tl.log(cool_z)
    is_xtc = valid & (law == _XTC)
    ceiling = _INFINITY
    if is_xtc:  # Exclude top choices; the content's maximum is then the least of them.
        least = tl.log(z) + tl.load(numbers + _LOG_XTC_THRESHOLD)
        ceiling = _ceiling(source, least, numbers, tl.load(position + r), CHUNK, BLOCK)
    remaining = (row, active, gathered, vocabulary, peak, divisor, threshold, ceiling)
    remaining_top = tl.minimum(top, ceiling)
    hot_z, hot_a = _sums(remaining, remaining_top, 1 / wanted, exists, CHUNK, BLOCK)

    is_words = valid & (law == _WORDS)
    state = -1
    if is_words:
        state = _state(classes, tl.load(last_token + r), classified)
    tl.store(plan + _STATE, state.to(tl.float32))

    # 5. Content and the most likely stop token may tie, but their order must not reverse:
    #    stops.apply_temperature. Under `words` and `xtc` the content keeps its share, either may
    #    lead, and the temperature is not limited.
    is_free = is_words | is_xtc
    reached = wanted
    argmax_bound = cool_log_z - stop_peak / temperature
    leads = content_peak >= stop_peak
    leads_hot = tl.log(hot_z) <= argmax_bound
    if exists & (stop_peak > _ABSENT) & (leads != leads_hot) & (is_free == 0):
        reached = _temperature_at_bound(
            source, top, temperature, wanted, argmax_bound, CHUNK, BLOCK
        )
        hot_z, hot_a = _sums(source, top, 1 / reached, exists, CHUNK, BLOCK)
    inverse = 1 / reached
    hot_log_z = remaining_top * inverse + tl.log(hot_z)

    # 6. Rescale the stop tokens, which keep their probability, so that rounding does not change the
    #    order: stops.rescale_stop_tokens.
    shift = tl.where(exists & (is_words == 0), hot_log_z - cool_log_z, 0.0)
    leads = leads | is_free  # The content is not clamped to the stop tokens.
    held_stop = tl.where(leads & (is_free == 0), top * inverse, _INFINITY)
    is_same = tl.abs(reached / temperature - 1) < _NEARLY
    # No weight is infinite, so with _INFINITY nothing ties.
    tied_at = tl.where(exists & leads & is_same & (is_free == 0), content_peak, _INFINITY)
    rescaling = (stop_value, stops, temperature, shift, held_stop, tied_at)
    stop_top_E = tl.full([STOPS], _ABSENT, tl.float32)
    for start in range(0, stops, STOPS):
        _is_allowed_E, weight_E = _rescale_stop_tokens(rescaling, start, STOPS)
        stop_top_E = tl.maximum(stop_top_E, weight_E)
    stop_top = tl.max(stop_top_E)
    held = tl.where(leads, _INFINITY, stop_top)
    content_log_z = tl.where(exists, tl.where(is_words, cool_log_z, hot_log_z), _ABSENT)

    # 7. ln Z of content and stop tokens together, the stop tokens' final values, the statistics.
    highest = tl.maximum(content_log_z, stop_top)
    z_E = tl.zeros([STOPS], tl.float32)
    for start in range(0, stops, STOPS):
        _is_allowed_E, weight_E = _rescale_stop_tokens(rescaling, start, STOPS)
        z_E += tl.exp(weight_E - highest)
    log_z = highest + tl.log(tl.exp(content_log_z - highest) + tl.sum(z_E))
    scale = temperature / divisor
    content_log_p = content_log_z - log_z
    content_share = tl.exp(content_log_p)
    content_entropy = tl.log(hot_z) - hot_a / hot_z
    words_moved = 0.0
    if is_words:
        content_entropy, words_moved, reached = _by_class(
            (source, classes, classified, state, content_log_z),
            own_level,
            numbers,
            constants,
            temperature,
            plan,
            CHUNK,
            BLOCK,
        )
    entropy_after = content_share * tl.where(exists, content_entropy - content_log_p, 0.0)
    a_E = tl.zeros([STOPS], tl.float32)
    for start in range(0, stops, STOPS):
        is_allowed_E, weight_E = _rescale_stop_tokens(rescaling, start, STOPS)
        log_p_E = weight_E - log_z
        a_E += tl.exp(log_p_E) * log_p_E
        e = start + tl.arange(0, STOPS)
        value_E = tl.where(is_allowed_E, log_p_E * scale, -_INFINITY)
        tl.debug_barrier()  # All threads must have read the weights before they are overwritten.
        tl.store(stop_value + e, value_E, mask=e < stops)
    entropy_after -= tl.sum(a_E)

    moved_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.where(is_words, 0, gathered), BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        cool_K = tl.exp((below_K - top) / temperature) / cool_z
        is_kept_K = below_K <= ceiling
        hot_K = tl.exp(tl.where(is_kept_K, (below_K - remaining_top) * inverse, _ABSENT)) / hot_z
        moved_K += tl.where(is_content_K, tl.maximum(cool_K - hot_K, 0.0), 0.0)

    changed = content_share * (tl.sum(moved_K) + words_moved)
    tl.store(values + r, tl.where(valid, entropy_before, 0.0))
    tl.store(values + count + r, tl.where(valid, entropy_after, 0.0))
    tl.store(values + 2 * count + r, tl.where(valid, reached, 0.0))
    tl.store(values + 3 * count + r, tl.where(valid, changed, 0.0))
    tl.store(valid_rows + r, valid)
    if (has_slots != 0) & is_busy:
        at, k = tl.load(position + r), tl.load(offset + r)
        samples = at + 1 >= tl.load(known + s)
        statistics = (entropy_before, entropy_after, reached, changed)
        kept = (base, waiting, invalid)
        own = style_stats + r * _STYLE_STATS
        stage_row(kept, s, k, at, samples, valid, statistics, own, has_styles, rows_per_request)

    # 8. The plan for `_write`.
    tl.store(plan, valid.to(tl.float32))
    tl.store(plan + 1, peak)
    tl.store(plan + 2, threshold)
    tl.store(plan + 3, divisor)
    tl.store(plan + 4, inverse)
    tl.store(plan + 5, held)
    tl.store(plan + 6, log_z)
    tl.store(plan + 7, scale)
    tl.store(plan + 8, stops.to(tl.float32))
    tl.store(plan + _CEILING, ceiling)


@triton.jit
def _peak(maxima, chunks, BLOCK: tl.constexpr):
    peak_K = tl.full([BLOCK], -_INFINITY, tl.float32)
    for start in range(0, chunks, BLOCK):
        j = start + tl.arange(0, BLOCK)
        peak_K = tl.maximum(peak_K, tl.load(maxima + j, mask=j < chunks, other=-_INFINITY))
    return tl.max(peak_K)


@triton.jit
def _log_guard(level, numbers, constants):
    """laws.log_guard."""
    log_min_p = tl.load(numbers + _LOG_MIN_P)
    start, step = tl.load(constants + _LOG_GUARD_START), tl.load(constants + _LOG_GUARD_STEP)
    follows = tl.minimum(tl.maximum(level, 0.0), 1.0) * step + start
    return tl.where(log_min_p != log_min_p, follows, log_min_p)


@triton.jit
def _deviation(moments, tiles, BLOCK: tl.constexpr):
    """top_n_sigma: σ of the row's finite logits, in units of the row, from its tiles' moments."""
    count_K = tl.zeros([BLOCK], tl.float32)
    total_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tile_count_K = tl.load(moments + t, mask=t < tiles, other=0.0)
        count_K += tile_count_K
        total_K += tile_count_K * tl.load(moments + tiles + t, mask=t < tiles, other=0.0)
    count = tl.maximum(tl.sum(count_K), 1.0)
    mean = tl.sum(total_K) / count
    squares_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tile_count_K = tl.load(moments + t, mask=t < tiles, other=0.0)
        from_mean_K = tl.load(moments + tiles + t, mask=t < tiles, other=0.0) - mean
        squares_K += tl.load(moments + 2 * tiles + t, mask=t < tiles, other=0.0)
        squares_K += tile_count_K * from_mean_K * from_mean_K
    return tl.sqrt(tl.sum(squares_K) / count)


@triton.jit
def _ceiling(source, least, numbers, position, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """xtc.ceilings; a top choice has a log-weight of `least` or more."""
    ceiling = _INFINITY
    if _draw(numbers, position) < tl.load(numbers + _XTC_PROBABILITY):
        least_K = tl.full([BLOCK], _INFINITY, tl.float32)
        for start in range(0, source[2], BLOCK):
            below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
            is_top_K = is_content_K & (below_K >= least)
            least_K = tl.minimum(least_K, tl.where(is_top_K, below_K, _INFINITY))
        ceiling = tl.min(least_K)
    return ceiling


@triton.jit
def _draw(numbers, position):
    """draws.uniform."""
    high = tl.load(numbers + _KEY_HIGH).to(tl.int64)
    low = tl.load(numbers + _KEY_LOW).to(tl.int64)
    bits = _mixed(_mixed((position + low) & _WORD) ^ high)
    return (bits >> _SHIFT).to(tl.float32) * _UNIT


@triton.jit
def _mixed(bits):
    bits = ((bits ^ (bits >> 16)) * _FIRST) & _WORD
    bits = ((bits ^ (bits >> 15)) * _SECOND) & _WORD
    return bits ^ (bits >> 16)


@triton.jit
def _list_active(maxima, active, threshold, chunks, BLOCK: tl.constexpr):
    """Lists the chunks that contain a survivor, in order; returns their number."""
    listed = 0
    for start in range(0, chunks, BLOCK):
        j = start + tl.arange(0, BLOCK)
        is_active = tl.load(maxima + j, mask=j < chunks, other=-_INFINITY) >= threshold
        index = listed + tl.cumsum(is_active.to(tl.int32)) - 1
        tl.store(active + index, j, mask=is_active)
        listed += tl.sum(is_active.to(tl.int32))
    return listed


@triton.jit
def _stop_weights(
    row,
    stop_ids,
    stop_value,
    width,
    vocabulary,
    peak,
    divisor,
    threshold,
    STOPS: tl.constexpr,
):
    """Stores the stop tokens' weights: `_ABSENT` for a token that is not in the vocabulary or that
    the grammar forbids. Reads only the row's own stop tokens, not the padding.

    Returns:
        Their number, the highest weight, the plausible ones' part of H0's sums, and the number of
        plausible ones.
    """
    stops = 0
    peak_E = tl.full([STOPS], _ABSENT, tl.float32)
    z_E = tl.zeros([STOPS], tl.float32)
    a_E = tl.zeros([STOPS], tl.float32)
    plausible_E = tl.zeros([STOPS], tl.int32)
    has_more = width > 0
    while has_more:
        place_E = tl.arange(0, STOPS)
        e = stops + place_E
        token_E = tl.load(stop_ids + e, mask=e < width, other=-1)
        own = tl.min(tl.where(token_E < 0, place_E, STOPS))
        is_known_E = (place_E < own) & (token_E < vocabulary)
        logit_E = tl.load(row + token_E, mask=is_known_E, other=-_INFINITY)
        is_allowed_E = logit_E > -_INFINITY
        below_E = tl.where(is_allowed_E, tl.maximum((logit_E - peak) * divisor, _FARTHEST), _ABSENT)
        tl.store(stop_value + e, below_E, mask=e < width)
        peak_E = tl.maximum(peak_E, below_E)
        is_plausible_E = logit_E >= threshold
        share_E = tl.where(is_plausible_E, tl.exp(below_E), 0.0)
        z_E += share_E
        a_E += share_E * below_E
        plausible_E += is_plausible_E.to(tl.int32)
        stops += own
        has_more = own == STOPS
    return stops, tl.max(peak_E), tl.sum(z_E), tl.sum(a_E), tl.sum(plausible_E)


@triton.jit
def _take_out(row, stop_ids, stops, vocabulary, STOPS: tl.constexpr):
    for start in range(0, stops, STOPS):
        e = start + tl.arange(0, STOPS)
        token_E = tl.load(stop_ids + e, mask=e < stops, other=vocabulary)
        tl.store(row + token_E, -_INFINITY, mask=token_E < vocabulary)


@triton.jit
def _survivors(source, start, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """For a block of gathered tokens: log-weights at temperature 1 relative to the row's maximum (0
    for tokens that do not survive), and which tokens survive: those from the guard's threshold to
    the ceiling."""
    row, active, gathered, vocabulary, peak, divisor, threshold, ceiling = source
    k = start + tl.arange(0, BLOCK)
    chunk = tl.load(active + k // CHUNK, mask=k < gathered, other=0)
    token = chunk * CHUNK + k % CHUNK
    is_there = (k < gathered) & (token < vocabulary)
    logit = tl.load(row + token, mask=is_there, other=-_INFINITY)
    is_content = logit >= threshold
    below = tl.where(is_content, (logit - peak) * divisor, 0.0)
    is_content = is_content & (below <= ceiling)
    return tl.where(is_content, below, 0.0), is_content


@triton.jit
def _sums(source, top, inverse, exists, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Σ e^w and Σ w·e^w over the content, w = (weight − top)·inverse; 1 and 0 without content."""
    z_K = tl.zeros([BLOCK], tl.float32)
    a_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        weight_K = tl.where(is_content_K, (below_K - top) * inverse, 0.0)
        share_K = tl.where(is_content_K, tl.exp(weight_K), 0.0)
        z_K += share_K
        a_K += share_K * weight_K
    return tl.where(exists, tl.sum(z_K), 1.0), tl.sum(a_K)


@triton.jit
def _state(classes, last_token, classified):
    """The state of a text that ends in this token: words.row_classes."""
    is_known = (last_token >= 0) & (last_token < classified)
    return tl.load(classes + last_token, mask=is_known, other=0).to(tl.int32) >> _STATE_SHIFT


@triton.jit
def _class_after(classes, token, is_wanted, state, classified):
    """The class of each token after a text in this state; `other` where `is_wanted` is false."""
    mask = is_wanted & (token < classified)
    packed = tl.load(classes + token, mask=mask, other=0).to(tl.int32)
    return (packed >> (2 * state)) & _CLASS_MASK


@triton.jit
def _block_classes(words, start, is_content_K, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The classes of a block of gathered tokens; -1 for tokens that are not content."""
    source, classes, classified, state, _content_log_z = words
    k = start + tl.arange(0, BLOCK)
    chunk = tl.load(source[1] + k // CHUNK, mask=k < source[2], other=0)
    token = chunk * CHUNK + k % CHUNK
    class_K = _class_after(classes, token, is_content_K, state, classified)
    return tl.where(is_content_K, class_K, -1)


@triton.jit
def _by_class(
    words,
    level,
    numbers,
    constants,
    temperature,
    plan,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """words.heat_by_class. Stores in the plan each class's 1/T_c and the number to add to its
    weights.

    Returns:
        For the content alone: its entropy, the probability moved, and its mean temperature.
    """
    source, _classes, _classified, _state, content_log_z = words
    # 1. The temperatures: words.class_temperatures.
    start_T = temperature * (1.0 + tl.load(constants + _WORD_START_RISE) * level)
    start_T = tl.minimum(start_T, tl.maximum(temperature, tl.load(numbers + _MAX_TEMPERATURE)))
    fall = 1.0 - tl.load(constants + _WORD_INSIDE_FALL) * level
    inside_T = temperature * tl.maximum(fall, _COOLEST)

    # 2. Each class's maximum.
    other_top_K = tl.full([BLOCK], _ABSENT, tl.float32)
    start_top_K = tl.full([BLOCK], _ABSENT, tl.float32)
    inside_top_K = tl.full([BLOCK], _ABSENT, tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        class_K = _block_classes(words, start, is_content_K, CHUNK, BLOCK)
        other_top_K = tl.maximum(other_top_K, tl.where(class_K == _OTHER, below_K, _ABSENT))
        start_top_K = tl.maximum(start_top_K, tl.where(class_K == _START, below_K, _ABSENT))
        inside_top_K = tl.maximum(inside_top_K, tl.where(class_K == _INSIDE, below_K, _ABSENT))
    other_top, start_top = tl.max(other_top_K), tl.max(start_top_K)
    inside_top = tl.max(inside_top_K)

    # 3. Each class's sums at T and at T_c, relative to its maximum; for `other` both are equal.
    other_z_K = tl.zeros([BLOCK], tl.float32)
    other_a_K = tl.zeros([BLOCK], tl.float32)
    start_cool_K = tl.zeros([BLOCK], tl.float32)
    start_z_K = tl.zeros([BLOCK], tl.float32)
    start_a_K = tl.zeros([BLOCK], tl.float32)
    inside_cool_K = tl.zeros([BLOCK], tl.float32)
    inside_z_K = tl.zeros([BLOCK], tl.float32)
    inside_a_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        class_K = _block_classes(words, start, is_content_K, CHUNK, BLOCK)
        share_K, weight_K = _share(below_K, class_K == _OTHER, other_top, temperature)
        other_z_K += share_K
        other_a_K += share_K * weight_K
        share_K, weight_K = _share(below_K, class_K == _START, start_top, temperature)
        start_cool_K += share_K
        share_K, weight_K = _share(below_K, class_K == _START, start_top, start_T)
        start_z_K += share_K
        start_a_K += share_K * weight_K
        share_K, weight_K = _share(below_K, class_K == _INSIDE, inside_top, temperature)
        inside_cool_K += share_K
        share_K, weight_K = _share(below_K, class_K == _INSIDE, inside_top, inside_T)
        inside_z_K += share_K
        inside_a_K += share_K * weight_K
    other_z, start_cool, inside_cool = (
        tl.sum(other_z_K),
        tl.sum(start_cool_K),
        tl.sum(inside_cool_K),
    )
    start_z, inside_z = tl.sum(start_z_K), tl.sum(inside_z_K)

    # 4. The share of each class in the content, and ln of it.
    other_p, other_log_p = _class_share(other_z, other_top, temperature, content_log_z)
    start_p, start_log_p = _class_share(start_cool, start_top, temperature, content_log_z)
    inside_p, inside_log_p = _class_share(inside_cool, inside_top, temperature, content_log_z)
    entropy = _part(other_p, other_log_p, other_z, tl.sum(other_a_K))
    entropy += _part(start_p, start_log_p, start_z, tl.sum(start_a_K))
    entropy += _part(inside_p, inside_log_p, inside_z, tl.sum(inside_a_K))
    content_p = other_p + start_p + inside_p
    mean = other_p * temperature + start_p * start_T + inside_p * inside_T
    has_share = content_p > 0
    mean = tl.where(has_share, mean / tl.where(has_share, content_p, 1.0), temperature)

    # 5. The probability moved within the classes.
    start_moved_K = tl.zeros([BLOCK], tl.float32)
    inside_moved_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        class_K = _block_classes(words, start, is_content_K, CHUNK, BLOCK)
        cool_K, _w = _share(below_K, class_K == _START, start_top, temperature)
        hot_K, _w = _share(below_K, class_K == _START, start_top, start_T)
        moved_K = cool_K / tl.maximum(start_cool, 1.0) - hot_K / tl.maximum(start_z, 1.0)
        start_moved_K += tl.maximum(moved_K, 0.0)
        cool_K, _w = _share(below_K, class_K == _INSIDE, inside_top, temperature)
        hot_K, _w = _share(below_K, class_K == _INSIDE, inside_top, inside_T)
        moved_K = cool_K / tl.maximum(inside_cool, 1.0) - hot_K / tl.maximum(inside_z, 1.0)
        inside_moved_K += tl.maximum(moved_K, 0.0)
    moved = start_p * tl.sum(start_moved_K) + inside_p * tl.sum(inside_moved_K)

    # 6. For `_write`: w/T_c + added is the token's log-weight on the scale of all content.
    plan += _STATE + 1
    _plan_class(plan, temperature, other_top, other_log_p + content_log_z, other_z)
    _plan_class(plan + 2, start_T, start_top, start_log_p + content_log_z, start_z)
    _plan_class(plan + 4, inside_T, inside_top, inside_log_p + content_log_z, inside_z)
    return entropy, moved, mean


@triton.jit
def _share(below_K, is_member_K, top, temperature):
    """e^w and w, w = (weight − top)/temperature, for the members of a class; 0 for others."""
    weight_K = tl.where(is_member_K, (below_K - top) / temperature, 0.0)
    return tl.where(is_member_K, tl.exp(weight_K), 0.0), weight_K


@triton.jit
def _class_share(z, top, temperature, content_log_z):
    """The share of a class in the content at T, and ln of it; 0 and 0 for an empty class."""
    exists = z > 0
    log_p = top / temperature + tl.log(tl.where(exists, z, 1.0)) - content_log_z
    return tl.where(exists, tl.exp(log_p), 0.0), tl.where(exists, log_p, 0.0)


@triton.jit
def _part(p, log_p, z, a):
    """A class's part of the content's entropy."""
    z = tl.where(z > 0, z, 1.0)
    return p * (tl.log(z) - a / z - log_p)


@triton.jit
def _plan_class(plan, temperature, top, log_mass, z):
    exists = z > 0
    added = log_mass - tl.log(tl.where(exists, z, 1.0)) - top / temperature
    tl.store(plan, 1 / temperature)
    tl.store(plan + 1, tl.where(exists, added, 0.0))


@triton.jit
def _temperature(level, numbers, constants, entropy, plausible):
    """laws.temperature."""
    temperature = tl.load(numbers + _TEMPERATURE)
    gate = _power(entropy / (entropy + 1), tl.load(constants + _GATE_POWER))
    heated = temperature * tl.exp(level * gate * tl.load(constants + _STRENGTH))
    heated = tl.minimum(heated, tl.maximum(temperature, tl.load(numbers + _MAX_TEMPERATURE)))

    half_width = tl.load(numbers + _RANGE) * level
    coolest = tl.maximum(temperature - half_width, 0.0)
    share = entropy / tl.log(tl.maximum(plausible, 2.0))
    share = _power(tl.minimum(tl.maximum(share, 0.0), 1.0), tl.load(numbers + _EXPONENT))
    ranged = coolest + (temperature + half_width - coolest) * share
    ranged = tl.maximum(ranged, tl.load(constants + _LOWEST_TEMPERATURE))
    ranged = tl.where(plausible > 1, ranged, temperature)
    return tl.where(tl.load(numbers + _LAW) == _DYNATEMP, ranged, heated)


@triton.jit
def _power(base, exponent):
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(tl.log(safe) * exponent), 0.0)


@triton.jit
def _rescale_stop_tokens(rescaling, start, STOPS: tl.constexpr):
    """For a block of stop tokens: which are allowed, and their log-weights on the scale of the
    content: stops.rescale_stop_tokens."""
    stop_value, stops, temperature, shift, held_stop, tied_at = rescaling
    e = start + tl.arange(0, STOPS)
    below_E = tl.load(stop_value + e, mask=e < stops, other=_ABSENT)
    weight_E = tl.minimum(below_E / temperature + shift, held_stop)
    return below_E > _ABSENT, tl.where(below_E == tied_at, held_stop, weight_E)


@triton.jit
def _temperature_at_bound(
    source, top, temperature, wanted, argmax_bound, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """stops.temperature_at_bound."""
    low = 1 / tl.maximum(temperature, wanted)
    high = 1 / tl.minimum(temperature, wanted)
    beta = low
    for _ in range(_NEWTON_STEPS):
        z, a = _sums(source, top, beta, True, CHUNK, BLOCK)
        slope = tl.minimum(a / z / beta, -1e-12)
        beta = tl.minimum(tl.maximum(beta + (argmax_bound - tl.log(z)) / slope, low), high)
    return 1 / beta


@triton.jit(
    do_not_specialize=["stride", "vocabulary", "chunks", "width", "classified"],
    do_not_specialize_on_alignment=["logits", "rows", "slot", "stop_ids", "classes"],
)
def _write(
    logits,
    rows,
    maxima,
    slot,
    plan,
    stop_ids,
    stop_value,
    classes,
    stride,
    vocabulary,
    chunks,
    width,
    classified,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    STOPS: tl.constexpr,
):
    r = tl.program_id(0)
    row, vocabulary = _row(logits, rows, stride, vocabulary, ALIGNED)
    plan += r * _PLAN
    is_valid, peak, threshold = tl.load(plan) > 0, tl.load(plan + 1), tl.load(plan + 2)
    divisor, inverse, held = tl.load(plan + 3), tl.load(plan + 4), tl.load(plan + 5)
    log_z, scale, stops = tl.load(plan + 6), tl.load(plan + 7), tl.load(plan + 8).to(tl.int32)
    first = tl.program_id(1) * TILE
    chunk = tl.program_id(1) * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    is_there = token < vocabulary
    maximum = tl.load(maxima + r * chunks + chunk, mask=chunk < chunks, other=-_INFINITY)
    is_active = (maximum >= threshold)[:, None]
    if is_valid:  # An invalid row is left unchanged.
        logit = tl.load(row + token, mask=is_there & is_active, other=-_INFINITY)
        below = (logit - peak) * divisor
        weight = tl.minimum(below * inverse, held)
        state = tl.load(plan + _STATE).to(tl.int32)
        if state >= 0:  # The law `words`: a temperature for each class.
            class_ = _class_after(classes, token, logit >= threshold, state, classified)
            by_class = plan + _STATE + 1
            is_start, is_inside = class_ == _START, class_ == _INSIDE
            inverses = tl.where(is_start, tl.load(by_class + 2), tl.load(by_class))
            inverses = tl.where(is_inside, tl.load(by_class + 4), inverses)
            added = tl.where(is_start, tl.load(by_class + 3), tl.load(by_class + 1))
            added = tl.where(is_inside, tl.load(by_class + 5), added)
            weight = (logit - peak) * divisor * inverses + added
        is_kept = (logit >= threshold) & (below <= tl.load(plan + _CEILING))
        value = tl.where(is_kept, (weight - log_z) * scale, -_INFINITY)
        tl.store(row + token, value, mask=is_there)
        tl.debug_barrier()  # The writes above included the stop tokens, which are overwritten now.
        stop_ids += tl.load(slot + r) * width
        for start in range(0, stops, STOPS):
            e = start + tl.arange(0, STOPS)
            stop_E = tl.load(stop_ids + e, mask=e < stops, other=-1)
            is_here_E = (stop_E >= first) & (stop_E < first + TILE) & (stop_E < vocabulary)
            value_E = tl.load(stop_value + r * width + e, mask=is_here_E, other=-_INFINITY)
            tl.store(row + stop_E, value_E, mask=is_here_E)
