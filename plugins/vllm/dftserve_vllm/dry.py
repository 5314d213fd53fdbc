"""DRY on an engine: breakers of its vocabulary, and the texts of V1's requests.

V1 tells the host each token before the next step, so the repeats are looked for there and only the
penalties are sent. V2's host does not know the last tokens: see `sampling.dry.on_device`.
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
    """A request's, by the tokens of an engine's vocabulary.

    Raises:
        ValueError: it has breakers, and the vocabulary is not known.
    """
    if not dry.sequence_breakers:
        return DryControls.of(dry, NO_BREAKERS)
    if breakers is None:
        raise ValueError(
            f"{DRY_BREAKERS}: got some, and an engine whose tokens' text is not known; accepted: "
            "an empty list."
        )
    return DryControls.of(dry, breakers.tokens(dry.sequence_breakers))


class HostRepeats:
    """DRY of V1's requests, by slot."""

    def __init__(self, breakers: Breakers | None, staging: PinnedStaging) -> None:
        self._breakers = breakers
        self._staging = staging
        self._by_slot: dict[int, TextRepeats] = {}

    def open(self, slot: int, dry: Dry | None, prompt: Sequence[int] | None) -> None:
        """A request enters a slot; `prompt` is None for one of embeddings."""
        self.close(slot)
        if dry is not None:
            self._by_slot[slot] = TextRepeats(prompt or (), dry_controls(dry, self._breakers))

    def close(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def penalties(self, slots: Array, outputs: list[list[int]]) -> tuple[Penalties, ...]:
        """Of a step's rows, by the output so far of each; nothing where no row has any."""
        if not self._by_slot:
            return ()
        places, found = [], []
        for place in np.flatnonzero(np.isin(slots, list(self._by_slot))).tolist():
            row = self._by_slot[int(slots[place])].after(outputs[place])
            if len(row[0]):
                places.append(place)
                found.append(row)
        if not places:
            return ()
        sent: list[torch.Tensor] = self._staging.to_device_together(
            *together(found), np.array(places)
        )
        return (Penalties(*sent),)
