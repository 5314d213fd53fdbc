"""The transform on a GPU: three Triton kernels, one read and one write of the rows.

    _maxima   streams the rows once, for the maxima of their chunks, in as many programs as fit
    _decide   one program a row: the few chunks that can hold survivors are gathered; H0, the
              law's temperature, stop tokens, figures
    _write    -inf and the rewritten survivors; reads again only the chunks that hold some

A peaked row is gathered from a few kilobytes that are still in cache; a flat one takes the same
way and is streamed again for each sum. Nothing waits for the host, buffers stay once the largest
batch was seen (from then on graphs can be captured), and sums have one order: tensor-parallel ranks
agree. The maths is that of `transform.py`, which is the reference.
"""

# Kernels are Triton, not Python, to a type checker's eye.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import entropy, guard, laws, stops
from dftserve.sampling.buffers import Buffer
from dftserve.sampling.laws import Controls
from dftserve.sampling.transform import Statistics

CHUNK = 64
TILE = 4096
"""Tokens a program of `_maxima` and of `_write`; a multiple of CHUNK."""
BLOCK = 2048
"""Values at a time in `_decide`; a multiple of CHUNK."""


_EXACT = {"enable_fp_fusion": False}
"""The same product has the same bits in every kernel: ties between tokens must stay ties."""


class TritonTransform:
    """`transform` with buffers of its own; for one stream at a time."""

    def __init__(self, device: torch.device) -> None:
        self._rows = Buffer(device, torch.int64)
        self._numbers = Buffer(device)
        self._maxima = Buffer(device)
        self._active = Buffer(device, torch.int32)
        self._plan = Buffer(device)
        self._stop_at = Buffer(device, torch.int32)
        self._stop_value = Buffer(device)
        self._figures = Buffer(device)

    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        """As `transform.transform`."""
        rows, width = controls.stop_ids_RE.shape
        vocabulary = logits_XV.shape[1]
        chunks = triton.cdiv(vocabulary, CHUNK)
        if rows_R is None:
            rows_R = torch.arange(rows, out=self._rows.take(1, rows)[0])
        numbers_RF = self._numbers.take(rows, len(_NUMBERS))
        torch.stack([getattr(controls, name) for name in _NUMBERS], dim=1, out=numbers_RF)
        maxima_RJ = self._maxima.take(rows, chunks)
        plan_RP = self._plan.take(rows, _PLAN.value)
        stop_at_RE = self._stop_at.take(rows, width)
        stop_value_RE = self._stop_value.take(rows, width)
        figures_FR = self._figures.take(5, rows)
        tiles = (rows, triton.cdiv(vocabulary, TILE))
        _maxima[tiles](
            logits_XV,
            rows_R,
            maxima_RJ,
            logits_XV.stride(0),
            vocabulary,
            chunks,
            CHUNK=CHUNK,
            TILE=TILE,
            **_EXACT,
        )
        _decide[(rows,)](
            logits_XV,
            rows_R,
            maxima_RJ,
            numbers_RF,
            controls.stop_ids_RE.contiguous(),
            self._active.take(rows, chunks),
            plan_RP,
            stop_at_RE,
            stop_value_RE,
            figures_FR,
            logits_XV.stride(0),
            vocabulary,
            chunks,
            width,
            rows,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=8,
            **_EXACT,
        )
        _write[tiles](
            logits_XV,
            rows_R,
            maxima_RJ,
            plan_RP,
            stop_at_RE,
            stop_value_RE,
            logits_XV.stride(0),
            vocabulary,
            chunks,
            width,
            CHUNK=CHUNK,
            TILE=TILE,
            **_EXACT,
        )
        return Statistics(*figures_FR[:4], sound_R=figures_FR[4] > 0)


_NUMBERS = (
    "law_R",
    "temperature_R",
    "divided_R",
    "level_R",
    "log_min_p_R",
    "max_temperature_R",
    "dynatemp_range_R",
    "dynatemp_exponent_R",
)
_FIELDS = tl.constexpr(len(_NUMBERS))
_PLAN = tl.constexpr(7)

# What a kernel reads from outside has to be marked so.
_ABSENT = tl.constexpr(entropy.ABSENT)
_FARTHEST = tl.constexpr(guard.FARTHEST)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_GUARD_START = tl.constexpr(math.log(laws.GUARD_START))
_GUARD_STEP = tl.constexpr(math.log(laws.GUARD_END / laws.GUARD_START))
_STRENGTH = tl.constexpr(laws.STRENGTH)
_GATE_POWER = tl.constexpr(laws.GATE_POWER)
_LOWEST_TEMPERATURE = tl.constexpr(laws.LOWEST_TEMPERATURE)
_DYNATEMP = tl.constexpr(laws.LAW_CODES["dynatemp"])
_NEARLY = tl.constexpr(stops.NEARLY)
_NEWTON_STEPS = tl.constexpr(stops.NEWTON_STEPS)
_INFINITY = tl.constexpr(math.inf)
_NAN = tl.constexpr(math.nan)


@triton.jit(do_not_specialize=["chunks"])
def _maxima(
    logits, rows, maxima, stride, vocabulary, chunks, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """NaN counts as +inf: neither leaves a row sound."""
    r = tl.program_id(0)
    row = logits + tl.load(rows + r) * stride
    chunk = tl.program_id(1) * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    logit = tl.load(row + token, mask=token < vocabulary, other=-_INFINITY)
    logit = tl.where(logit != logit, _INFINITY, logit)
    tl.store(maxima + r * chunks + chunk, tl.max(logit, axis=1), mask=chunk < chunks)


@triton.jit(do_not_specialize=["chunks", "width", "count"])
def _decide(
    logits,
    rows,
    maxima,
    numbers,
    stop_ids,
    active,
    plan,
    stop_at,
    stop_value,
    figures,
    stride,
    vocabulary,
    chunks,
    width,
    count,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0)
    row = logits + tl.load(rows + r) * stride
    maxima += r * chunks
    active += r * chunks
    stop_ids += r * width
    stop_at += r * width
    stop_value += r * width
    numbers += r * _FIELDS
    temperature, divided = tl.load(numbers + 1), tl.load(numbers + 2)

    # The guard: where the row's survivors are.
    peak = _peak(maxima, chunks, BLOCK)
    sound = (peak > -_INFINITY) & (peak < _INFINITY)
    peak = tl.where(sound, peak, 0.0)
    floor = tl.maximum(peak + _log_guard(numbers) / divided, _LOWEST)
    floor = tl.where(sound, floor, _NAN)  # Nothing is at least NaN: nothing survives.
    gathered = _list_active(maxima, active, floor, chunks, BLOCK) * CHUNK
    tl.debug_barrier()
    source = (row, active, gathered, vocabulary, peak, divided, floor, stop_ids, width)

    # Openness, and the law's temperature.
    z_K = tl.zeros([BLOCK], tl.float32)
    a_K = tl.zeros([BLOCK], tl.float32)
    plausible_K = tl.zeros([BLOCK], tl.int32)
    content_peak_K = tl.full([BLOCK], _ABSENT, tl.float32)
    for start in range(0, gathered, BLOCK):
        below_K, is_plausible_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        share_K = tl.where(is_plausible_K, tl.exp(below_K), 0.0)
        z_K += share_K
        a_K += share_K * below_K
        plausible_K += is_plausible_K.to(tl.int32)
        content_peak_K = tl.maximum(content_peak_K, tl.where(is_content_K, below_K, _ABSENT))
    z = tl.where(sound, tl.sum(z_K), 1.0)
    entropy_before = tl.log(z) - tl.sum(a_K) / z
    wanted = _temperature(numbers, entropy_before, tl.sum(plausible_K).to(tl.float32))

    # The content at T and at T', its sums below its own maximum.
    content_peak = tl.max(content_peak_K)
    exists = content_peak > _ABSENT
    top = tl.where(exists, content_peak, 0.0)
    cool_z, _cool_a = _sums(source, top, 1 / temperature, exists, CHUNK, BLOCK)
    hot_z, hot_a = _sums(source, top, 1 / wanted, exists, CHUNK, BLOCK)
    cool_log_z = top / temperature + tl.log(cool_z)

    # No hotter than where content and the likeliest stop token tie: stops.heat.
    stop_peak = _ABSENT
    for e in range(width):
        stop_peak = tl.maximum(stop_peak, _stop(source, e))
    reached = wanted
    tie = cool_log_z - stop_peak / temperature
    leads = content_peak >= stop_peak
    leads_hot = tl.log(hot_z) <= tie
    if exists & (stop_peak > _ABSENT) & (leads != leads_hot):
        reached = _tie(source, top, temperature, wanted, tie, CHUNK, BLOCK)
        hot_z, hot_a = _sums(source, top, 1 / reached, exists, CHUNK, BLOCK)
    inverse = 1 / reached
    hot_log_z = top * inverse + tl.log(hot_z)

    # Stop tokens keep their probability, and rounding changes no order: stops.beside_stops.
    shift = tl.where(exists, hot_log_z - cool_log_z, 0.0)
    held_stop = tl.where(leads, top * inverse, _INFINITY)
    is_same = tl.abs(reached / temperature - 1) < _NEARLY
    tied_at = tl.where(exists & leads & is_same, content_peak, _NAN)
    stop_top = _ABSENT
    for e in range(width):
        weight = _beside(_stop(source, e), temperature, shift, held_stop, tied_at)
        stop_top = tl.maximum(stop_top, weight)
    held = tl.where(leads, _INFINITY, stop_top)
    content_log_z = tl.where(exists, hot_log_z, _ABSENT)
    highest = tl.maximum(content_log_z, stop_top)
    z = tl.exp(content_log_z - highest)
    for e in range(width):
        weight = _beside(_stop(source, e), temperature, shift, held_stop, tied_at)
        z += tl.exp(weight - highest)
    log_z = highest + tl.log(z)
    scale = temperature / divided
    content_log_p = content_log_z - log_z
    content_share = tl.exp(content_log_p)
    content_entropy = tl.log(hot_z) - hot_a / hot_z
    entropy_after = content_share * tl.where(exists, content_entropy - content_log_p, 0.0)
    for e in range(width):
        below = _stop(source, e)
        log_p = _beside(below, temperature, shift, held_stop, tied_at) - log_z
        entropy_after -= tl.exp(log_p) * log_p
        is_allowed = sound & (below > _ABSENT)
        tl.store(stop_at + e, tl.where(is_allowed, tl.load(stop_ids + e).to(tl.int32), -1))
        tl.store(stop_value + e, log_p * scale)

    moved_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, gathered, BLOCK):
        below_K, _is_plausible_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        cool_K = tl.exp((below_K - top) / temperature) / cool_z
        hot_K = tl.exp((below_K - top) * inverse) / hot_z
        moved_K += tl.where(is_content_K, tl.maximum(cool_K - hot_K, 0.0), 0.0)

    tl.store(figures + r, tl.where(sound, entropy_before, 0.0))
    tl.store(figures + count + r, tl.where(sound, entropy_after, 0.0))
    tl.store(figures + 2 * count + r, tl.where(sound, reached, 0.0))
    tl.store(figures + 3 * count + r, tl.where(sound, content_share * tl.sum(moved_K), 0.0))
    tl.store(figures + 4 * count + r, sound.to(tl.float32))
    plan += r * _PLAN
    tl.store(plan, peak)
    tl.store(plan + 1, floor)
    tl.store(plan + 2, divided)
    tl.store(plan + 3, inverse)
    tl.store(plan + 4, held)
    tl.store(plan + 5, log_z)
    tl.store(plan + 6, scale)


@triton.jit
def _peak(maxima, chunks, BLOCK: tl.constexpr):
    peak_K = tl.full([BLOCK], -_INFINITY, tl.float32)
    for start in range(0, chunks, BLOCK):
        j = start + tl.arange(0, BLOCK)
        peak_K = tl.maximum(peak_K, tl.load(maxima + j, mask=j < chunks, other=-_INFINITY))
    return tl.max(peak_K)


@triton.jit
def _log_guard(numbers):
    """laws.log_guard."""
    level, log_min_p = tl.load(numbers + 3), tl.load(numbers + 4)
    follows = tl.minimum(tl.maximum(level, 0.0), 1.0) * _GUARD_STEP + _GUARD_START
    return tl.where(log_min_p != log_min_p, follows, log_min_p)


@triton.jit
def _list_active(maxima, active, floor, chunks, BLOCK: tl.constexpr):
    """The chunks that hold a survivor, in order; returns their number."""
    listed = 0
    for start in range(0, chunks, BLOCK):
        j = start + tl.arange(0, BLOCK)
        is_active = tl.load(maxima + j, mask=j < chunks, other=-_INFINITY) >= floor
        place = listed + tl.cumsum(is_active.to(tl.int32)) - 1
        tl.store(active + place, j, mask=is_active)
        listed += tl.sum(is_active.to(tl.int32))
    return listed


@triton.jit
def _survivors(source, start, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A block of gathered tokens: log-weights at temperature 1 below the row's maximum (0 where
    not plausible), which are plausible, which are content."""
    row, active, gathered, vocabulary, peak, divided, floor, stop_ids, width = source
    k = start + tl.arange(0, BLOCK)
    chunk = tl.load(active + k // CHUNK, mask=k < gathered, other=0)
    token = chunk * CHUNK + k % CHUNK
    is_there = (k < gathered) & (token < vocabulary)
    logit = tl.load(row + token, mask=is_there, other=-_INFINITY)
    is_plausible = logit >= floor
    is_content = is_plausible
    for e in range(width):
        is_content &= token != tl.load(stop_ids + e)
    return tl.where(is_plausible, (logit - peak) * divided, 0.0), is_plausible, is_content


@triton.jit
def _sums(source, top, inverse, exists, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Σ e^w and Σ w·e^w over the content, w = (weight − top)·inverse; 1 and 0 where none is."""
    z_K = tl.zeros([BLOCK], tl.float32)
    a_K = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[2], BLOCK):
        below_K, _is_plausible_K, is_content_K = _survivors(source, start, CHUNK, BLOCK)
        weight_K = tl.where(is_content_K, (below_K - top) * inverse, 0.0)
        share_K = tl.where(is_content_K, tl.exp(weight_K), 0.0)
        z_K += share_K
        a_K += share_K * weight_K
    return tl.where(exists, tl.sum(z_K), 1.0), tl.sum(a_K)


@triton.jit
def _temperature(numbers, entropy, plausible):
    """laws.temperature."""
    temperature, level = tl.load(numbers + 1), tl.load(numbers + 3)
    gate = _power(entropy / (entropy + 1), _GATE_POWER)
    heated = temperature * tl.exp(level * gate * _STRENGTH)
    heated = tl.minimum(heated, tl.maximum(temperature, tl.load(numbers + 5)))

    reach = tl.load(numbers + 6) * level
    coolest = tl.maximum(temperature - reach, 0.0)
    share = entropy / tl.log(tl.maximum(plausible, 2.0))
    share = _power(tl.minimum(tl.maximum(share, 0.0), 1.0), tl.load(numbers + 7))
    ranged = coolest + (temperature + reach - coolest) * share
    ranged = tl.where(plausible > 1, tl.maximum(ranged, _LOWEST_TEMPERATURE), temperature)
    return tl.where(tl.load(numbers) == _DYNATEMP, ranged, heated)


@triton.jit
def _power(base, exponent):
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(tl.log(safe) * exponent), 0.0)


@triton.jit
def _stop(source, e):
    """The weight of a stop token; `_ABSENT` where the row has none or the grammar forbids it."""
    row, _, _, vocabulary, peak, divided, _, stop_ids, _ = source
    token = tl.load(stop_ids + e)
    is_known = (token >= 0) & (token < vocabulary)
    logit = tl.load(row + token, mask=is_known, other=-_INFINITY)
    below = tl.maximum((logit - peak) * divided, _FARTHEST)
    return tl.where(is_known & (logit > -_INFINITY), below, _ABSENT)


@triton.jit
def _beside(below, temperature, shift, held_stop, tied_at):
    """A stop token's log-weight beside the content: stops.beside_stops."""
    weight = tl.minimum(below / temperature + shift, held_stop)
    return tl.where(below == tied_at, held_stop, weight)


@triton.jit
def _tie(source, top, temperature, wanted, tie, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """stops.temperature_at."""
    low = 1 / tl.maximum(temperature, wanted)
    high = 1 / tl.minimum(temperature, wanted)
    beta = low
    for _ in range(_NEWTON_STEPS):
        z, a = _sums(source, top, beta, True, CHUNK, BLOCK)
        slope = tl.minimum(a / z / beta, -1e-12)
        beta = tl.minimum(tl.maximum(beta + (tie - tl.log(z)) / slope, low), high)
    return 1 / beta


@triton.jit(do_not_specialize=["chunks", "width"])
def _write(
    logits,
    rows,
    maxima,
    plan,
    stop_at,
    stop_value,
    stride,
    vocabulary,
    chunks,
    width,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(0)
    row = logits + tl.load(rows + r) * stride
    plan += r * _PLAN
    peak, floor, divided = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2)
    inverse, held = tl.load(plan + 3), tl.load(plan + 4)
    log_z, scale = tl.load(plan + 5), tl.load(plan + 6)
    chunk = tl.program_id(1) * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    is_there = token < vocabulary
    maximum = tl.load(maxima + r * chunks + chunk, mask=chunk < chunks, other=-_INFINITY)
    is_active = (maximum >= floor)[:, None]
    if floor == floor:  # Else the row is not sound, and keeps its bits.
        logit = tl.load(row + token, mask=is_there & is_active, other=-_INFINITY)
        weight = tl.minimum((logit - peak) * divided * inverse, held)
        value = tl.where(logit >= floor, (weight - log_z) * scale, -_INFINITY)
        for e in range(width):
            is_stop = token == tl.load(stop_at + r * width + e)
            value = tl.where(is_stop, tl.load(stop_value + r * width + e), value)
        tl.store(row + token, value, mask=is_there)
