"""DRY on an engine: sequence breakers for its vocabulary, and repeats in the texts of V1's
requests.

On V1 the host has each token before the next step, so it searches for the repeats and sends only
the penalties to the device. On V2 the host does not have the last tokens: see
`sampling.dry.on_device`.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dftserve.sampling.dry import (
    NO_BREAKERS,
    Breakers,
    DryControls,
    TextRepeats,
    together,
)
from dftserve.sampling.staging import PinnedStaging
from dftserve.sampling.step import Penalties
from dftserve.spec import DRY_BREAKERS, Dry
from dftserve_vllm.step_report import Array


def dry_controls(dry: Dry, breakers: Breakers | None) -> DryControls:
    """A request's DRY settings, in tokens of the engine's vocabulary.

    Raises:
        ValueError: it has breakers, and the text of the vocabulary's tokens is not known.
    """
    if not dry.sequence_breakers:
        return DryControls.of(dry, NO_BREAKERS)
    if breakers is None:
        raise ValueError(
            f"{DRY_BREAKERS}: got some, but the text of this engine's tokens is not known; "
            "accepted: an empty list."
        )
    return DryControls.of(dry, breakers.tokens(dry.sequence_breakers))


class HostRepeats:
    """DRY on the V1 runner: the repeats of each request, by slot."""

    def __init__(self, breakers: Breakers | None, staging: PinnedStaging) -> None:
        self._breakers = breakers
        self._staging = staging
        self._by_slot: dict[int, TextRepeats] = {}

    def open(self, slot: int, dry: Dry | None, prompt: Sequence[int] | None) -> None:
        """A request enters a slot; `prompt` is None for a prompt of embeddings."""
        self.close(slot)
        if dry is not None:
            self._by_slot[slot] = TextRepeats(prompt or (), dry_controls(dry, self._breakers))

    def close(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def penalties(self, slots: Array, outputs: list[list[int]]) -> tuple[Penalties, ...]:
        """A step's penalties, given each row's output so far; empty if no row has any."""
        if not self._by_slot:
            return ()
        rows, penalties_of_rows = [], []
        for row in np.flatnonzero(np.isin(slots, list(self._by_slot))).tolist():
            penalties = self._by_slot[int(slots[row])].after(outputs[row])
            if len(penalties[0]):
                rows.append(row)
                penalties_of_rows.append(penalties)
        if not rows:
            return ()
        sent: list[torch.Tensor] = self._staging.to_device_together(
            *together(penalties_of_rows), np.array(rows)
        )
        return (Penalties(*sent),)
