"""Rows of logits of every kind that a sampler must handle, by name."""

import numpy as np
import torch


def _peaky(random, v):
    row = random.normal(0, 2, v)
    row[random.integers(v)] += 12
    return row


def _masked(random, v, finite):
    row = np.full(v, -np.inf)
    chosen = random.choice(v, size=min(finite, v), replace=False)
    row[chosen] = random.normal(0, 2, len(chosen))
    return row


def _few(random, v):
    row = random.normal(-9, 1, v)
    row[random.choice(v, size=min(6, v), replace=False)] = random.normal(3, 1.5, min(6, v))
    return row


def _ties(random, v):
    return random.integers(0, 3, v).astype(float)


KINDS = {
    "peaky": _peaky,
    "flat": lambda random, v: np.zeros(v) + random.normal(),
    "gaussian": lambda random, v: random.normal(0, 2, v),
    "few": _few,
    "ties": _ties,
    "grammar": lambda random, v: _masked(random, v, 8),
    "yes or no": lambda random, v: _masked(random, v, 2),
    "one finite": lambda random, v: _masked(random, v, 1),
    "large": lambda random, v: random.normal(0, 3, v) + random.choice([-1, 1]) * 1e4,
    "far apart": lambda random, v: random.normal(0, 1e4, v),
    "bf16": lambda random, v: _bf16(random.normal(0, 4, v)),
    "padded": lambda random, v: np.where(
        np.arange(v) < max(v - v // 8, 1), _few(random, v), -np.inf
    ),
    "zipf": lambda random, v: -1.1 * np.log1p(random.permutation(v)) + random.normal(0, 0.1, v),
}


def _bf16(row):
    return torch.tensor(row).bfloat16().double().numpy()


def make_rows(kinds, vocabulary: int, seed: int) -> torch.Tensor:
    """float32 [len(kinds), vocabulary]."""
    random = np.random.default_rng(seed)
    return torch.tensor(np.stack([KINDS[kind](random, vocabulary) for kind in kinds])).float()
