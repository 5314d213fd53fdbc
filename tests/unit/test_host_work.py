"""What a step costs the host does not grow with its rows: Python executes as many instructions, and
torch does as many operations, for two rows as for 256."""

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
from tests.styles import stored

CPU = torch.device("cpu")
SLOTS, V = 256, 40
PROFILE = stored(vocabulary=V).profile
ASKED = {
    "a law": {"diversity": 0.7},
    "last tokens": {"diversity": {"law": "words", "level": 0.5}},
    "a style": {"style": {"name": PROFILE.name, "strength": 0.8, "max_kl": 0.2}},
}


class Operations(TorchDispatchMode):
    """How many torch does while it is entered."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def work_of(step, then):
    """(instructions of Python, operations of torch), each of one step after some."""
    for _ in range(3):
        step()
        then()
    instructions, former = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal instructions
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        instructions += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(former)
    then()
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


def params(asked):
    return SamplingParams(temperature=0.9, extra_args=ASKED[asked])


def v1_of(engine, rows, asked):
    """The processor, its batch's answers, and what ends a step."""
    outputs = [[5] for _ in range(rows)]
    processor = V1Processor(engine, CPU, False)
    added = [(i, params(asked), [1], outputs[i]) for i in range(rows)]
    processor.update_state(BatchUpdate(rows, removed=[], added=added, moved=[]))

    def then():
        for output in outputs:
            output.append(1)

    return processor, outputs, then


@pytest.mark.parametrize("asked", ASKED)
def test_a_step_of_the_v1_runner(engine, asked):
    def work(rows):
        processor, _, then = v1_of(engine, rows, asked)
        logits_RV = torch.zeros(rows, V)
        found = work_of(lambda: processor.apply(logits_RV), then)
        assert processor.stats.faults == 0
        return found

    assert work(SLOTS) == work(2)


@pytest.mark.parametrize("asked", ASKED)
def test_a_step_of_the_v1_runner_whose_batch_has_changed(engine, asked):
    """On a busy server one request or another comes or goes at most steps."""

    def work(rows):
        processor, outputs, then = v1_of(engine, rows, asked)
        logits_RV = torch.zeros(rows, V)

        def step():
            outputs[0] = []
            one = BatchUpdate(
                rows, removed=[], added=[(0, params(asked), [1], outputs[0])], moved=[]
            )
            processor.update_state(one)
            processor.apply(logits_RV)

        found = work_of(step, then)
        assert processor.stats.faults == 0
        return found

    assert work(SLOTS) == work(2)


@pytest.mark.parametrize("asked", ASKED)
def test_a_step_of_the_v2_runner(engine, asked):
    def work(rows):
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
            assert processor.add_request(slot, params(asked))
        processor.apply_staged_writes()
        context = SimpleNamespace(
            idx_mapping_np=np.arange(rows),
            expanded_idx_mapping=torch.arange(rows),
            expanded_local_pos=torch.zeros(rows, dtype=torch.int32),
            pos=torch.ones(rows, dtype=torch.int64),
            input_ids=torch.ones(rows, dtype=torch.int32),
        )
        logits_RV = torch.zeros(rows, V)
        found = work_of(lambda: processor.apply(logits_RV, context), lambda: context.pos.add_(1))
        assert processor.stats.faults == 0
        return found

    assert work(SLOTS) == work(2)


def test_a_report_on_its_way(engine):
    """Of a step that ends no request; from the worker to the engine core."""

    def work(rows):
        processor, _, then = v1_of(engine, rows, "a law")
        processor.apply(torch.zeros(rows, V))
        pending = processor.stats.take_report()
        outputs = [SimpleNamespace(request_id=str(i), finish_reason=None) for i in range(rows)]
        clients = {0: SimpleNamespace(outputs=outputs)}
        places = {str(i): i for i in range(rows)}
        forwarder = Forwarder(0)

        def step():
            output = SimpleNamespace(dftserve_report=pending.resolve(), req_id_to_index=places)
            forwarder.forward(output, clients)

        return work_of(step, then)

    assert work(SLOTS) == work(2)
