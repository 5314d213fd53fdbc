"""DRY of docs/maths.md in fp64 numpy, one row at a time, by comparing every position of the text
with its end; it shares no code with `dftserve.sampling.dry`."""

import math

import numpy as np


def penalties_reference(
    text,
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    breakers=frozenset(),
    history: int = 32768,
    longest: int = 64,
    cap: float = 100.0,
) -> dict[int, float]:
    """The penalties in nats, by token."""
    text = list(text)[-history:]
    found: dict[int, int] = {}
    for following in range(1, len(text)):
        length = 0
        while length < min(following, longest):
            ours, theirs = text[len(text) - 1 - length], text[following - 1 - length]
            if ours != theirs or ours in breakers:
                break
            length += 1
        token = text[following]
        if length >= allowed_length and token not in breakers:
            found[token] = max(found.get(token, 0), length)
    return {
        token: min(multiplier * base ** (length - allowed_length), cap)
        for token, length in found.items()
    }


def dry_reference(
    logits_V, nats: dict[int, float], *, temperature: float, log_guard: float, stop_ids=frozenset()
) -> np.ndarray:
    """The row as the law should receive it; `log_guard`: ln a of the guard applied afterwards."""
    before = np.asarray(logits_V, dtype=np.float64)
    after = before.copy()
    for token, lost in nats.items():
        if token not in stop_ids:
            after[token] -= lost
    if not any(token not in stop_ids for token in nats):
        return before
    content = [i for i in range(len(before)) if np.isfinite(before[i]) and i not in stop_ids]
    top = max(before[np.isfinite(before)])
    kept = [before[i] for i in content if before[i] >= top + log_guard]
    most_after = max((after[i] for i in content), default=-math.inf)
    kept_after = [after[i] for i in content if after[i] >= most_after + log_guard]
    if kept and kept_after:
        moved = temperature * (_log_z(kept_after, temperature) - _log_z(kept, temperature))
        for i in stop_ids:
            after[i] += moved
    return after


def _log_z(weights: list[float], temperature: float) -> float:
    scaled = np.array(weights) / temperature
    return float(scaled.max() + np.log(np.exp(scaled - scaled.max()).sum()))
