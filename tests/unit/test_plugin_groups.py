"""Groups in the plug-in: from the request's body through vLLM's child requests to the rows of both
runners."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm import engine, extra_args, groups, request_params
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve import spec
from tests.group_reference import cut_reference, drawn_reference, first_code_reference
from tests.reference import reference
from tests.vllm_config import config
from tests.vllm_requests import params_of, refused

V, T, STEPS = 40, 0.9, 8
SIZE = 1024
"""The size of a group: its codes have ten bits, enough for several steps."""
CPU = torch.device("cpu")
MEMBER = {"id": "mine", "index": 2, "size": 4}


@pytest.fixture
def configured(monkeypatch):
    model = SimpleNamespace(is_diffusion=False, override_generation_config={})
    fields = {"model_config": model, "use_v2_model_runner": True}
    monkeypatch.setattr(engine, "_config", config(**fields))
    return fields


def member(index=0, level=0.5, identity="a", **fields):
    """One text of a group."""
    group = {"id": "mine", "index": index, "size": SIZE}
    carried = {"diversity": {"level": level, "group": group}, "diversity_id": identity}
    return SamplingParams(temperature=T, extra_args=carried, **fields)


def children(params, request_id="r"):
    """The choices' parameters as vLLM makes them from a request, with the hook applied."""
    parent = ParentRequest(
        SimpleNamespace(request_id=request_id, external_req_id=request_id, params=params)
    )
    made = [parent.get_child_info(index)[1] for index in range(params.n)]
    return [extra_args.of_choice(child, i, parent) for i, child in enumerate(made)]


def logits_of(step, row=0):
    return np.random.default_rng((step, row)).normal(scale=2.5, size=V).astype(np.float32)


def expected(index, steps, *, level=0.5, row=0, **cuts):
    """The tokens of a text of the group, by the fp64 references of the law and of the code. Once
    the code's bits are used up, or if the index is None, what `token_of` returns for the law's
    rows."""
    used = math.inf if index is None else 0.0
    code = 0.0 if index is None else first_code_reference("mine", index, SIZE)
    tokens = []
    for step in steps:
        law = reference(logits_of(step, row), temperature=T, level=level, stop_ids=frozenset())
        p_V = np.exp(law.log_p_V)
        if used >= math.log2(SIZE):
            tokens.append(int(p_V.argmax()) if (p_V > 0).sum() == 1 else -1)
            continue
        p_V = cut_reference(p_V, **cuts)
        token, code = drawn_reference(p_V, code)
        tokens.append(token)
        used -= math.log2(p_V[token])
    return tokens


def token_of(row_V):
    """The only token left in a row, or -1 if there are several."""
    finite = torch.isfinite(row_V).nonzero().flatten().tolist()
    return finite[0] if len(finite) == 1 else -1


class V1Batch:
    """A batch of the V1 runner, and each request's output."""

    def __init__(self, *requests, outputs=None):
        self.processor = V1Processor(config(), CPU, False)
        self.outputs = outputs or [[] for _ in requests]
        self.join(*requests)

    def join(self, *requests):
        added = [(i, each, [1], self.outputs[i]) for i, each in enumerate(requests)]
        update = BatchUpdate(len(requests), removed=[], added=added, moved=[])
        self.processor.update_state(update)

    def leave(self):
        rows = range(len(self.outputs))
        self.processor.update_state(BatchUpdate(0, removed=list(rows), added=[], moved=[]))

    def step(self, step, rows=None):
        """`rows`: which row of logits each request has."""
        rows = range(len(self.outputs)) if rows is None else rows
        logits_RV = torch.from_numpy(np.stack([logits_of(step, row) / T for row in rows]))
        self.processor.apply(logits_RV)
        assert self.processor.state.faults == 0
        for output, row_V in zip(self.outputs, logits_RV, strict=True):
            output.append(token_of(row_V))


def test_v1_draws_by_the_law_the_requests_cuts_and_the_code():
    cuts = {"top_k": 6, "top_p": 0.8}
    requests = [member(0), member(1, level=0.0, identity="b"), member(2, identity="c", **cuts)]
    batch = V1Batch(*requests, SamplingParams(temperature=T, extra_args={"diversity": 0.5}))
    for step in range(STEPS):
        batch.step(step)
    assert batch.outputs[0] == expected(0, range(STEPS))
    assert batch.outputs[1] == expected(1, range(STEPS), level=1e-9, row=1)
    assert batch.outputs[2] == expected(2, range(STEPS), row=2, **cuts)
    assert -1 in batch.outputs[0][6:]
    assert -1 not in batch.outputs[0][:6]
    assert batch.outputs[3] == expected(None, range(STEPS), row=3)


@pytest.mark.parametrize("dropped", [0, 1])
def test_v1_output_does_not_depend_on_a_preemption(dropped):
    """Also if the last token was dropped: it is then drawn again."""
    first, second = member(3), member(1, identity="b")
    whole, batch = V1Batch(first, second), V1Batch(first, second)
    for step in range(8):
        whole.step(step)
    for step in range(3):
        batch.step(step)
    batch.leave()
    for output in batch.outputs:
        del output[3 - dropped :]
    batch.outputs.reverse()
    batch.join(second, first)
    for step in range(3 - dropped, 8):
        batch.step(step, rows=(1, 0))
    assert batch.outputs == whole.outputs[::-1]
    assert -1 not in whole.outputs[0][:4] + whole.outputs[1][:4]


def test_v1_output_does_not_depend_on_a_second_preemption_before_any_step():
    """In a slot whose previous request was another text of the group."""
    first, second = member(3), member(1, identity="b")
    whole, batch = V1Batch(first, second), V1Batch(first, second)
    for step in range(8):
        whole.step(step)
    for step in range(3):
        batch.step(step)
    batch.leave()
    batch.outputs.reverse()
    batch.join(second, first)
    batch.leave()
    batch.outputs.reverse()
    batch.join(first, second)
    for step in range(3, 8):
        batch.step(step)
    assert batch.outputs == whole.outputs


def test_without_an_identity_a_preempted_text_is_no_longer_drawn_by_the_code():
    batch = V1Batch(member(3, identity=None))
    batch.step(0)
    batch.leave()
    batch.join(member(3, identity=None))
    batch.step(1)
    assert batch.outputs == [[*expected(3, [0]), -1]]


def v2_processor(drafts=0):
    lengths = torch.full((4,), 2, dtype=torch.int32)
    prefill = SimpleNamespace(np=lengths.numpy().copy(), gpu=lengths)
    prompt = SimpleNamespace(np=lengths.numpy().copy(), gpu=lengths.clone())
    states = SimpleNamespace(max_num_reqs=4, device=CPU, prefill_len=prefill, prompt_len=prompt)
    given = config()
    if drafts:
        given.speculative_config = SimpleNamespace(num_speculative_tokens=drafts)
    return V2Processor(given, states), prefill


def v2_step(processor, slots, first, rows_per_request=1, rows=None):
    """The tokens of a step's rows; `first` is the position of each request's first row."""
    offsets = np.tile(np.arange(rows_per_request), len(slots))
    slot_R = torch.from_numpy(np.repeat(slots, rows_per_request))
    context = SimpleNamespace(
        idx_mapping_np=np.array(slots),
        expanded_idx_mapping=slot_R,
        expanded_local_pos=torch.from_numpy(offsets),
        pos=torch.from_numpy(first + offsets),
    )
    rows = rows or [logits_of(first - 1 + offset) for offset in offsets]
    logits_RV = torch.from_numpy(np.stack(rows))
    processor.apply(logits_RV, context)
    assert processor.state.faults == 0
    return [token_of(row_V) for row_V in logits_RV]


def test_v2_draws_by_slot_and_resumes_after_a_preemption():
    processor, prefill = v2_processor()
    assert processor.add_request(1, member(2))
    assert processor.add_request(3, SamplingParams(temperature=T, extra_args={"diversity": 0.5}))
    processor.apply_staged_writes()
    drawn = [v2_step(processor, [3, 1], 1 + step) for step in range(3)]
    assert [other for other, _ in drawn] == [-1] * 3
    prefill.np[0] = prefill.gpu[0] = 2 + 3
    assert processor.add_request(0, member(2))  # In another slot, with three tokens.
    assert not processor.add_request(1, SamplingParams())
    processor.apply_staged_writes()
    drawn += [v2_step(processor, [1, 0], 1 + step) for step in range(3, STEPS)]
    assert [own for _, own in drawn] == expected(2, range(STEPS))


def test_v2_draws_drafts_in_sequence():
    processor, _ = v2_processor(drafts=2)
    assert processor.add_request(1, member(2, level=0.8))
    processor.apply_staged_writes()
    tokens = expected(2, range(STEPS), level=0.8)
    for first in (0, 1):  # One row of three is accepted.
        assert v2_step(processor, [0, 1], 1 + first, 3)[3:] == tokens[first : first + 3]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_nothing_is_drawn_if_no_row_belongs_to_a_group(monkeypatch, runner):
    request = SamplingParams(temperature=T, extra_args={"diversity": 0.5})
    if runner == "V1":
        batch = V1Batch(request)
        processor, run = batch.processor, lambda: batch.step(0)
    else:
        processor, _ = v2_processor(drafts=2)
        processor.add_request(0, member(1))  # The slot's previous request has a group.
        processor.add_request(0, request)
        processor.apply_staged_writes()
        run = lambda: v2_step(processor, [0], 1, 3)  # noqa: E731
    monkeypatch.setattr(processor.state._codes, "draw", None)
    run()


# ── The request ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {"diversity": {"level": 0.5, "group": True}, "n": 4},
        {"vllm_xargs": {"diversity": '{"level": 0.5, "group": true}'}, "n": 4},
    ],
)
def test_each_choice_has_its_index_and_the_seed_determines_the_group(configured, fields):
    choices = children(params_of(seed=7, **fields))
    memberships = [child.extra_args["diversity"]["group"] for child in choices]
    assert [each["index"] for each in memberships] == [0, 1, 2, 3]
    assert {each["size"] for each in memberships} == {4}
    assert len({each["id"] for each in memberships}) == 1
    assert [child.seed for child in choices] == [7, 8, 9, 10]
    assert len({child.extra_args["diversity_id"] for child in choices}) == 4
    again = children(params_of(seed=7, **fields), request_id="other")
    assert [child.extra_args["diversity"]["group"] for child in again] == memberships
    other = children(params_of(seed=8, **fields))
    assert other[0].extra_args["diversity"]["group"]["id"] != memberships[0]["id"]


def test_without_a_seed_each_request_has_its_own_group(configured):
    fields = {"diversity": {"level": 0, "group": True}, "n": 2}
    first, second = (children(params_of(**fields), request_id=name) for name in "ab")
    names = [child.extra_args["diversity"]["group"]["id"] for child in (*first, *second)]
    assert names[0] == names[1] != names[2] == names[3]


def test_the_group_of_a_single_text_reaches_the_worker_unchanged(configured):
    carried = params_of(diversity={"level": 0.5, "group": MEMBER}).extra_args
    assert carried["diversity"]["group"] == MEMBER
    assert spec.parse(carried["diversity"]).group == spec.Group(**MEMBER)
    assert params_of(diversity={"level": 0.5, "group": False}).extra_args["diversity"] == {
        "law": "gated",
        "level": 0.5,
        "max_temperature": 4.0,
    }


def test_offline_choices_have_their_index_too():
    params = SamplingParams(n=3, extra_args={"diversity": {"level": 0.5, "group": True}})
    DiversityProcessor.validate_params(params)
    indices = [child.extra_args["diversity"]["group"]["index"] for child in children(params)]
    assert indices == [0, 1, 2]


@pytest.mark.parametrize(
    ("group", "fields", "parameter", "message"),
    [
        (True, {}, "diversity.group", "got true with n = 1; accepted: n from 2 to 1024, or "),
        (True, {"n": 1025}, "diversity.group", "got true with n = 1025"),
        (MEMBER, {"n": 2}, "diversity.group", "got one text's index with n = 2; accepted: n = 1"),
        (MEMBER, {"temperature": 0}, "temperature", "got 0 with diversity.group"),
        (1, {"n": 2}, "diversity.group", "got 1; accepted: true, for the choices of"),
        ("mine", {}, "diversity.group", "got 'mine'; accepted: true"),
        (MEMBER | {"id": ""}, {}, "diversity.group.id", "got ''; accepted: a text of 1 to 64"),
        (MEMBER | {"id": "a\n"}, {}, "diversity.group.id", "printable"),
        (MEMBER | {"id": "a" * 65}, {}, "diversity.group.id", "1 to 64"),
        ({"index": 0, "size": 4}, {}, "diversity.group.id", "got nothing; accepted: a text"),
        (MEMBER | {"index": 4}, {}, "diversity.group.index", "whole number from 0 to 3"),
        (MEMBER | {"index": -1}, {}, "diversity.group.index", "got -1; accepted: a whole"),
        (MEMBER | {"index": 0.5}, {}, "diversity.group.index", "got 0.5"),
        (MEMBER | {"index": True}, {}, "diversity.group.index", "got true"),
        (MEMBER | {"size": 1}, {}, "diversity.group.size", "whole number from 2 to 1024"),
        (MEMBER | {"size": 1025}, {}, "diversity.group.size", "got 1025"),
        (MEMBER | {"size": math.inf}, {}, "diversity.group.size", "got inf"),
        ({"id": "a", "index": 0}, {}, "diversity.group.size", "got nothing"),
        (MEMBER | {"indx": 1}, {}, "diversity.group.indx", "did you mean 'index'"),
    ],
)
def test_an_invalid_group_is_refused_by_name(configured, group, fields, parameter, message):
    error = refused(diversity={"level": 0.5, "group": group}, **fields)
    assert error.parameter == parameter
    assert message in str(error)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_invalid_group_is_refused_offline(temperature):
    for n, group in ((1, True), (2, MEMBER), (1, {**MEMBER, "index": 9})):
        carried = {"diversity": {"level": 0.5, "group": group}}
        # Set afterwards: vLLM itself refuses n > 1 at temperature 0.
        params = SamplingParams(temperature=temperature, extra_args=carried)
        params.n = n
        with pytest.raises(ValueError, match=r"diversity\.group"):
            DiversityProcessor.validate_params(params)


def test_a_group_is_refused_at_temperature_0_offline():
    carried = {"diversity": {"level": 0.5, "group": MEMBER}}
    DiversityProcessor.validate_params(SamplingParams(extra_args=carried))
    with pytest.raises(ValueError, match=r"temperature: got 0 with diversity\.group"):
        DiversityProcessor.validate_params(SamplingParams(temperature=0, extra_args=carried))


def test_with_watermarking_only_groups_are_refused(configured, monkeypatch):
    watermarked = config(**configured, watermark_config=SimpleNamespace())
    monkeypatch.setattr(engine, "_config", watermarked)
    error = refused(diversity={"level": 0.5, "group": True}, n=2)
    assert "watermark" in str(error)
    assert engine.refusal_of_groups() == groups.WATERMARKED
    params_of(diversity=0.5, n=2)


def test_beam_search_is_refused_with_a_group_at_level_0(configured):
    request = CompletionRequest(model="m", prompt="x", diversity={"level": 0, "group": True}, n=2)
    refuse = request_params.refuse_beam_search(lambda request: None)
    with pytest.raises(VLLMValidationError, match="use_beam_search"):
        refuse(request)


def test_a_group_in_the_default_applies_to_several_choices_only(configured, monkeypatch):
    monkeypatch.setenv(spec.DEFAULT_VARIABLE, '{"level": 0.5, "group": true}')
    request_params.default_diversity.cache_clear()
    try:
        assert params_of(n=3).extra_args["diversity"]["group"] is True
        assert "group" not in params_of().extra_args["diversity"]
        assert params_of(n=2000).extra_args is None
        monkeypatch.setenv(
            spec.DEFAULT_VARIABLE,
            '{"level": 0.5, "group": {"id": "a", "index": 0, "size": 2}}',
        )
        request_params.default_diversity.cache_clear()
        with pytest.raises(spec.DiversityError, match="cannot be a default"):
            request_params.default_diversity()
    finally:
        request_params.default_diversity.cache_clear()
