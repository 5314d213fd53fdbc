"""Each engine request has a unique identity, whatever identities clients have seen and send."""

from types import SimpleNamespace

import pytest
from dftserve_vllm import request_context, statistics, step_report
from dftserve_vllm.extra_args import DIVERSITY, IDENTITY, of_choice
from dftserve_vllm.request_context import PromptContext, RequestContext
from vllm import SamplingParams

from dftserve import spec
from dftserve.sampling.slots import BEFORE, COLUMNS, COUNT


def submit(carried, n=1):
    """The identities of the engine's requests for these extra_args, and whether each request's
    statistics are collected."""
    params = SamplingParams(n=n, extra_args=carried)
    states: dict[str, SimpleNamespace] = {}
    requests = []
    for index in range(n):
        parent = SimpleNamespace(sampling_params=params, request_id="parent")
        own = params if n == 1 else of_choice(params, index, parent)
        request = SimpleNamespace(request_id=str(index), sampling_params=own)
        states[request.request_id] = SimpleNamespace()
        statistics.note(SimpleNamespace(request_states=states), request)
        requests.append(request)
    assert (params.extra_args or {}) == carried  # Unchanged: the object may be shared.
    names = [request.sampling_params.extra_args[IDENTITY] for request in requests]
    return names, [hasattr(state, "dftserve_choice") for state in states.values()]


def prompt(count=1) -> PromptContext:
    return PromptContext(spec.parse(0.5), count)


def carried_by(made: PromptContext):
    return {**made.carried(), IDENTITY: made.identity}


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_keeps_the_identity_that_it_was_given(count):
    made = prompt(count)
    names, have_statistics = submit(carried_by(made), count)
    assert [name.partition(".")[0] for name in names] == [made.identity] * count
    assert len(set(names)) == count
    assert have_statistics == [True] * count


@pytest.mark.parametrize("count", [1, 3])
def test_an_identity_in_use_is_replaced(count):
    """A render route's answer sent twice, or the identity of a running stream."""
    made = prompt(count)
    first, _ = submit(carried_by(made), count)
    second, have_statistics = submit(carried_by(made), count)
    assert len({*first, *second}) == 2 * count
    assert have_statistics == [False] * count


def test_an_identity_of_an_ended_request_is_replaced():
    carried = carried_by(prompt())
    assert carried[IDENTITY] not in request_context._prompts  # The request has ended.
    (first, second), _ = zip(*(submit(carried) for _ in range(2)), strict=True)
    assert len({carried[IDENTITY], *first, *second}) == 3


@pytest.mark.parametrize("suffix", [".1", ".7", ".-1", ".x", ".0.0", "." + "9" * 9000, "٣", "."])
def test_an_identity_with_an_invalid_choice_suffix_is_replaced(suffix):
    made = prompt()
    foreign = {**made.carried(), IDENTITY: f"{made.identity}{suffix}"}
    (name,), have_statistics = submit(foreign)
    if suffix == ".":  # Equivalent to the identity without a suffix.
        assert have_statistics == [True]
        return
    assert name != foreign[IDENTITY]
    assert have_statistics == [False]
    assert submit(carried_by(made))[1] == [True]


@pytest.mark.parametrize("identity", [7, [], {}, "", "1-2-3"])
def test_an_invalid_identity_is_replaced(identity):
    (name,), _ = submit({DIVERSITY: 0.5, IDENTITY: identity})
    assert isinstance(name, str)
    assert name != identity


@pytest.fixture
def context():
    token = request_context.current.set(RequestContext())
    yield request_context.current.get()
    request_context.current.reset(token)


class Engine:
    """vLLM's output processor in the API process, which sees requests start and end."""

    def __init__(self) -> None:
        self.request_states: dict[str, SimpleNamespace] = {}
        self.names: list[str] = []

    def run(self, carried, tokens: int, *, entropy: float = 0.0, is_reported: bool = True) -> None:
        """Run one request from start to end."""
        params = SamplingParams(extra_args=carried)
        request = SimpleNamespace(request_id=str(len(self.names)), sampling_params=params)
        self.request_states[request.request_id] = SimpleNamespace()
        statistics.note(self, request)
        self.names.append(request.sampling_params.extra_args[IDENTITY])
        output = SimpleNamespace(
            request_id=request.request_id,
            new_token_ids=[0] * tokens,
            finish_reason="stop",
            kv_transfer_params=None,
        )
        sums_F = [0.0] * COLUMNS
        sums_F[COUNT], sums_F[BEFORE] = tokens, tokens * entropy
        if is_reported:
            step_report.put(output, {"row": [tokens, *sums_F], "engine": 0})
        statistics.collect(self, [output])
        del self.request_states[request.request_id]


def test_the_turns_of_one_answer_are_reported_together(context):
    """The Responses API sends the engine another request after each call of a built-in tool."""
    made, engine = prompt(), Engine()
    context.prompts.append(made)
    for tokens, entropy in ((10, 1.0), (30, 3.0), (40, 2.0)):
        engine.run(carried_by(made), tokens, entropy=entropy)
    (choice,) = context.members()["diversity"]["choices"]
    assert choice["tokens"] == 80
    assert choice["mean_entropy_before"] == 2.25
    assert engine.names[0] == made.identity
    assert len(set(engine.names)) == 3


@pytest.mark.parametrize("unreported", [0, 1, 2])
def test_incomplete_turns_are_not_reported(context, unreported):
    made, engine = prompt(), Engine()
    context.prompts.append(made)
    for turn in range(3):
        engine.run(carried_by(made), 10, is_reported=turn != unreported)
    assert context.members()["diversity"]["choices"] == [None]


@pytest.mark.parametrize("other", [None, RequestContext()])
def test_another_http_request_adds_no_turn(context, other):
    """It may have the identity from a render route, or have guessed it."""
    made, engine = prompt(), Engine()
    context.prompts.append(made)
    engine.run(carried_by(made), 10)
    token = request_context.current.set(other)
    engine.run(carried_by(made), 30)
    request_context.current.reset(token)
    assert context.members()["diversity"]["choices"][0]["tokens"] == 10


def test_without_an_identity_nothing_is_added():
    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={DIVERSITY: 0.5}))
    statistics.note(SimpleNamespace(request_states={}), request)
    assert IDENTITY not in request.sampling_params.extra_args
