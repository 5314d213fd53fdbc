"""The host cost of a step does not grow with its rows: Python executes as many instructions, and
torch as many operations, for 256 rows as for two."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import styles, vocabulary
from dftserve_vllm.step_report import Forwarder
from dftserve_vllm.styles import Styles
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve.sampling import TokenClasses
from tests.cpu_time import without_garbage_collection
from tests.styles import stored

CPU = torch.device("cpu")
SLOTS, V = 256, 40
PROFILE = stored(vocabulary=V).profile
MANY = {
    "a law": {"diversity": 0.7},
    "last tokens": {"diversity": {"law": "words", "level": 0.5}},
    "a style": {"style": {"name": PROFILE.name, "strength": 0.8, "max_kl": 0.2}},
}
ONE = {
    "a group": {"diversity": {"level": 0.5, "group": {"id": "a", "index": 3, "size": 1024}}},
    "DRY": {"diversity": {"dry_multiplier": 0.8, "dry_sequence_breakers": []}},
}
PAIR = {"id": "a", "index": 1, "size": 2}
USED_UP = {"a group of two": {"diversity": {"level": 0.5, "group": PAIR}}}
"""A token of a uniform row takes more bits than its code has."""


class Operations(TorchDispatchMode):
    """Counts the operations of torch while it is entered."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def work_of(step, end_step):
    """(Python instructions, torch operations), each of one step after some others."""
    for _ in range(3):
        step()
        end_step()
    instructions, former = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal instructions
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        instructions += event == "opcode"
        return trace

    with without_garbage_collection():
        sys.settrace(trace)
        try:
            step()
        finally:
            sys.settrace(former)
    end_step()
    with Operations() as operations:
        step()
    assert instructions > 100
    return instructions, operations.count


@pytest.fixture
def engine(monkeypatch):
    classes = TokenClasses(np.zeros(V, np.uint8))
    monkeypatch.setattr(vocabulary, "token_classes", lambda vllm_config: classes)
    monkeypatch.setattr(styles, "of_engine", lambda vllm_config: Styles((PROFILE,)))
    scheduler = SimpleNamespace(max_num_seqs=SLOTS)
    return SimpleNamespace(scheduler_config=scheduler, speculative_config=None)


def params(kind):
    return SamplingParams(temperature=0.9, extra_args=(MANY | ONE | USED_UP)[kind])


def v1_of(engine, rows, kind, *others):
    """The processor, the answers of its batch, and a function that ends a step. The first requests
    are `others`, all further ones `kind`."""
    outputs = [[] if i < len(others) else [5] for i in range(rows)]
    processor = V1Processor(engine, CPU, False)
    kinds = [*others, *[kind] * (rows - len(others))]
    added = [(i, params(each), [1], outputs[i]) for i, each in enumerate(kinds)]
    processor.update_state(BatchUpdate(rows, removed=[], added=added, moved=[]))

    def end_step():
        for output in outputs:
            output.append(1)

    return processor, outputs, end_step


@pytest.mark.parametrize("kind", MANY)
def test_a_step_of_the_v1_runner_costs_the_same_for_any_number_of_rows(engine, kind):
    def work(rows):
        processor, _, end_step = v1_of(engine, rows, kind)
        logits_RV = torch.zeros(rows, V)
        found = work_of(lambda: processor.apply(logits_RV), end_step)
        assert processor.state.faults == 0
        return found

    assert work(SLOTS) == work(2)


@pytest.mark.parametrize("kind", MANY)
def test_a_v1_step_with_a_changed_batch_costs_the_same_for_any_number_of_rows(engine, kind):
    """On a busy server a request starts or ends at most steps."""

    def work(rows):
        processor, outputs, end_step = v1_of(engine, rows, kind)
        logits_RV = torch.zeros(rows, V)

        def step():
            outputs[0] = []
            one = BatchUpdate(
                rows, removed=[], added=[(0, params(kind), [1], outputs[0])], moved=[]
            )
            processor.update_state(one)
            processor.apply(logits_RV)

        found = work_of(step, end_step)
        assert processor.state.faults == 0
        return found

    assert work(SLOTS) == work(2)


def v2_work(engine, rows, kind, *others, drafts=0):
    """The work of a step of `rows` requests: the first are `others`, all further ones `kind`."""
    if drafts:
        engine.speculative_config = SimpleNamespace(num_speculative_tokens=drafts)
    lengths = torch.ones(SLOTS, dtype=torch.int32)
    known = SimpleNamespace(np=lengths.numpy(), gpu=lengths)
    tokens = SimpleNamespace(gpu=torch.zeros(SLOTS, 16, dtype=torch.int32))
    states = SimpleNamespace(
        max_num_reqs=SLOTS,
        device=CPU,
        prefill_len=known,
        prompt_len=known,
        all_token_ids=tokens,
    )
    processor = V2Processor(engine, states)
    for slot in range(rows):
        assert processor.add_request(slot, params(others[slot] if slot < len(others) else kind))
    processor.apply_staged_writes()
    offsets = torch.arange(1 + drafts, dtype=torch.int32).repeat(rows)
    context = SimpleNamespace(
        idx_mapping_np=np.arange(rows),
        expanded_idx_mapping=torch.arange(rows).repeat_interleave(1 + drafts),
        expanded_local_pos=offsets,
        pos=1 + offsets.long(),
        input_ids=torch.ones(len(offsets), dtype=torch.int32),
        seq_lens_upper_bound_np=np.pad(np.full(rows, 12), (0, 3)),  # Of a larger CUDA graph.
    )
    logits_RV = torch.zeros(len(offsets), V)
    found = work_of(lambda: processor.apply(logits_RV, context), lambda: context.pos.add_(1))
    assert processor.state.faults == 0
    return found


@pytest.mark.parametrize("kind", [*MANY, "DRY"])
def test_a_step_of_the_v2_runner_costs_the_same_for_any_number_of_rows(engine, kind):
    assert v2_work(engine, SLOTS, kind) == v2_work(engine, 2, kind)


@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("one", ONE)
def test_a_single_request_of_a_kind_costs_v2_the_same_among_many_as_among_few(engine, one, drafts):
    """With drafts a request has several rows, and the host does not know which."""
    work = [v2_work(engine, rows, "a law", one, drafts=drafts) for rows in (2, SLOTS)]
    assert work[0] == work[1]
    assert work[0] > v2_work(engine, 2, "a law", drafts=drafts)


@pytest.mark.parametrize("one", ONE)
def test_a_single_request_of_a_kind_costs_v1_the_same_among_many_as_among_few(engine, one):
    def work(rows):
        processor, _, end_step = v1_of(engine, rows, "a law", one)
        logits_RV = torch.zeros(rows, V)
        return work_of(lambda: processor.apply(logits_RV), end_step)

    assert work(SLOTS) == work(2)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_text_of_a_group_costs_nothing_once_its_bits_are_used(engine, runner):
    def work(one):
        if runner == "V2":
            return v2_work(engine, 4, "a law", one, drafts=5)
        processor, _, end_step = v1_of(engine, 4, "a law", one)
        logits_RV = torch.zeros(4, V)
        return work_of(lambda: processor.apply(logits_RV), end_step)

    assert work("a group of two") == work("a law") != work("a group")


def test_forwarding_a_report_costs_the_same_for_any_number_of_rows(engine):
    """From the worker to the engine core, for a step that ends no request."""

    def work(rows):
        processor, _, end_step = v1_of(engine, rows, "a law")
        processor.apply(torch.zeros(rows, V))
        pending = processor.state.take_report()
        outputs = [SimpleNamespace(request_id=str(i), finish_reason=None) for i in range(rows)]
        clients = {0: SimpleNamespace(outputs=outputs)}
        indices = {str(i): i for i in range(rows)}
        forwarder = Forwarder(0)

        def step():
            output = SimpleNamespace(dftserve_report=pending.resolve(), req_id_to_index=indices)
            forwarder.forward(output, clients)

        return work_of(step, end_step)

    assert work(SLOTS) == work(2)
