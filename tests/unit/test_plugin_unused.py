"""If no request has the field, no tensor operation runs: counted by torch on both runners."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from tests.vllm_config import config

V = 300
UNAFFECTED = (
    SamplingParams(temperature=0.7),
    SamplingParams(extra_args={"diversity": 0}),
    SamplingParams(extra_args={"diversity": None, "other": 1}),
    SamplingParams(temperature=0.0, extra_args={"diversity": 0.5}),
)


class Count(TorchDispatchMode):
    """Counts every operation on any tensor."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def v1_update(params):
    added = [(i, request, [1], []) for i, request in enumerate(params)]
    return BatchUpdate(len(params), removed=[], added=added, moved=[])


def test_v1_runs_no_operation_for_unaffected_requests():
    processor = V1Processor(config(), torch.device("cpu"), False)
    logits_RV = torch.randn(4, V)
    with Count() as count:
        for _ in range(3):
            processor.update_state(v1_update(UNAFFECTED))
            assert processor.apply(logits_RV) is logits_RV
            processor.update_state(None)
            processor.update_state(BatchUpdate(0, removed=[0, 1, 2, 3], added=[], moved=[]))
    assert count.operations == 0


def test_v1_runs_operations_for_a_request_with_the_field():
    """Shows that the count of the test above can be other than zero."""
    processor = V1Processor(config(), torch.device("cpu"), False)
    processor.update_state(v1_update([SamplingParams(extra_args={"diversity": 0.5})]))
    with Count() as count:
        processor.apply(torch.randn(1, V))
    assert count.operations > 0
    assert processor.state.faults == 0


@pytest.fixture
def v2():
    states = SimpleNamespace(
        max_num_reqs=4,
        device=torch.device("cpu"),
        prefill_len=SimpleNamespace(np=np.ones(4, int), gpu=torch.ones(4)),
        prompt_len=SimpleNamespace(np=np.ones(4, int)),
    )
    return V2Processor(config(), states)


def test_v2_reports_which_requests_it_changes_and_runs_nothing_for_the_others(v2):
    assert v2.add_request(3, SamplingParams(extra_args={"diversity": 0.5})) is True
    logits_RV = torch.randn(3, V)
    context = SimpleNamespace(idx_mapping_np=np.arange(3))
    with Count() as count:
        for slot, request in enumerate(UNAFFECTED[:3]):
            assert v2.add_request(slot, request) is False
        assert v2.add_request(0, UNAFFECTED[3]) is False
        assert v2.apply(logits_RV, context) is logits_RV
    assert count.operations == 0
    assert v2.state.faults == 0


def test_an_engine_keeps_one_backend_for_all_its_steps(monkeypatch):
    """The backend's buffers are kept as long as the engine and are not shared with another."""
    backends = []
    processors = [V1Processor(config(), torch.device("cpu"), False) for _ in range(2)]

    def record(logits_XV, step, slots, backend, style_stage):
        assert style_stage is None
        backends.append(backend)
        return backend.step(logits_XV, step, slots)

    monkeypatch.setattr("dftserve_vllm.worker_state.transform_step", record)
    for processor in processors:
        processor.update_state(v1_update([SamplingParams(extra_args={"diversity": 0.5})]))
        for _ in range(3):
            processor.apply(torch.randn(1, V))
        assert processor.state.faults == 0
    assert [backends.count(backend) for backend in (backends[0], backends[-1])] == [3, 3]
