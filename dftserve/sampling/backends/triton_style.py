"""Styles on a GPU: one Triton kernel, launched before the law's; the reference is `style.stage`.

One program per row; those of rows without a style return immediately. A program reads its row for
the maxima of its chunks, then only the chunks that contain survivors, once for each sum, and writes
the row: the cost is two passes over the row, and little more if few tokens survive. The slots'
statistics are only read here: the law's first kernel settles them later.

Shapes: see `triton.py` and `style/tables.py`.
"""

# Type checkers cannot analyse Triton kernels.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import slots as slot_columns
from dftserve.sampling.backends.triton import (
    _ABSENT,
    _DIVISOR,
    _INFINITY,
    _LAW,
    _LOWEST,
    _NO_LAW,
    _NUMBERS,
    _TEMPERATURE,
    BLOCK,
    CHUNK,
    STOPS,
    _is_aligned,
    _list_active,
    _peak,
    _row,
    _stop_weights,
    _survivors,
    _take_out,
)
from dftserve.sampling.backends.triton_slots import EXACT, TritonSlots
from dftserve.sampling.buffers import Buffer
from dftserve.sampling.controls import NO_STYLE
from dftserve.sampling.slots import Slots
from dftserve.sampling.step import FiniteTokens, Step
from dftserve.sampling.style import stage, strength
from dftserve.sampling.style.tables import StyleTables

TILE = 4096
"""Tokens processed at a time when a whole row is read or written; a multiple of CHUNK."""


class TritonStyleStage:
    """`StyleStage` with its own buffers, allocated on first use; use it on one stream at a time."""

    finite_tokens: FiniteTokens | None = None

    def __init__(self, tables: StyleTables) -> None:
        self._tables, self._arrays = tables, tables.arrays()
        device = tables.root_P.device
        self._maxima, self._stats = Buffer(device), Buffer(device)
        self._active = Buffer(device, torch.int32)
        self._stop_value = Buffer(device)
        self._index_R = torch.arange(0, device=device)

    def __call__(self, logits_XV: Tensor, step: Step, slots: Slots) -> Tensor:
        assert isinstance(slots, TritonSlots)
        texts, tables = step.texts, self._tables
        assert texts is not None
        rows, width = len(step.slot_R), step.controls.stop_ids_RE.shape[1]
        chunks = triton.cdiv(logits_XV.shape[1], CHUNK)
        if rows > len(self._index_R):
            with torch.inference_mode(mode=False):
                self._index_R = torch.arange(2 * rows, device=self._index_R.device)
        _level, _steered, _tokens, base_S, sums_SF, waiting_SKF, _invalid = slots.state()
        style_stats_RF = self._stats.take(rows, _STYLE_STATS.value)
        with torch.cuda.device_of(logits_XV):
            _restyle[(rows,)](
                logits_XV,
                self._index_R if step.rows_R is None else step.rows_R,
                step.slot_R,
                step.position_R,
                step.offset_R,
                step.controls.numbers_RF,
                step.controls.stop_ids_RE,
                texts.tokens_SL,
                texts.begin_S,
                texts.at_R,
                texts.input_R,
                *self._arrays,
                base_S,
                sums_SF,
                waiting_SKF,
                self._maxima.take(rows, chunks),
                self._active.take(rows, chunks),
                self._stop_value.take(rows, width),
                style_stats_RF,
                logits_XV.stride(0),
                logits_XV.shape[1],
                chunks,
                width,
                texts.tokens_SL.stride(0),
                tables.vocabulary,
                tables.depth,
                tables.search_steps,
                slots.rows_per_request,
                ALIGNED=_is_aligned(logits_XV),
                CHUNK=CHUNK,
                TILE=TILE,
                BLOCK=BLOCK,
                STOPS=STOPS,
                num_warps=8,
                **EXACT,
            )
        return style_stats_RF


_STYLE, _NO_STYLE = tl.constexpr(columns.STYLE), tl.constexpr(NO_STYLE)
_STYLE_STRENGTH = tl.constexpr(columns.STYLE_STRENGTH)
_STYLE_MAX_KL = tl.constexpr(columns.STYLE_MAX_KL)
_STYLE_LOG_GUARD = tl.constexpr(columns.STYLE_LOG_GUARD)
_COLUMNS, _COUNT = tl.constexpr(slot_columns.COLUMNS), tl.constexpr(slot_columns.COUNT)
_TILT_KL = tl.constexpr(slot_columns.TILT_KL)
_STYLE_STATS = tl.constexpr(slot_columns.COLUMNS - slot_columns.KL)
_WEAKEST, _STEPS = tl.constexpr(stage.WEAKEST), tl.constexpr(strength.STEPS)
_TINY = tl.constexpr(1e-30)


@triton.jit(
    do_not_specialize=[
        *("stride", "vocabulary", "chunks", "width", "text_stride", "known_tokens", "depth"),
        *("search_steps", "rows_per_request"),
    ],
    do_not_specialize_on_alignment=[
        *("logits", "rows", "slot", "position", "offset", "numbers", "stop_ids"),
        *("texts", "begin", "at", "input_ids"),
        *("root", "root_next", "root_log_factor", "row_start", "row_token", "row_next"),
        *("row_log_factor", "unigram", "bigram_start", "bigram_token", "bigram_delta"),
    ],
)
def _restyle(
    logits,
    rows,
    slot,
    position,
    offset,
    numbers,
    stop_ids,
    texts,
    begin,
    at,
    input_ids,
    root,
    root_next,
    root_log_factor,
    row_start,
    row_token,
    row_next,
    row_log_factor,
    unigram,
    bigram_start,
    bigram_token,
    bigram_delta,
    base,
    sums,
    waiting,
    maxima,
    active,
    stop_value,
    style_stats,
    stride,
    vocabulary,
    chunks,
    width,
    text_stride,
    known_tokens,
    depth,
    search_steps,
    rows_per_request,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STOPS: tl.constexpr,
):
    r = tl.program_id(0)
    s = tl.load(slot + r)
    numbers += s * _NUMBERS
    style = tl.load(numbers + _STYLE).to(tl.int32)
    has_style = (tl.load(numbers + _LAW) != _NO_LAW) & (style != _NO_STYLE)
    style_stats += r * _STYLE_STATS
    tl.store(style_stats + tl.arange(0, _STYLE_STATS), tl.zeros([_STYLE_STATS], tl.float32))
    if has_style:
        row, vocabulary = _row(logits, rows, stride, vocabulary, ALIGNED)
        maxima += r * chunks
        active += r * chunks
        stop_value += r * width
        stop_ids += s * width

        # 1. The maxima of the row's chunks.
        for first in range(0, chunks, TILE // CHUNK):
            chunk = first + tl.arange(0, TILE // CHUNK)
            token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            logit = tl.load(row + token, mask=token < vocabulary, other=-_INFINITY)
            logit = tl.where(logit != logit, _INFINITY, logit)
            tl.store(maxima + chunk, tl.max(logit, axis=1), mask=chunk < chunks)
        tl.debug_barrier()  # All threads must have stored their maxima.
        peak = _peak(maxima, chunks, BLOCK)
        if (peak > -_INFINITY) & (peak < _INFINITY):
            automaton = (root_next, root_log_factor, row_start, row_token, row_next, row_log_factor)
            tilt = (unigram, bigram_start, bigram_token, bigram_delta)
            text = (texts + s * text_stride, input_ids + r)
            ends = (tl.load(at + r), tl.load(begin + s), tl.load(offset + r), depth)
            sizes = (style, known_tokens, search_steps)
            state = _state_before(text, ends, tl.load(root + style), automaton, sizes)
            state_of_slot = (base + s, sums + s * _COLUMNS, waiting)
            first_at = tl.load(position + r) - tl.load(offset + r)
            max_kl = tl.load(numbers + _STYLE_MAX_KL)
            allowance = _allowance(state_of_slot, s, first_at, max_kl, rows_per_request)
            _restyle_row(
                (row, maxima, active, stop_ids, stop_value, style_stats),
                (vocabulary, chunks, width, peak),
                numbers,
                (state, tl.load(input_ids + r).to(tl.int32), allowance),
                automaton,
                tilt,
                sizes,
                CHUNK,
                TILE,
                BLOCK,
                STOPS,
            )


@triton.jit
def _state_before(text, ends, root_state, automaton, sizes):
    """stage.states_before, for one row."""
    tokens, input_id = text
    at, begin, offset, depth = ends
    state = root_state
    for step in range(depth):
        back = depth - 1 - step
        is_text, is_input = at - back >= begin, offset >= back
        known = tl.load(tokens + (at - back), mask=is_text & (is_input == 0), other=0)
        drafted = tl.load(input_id - back, mask=is_text & is_input, other=0)
        token = tl.where(is_input, drafted, known).to(tl.int32)
        is_known = (token >= 0) & (token < sizes[1])
        following, _factor = _follow(state, token, is_known, automaton, sizes)
        following = tl.where(is_known, following, root_state)
        state = tl.where(is_text, following, state)
    return state


@triton.jit
def _allowance(state_of_slot, s, first_at, max_kl, rows_per_request):
    """stage.allowances, for one row, from the sums that the law's first kernel will store."""
    base, sums, waiting = state_of_slot
    waiting += s * rows_per_request * _COLUMNS
    accepted = tl.minimum(tl.maximum(first_at - tl.load(base), 0), rows_per_request)
    count, spent = tl.load(sums + _COUNT), tl.load(sums + _TILT_KL)
    for k in range(rows_per_request):
        is_accepted = k < accepted
        count += tl.load(waiting + k * _COLUMNS + _COUNT, mask=is_accepted, other=0.0)
        spent += tl.load(waiting + k * _COLUMNS + _TILT_KL, mask=is_accepted, other=0.0)
    return tl.maximum(max_kl + (max_kl * count - spent) / rows_per_request, 0.0)


@triton.jit
def _find(tokens, low, end, wanted, mask, search_steps):
    """The index of each token in the sorted range [low, end), and whether it was found."""
    high = end
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_open = low < high
        is_below = tl.load(tokens + middle, mask=mask & is_open, other=0) < wanted
        low = tl.where(is_open & is_below, middle + 1, low)
        high = tl.where(is_open & (is_below == 0), middle, high)
    is_there = mask & (low < end)
    return low, is_there & (tl.load(tokens + low, mask=is_there, other=-1) == wanted)


@triton.jit
def _follow(state, token, mask, automaton, sizes):
    """StyleTables.step, for one token or a block of them; 0 where `mask` is false."""
    root_next, root_log_factor, row_start, row_token, row_next, row_log_factor = automaton
    style, known_tokens, search_steps = sizes
    low = tl.load(row_start + state) + token * 0
    end = tl.load(row_start + state + 1) + token * 0
    entry, is_found = _find(row_token, low, end, token, mask, search_steps)
    place = style.to(tl.int64) * known_tokens + token
    from_root = mask & (is_found == 0)
    following = tl.load(root_next + place, mask=from_root, other=0)
    following = tl.where(is_found, tl.load(row_next + entry, mask=is_found, other=0), following)
    factor = tl.load(root_log_factor + place, mask=from_root, other=0.0)
    found = tl.load(row_log_factor + entry, mask=is_found, other=0.0)
    return following, tl.where(is_found, found, factor)


@triton.jit
def _delta(context, token, mask, tilt, sizes):
    """StyleTables.delta, for a block of tokens; 0 where `mask` is false."""
    unigram, bigram_start, bigram_token, bigram_delta = tilt
    style, known_tokens, search_steps = sizes
    has_context = (context >= 0) & (context < known_tokens)
    place = style.to(tl.int64) * known_tokens
    low = tl.load(bigram_start + place + context, mask=has_context, other=0) + token * 0
    end = tl.load(bigram_start + place + context + 1, mask=has_context, other=0) + token * 0
    entry, is_found = _find(bigram_token, low, end, token, mask, search_steps)
    alone = tl.load(unigram + place + token, mask=mask & (is_found == 0), other=0.0)
    return tl.where(is_found, tl.load(bigram_delta + entry, mask=is_found, other=0.0), alone)


@triton.jit
def _block(source, start, row_of, automaton, tilt, sizes, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """For a block of gathered tokens: their ids, w at T relative to the content's maximum, the log
    factor and δ, and which of them are content. `row_of`: state, context, content_peak, T,
    strength."""
    state, context, content_peak, temperature, strength = row_of
    below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
    k = start + tl.arange(0, BLOCK)
    chunk = tl.load(source[1] + k // CHUNK, mask=k < source[2], other=0)
    token_K = chunk * CHUNK + k % CHUNK
    is_known_K = is_content_K & (token_K < sizes[1])
    _next, factor_K = _follow(state, token_K, is_known_K, automaton, sizes)
    weaker_K = tl.log((1.0 - strength) + strength * tl.exp(factor_K))
    # Factors of 1 must not change any bit.
    weaker_K = tl.where(factor_K == 0.0, 0.0, weaker_K)
    factor_K = tl.where(strength < 1, weaker_K, factor_K)
    delta_K = _delta(context, token_K, is_known_K, tilt, sizes)
    weight_K = tl.where(is_content_K, (below_K - content_peak) / temperature, 0.0)
    return token_K, weight_K, factor_K, delta_K, is_content_K


@triton.jit
def _tilted(
    source, row_of, automaton, tilt, sizes, z_once, s, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """K(s), and ln E_p[e^{sδ}]."""
    z_K = tl.zeros([BLOCK], tl.float32)
    a_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        _t, weight_K, factor_K, delta_K, is_content_K = _block(
            source, start, row_of, automaton, tilt, sizes, CHUNK, BLOCK
        )
        share_K = tl.where(is_content_K, tl.exp(weight_K + factor_K + s * delta_K), 0.0)
        z_K += share_K
        a_K += share_K * delta_K
    z = tl.maximum(tl.sum(z_K), _TINY)
    log_rise = tl.log(z / z_once)
    return tl.maximum(s * tl.sum(a_K) / z - log_rise, 0.0), log_rise


@triton.jit
def _largest_strength(
    source,
    row_of,
    automaton,
    tilt,
    sizes,
    z_once,
    allowance,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """strength.largest_strength, for one row."""
    requested = row_of[4]
    goal = tl.sqrt(allowance)
    cost, _rise = _tilted(source, row_of, automaton, tilt, sizes, z_once, requested, CHUNK, BLOCK)
    at_high = tl.sqrt(cost) - goal
    reached = requested
    if at_high > 0:
        low, high, at_low, side = requested * 0.0, requested, -goal, requested * 0.0
        for _ in range(_STEPS):
            reached = high - at_high * (high - low) / (at_high - at_low)
            cost, _rise = _tilted(
                source, row_of, automaton, tilt, sizes, z_once, reached, CHUNK, BLOCK
            )
            at = tl.sqrt(cost) - goal
            above = at > 0
            at_low = tl.where(above & (side > 0), 0.5 * at_low, at_low)
            at_high = tl.where((above == 0) & (side < 0), 0.5 * at_high, at_high)
            side = tl.where(above, 1.0, -1.0)
            high, at_high = tl.where(above, reached, high), tl.where(above, at, at_high)
            low, at_low = tl.where(above, low, reached), tl.where(above, at_low, at)
    return reached


@triton.jit
def _restyle_row(
    places,
    lengths,
    numbers,
    before,
    automaton,
    tilt,
    sizes,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STOPS: tl.constexpr,
):
    """stage.restyled, for one valid row."""
    row, maxima, active, stop_ids, stop_value, style_stats = places
    vocabulary, chunks, width, peak = lengths
    state, context, allowance = before
    temperature, divisor = tl.load(numbers + _TEMPERATURE), tl.load(numbers + _DIVISOR)
    strength = tl.load(numbers + _STYLE_STRENGTH)

    # 1. The guard; stop tokens are set to -inf in the row, and their logits are saved.
    log_guard = tl.load(numbers + _STYLE_LOG_GUARD)
    threshold = tl.maximum(peak + log_guard / divisor, _LOWEST)
    listed = _list_active(maxima, active, threshold, chunks, BLOCK)
    stops, _peak_below, _z, _a, _plausible = _stop_weights(
        row, stop_ids, stop_value, width, vocabulary, peak, divisor, threshold, STOPS
    )
    stop_top_E = tl.full([STOPS], _ABSENT, tl.float32)
    tl.debug_barrier()  # The weights must be stored, and all threads must have read the tokens.
    for start in range(0, stops, STOPS):
        e = start + tl.arange(0, STOPS)
        below_E = tl.load(stop_value + e, mask=e < stops, other=_ABSENT)
        stop_top_E = tl.maximum(stop_top_E, below_E / temperature)
    stop_top = tl.max(stop_top_E)
    stop_z_E = tl.zeros([STOPS], tl.float32)
    tl.debug_barrier()
    for start in range(0, stops, STOPS):
        e = start + tl.arange(0, STOPS)
        below_E = tl.load(stop_value + e, mask=e < stops, other=_ABSENT)
        stop_z_E += tl.where(below_E > _ABSENT, tl.exp(below_E / temperature - stop_top), 0.0)
        token_E = tl.load(stop_ids + e, mask=e < stops, other=vocabulary)
        logit_E = tl.load(row + token_E, mask=token_E < vocabulary, other=-_INFINITY)
        tl.debug_barrier()  # All threads must have read the weights before they are overwritten.
        tl.store(stop_value + e, logit_E, mask=e < stops)
    stop_z = tl.sum(stop_z_E)
    tl.debug_barrier()
    _take_out(row, stop_ids, stops, vocabulary, STOPS)
    tl.debug_barrier()
    source = (row, active, listed * CHUNK, vocabulary, peak, divisor, threshold, _INFINITY)

    # 2. The content's maximum.
    top_K = tl.full([BLOCK], _ABSENT, tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        top_K = tl.maximum(top_K, tl.where(is_content_K, below_K, _ABSENT))
    content_peak = tl.max(top_K)
    exists = content_peak > _ABSENT
    content_peak = tl.where(exists, content_peak, 0.0)
    row_of = (state, context, content_peak, temperature, strength)

    # 3. The phrases.
    z_K = tl.zeros([BLOCK], tl.float32)
    once_K = tl.zeros([BLOCK], tl.float32)
    twice_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        _t, weight_K, factor_K, _d, is_content_K = _block(
            source, start, row_of, automaton, tilt, sizes, CHUNK, BLOCK
        )
        z_K += tl.where(is_content_K, tl.exp(weight_K), 0.0)
        once_K += tl.where(is_content_K, tl.exp(weight_K + factor_K), 0.0)
        twice_K += tl.where(is_content_K, tl.exp(weight_K + 2.0 * factor_K), 0.0)
    z = tl.where(exists, tl.sum(z_K), 1.0)
    z_once = tl.where(exists, tl.sum(once_K), 1.0)
    held_back = (tl.sum(twice_K) / z_once - z_once / z) / tl.maximum(strength, _WEAKEST)
    content_log_z = content_peak / temperature + tl.log(z)
    stop_log_z = stop_top + tl.log(tl.maximum(stop_z, _TINY))
    share = tl.where(stop_z > 0, 1.0 / (1.0 + tl.exp(stop_log_z - content_log_z)), 1.0)
    share = tl.where(exists, share, 0.0)

    # 4. The tilt.
    reached, tilt_kl, log_rise = strength, strength * 0.0, strength * 0.0
    if exists:
        within = allowance / tl.maximum(share, _TINY)
        reached = _largest_strength(
            source, row_of, automaton, tilt, sizes, z_once, within, CHUNK, BLOCK
        )
        tilt_kl, log_rise = _tilted(
            source, row_of, automaton, tilt, sizes, z_once, reached, CHUNK, BLOCK
        )
    shift = tl.log(z_once / z) + log_rise

    # 5. Set all other tokens to -inf, shift the survivors, and sum their divergence.
    for first in range(0, chunks, TILE // CHUNK):
        chunk = first + tl.arange(0, TILE // CHUNK)
        token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        is_there = token < vocabulary
        maximum = tl.load(maxima + chunk, mask=chunk < chunks, other=-_INFINITY)
        is_active = (maximum >= threshold)[:, None]
        logit = tl.load(row + token, mask=is_there & is_active, other=-_INFINITY)
        value = tl.where(logit >= threshold, logit, -_INFINITY)
        tl.store(row + token, value, mask=is_there)
    tl.debug_barrier()
    scale = temperature / divisor
    kl_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        token_K, weight_K, factor_K, delta_K, is_content_K = _block(
            source, start, row_of, automaton, tilt, sizes, CHUNK, BLOCK
        )
        bias_K = factor_K + reached * delta_K - shift
        kl_K += tl.where(is_content_K, tl.exp(weight_K + bias_K) / z * bias_K, 0.0)
        logit_K = tl.load(row + token_K, mask=is_content_K, other=0.0)
        tl.debug_barrier()  # All threads must have read the block's logits, also in `_survivors`.
        tl.store(row + token_K, logit_K + bias_K * scale, mask=is_content_K)
    tl.debug_barrier()
    for start in range(0, stops, STOPS):
        e = start + tl.arange(0, STOPS)
        token_E = tl.load(stop_ids + e, mask=e < stops, other=vocabulary)
        logit_E = tl.load(stop_value + e, mask=e < stops, other=-_INFINITY)
        tl.store(row + token_E, logit_E, mask=token_E < vocabulary)
    tl.store(style_stats, share * tl.maximum(tl.sum(kl_K), 0.0))
    tl.store(style_stats + 1, share * tilt_kl)
    tl.store(style_stats + 2, share * tl.maximum(held_back, 0.0))
    tl.store(style_stats + 3, reached)
