"""Copies from pinned memory: a buffer that the device has not read yet is never written to.

The device here is a queue: a copy reads its buffer when the test runs it, like a stream that is
behind the host.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling.host_copy import HostCopy
from dftserve.sampling.staging import SMALLEST, PinnedStaging


class Queue:
    """A transport whose copies wait for `run`."""

    def __init__(self):
        self.buffers = 0
        self.waiting = []

    def pinned(self, size):
        self.buffers += 1
        return torch.empty(size, dtype=torch.uint8)

    def send(self, host):
        copy = (host, torch.empty_like(host))
        self.waiting.append(copy)
        return copy[1], lambda: all(other is not copy for other in self.waiting)

    def run(self, count):
        for host, sent in self.waiting[:count]:
            sent.copy_(host)
        del self.waiting[:count]


def array_of(seed, size, dtype):
    return np.random.default_rng(seed).integers(0, 2, size).astype(dtype)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 7, 300, SMALLEST]),
        st.sampled_from([np.int64, np.float32, np.bool_]),
        st.integers(0, 4),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS)
def test_values_arrive_unchanged_however_late_they_are_read(steps):
    queue = Queue()
    staging = PinnedStaging("cpu", queue)
    given_and_sent = []
    for seed, (size, dtype, finished) in enumerate(steps):
        values = array_of(seed, size, dtype)
        given_and_sent.append((values.copy(), staging.to_device(values)))
        values[...] = 0
        queue.run(finished)
    queue.run(len(steps))
    for values, sent in given_and_sent:
        assert sent.numpy().dtype == values.dtype
        np.testing.assert_array_equal(sent.numpy(), values)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_there_are_as_many_buffers_as_copies_in_flight(ahead):
    queue = Queue()
    staging = PinnedStaging("cpu", queue)
    for step in range(50):
        staging.to_device([step])
        queue.run(max(len(queue.waiting) - ahead + 1, 0))
    assert queue.buffers == ahead


def test_a_stalled_device_gets_a_buffer_for_every_copy():
    queue = Queue()
    staging = PinnedStaging("cpu", queue)
    sent = [staging.to_device([step]) for step in range(10)]
    assert queue.buffers == 10
    queue.run(10)
    assert torch.cat(sent).tolist() == list(range(10))


@pytest.mark.parametrize("transport", [None, Queue()], ids=["plain", "pinned"])
def test_shapes_and_types_are_kept(transport):
    staging = PinnedStaging("cpu", transport)
    cases = [[3, 4], np.ones((2, 3), np.float32), np.zeros((0, 4), np.int64), np.array(True)]
    for values in cases:
        sent = staging.to_device(values)
        expected = torch.tensor(np.asarray(values))
        assert (sent.shape, sent.dtype) == (expected.shape, expected.dtype)


def test_values_are_copied_on_a_cpu_too():
    values = np.array([1, 2, 3])
    sent = PinnedStaging("cpu").to_device(values)
    values[0] = 9
    assert sent.tolist() == [1, 2, 3]


def test_buffers_made_in_inference_mode_are_usable_outside_of_it():
    queue = Queue()
    staging = PinnedStaging("cpu", queue)
    with torch.inference_mode():
        staging.to_device([1])
        queue.run(1)
    assert not staging.to_device([2]).is_inference()


def test_a_copy_to_the_host_is_waited_for_on_its_own_device(monkeypatch):
    """Whichever is current: its stream is another, and knows nothing of the copy."""
    recorded = []
    event = SimpleNamespace(record=recorded.append, query=lambda: False, synchronize=None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    device = torch.device("cuda", 1)
    held = SimpleNamespace(device=device, to=lambda place, non_blocking: torch.ones(2))
    copy = HostCopy.of(held)
    assert recorded == [device]
    assert not copy.is_there()
