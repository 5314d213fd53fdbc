"""Plain torch: the reference on any device, and the fallback where no kernels can be used."""

from torch import Tensor

from dftserve.sampling.backends.base import Backend
from dftserve.sampling.controls import Controls
from dftserve.sampling.slots import Slots
from dftserve.sampling.transform import Statistics, transform


class TorchBackend(Backend):
    """`transform.transform` and `slots.Slots` as they are; allocates at every call."""

    def __call__(
        self, logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None
    ) -> Statistics:
        return transform(logits_XV, controls, rows_R, self.constants)

    def create_slots(self, slots: int, rows_per_request: int) -> Slots:
        return Slots(slots, rows_per_request, self.device, self.constants)
