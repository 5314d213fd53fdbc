"""Controls by slot: what the device has after requests start and end, and the number of copies."""

import numpy as np
import pytest
import torch

from dftserve.sampling import Controls, SlotControls, control_row
from dftserve.sampling.staging import PinnedStaging
from dftserve.spec import parse


def row(level=0.5, stops=()):
    return control_row(parse(level), temperature=0.8, logits_divisor=1.0, stop_ids=frozenset(stops))


class Copies:
    """A transport that copies at once, and keeps the size in bytes of each copy."""

    def __init__(self):
        self.sizes = []

    def pinned(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def send(self, host):
        self.sizes.append(len(host))
        return host.clone(), lambda: True


def controls_and_copies():
    copies = Copies()
    return SlotControls(4, "cpu", PinnedStaging("cpu", copies)), copies.sizes


def test_the_device_has_the_row_of_each_request():
    controls, sent = controls_and_copies()
    controls.put(2, row(0.7, {5, 9}))
    controls.put(0, row(0.2, {3}))
    on_device = controls.on_device()
    assert len(sent) == 1
    numbers_RF = Controls.stack([row(0.2, {3}), row(0.7, {5, 9})]).numbers_RF
    assert torch.isclose(on_device.numbers_RF[[0, 2]], numbers_RF, equal_nan=True).all()
    assert on_device.stop_ids_RE.tolist() == [[3, -1], [-1, -1], [5, 9], [-1, -1]]
    assert on_device.holds_request().tolist() == [True, False, True, False]


def test_nothing_is_sent_while_nothing_changes():
    controls, sent = controls_and_copies()
    controls.put(2, row())
    assert controls.on_device() is controls.on_device()
    controls.clear(1)
    controls.on_device()
    assert len(sent) == 1
    controls.clear(2)
    assert not controls.on_device().holds_request().any()
    assert len(sent) == 2


def test_stop_tokens_take_memory_only_during_their_request():
    controls = SlotControls(4, "cpu")
    controls.put(0, row(0.5, {3}))
    controls.put(1, row(0.5, range(40)))
    assert controls.on_device().stop_ids_RE.shape == (4, 64)
    controls.put(1, row(0.5, {8}))
    assert controls.on_device().stop_ids_RE.tolist() == [[3], [8], [-1], [-1]]


@pytest.mark.parametrize("transport", [None, Copies()], ids=["host", "device"])
def test_arrays_sent_together_arrive_unchanged(transport):
    given = [
        np.arange(3, dtype=np.int32),
        np.array([[2**62]]),
        np.zeros((0, 2), np.float32),
        np.array([1.5, -0.0], dtype=np.float32),
    ]
    arrived = PinnedStaging("cpu", transport).to_device_together(*given)
    for array, tensor in zip(given, arrived, strict=True):
        assert torch.equal(torch.from_numpy(array), tensor)
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert tensor.shape == array.shape
        assert tensor.data_ptr() % 16 == 0
