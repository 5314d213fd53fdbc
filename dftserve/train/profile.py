"""How open a model's next tokens are on held-out text, beside its target's, and the diversity that
brings it there.

Entropies are of all positions; what a level adds to them is measured on some, spread evenly, in
plain torch: a backend with kernels of its own would compile longer than that takes.

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
from dftserve.train.divergences import Rows
from dftserve.train.head import chunks

LEVELS = tuple(round(0.1 * step, 1) for step in range(1, 11))
LEVEL_ELEMENTS = 1 << 25
"""Logits that each level is applied to: 682 positions of 49,152 tokens, some 12 s of one core."""
AT_ONCE = 1 << 19
"""Of them at a time: what stays in a CPU's cache takes half as long."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Next-token entropies in nats, on the same tokens."""

    target_T: np.ndarray
    model_T: np.ndarray
    by_level: Mapping[float, float]
    """The mean of what would be sampled from at each level of `gated`, T = 1: the model's own, and
    what the level adds to it on the positions that it was applied to."""
    share_T: np.ndarray | None = None
    """Of each token in means and deciles, summing to 1; None: all have the same."""

    @staticmethod
    def mixed(parts: Sequence["Profile"], weights: Sequence[float]) -> "Profile":
        """The mean of several by weights that sum to 1, whatever number of tokens each has."""
        shares = [
            np.full(len(part.model_T), weight / max(len(part.model_T), 1))
            for part, weight in zip(parts, weights, strict=True)
        ]
        return Profile(
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
) -> Profile:
    """Over the first batches that together hold `tokens` trained positions or more.

    Args:
        share: how much of `LEVEL_ELEMENTS` the levels are applied to.
    """
    head = model.head
    taken = _first(batches, tokens)
    seen = sum(len(batch["positions_T"]) for batch in taken)
    vocabulary = len(head.weight_VD)
    step = max(1, -(-seen * vocabulary // max(1, int(share * LEVEL_ELEMENTS))))
    targets: list[Tensor] = []
    entropies: list[Tensor] = []
    added = dict.fromkeys(LEVELS, 0.0)
    done = 0
    for batch in taken:
        hidden_BND = model.states(**model_inputs(batch)).hidden_BND
        hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])[batch["positions_T"]]
        targets.append(batch["entropy_R"])
        for part in chunks(len(hidden_TD), vocabulary, hidden_TD.device.type):
            logits_RV = head.logits(hidden_TD[part]).float()
            entropy_R = Rows.of(logits_RV).entropy_R
            entropies.append(entropy_R)
            some = slice(-done % step, None, step)
            for level in LEVELS if len(logits_RV[some]) else ():
                added[level] += _added_by(level, logits_RV[some], entropy_R[some], stop_ids)
            done += len(logits_RV)
    if not seen:
        return Profile(np.zeros(0), np.zeros(0), added)
    model_T = torch.cat(entropies).float().cpu().numpy()
    applied = -(-seen // step)
    return Profile(
        target_T=torch.cat(targets).float().cpu().numpy(),
        model_T=model_T,
        by_level={level: float(model_T.mean()) + total / applied for level, total in added.items()},
    )


def deciles(entropies_T: np.ndarray, share_T: np.ndarray | None = None) -> tuple[float, ...]:
    """With shares, of each the first value at which so much is reached."""
    tenths = np.arange(1, 10) / 10
    if share_T is None:
        found = np.quantile(entropies_T, tenths)
    else:
        order_T = np.argsort(entropies_T)
        reached_T = np.cumsum(share_T[order_T])
        places = np.searchsorted(reached_T, tenths * reached_T[-1])
        found = entropies_T[order_T][places]
    return tuple(round(float(x), 4) for x in found)


def _first(batches: Iterable[Mapping[str, Tensor]], tokens: float) -> list[Mapping[str, Tensor]]:
    taken, seen = [], 0
    for batch in batches:
        taken.append(batch)
        seen += len(batch["positions_T"])
        if seen >= tokens:
            break
    return taken


def _added_by(
    level: float, logits_RV: Tensor, entropy_R: Tensor, stop_ids: frozenset[int]
) -> float:
    """Σ of how much higher the entropy is at a level than the model's own, in nats."""
    row = control_row(parse(level), temperature=1.0, logits_divisor=1.0, stop_ids=stop_ids)
    backend = TorchBackend(logits_RV.device)
    total = -float(entropy_R.sum())
    for part_RV in logits_RV.split(max(1, AT_ONCE // logits_RV.shape[1])):
        controls = Controls.stack([row] * len(part_RV), device=part_RV.device)
        total += float(transform(part_RV.clone(), controls, backend=backend).entropy_after_R.sum())
    return total
