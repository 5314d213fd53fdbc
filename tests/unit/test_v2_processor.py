"""The processor of vLLM's V2 runner: after a fault, which is counted, rows are unchanged; a request
does not widen the steps of others."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import v2 as v2_module
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams

V = 300
SLOTS = 3
ASKED = SamplingParams(extra_args={"diversity": 0.9, "diversity_id": "a"})


@pytest.fixture
def v2() -> V2Processor:
    """Slot 0 has a request with the field, after one step."""
    states = SimpleNamespace(
        max_num_reqs=SLOTS,
        device=torch.device("cpu"),
        prefill_len=SimpleNamespace(np=np.ones(SLOTS, int), gpu=torch.ones(SLOTS)),
        prompt_len=SimpleNamespace(np=np.ones(SLOTS, int)),
    )
    scheduler = SimpleNamespace(max_num_seqs=SLOTS)
    config = SimpleNamespace(scheduler_config=scheduler, speculative_config=None)
    processor = V2Processor(config, states)
    add_request(processor, 0)
    assert rows_changed(processor) == [True, False, False]
    return processor


def add_request(processor: V2Processor, slot: int, parameters: SamplingParams = ASKED) -> bool:
    is_active = processor.add_request(slot, parameters)
    processor.apply_staged_writes()
    return is_active


def rows_changed(processor: V2Processor, slots: tuple[int, ...] = (0, 1, 2)) -> list[bool]:
    """For each of these slots, whether a step changes its row."""
    torch.manual_seed(0)
    logits_RV = torch.randn(len(slots), V) * 3
    after_RV = logits_RV.clone()
    slot_R = torch.tensor(slots)
    context = SimpleNamespace(
        idx_mapping_np=slot_R.numpy(),
        expanded_idx_mapping=slot_R,
        expanded_local_pos=torch.zeros_like(slot_R),
        pos=torch.zeros_like(slot_R),
    )
    assert processor.apply(after_RV, context) is after_RV
    return (after_RV != logits_RV).any(dim=1).tolist()


@pytest.mark.parametrize(("rows", "has_report"), [(0, True), (4, True), (5, False)])
def test_no_statistics_if_drafts_may_be_verified_in_parts(v2, monkeypatch, rows, has_report):
    """Requests have other indices in a part than in the batch. Without drafts no parts exist."""
    v2.state.take_report()
    monkeypatch.setattr(v2_module, "PART_BYTES", 4 * 4 * V)
    monkeypatch.setattr(v2, "_verified_rows", rows)
    assert rows_changed(v2) == [True, False, False]
    assert (v2.state.take_report() is not None) == has_report


def breaking(*_, **__):
    raise RuntimeError("a fault")


def test_a_fault_while_adding_a_request_affects_only_it(v2, monkeypatch):
    monkeypatch.setattr("dftserve_vllm.v2.active_request", breaking)
    check_only_the_new_request_is_affected(v2, monkeypatch)


def test_a_fault_while_storing_controls_affects_only_their_request(v2, monkeypatch):
    monkeypatch.setattr(v2._controls, "put", breaking)
    check_only_the_new_request_is_affected(v2, monkeypatch)


def check_only_the_new_request_is_affected(v2, monkeypatch):
    assert add_request(v2, 1) is False
    monkeypatch.undo()
    assert v2.state.faults == 1
    assert rows_changed(v2) == [True, False, False]
    assert add_request(v2, 1) is True
    assert rows_changed(v2) == [True, True, False]


def test_a_fault_while_copying_controls_affects_only_the_new_request(v2, monkeypatch):
    monkeypatch.setattr(v2._controls, "on_device", breaking)
    add_request(v2, 1)
    monkeypatch.undo()
    assert v2.state.faults == 1
    assert rows_changed(v2) == [True, False, False]


def test_a_fault_while_reporting_a_step_is_counted(v2, monkeypatch):
    monkeypatch.setattr(v2.state.slots, "snapshot", breaking)
    rows_changed(v2)
    monkeypatch.undo()
    assert v2.state.faults == 1
    assert rows_changed(v2) == [True, False, False]


def test_a_fault_in_the_transform_leaves_the_rows_unchanged(v2, monkeypatch):
    monkeypatch.setattr("dftserve_vllm.worker_state.transform_step", breaking)
    assert rows_changed(v2) == [False, False, False]
    assert v2.state.faults == 1


def test_an_unknown_context_leaves_the_logits_unchanged(v2):
    logits = object()
    assert v2.apply(logits, SimpleNamespace()) is logits
    assert v2.state.faults == 1


def test_a_step_has_no_wider_stop_tokens_than_its_requests_need(v2, monkeypatch):
    widths = []
    apply = v2.state.apply

    def noting(logits_XV, step, *rest):
        widths.append(step.controls.stop_ids_RE.shape[1])
        apply(logits_XV, step, *rest)

    monkeypatch.setattr(v2.state, "apply", noting)
    many = SamplingParams(extra_args=ASKED.extra_args, stop_token_ids=list(range(64)))
    add_request(v2, 1, many)
    assert rows_changed(v2, (0, 1)) == [True, True]
    add_request(v2, 1, SamplingParams())
    assert rows_changed(v2, (0,)) == [True]
    assert widths[0] >= 64
    assert widths[1] == 1
    assert v2.state.faults == 0
