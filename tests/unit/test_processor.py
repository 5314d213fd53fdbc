"""The class that vLLM's loaders use: the implementation for each runner, loaded once per engine;
rows, faults and preemptions."""

from abc import abstractmethod
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import engine, metrics
from dftserve_vllm import processor as processor_module
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.request_context import ChoiceStatistics
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Base
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Base

from dftserve.sampling.staging import PinnedStaging
from tests.vllm_config import config

V = 50


def params(diversity=None, identity=None, temperature=1.0, **fields):
    carried = {"diversity": diversity, "diversity_id": identity}
    return SamplingParams(temperature=temperature, extra_args=carried, **fields)


def v1_with(*requests):
    """A processor with these (params, output ids) at indices 0, 1, …"""
    processor = DiversityProcessor(config(), torch.device("cpu"), False)
    added = [(i, request, [1], output) for i, (request, output) in enumerate(requests)]
    processor.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    return processor


def test_both_loaders_accept_the_class():
    assert issubclass(DiversityProcessor, V1Base)
    assert issubclass(DiversityProcessor, V2Base)


def test_a_second_load_for_the_same_engine_does_nothing():
    """The entry point and the --logits-processors flag together."""
    one_engine = config()
    first = DiversityProcessor(one_engine, torch.device("cpu"), False)
    second = DiversityProcessor(one_engine, torch.device("cpu"), False)
    other = DiversityProcessor(config(), torch.device("cpu"), False)
    assert isinstance(first, V1Processor)
    assert isinstance(other, V1Processor)
    assert not isinstance(second, V1Processor)
    untouched = object()
    assert second.apply(untouched) is untouched


def test_the_engine_starts_on_a_later_vllm_that_requires_more_methods(monkeypatch):
    class LaterBase(V1Base):
        @abstractmethod
        def of_a_later_version(self): ...

    monkeypatch.setattr(processor_module, "V1Base", LaterBase)
    monkeypatch.setattr(engine, "unsupported", lambda: "vLLM 0.99 is not supported")
    made = DiversityProcessor(config(), torch.device("cpu"), False)
    assert isinstance(made, LaterBase)
    untouched = object()
    assert made.apply(untouched) is untouched


def test_without_the_field_no_tensor_is_touched():
    """The logits are an object without attributes: any use of it would raise."""
    processor = v1_with((SamplingParams(), []), (params(0), []), (params(0.5, seed=1), []))
    processor.update_state(BatchUpdate(2, removed=[2], added=[], moved=[]))
    logits = object()
    assert processor.apply(logits) is logits
    assert processor.state.faults == 0


def test_missing_arguments_are_an_error():
    with pytest.raises(TypeError):
        DiversityProcessor(config())


AT_EACH_TEMPERATURE = pytest.mark.parametrize("temperature", [0.0, 1.0])


@AT_EACH_TEMPERATURE
@pytest.mark.parametrize(
    "diversity",
    [2, "x", {"law": "none"}, {"level": 0.5, "lvl": 1}, {"level": 0, "group": True}],
)
def test_invalid_extra_args_are_refused_offline(diversity, temperature):
    with pytest.raises(ValueError, match="accepted"):
        DiversityProcessor.validate_params(params(diversity, temperature=temperature))


@AT_EACH_TEMPERATURE
@pytest.mark.parametrize("diversity", [None, 0, 0.5, '{"law": "guard", "min_p": 0.1}'])
def test_valid_extra_args_are_accepted_offline(diversity, temperature):
    DiversityProcessor.validate_params(params(diversity, temperature=temperature))
    DiversityProcessor.validate_params(SamplingParams(temperature=temperature))


@AT_EACH_TEMPERATURE
def test_what_the_engine_cannot_honour_is_refused_offline(monkeypatch, temperature):
    monkeypatch.setattr(engine, "refusal", lambda: "not on this engine")
    with pytest.raises(ValueError, match="diversity: not on this engine"):
        DiversityProcessor.validate_params(params(0.5, temperature=temperature))
    DiversityProcessor.validate_params(params(0, temperature=temperature))


def test_a_request_keeps_its_row_when_the_batch_moves():
    """After swaps, one-way moves and removal."""
    torch.manual_seed(0)
    outputs = [[], [], []]
    requests = [params(0.9, "a"), SamplingParams(), params({"level": 0.2}, "c")]
    processor = v1_with(*zip(requests, outputs, strict=True))
    logits_RV = torch.randn(3, V) * 3

    def changed(rows):
        after_RV = logits_RV.clone()
        processor.apply(after_RV)
        same = [torch.equal(after_RV[i], logits_RV[i]) for i in range(3)]
        assert [not s for s in same] == rows
        return after_RV

    first = changed([True, False, True])
    swap = [(0, 1, MoveDirectionality.SWAP)]
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
    changed([False, True, True])
    processor.update_state(BatchUpdate(3, removed=[], added=[], moved=swap))
    assert torch.equal(changed([True, False, True]), first)
    one_way = [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]
    processor.update_state(BatchUpdate(2, removed=[], added=[], moved=one_way))
    changed([True, False, False])
    report = processor.state.take_report().resolve()
    assert report.positions.tolist() == [0]
    assert counted(report, 0, produced=1) == 1


def counted(report, row, produced):
    return ChoiceStatistics("gated", produced=produced, payload={"row": report.row(row)}).means()[0]


def test_a_step_reports_its_requests_once():
    output = []
    processor = v1_with((params(0.5, "a"), output))
    for token in range(5):
        processor.apply(torch.randn(1, V))
        output.append(token)
    report = processor.state.take_report().resolve()
    assert report.positions.tolist() == [0]
    assert counted(report, 0, produced=5) == 5
    assert processor.state.take_report() is None


def test_a_preempted_request_keeps_its_statistics():
    output = []
    processor = v1_with((params(0.5, "a"), output))
    for token in range(5):
        processor.apply(torch.randn(1, V))
        output.append(token)
    leave = BatchUpdate(0, removed=[0], added=[], moved=[])
    processor.update_state(leave)
    back = BatchUpdate(1, removed=[], added=[(0, params(0.5, "a"), [1], output)], moved=[])
    processor.update_state(back)
    processor.apply(torch.randn(1, V))
    assert counted(processor.state.take_report().resolve(), 0, produced=6) == 6


def test_a_fault_leaves_the_rows_unchanged_and_is_counted(monkeypatch):
    processor = v1_with((params(0.5, "a"), []))

    def failing(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("dftserve_vllm.worker_state.transform_step", failing)
    logits_RV = torch.randn(1, V)
    before_RV = logits_RV.clone()
    assert torch.equal(processor.apply(logits_RV), before_RV)
    assert processor.state.faults == 1


def raise_fault(*_, **__):
    raise RuntimeError("a fault")


def test_a_fault_while_adding_a_request_affects_its_rows_only(monkeypatch):
    processor = v1_with((params(0.5, "a"), []), (params(0.5, "b"), []))
    monkeypatch.setattr("dftserve_vllm.v1.active_request", raise_fault)
    added = [(2, params(0.5, "c"), [1], [])]
    processor.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    logits_RV = torch.randn(3, V) * 3
    after_RV = logits_RV.clone()
    processor.apply(after_RV)
    assert [torch.equal(after_RV[i], logits_RV[i]) for i in range(3)] == [False, False, True]
    assert processor.state.take_report().resolve().faults == 1


@pytest.mark.parametrize("method", ["open", "close"])
def test_a_fault_in_the_slots_does_not_leak_a_slot(monkeypatch, method):
    """Four slots; every addition or removal of a request has a fault."""
    processor = v1_with()
    for _ in range(3):
        monkeypatch.setattr(processor.state, method, raise_fault)
        added = [(i, params(0.5, str(i)), [1], []) for i in range(4)]
        processor.update_state(BatchUpdate(4, removed=[], added=added, moved=[]))
        processor.update_state(BatchUpdate(0, removed=range(4), added=[], moved=[]))
        monkeypatch.undo()
    added = [(i, params(0.5, str(i)), [1], []) for i in range(4)]
    processor.update_state(BatchUpdate(4, removed=[], added=added, moved=[]))
    logits_RV = torch.randn(4, V) * 3
    after_RV = logits_RV.clone()
    processor.apply(after_RV)
    assert not any(torch.equal(after_RV[i], logits_RV[i]) for i in range(4))
    assert processor.state.faults == 12


def test_a_malformed_update_leaves_every_row_unchanged(monkeypatch):
    processor = v1_with((params(0.5, "a"), []), (params(0.5, "b"), []))
    processor.update_state(BatchUpdate(3, removed=[], added=[("one of three",)], moved=[]))
    untouched = object()
    assert processor.apply(untouched) is untouched
    assert processor.state.faults == 1


@pytest.mark.parametrize("method", ["arrays", "snapshot"])
def test_a_fault_in_the_statistics_does_not_fail_a_step(monkeypatch, method):
    processor = v1_with((params(0.5, "a"), []))
    monkeypatch.setattr(processor.state.slots, method, raise_fault)
    logits_RV = torch.randn(1, V)
    assert processor.apply(logits_RV) is logits_RV
    assert processor.state.faults == 1


def test_nan_rows_are_counted():
    processor = v1_with((params(0.5, "a"), []))
    processor.apply(torch.full((1, V), float("nan")))
    assert processor.state.take_report().resolve().nan_rows == 1


@pytest.fixture
def v2():
    lengths_S = torch.ones(4, dtype=torch.int32)
    lengths = SimpleNamespace(np=lengths_S.numpy(), gpu=lengths_S)
    states = SimpleNamespace(
        max_num_reqs=4, device=torch.device("cpu"), prefill_len=lengths, prompt_len=lengths
    )
    return V2Processor(config(), states)


def is_changed_by(v2, slots):
    """For each of these slots whether a step changes its row."""
    context = SimpleNamespace(
        idx_mapping_np=np.array(slots),
        expanded_idx_mapping=torch.tensor(slots),
        expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
        pos=torch.full((len(slots),), 5),
        input_ids=torch.zeros(len(slots), dtype=torch.int32),
    )
    logits_RV = torch.randn(len(slots), V) * 3
    after_RV = logits_RV.clone()
    assert v2.apply(after_RV, context) is after_RV
    return [not torch.equal(a, b) for a, b in zip(logits_RV, after_RV, strict=True)]


def test_v2_changes_only_the_rows_of_requests_with_the_field(v2):
    """Also if a slot's previous request had the field."""
    assert v2.add_request(1, params(0.5, "a"))
    assert v2.add_request(3, params(0.5, "b"))
    v2.apply_staged_writes()
    assert is_changed_by(v2, [3, 0, 1]) == [True, False, True]
    assert not v2.add_request(3, SamplingParams())
    v2.apply_staged_writes()
    assert is_changed_by(v2, [3, 0, 1]) == [False, False, True]
    assert v2.state.faults == 0


def test_v2_does_not_change_rows_whose_controls_were_not_copied_to_the_device(v2, monkeypatch):
    """One fault is counted, and other requests are not affected."""
    assert v2.add_request(1, params(0.5, "a"))
    v2.apply_staged_writes()
    assert v2.add_request(2, params(0.5, "b"))
    monkeypatch.setattr(PinnedStaging, "to_device", raise_fault)
    v2.apply_staged_writes()
    monkeypatch.undo()
    assert is_changed_by(v2, [1, 2]) == [True, False]
    assert v2.state.faults == 1


def test_v2_changes_nothing_while_the_controls_on_the_device_are_outdated(v2, monkeypatch):
    assert v2.add_request(1, params(0.5, "a"))
    assert v2.add_request(2, params(0.5, "b"))
    v2.apply_staged_writes()
    assert is_changed_by(v2, [1, 2]) == [True, True]
    assert not v2.add_request(2, SamplingParams())
    monkeypatch.setattr(PinnedStaging, "to_device", raise_fault)
    assert is_changed_by(v2, [1, 2]) == [False, False]
    assert v2.state.faults == 1
    monkeypatch.undo()
    assert is_changed_by(v2, [1, 2]) == [True, False]


@pytest.mark.parametrize(("value", "refused"), [(7, 1), (0.5, 0)])
def test_a_refusal_on_a_route_without_the_field_is_counted(value, refused):
    """vLLM answers the error of `validate_params` with a 400."""
    before = _refused()
    with pytest.raises(ValueError, match="diversity") if refused else nullcontext():
        DiversityProcessor.validate_params(params(value))
    assert _refused() - before == refused


def _refused() -> float:
    samples = (each for family in metrics.metrics().refused.collect() for each in family.samples)
    return sum(each.value for each in samples if each.name == "dft:requests_refused_total")
