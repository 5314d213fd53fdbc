"""Plain torch: the reference on any device, and the fallback if no kernels can be used."""

import torch
from torch import Tensor

from dftserve.sampling.backends.base import Backend
from dftserve.sampling.controls import DEFAULT_CONSTANTS, Controls, LawConstants
from dftserve.sampling.token_classes import TokenClasses
from dftserve.sampling.transform import Statistics, transform


class TorchBackend(Backend):
    """Uses `transform.transform` and `slots.Slots` directly; allocates memory at every call."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        constants: LawConstants = DEFAULT_CONSTANTS,
        token_classes: TokenClasses | None = None,
    ) -> None:
        super().__init__(device, constants, token_classes)
        self._classes_V = None if token_classes is None else token_classes.to(self.device)

    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        return transform(logits_XV, controls, rows_R, self.constants, self._classes_V)
