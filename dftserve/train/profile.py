"""How open a model's next tokens are on held-out text, beside its target's, and the diversity that
brings it there.

Shapes: T trained positions, R of them in a chunk, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dftserve.lm import LanguageModel
from dftserve.sampling import Controls, control_row, transform
from dftserve.spec import Diversity, parse
from dftserve.train.data import model_inputs
from dftserve.train.divergences import Rows
from dftserve.train.head import chunks

LEVELS = tuple(round(0.1 * step, 1) for step in range(1, 11))


@dataclass(frozen=True, eq=False)
class Profile:
    """Next-token entropies in nats, on the same tokens."""

    target_T: np.ndarray
    model_T: np.ndarray
    by_level: Mapping[float, float]
    """The mean of what would be sampled from at each level of `gated`, T = 1."""

    @property
    def suggested(self) -> Diversity | None:
        """The level whose mean entropy is nearest to the target's; None without tokens."""
        if not len(self.target_T):
            return None
        target = float(self.target_T.mean())
        return parse(min(self.by_level, key=lambda level: abs(self.by_level[level] - target)))


@torch.no_grad()
def measure(
    model: LanguageModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    stop_ids: frozenset[int],
    tokens: int,
) -> Profile:
    """Over the first batches that together hold `tokens` trained positions or more."""
    head = model.head
    targets: list[Tensor] = []
    entropies: list[Tensor] = []
    sums = dict.fromkeys(LEVELS, 0.0)
    seen = 0
    for batch in batches:
        hidden_BND = model.states(**model_inputs(batch)).hidden_BND
        hidden_TD = hidden_BND.reshape(-1, hidden_BND.shape[-1])[batch["positions_T"]]
        targets.append(batch["entropy_R"])
        for part in chunks(len(hidden_TD), len(head.weight_VD), hidden_TD.device.type):
            logits_RV = head.logits(hidden_TD[part]).float()
            entropies.append(Rows.of(logits_RV).entropy_R)
            for level in LEVELS:
                sums[level] += _entropy_at(level, logits_RV, stop_ids)
        seen += len(hidden_TD)
        if seen >= tokens:
            break
    if not seen:
        return Profile(np.zeros(0), np.zeros(0), sums)
    return Profile(
        target_T=torch.cat(targets).float().cpu().numpy(),
        model_T=torch.cat(entropies).float().cpu().numpy(),
        by_level={level: total / seen for level, total in sums.items()},
    )


def deciles(entropies_T: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(x), 4) for x in np.quantile(entropies_T, np.arange(1, 10) / 10))


def _entropy_at(level: float, logits_RV: Tensor, stop_ids: frozenset[int]) -> float:
    row = control_row(parse(level), temperature=1.0, logits_divisor=1.0, stop_ids=stop_ids)
    controls = Controls.stack([row] * len(logits_RV), device=logits_RV.device)
    return float(transform(logits_RV.clone(), controls).entropy_after_R.sum())
