"""A step's output leaves the worker as vLLM's own object, with the report attached."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from dftserve_vllm import processor, step_report, worker
from dftserve_vllm.step_report import PendingReport
from dftserve_vllm.worker_state import WorkerState
from vllm.v1.outputs import AsyncModelRunnerOutput

from dftserve.sampling.host_copy import HostCopy
from dftserve.sampling.slots import Snapshot, StatisticsLayout


class Awaited(AsyncModelRunnerOutput):
    """The output of a vLLM whose executor calls more than `get_output`, such as 0.33."""

    def __init__(self, ready):
        self.ready = ready

    def get_output(self):
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready

    def get_kv_connector_output(self):
        return "of a connector"


class Reporting(WorkerState):
    """The state after a step with one fault and nothing else to report."""

    def __init__(self):
        self.faults = 1

    def take_report(self):
        layout = StatisticsLayout(1, 1)
        snapshot = Snapshot(layout, HostCopy.of(layout.zeros("cpu")))
        return PendingReport([], [], np.empty(0, np.int64), snapshot, self.faults)


@pytest.fixture
def state(monkeypatch) -> WorkerState:
    made = Reporting()
    monkeypatch.setattr(processor, "state_of", lambda _: made)
    return made


def test_an_asynchronous_output_carries_the_report(state):
    ready = SimpleNamespace()
    output = worker.with_report(None, Awaited(ready))
    assert output.get_output() is ready
    assert getattr(ready, step_report.ATTRIBUTE).faults == 1
    assert state.faults == 1


def test_an_output_behaves_as_vllms_own_in_all_else(state):
    output = worker.with_report(None, Awaited(RuntimeError("the step failed")))
    with pytest.raises(RuntimeError, match="the step failed"):
        output.get_output()
    assert output.get_kv_connector_output() == "of a connector"
    assert state.faults == 1


def test_an_output_is_freed_as_soon_as_it_was_read(state):
    """It holds device tensors, which must not wait for the garbage collector."""
    output = worker.with_report(None, Awaited(SimpleNamespace()))
    output.get_output()
    reference = weakref.ref(output)
    gc.disable()
    try:
        del output
        assert reference() is None
    finally:
        gc.enable()
