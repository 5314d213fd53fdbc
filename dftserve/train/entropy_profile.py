"""Next-token entropy of a model and of its target on held-out text, and the diversity that brings
the model's entropy to the target's.

Entropies are measured at all positions; the entropy that a level adds is measured at evenly spaced
ones, in plain torch: a backend with its own kernels would take longer to compile.

Shapes: T trained positions, R of them in a chunk, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dftserve.lm import LanguageModel
from dftserve.sampling import Controls, control_row, transform
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.spec import Diversity, parse
from dftserve.train.data import model_inputs
from dftserve.train.divergences import LogitRows
from dftserve.train.head import chunks

LEVELS = tuple(round(0.1 * step, 1) for step in range(1, 11))
LEVEL_ELEMENTS = 1 << 25
"""Logits that each level is applied to: 682 positions of 49,152 tokens, some 12 s of one core."""
AT_ONCE = 1 << 19
"""Logits processed at a time: few enough to stay in a CPU's cache, which halves the time."""


@dataclass(frozen=True, eq=False)
class EntropyProfile:
    """Next-token entropies in nats, on the same tokens."""

    target_T: np.ndarray
    model_T: np.ndarray
    by_level: Mapping[float, float]
    """Mean entropy of the sampled distribution at each level of `gated`, T = 1: the model's own
    entropy plus what the level adds to it at the positions that it was applied to."""
    share_T: np.ndarray | None = None
    """Weight of each token in means and deciles, summing to 1; None: equal weights."""

    @staticmethod
    def mixed(parts: Sequence["EntropyProfile"], weights: Sequence[float]) -> "EntropyProfile":
        """The mean by weights that sum to 1, regardless of the number of tokens in each part."""
        shares = [
            np.full(len(part.model_T), weight / max(len(part.model_T), 1))
            for part, weight in zip(parts, weights, strict=True)
        ]
        return EntropyProfile(
            target_T=np.concatenate([part.target_T for part in parts]),
            model_T=np.concatenate([part.model_T for part in parts]),
            by_level={
                level: math.fsum(
                    weight * part.by_level[level]
                    for part, weight in zip(parts, weights, strict=True)
                )
                for level in LEVELS
            },
            share_T=np.concatenate(shares),
        )

    @property
    def target_mean(self) -> float:
        return float(np.average(self.target_T, weights=self.share_T))

    @property
    def model_mean(self) -> float:
        return float(np.average(self.model_T, weights=self.share_T))

    @property
    def target_deciles(self) -> tuple[float, ...]:
        return deciles(self.target_T, self.share_T)

    @property
    def model_deciles(self) -> tuple[float, ...]:
        return deciles(self.model_T, self.share_T)

    @property
    def suggested(self) -> Diversity | None:
        """The level whose mean entropy is nearest to the target's; None without tokens."""
        if not len(self.target_T):
            return None
        target = self.target_mean
        return parse(min(self.by_level, key=lambda level: abs(self.by_level[level] - target)))


@torch.no_grad()
def measure(
    model: LanguageModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    stop_ids: frozenset[int],
    tokens: float,
    share: float = 1.0,
) -> EntropyProfile:
    """Measure the first batches that together have `tokens` trained positions or more.

    Args:
        share: the fraction of `LEVEL_ELEMENTS` that the levels are applied to.
    """
    head = model.head
    batches_read = _first(batches, tokens)
    positions = sum(len(batch["positions_T"]) for batch in batches_read)
    vocabulary = len(head.weight_VD)
    step = max(1, -(-positions * vocabulary // max(1, int(share * LEVEL_ELEMENTS))))
    targets: list[Tensor] = []
    entropies: list[Tensor] = []
    added = dict.fromkeys(LEVELS, 0.0)
    done = 0
    for batch in batches_read:
        hidden_BND = model.states(**model_inputs(batch)).hidden_BND
        hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])[batch["positions_T"]]
        targets.append(batch["entropy_R"])
        for part in chunks(len(hidden_TD), vocabulary, hidden_TD.device.type):
            logits_RV = head.logits(hidden_TD[part]).float()
            entropy_R = LogitRows.of(logits_RV).entropy_R
            entropies.append(entropy_R)
            some = slice(-done % step, None, step)
            for level in LEVELS if len(logits_RV[some]) else ():
                added[level] += _added_by(level, logits_RV[some], entropy_R[some], stop_ids)
            done += len(logits_RV)
    if not positions:
        return EntropyProfile(np.zeros(0), np.zeros(0), added)
    model_T = torch.cat(entropies).float().cpu().numpy()
    applied = -(-positions // step)
    return EntropyProfile(
        target_T=torch.cat(targets).float().cpu().numpy(),
        model_T=model_T,
        by_level={level: float(model_T.mean()) + total / applied for level, total in added.items()},
    )


def deciles(entropies_T: np.ndarray, share_T: np.ndarray | None = None) -> tuple[float, ...]:
    """The nine deciles; with shares, the first value at which each cumulative share is reached."""
    tenths = np.arange(1, 10) / 10
    if share_T is None:
        values = np.quantile(entropies_T, tenths)
    else:
        order_T = np.argsort(entropies_T)
        reached_T = np.cumsum(share_T[order_T])
        indices = np.searchsorted(reached_T, tenths * reached_T[-1])
        values = entropies_T[order_T][indices]
    return tuple(round(float(x), 4) for x in values)


def _first(batches: Iterable[Mapping[str, Tensor]], tokens: float) -> list[Mapping[str, Tensor]]:
    first_batches, positions = [], 0
    for batch in batches:
        first_batches.append(batch)
        positions += len(batch["positions_T"])
        if positions >= tokens:
            break
    return first_batches


def _added_by(
    level: float, logits_RV: Tensor, entropy_R: Tensor, stop_ids: frozenset[int]
) -> float:
    """Sum over rows of the entropy at a level minus the model's own, in nats."""
    row = control_row(parse(level), temperature=1.0, logits_divisor=1.0, stop_ids=stop_ids)
    backend = TorchBackend(logits_RV.device)
    total = -float(entropy_R.sum())
    for part_RV in logits_RV.split(max(1, AT_ONCE // logits_RV.shape[1])):
        controls = Controls.stack([row] * len(part_RV), device=part_RV.device)
        total += float(transform(part_RV.clone(), controls, backend=backend).entropy_after_R.sum())
    return total
