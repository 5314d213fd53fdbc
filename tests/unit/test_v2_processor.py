"""vLLM's V2 runner calls the processor: a fault is counted, and the rows are as they came; no
request makes the steps of others wider."""

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
    """Slot 0 has a request with the field, which has had a step."""
    states = SimpleNamespace(
        max_num_reqs=SLOTS,
        device=torch.device("cpu"),
        prefill_len=SimpleNamespace(np=np.ones(SLOTS, int), gpu=torch.ones(SLOTS)),
        prompt_len=SimpleNamespace(np=np.ones(SLOTS, int)),
    )
    scheduler = SimpleNamespace(max_num_seqs=SLOTS)
    config = SimpleNamespace(scheduler_config=scheduler, speculative_config=None)
    processor = V2Processor(config, states)
    joined(processor, 0)
    assert changed(processor) == [True, False, False]
    return processor


def joined(processor: V2Processor, slot: int, asked: SamplingParams = ASKED) -> bool:
    is_active = processor.add_request(slot, asked)
    processor.apply_staged_writes()
    return is_active


def changed(processor: V2Processor, slots: tuple[int, ...] = (0, 1, 2)) -> list[bool]:
    """Of each of these slots, whether a step of theirs changes its row."""
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


@pytest.mark.parametrize(("rows", "tells"), [(0, True), (4, True), (5, False)])
def test_no_figures_where_drafts_may_be_verified_in_parts(v2, monkeypatch, rows, tells):
    """A part's requests have other places than the batch's; without drafts there are no parts."""
    v2.stats.take_report()
    monkeypatch.setattr(v2_module, "PART_BYTES", 4 * 4 * V)
    monkeypatch.setattr(v2, "_verified_rows", rows)
    assert changed(v2) == [True, False, False]
    assert (v2.stats.take_report() is not None) == tells


def breaking(*_, **__):
    raise RuntimeError("a fault")


def test_as_a_request_joins(v2, monkeypatch):
    monkeypatch.setattr("dftserve_vllm.v2.active", breaking)
    check_the_fault_is_the_joining_requests(v2, monkeypatch)


def test_as_its_controls_are_put(v2, monkeypatch):
    monkeypatch.setattr(v2._controls, "put", breaking)
    check_the_fault_is_the_joining_requests(v2, monkeypatch)


def check_the_fault_is_the_joining_requests(v2, monkeypatch):
    assert joined(v2, 1) is False
    monkeypatch.undo()
    assert v2.stats.faults == 1
    assert changed(v2) == [True, False, False]
    assert joined(v2, 1) is True
    assert changed(v2) == [True, True, False]


def test_as_controls_go_to_the_device(v2, monkeypatch):
    monkeypatch.setattr(v2._controls, "on_device", breaking)
    joined(v2, 1)
    monkeypatch.undo()
    assert v2.stats.faults == 1
    assert changed(v2) == [True, False, False]


def test_as_a_step_is_reported(v2, monkeypatch):
    monkeypatch.setattr(v2.stats.slots, "snapshot", breaking)
    changed(v2)
    monkeypatch.undo()
    assert v2.stats.faults == 1
    assert changed(v2) == [True, False, False]


def test_in_the_transform(v2, monkeypatch):
    monkeypatch.setattr("dftserve_vllm.request_stats.transform_step", breaking)
    assert changed(v2) == [False, False, False]
    assert v2.stats.faults == 1


def test_a_context_that_is_not_understood(v2):
    logits = object()
    assert v2.apply(logits, SimpleNamespace()) is logits
    assert v2.stats.faults == 1


def test_a_step_looks_up_no_more_stop_tokens_than_the_requests_that_are_there_have(v2, monkeypatch):
    widths = []
    apply = v2.stats.apply

    def noting(logits_XV, step, *rest):
        widths.append(step.controls.stop_ids_RE.shape[1])
        apply(logits_XV, step, *rest)

    monkeypatch.setattr(v2.stats, "apply", noting)
    many = SamplingParams(extra_args=ASKED.extra_args, stop_token_ids=list(range(64)))
    joined(v2, 1, many)
    assert changed(v2, (0, 1)) == [True, True]
    joined(v2, 1, SamplingParams())
    assert changed(v2, (0,)) == [True]
    assert widths[0] >= 64
    assert widths[1] == 1
    assert v2.stats.faults == 0
