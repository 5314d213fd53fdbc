"""Groups in the plug-in: from the body, over vLLM's own children, to the rows of both runners."""

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

V, T, STEPS = 40, 0.9, 8
SIZE = 1024
"""Of a group: its codes last for ten bits, several steps."""
CPU = torch.device("cpu")
PLACE = {"id": "mine", "index": 2, "size": 4}


@pytest.fixture
def configured(monkeypatch):
    model = SimpleNamespace(is_diffusion=False, override_generation_config={})
    fields = {"model_config": model, "use_v2_model_runner": True}
    monkeypatch.setattr(engine, "_config", config(**fields))
    return fields


def ask(**fields):
    request = CompletionRequest(model="m", prompt="x", **fields)
    return request_params.honour(CompletionRequest.to_sampling_params)(request, 8, {})


def refused(**fields) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refusal:
        ask(**fields)
    return refusal.value


def placed(index=0, level=0.5, identity="a", **fields):
    """One text of a group."""
    group = {"id": "mine", "index": index, "size": SIZE}
    carried = {"diversity": {"level": level, "group": group}, "diversity_id": identity}
    return SamplingParams(temperature=T, extra_args=carried, **fields)


def children(params, request_id="r"):
    """As vLLM parts a request into choices, with the hook around it."""
    parent = ParentRequest(
        SimpleNamespace(request_id=request_id, external_req_id=request_id, params=params)
    )
    found = [parent.get_child_info(index)[1] for index in range(params.n)]
    return [extra_args.of_choice(child, i, parent) for i, child in enumerate(found)]


def logits_of(step, row=0):
    return np.random.default_rng((step, row)).normal(scale=2.5, size=V).astype(np.float32)


def expected(index, steps, *, level=0.5, row=0, **cuts):
    """The tokens of a text of the group, by the law's fp64 reference and then the code's; behind
    the code's bits, and where the index is None, what `token_of` makes of the law's rows."""
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
    """-1 where a row has more than one token left."""
    found = torch.isfinite(row_V).nonzero().flatten().tolist()
    return found[0] if len(found) == 1 else -1


class V1:
    """Requests in a batch of the V1 runner, and what each has said."""

    def __init__(self, *asked, outputs=None):
        self.processor = V1Processor(config(), CPU, False)
        self.outputs = outputs or [[] for _ in asked]
        self.join(*asked)

    def join(self, *asked):
        added = [(i, each, [1], self.outputs[i]) for i, each in enumerate(asked)]
        update = BatchUpdate(len(asked), removed=[], added=added, moved=[])
        self.processor.update_state(update)

    def leave(self):
        rows = range(len(self.outputs))
        self.processor.update_state(BatchUpdate(0, removed=list(rows), added=[], moved=[]))

    def step(self, step, rows=None):
        """`rows`: of which logits each request's are."""
        rows = range(len(self.outputs)) if rows is None else rows
        logits_RV = torch.from_numpy(np.stack([logits_of(step, row) / T for row in rows]))
        self.processor.apply(logits_RV)
        assert self.processor.stats.faults == 0
        for output, row_V in zip(self.outputs, logits_RV, strict=True):
            output.append(token_of(row_V))


def test_v1_draws_by_the_law_the_request_s_cuts_and_the_code():
    cuts = {"top_k": 6, "top_p": 0.8}
    asked = [placed(0), placed(1, level=0.0, identity="b"), placed(2, identity="c", **cuts)]
    batch = V1(*asked, SamplingParams(temperature=T, extra_args={"diversity": 0.5}))
    for step in range(STEPS):
        batch.step(step)
    assert batch.outputs[0] == expected(0, range(STEPS))
    assert batch.outputs[1] == expected(1, range(STEPS), level=1e-9, row=1)
    assert batch.outputs[2] == expected(2, range(STEPS), row=2, **cuts)
    assert -1 in batch.outputs[0][6:]
    assert -1 not in batch.outputs[0][:6]
    assert batch.outputs[3] == expected(None, range(STEPS), row=3)


@pytest.mark.parametrize("dropped", [0, 1])
def test_v1_goes_on_after_a_preemption_as_if_there_had_been_none(dropped):
    """Also where the last token was not taken: it is then drawn again."""
    first, second = placed(3), placed(1, identity="b")
    whole, batch = V1(first, second), V1(first, second)
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


def test_v1_goes_on_after_a_second_preemption_before_any_step():
    """Into a slot whose former request was another text of the group."""
    first, second = placed(3), placed(1, identity="b")
    whole, batch = V1(first, second), V1(first, second)
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


def test_without_an_identity_a_preempted_text_is_left_to_the_engine():
    batch = V1(placed(3, identity=None))
    batch.step(0)
    batch.leave()
    batch.join(placed(3, identity=None))
    batch.step(1)
    assert batch.outputs == [[*expected(3, [0]), -1]]


def v2_processor(drafts=0):
    lengths = torch.full((4,), 2, dtype=torch.int32)
    known = SimpleNamespace(np=lengths.numpy().copy(), gpu=lengths)
    prompt = SimpleNamespace(np=lengths.numpy().copy(), gpu=lengths.clone())
    states = SimpleNamespace(max_num_reqs=4, device=CPU, prefill_len=known, prompt_len=prompt)
    given = config()
    if drafts:
        given.speculative_config = SimpleNamespace(num_speculative_tokens=drafts)
    return V2Processor(given, states), known


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
    assert processor.stats.faults == 0
    return [token_of(row_V) for row_V in logits_RV]


def test_v2_draws_by_slot_and_goes_on_after_a_preemption():
    processor, known = v2_processor()
    assert processor.add_request(1, placed(2))
    assert processor.add_request(3, SamplingParams(temperature=T, extra_args={"diversity": 0.5}))
    processor.apply_staged_writes()
    found = [v2_step(processor, [3, 1], 1 + step) for step in range(3)]
    assert [other for other, _ in found] == [-1] * 3
    known.np[0] = known.gpu[0] = 2 + 3
    assert processor.add_request(0, placed(2))  # In another slot, with three tokens.
    assert not processor.add_request(1, SamplingParams())
    processor.apply_staged_writes()
    found += [v2_step(processor, [1, 0], 1 + step) for step in range(3, STEPS)]
    assert [own for _, own in found] == expected(2, range(STEPS))


def test_v2_draws_drafts_behind_one_another():
    processor, _ = v2_processor(drafts=2)
    assert processor.add_request(1, placed(2, level=0.8))
    processor.apply_staged_writes()
    said = expected(2, range(STEPS), level=0.8)
    for first in (0, 1):  # One row of three is accepted.
        assert v2_step(processor, [0, 1], 1 + first, 3)[3:] == said[first : first + 3]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_nothing_is_drawn_where_no_row_is_of_a_group(monkeypatch, runner):
    asked = SamplingParams(temperature=T, extra_args={"diversity": 0.5})
    if runner == "V1":
        batch = V1(asked)
        processor, run = batch.processor, lambda: batch.step(0)
    else:
        processor, _ = v2_processor(drafts=2)
        processor.add_request(0, placed(1))  # The slot was a group's.
        processor.add_request(0, asked)
        processor.apply_staged_writes()
        run = lambda: v2_step(processor, [0], 1, 3)  # noqa: E731
    monkeypatch.setattr(processor.stats._codes, "draw", None)
    run()


# ── The request ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "fields",
    [
        {"diversity": {"level": 0.5, "group": True}, "n": 4},
        {"vllm_xargs": {"diversity": '{"level": 0.5, "group": true}'}, "n": 4},
    ],
)
def test_each_choice_gets_its_place_and_the_seed_names_the_group(configured, fields):
    found = children(ask(seed=7, **fields))
    placed_in = [child.extra_args["diversity"]["group"] for child in found]
    assert [each["index"] for each in placed_in] == [0, 1, 2, 3]
    assert {each["size"] for each in placed_in} == {4}
    assert len({each["id"] for each in placed_in}) == 1
    assert [child.seed for child in found] == [7, 8, 9, 10]
    assert len({child.extra_args["diversity_id"] for child in found}) == 4
    again = children(ask(seed=7, **fields), request_id="other")
    assert [child.extra_args["diversity"]["group"] for child in again] == placed_in
    other = children(ask(seed=8, **fields))
    assert other[0].extra_args["diversity"]["group"]["id"] != placed_in[0]["id"]


def test_without_a_seed_each_request_is_a_group_of_its_own(configured):
    asked = {"diversity": {"level": 0, "group": True}, "n": 2}
    first, second = (children(ask(**asked), request_id=name) for name in "ab")
    names = [child.extra_args["diversity"]["group"]["id"] for child in (*first, *second)]
    assert names[0] == names[1] != names[2] == names[3]


def test_one_text_s_place_goes_to_the_worker_as_it_came(configured):
    carried = ask(diversity={"level": 0.5, "group": PLACE}).extra_args
    assert carried["diversity"]["group"] == PLACE
    assert spec.parse(carried["diversity"]).group == spec.Group(**PLACE)
    assert ask(diversity={"level": 0.5, "group": False}).extra_args["diversity"] == {
        "law": "gated",
        "level": 0.5,
        "max_temperature": 4.0,
    }


def test_offline_choices_are_placed_too():
    params = SamplingParams(n=3, extra_args={"diversity": {"level": 0.5, "group": True}})
    DiversityProcessor.validate_params(params)
    found = [child.extra_args["diversity"]["group"]["index"] for child in children(params)]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("group", "fields", "parameter", "says"),
    [
        (True, {}, "diversity.group", "got true with n = 1; accepted: n from 2 to 1024, or "),
        (True, {"n": 1025}, "diversity.group", "got true with n = 1025"),
        (PLACE, {"n": 2}, "diversity.group", "got one text's index with n = 2; accepted: n = 1"),
        (PLACE, {"temperature": 0}, "temperature", "got 0 with diversity.group"),
        (1, {"n": 2}, "diversity.group", "got 1; accepted: true, for the choices of"),
        ("mine", {}, "diversity.group", "got 'mine'; accepted: true"),
        (PLACE | {"id": ""}, {}, "diversity.group.id", "got ''; accepted: a text of 1 to 64"),
        (PLACE | {"id": "a\n"}, {}, "diversity.group.id", "printable"),
        (PLACE | {"id": "a" * 65}, {}, "diversity.group.id", "1 to 64"),
        ({"index": 0, "size": 4}, {}, "diversity.group.id", "got nothing; accepted: a text"),
        (PLACE | {"index": 4}, {}, "diversity.group.index", "whole number from 0 to 3"),
        (PLACE | {"index": -1}, {}, "diversity.group.index", "got -1; accepted: a whole"),
        (PLACE | {"index": 0.5}, {}, "diversity.group.index", "got 0.5"),
        (PLACE | {"index": True}, {}, "diversity.group.index", "got True"),
        (PLACE | {"size": 1}, {}, "diversity.group.size", "whole number from 2 to 1024"),
        (PLACE | {"size": 1025}, {}, "diversity.group.size", "got 1025"),
        (PLACE | {"size": math.inf}, {}, "diversity.group.size", "got inf"),
        ({"id": "a", "index": 0}, {}, "diversity.group.size", "got nothing"),
        (PLACE | {"indx": 1}, {}, "diversity.group.indx", "did you mean 'index'"),
    ],
)
def test_a_wrong_group_is_refused_by_name(configured, group, fields, parameter, says):
    error = refused(diversity={"level": 0.5, "group": group}, **fields)
    assert error.parameter == parameter
    assert says in str(error)


def test_offline_a_wrong_group_is_refused():
    for n, group in ((1, True), (2, PLACE), (2, {**PLACE, "index": 9})):
        params = SamplingParams(n=n, extra_args={"diversity": {"level": 0.5, "group": group}})
        with pytest.raises(ValueError, match=r"diversity\.group"):
            DiversityProcessor.validate_params(params)


def test_under_watermarking_a_group_is_refused_and_nothing_else(configured, monkeypatch):
    watermarked = config(**configured, watermark_config=SimpleNamespace())
    monkeypatch.setattr(engine, "_config", watermarked)
    error = refused(diversity={"level": 0.5, "group": True}, n=2)
    assert "watermark" in str(error)
    assert engine.refusal_of_groups() == groups.WATERMARKED
    ask(diversity=0.5, n=2)


def test_beam_search_is_refused_beside_a_group_at_level_0(configured):
    request = CompletionRequest(model="m", prompt="x", diversity={"level": 0, "group": True}, n=2)
    refuse = request_params.refuse_beam_search(lambda request: None)
    with pytest.raises(VLLMValidationError, match="use_beam_search"):
        refuse(request)


def test_a_default_s_group_is_for_several_choices(configured, monkeypatch):
    monkeypatch.setenv(spec.DEFAULT_VARIABLE, '{"level": 0.5, "group": true}')
    request_params.default_diversity.cache_clear()
    try:
        assert ask(n=3).extra_args["diversity"]["group"] is True
        assert "group" not in ask().extra_args["diversity"]
        assert ask(n=2000).extra_args is None
        monkeypatch.setenv(
            spec.DEFAULT_VARIABLE,
            '{"level": 0.5, "group": {"id": "a", "index": 0, "size": 2}}',
        )
        request_params.default_diversity.cache_clear()
        with pytest.raises(spec.DiversityError, match="cannot be a default"):
            request_params.default_diversity()
    finally:
        request_params.default_diversity.cache_clear()
