"""Ratios of paired measurements that were taken in turns."""

from typing import Any

import numpy as np


def ratio(measured: list[float], base: list[float]) -> dict[str, Any]:
    """The median of the paired ratios and its 95 % interval by bootstrap over the pairs."""
    ratios = np.array(measured) / np.array(base)
    draws = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
    }


def shown(found: dict[str, Any]) -> str:
    """A ratio with its interval, as text."""
    low, high = found["interval"]
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"
