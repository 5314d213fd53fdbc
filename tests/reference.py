"""The law of docs/maths.md in fp64 numpy, one row at a time, independent of the package.

It shares no code and no algorithm with `dftserve.sampling`: temperatures that must keep the argmax
are found by bisection, and distributions are plain softmaxes over explicit lists of tokens.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reference:
    log_p_V: np.ndarray
    """Log-probabilities, -inf where cut."""
    entropy_before: float
    entropy_after: float
    temperature: float
    margin: float
    """Distance in nats of the nearest token to the guard's threshold; a small one makes a
    comparison unreliable."""


def reference(
    logits_V,
    *,
    temperature: float,
    law: str = "gated",
    level: float = 1.0,
    max_temperature: float = 4.0,
    min_p: float | None = None,
    dynatemp_range: float = 0.0,
    dynatemp_exponent: float = 1.0,
    stop_ids=frozenset(),
) -> Reference:
    z = np.asarray(logits_V, dtype=np.float64)
    finite = [i for i in range(len(z)) if np.isfinite(z[i])]
    top = max(z[i] for i in finite)
    a = min_p if min_p is not None else 0.05 * (0.02 / 0.05) ** min(max(level, 0.0), 1.0)
    plausible = [i for i in finite if z[i] >= top + math.log(a)]
    margin = min((abs(z[i] - top - math.log(a)) for i in finite), default=math.inf)
    stops = [i for i in finite if i in stop_ids]
    content = [i for i in plausible if i not in stop_ids]

    h0 = _entropy(_softmax([z[i] for i in plausible]))
    wanted = _law(
        law,
        temperature,
        h0,
        len(plausible),
        level,
        max_temperature,
        dynatemp_range,
        dynatemp_exponent,
    )
    before = dict(
        zip(content + stops, _softmax([z[i] / temperature for i in content + stops]), strict=True)
    )
    stop_mass = sum(before[i] for i in stops)

    def after(t: float) -> dict[int, float]:
        shares = _softmax([z[i] / t for i in content])
        new = {i: share * (1.0 - stop_mass) for i, share in zip(content, shares, strict=True)}
        return new | {i: before[i] for i in stops}

    reached = wanted
    if content and stops:
        winner = max(content + stops, key=lambda i: before[i])
        rivals = stops if winner in content else content
        side = content if winner in content else stops

        def keeps(t: float) -> bool:
            p = after(t)
            return max(p[i] for i in side) >= max(p[i] for i in rivals)

        if not keeps(wanted):
            near, far = temperature, wanted
            for _ in range(200):
                middle = 0.5 * (near + far)
                near, far = (middle, far) if keeps(middle) else (near, middle)
            reached = near
    p = after(reached)
    log_p_V = np.full(len(z), -np.inf)
    for i, value in p.items():
        log_p_V[i] = math.log(value) if value > 0 else -1e30
    return Reference(log_p_V, h0, _entropy(list(p.values())), reached, margin)


def _law(law, t, h, n, level, max_temperature, reach, exponent):
    if law == "dynatemp":
        if n <= 1:
            return t
        low, high = max(t - reach * level, 0.0), t + reach * level
        return max(low + (high - low) * (h / math.log(n)) ** exponent, 0.01)
    heated = t * math.exp(2.0 * level * (h / (h + 1.0)) ** 2)
    return min(heated, max(t, max_temperature))


def _softmax(weights) -> list[float]:
    if not weights:
        return []
    peak = max(weights)
    raw = [math.exp(w - peak) for w in weights]
    return [r / sum(raw) for r in raw]


def _entropy(p) -> float:
    return -sum(q * math.log(q) for q in p if q > 0)


def words_reference(
    logits_V,
    class_V,
    *,
    temperature: float,
    level: float,
    max_temperature: float = 4.0,
    min_p: float | None = None,
    stop_ids=frozenset(),
) -> Reference:
    """The law `words`. `class_V`: 0 other, 1 start, 2 inside a word."""
    z = np.asarray(logits_V, dtype=np.float64)
    finite = [i for i in range(len(z)) if np.isfinite(z[i])]
    top = max(z[i] for i in finite)
    a = min_p if min_p is not None else 0.05 * (0.02 / 0.05) ** level
    plausible = [i for i in finite if z[i] >= top + math.log(a)]
    margin = min((abs(z[i] - top - math.log(a)) for i in finite), default=math.inf)
    support = [i for i in finite if i in stop_ids or i in set(plausible)]
    before = dict(zip(support, _softmax([z[i] / temperature for i in support]), strict=True))
    heated = min(temperature * (1 + 2 * level), max(temperature, max_temperature))
    temperatures = {0: temperature, 1: heated, 2: temperature * (1 - 0.3 * level)}
    p = {i: before[i] for i in support if i in stop_ids}
    mean, content_mass = 0.0, 0.0
    for c, t in temperatures.items():
        members = [i for i in plausible if i not in stop_ids and class_V[i] == c]
        mass = sum(before[i] for i in members)
        shares = _softmax([z[i] / t for i in members])
        p |= {i: mass * share for i, share in zip(members, shares, strict=True)}
        mean, content_mass = mean + mass * t, content_mass + mass
    log_p_V = np.full(len(z), -np.inf)
    for i, value in p.items():
        log_p_V[i] = math.log(value) if value > 0 else -1e30
    h0 = _entropy(_softmax([z[i] for i in plausible]))
    reached = mean / content_mass if content_mass else temperature
    return Reference(log_p_V, h0, _entropy(list(p.values())), reached, margin)


def cut_reference(
    logits_V,
    *,
    temperature: float,
    law: str,
    min_p: float | None = None,
    n_sigma: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_probability: float = 0.0,
    draw: float = 1.0,
    stop_ids=frozenset(),
) -> Reference:
    """The laws that cut and do not heat. `draw`: the step's random number in [0, 1)."""
    z = np.asarray(logits_V, dtype=np.float64)
    finite = [i for i in range(len(z)) if np.isfinite(z[i])]
    top = max(z[i] for i in finite)
    if law == "top_n_sigma":
        floor = top - n_sigma * float(np.std([z[i] for i in finite]))
    else:
        floor = top + math.log(min_p) if min_p is not None else -math.inf
    # The highest logits are left out: their distance to the floor is set by σ.
    margin = min((abs(z[i] - floor) for i in finite if z[i] < top), default=math.inf)
    plausible = [i for i in finite if z[i] >= floor or z[i] == top]
    at_one = dict(zip(plausible, _softmax([z[i] for i in plausible]), strict=True))
    content = [i for i in plausible if i not in stop_ids]
    stops = [i for i in finite if i in stop_ids]
    before = dict(
        zip(content + stops, _softmax([z[i] / temperature for i in content + stops]), strict=True)
    )
    if law == "xtc":
        choices = sorted((i for i in content if at_one[i] >= xtc_threshold), key=lambda i: z[i])
        near = (abs(math.log(at_one[i] / xtc_threshold)) for i in content if at_one[i] > 0)
        margin = min([margin, *near])
        if draw < xtc_probability:
            content = [i for i in content if not choices or z[i] <= z[choices[0]]]
    stop_mass = sum(before[i] for i in stops)
    shares = _softmax([z[i] / temperature for i in content])
    p = {i: share * (1.0 - stop_mass) for i, share in zip(content, shares, strict=True)}
    p |= {i: before[i] for i in stops}
    log_p_V = np.full(len(z), -np.inf)
    for i, value in p.items():
        log_p_V[i] = math.log(value) if value > 0 else -1e30
    h0, h = _entropy(list(at_one.values())), _entropy(list(p.values()))
    return Reference(log_p_V, h0, h, temperature, margin)


def draw_reference(key: int, position: int) -> float:
    """The random number of a position, from a key of 48 bits."""

    def mixed(h: int) -> int:
        h = (h ^ h >> 16) * 0x7FEB352D % 2**32
        h = (h ^ h >> 15) * 0x1B873593 % 2**32
        return h ^ h >> 16

    high, low = divmod(key, 2**24)
    return (mixed(mixed((position + low) % 2**32) ^ high) >> 8) / 2**24
