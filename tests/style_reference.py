"""The effect of a style on a row, in fp64 numpy, independent of the package: plain softmaxes over
lists of tokens, and the strength by bisection."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StyleReference:
    log_p_V: np.ndarray
    """At the request's temperature; -inf where cut."""
    kl: float
    tilt_kl: float
    held_back: float
    strength: float
    margin: float
    """Distance in nats of the nearest token to the guard's threshold."""


def style_reference(
    logits_V,
    factor_V,
    delta_V,
    *,
    temperature: float,
    log_guard: float,
    strength: float,
    allowance: float,
    stop_ids=frozenset(),
) -> StyleReference:
    z = np.asarray(logits_V, np.float64)
    finite = [v for v in range(len(z)) if np.isfinite(z[v])]
    top = max(z[v] for v in finite)
    margin = min((abs(z[v] - top - log_guard) for v in finite), default=math.inf)
    stops = [v for v in finite if v in stop_ids]
    content = [v for v in finite if v not in stop_ids and z[v] >= top + log_guard]
    support = content + stops
    p = dict(zip(support, _softmax([z[v] / temperature for v in support]), strict=True))
    share = sum(p[v] for v in content)
    inside = np.array(_softmax([z[v] / temperature for v in content]))
    factor = np.array([1 - strength * (1 - factor_V[v]) for v in content])
    delta = np.array([delta_V[v] for v in content])
    styled, reached, tilt_kl, held_back = inside, strength, 0.0, 0.0
    if content:
        base = inside * factor / (inside * factor).sum()
        whole = np.array([factor_V[v] for v in content])
        held_back = share * ((base - inside) * whole).sum()

        def tilted(s):
            weight = np.log(base) + s * delta
            q = np.array(_softmax(weight))
            return q, share * (q * (np.log(q) - np.log(base))).sum()

        if tilted(strength)[1] > allowance:
            low, high = 0.0, strength
            for _ in range(100):
                middle = 0.5 * (low + high)
                fits = tilted(middle)[1] <= allowance
                low, high = (middle, high) if fits else (low, middle)
            reached = low
        styled, tilt_kl = tilted(reached)
    q = dict(zip(content, styled * share, strict=True)) | {v: p[v] for v in stops}
    log_p_V = np.full(len(z), -np.inf)
    for v, value in q.items():
        log_p_V[v] = math.log(value) if value > 0 else -1e30
    kl = sum(value * math.log(value / p[v]) for v, value in q.items() if value > 0)
    return StyleReference(log_p_V, kl, tilt_kl, held_back, reached, margin)


def _softmax(weights) -> list[float]:
    if len(weights) == 0:
        return []
    raw = np.exp(np.asarray(weights, np.float64) - max(weights))
    return (raw / raw.sum()).tolist()


def style_rows(profile, state: int, last: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [V], [V]: each token's factor and δ, in a state of the automaton after a token."""
    factor_V, delta_V = np.ones(vocabulary), np.zeros(vocabulary)
    for token in range(profile.vocabulary):
        factor_V[token] = np.exp(profile.step(state, token)[1])
        delta_V[token] = profile.delta(last, token)
    return factor_V, delta_V
