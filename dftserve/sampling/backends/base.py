"""The interface of backends: the transform and the slots of one device."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dftserve.sampling.controls import DEFAULT_CONSTANTS, Controls, LawConstants
from dftserve.sampling.slots import Slots
from dftserve.sampling.step import Step
from dftserve.sampling.token_classes import TokenClasses
from dftserve.sampling.transform import Statistics


class Backend(ABC):
    """The transform on one device, with its own scratch buffers: create one per engine and thread.

    Args:
        device: where the logits are.
        constants: of the laws; also used by the slots of `create_slots` for steering.
        token_classes: of the model's vocabulary; required for the law `words`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        constants: LawConstants = DEFAULT_CONSTANTS,
        token_classes: TokenClasses | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.constants = constants
        self.token_classes = token_classes

    @abstractmethod
    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        """As `api.transform`, which validates the arguments."""

    def step(self, logits_XV: Tensor, step: Step, slots: Slots) -> Statistics:
        """As `api.transform_step`, which validates the arguments; `slots` come from
        `create_slots`. This is the reference; kernels do the same without gathering rows."""
        step = step.without_idle_rows()
        slot_R, offset_R = step.slot_R, step.offset_R.long()
        last_token_R = None if step.last_token_R is None else step.last_token_R.long()
        controls = step.controls.select(slot_R).at(step.position_R)
        if last_token_R is not None:
            controls = controls.after(last_token_R)
        controls = slots.commit_accepted(controls, slot_R, step.position_R, offset_R)
        statistics = self(logits_XV, controls, step.rows_R)
        slots.stage_step(
            slot_R, step.position_R, offset_R, step.samples_R(), statistics, step.style_stats_RF
        )
        return statistics

    def create_slots(self, slots: int, rows_per_request: int) -> Slots:
        """Statistics and steering state for up to `slots` requests on this backend's device."""
        return Slots(slots, rows_per_request, self.device, self.constants)
