"""Each request of the engine has a name of its own, whatever names clients have seen and send."""

from types import SimpleNamespace

import pytest
from dftserve_vllm import request_context, statistics
from dftserve_vllm.extra_args import DIVERSITY, IDENTITY, of_choice
from dftserve_vllm.request_context import PromptContext
from vllm import SamplingParams

from dftserve import spec


def entered(carried, n=1):
    """The engine's requests for these extra_args: their names, and whether figures come back."""
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
    assert (params.extra_args or {}) == carried  # It may be shared.
    names = [request.sampling_params.extra_args[IDENTITY] for request in requests]
    return names, [hasattr(state, "dftserve_choice") for state in states.values()]


def prompt(count=1) -> PromptContext:
    return PromptContext(spec.parse(0.5), count)


def carried_by(made: PromptContext):
    return {**made.carried(), IDENTITY: made.identity}


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_keeps_the_name_that_it_was_given(count):
    made = prompt(count)
    names, have_figures = entered(carried_by(made), count)
    assert [name.partition(".")[0] for name in names] == [made.identity] * count
    assert len(set(names)) == count
    assert have_figures == [True] * count


@pytest.mark.parametrize("count", [1, 3])
def test_a_name_that_is_taken_is_replaced(count):
    """A render's answer sent twice, or the name of a stream that is under way."""
    made = prompt(count)
    first, _ = entered(carried_by(made), count)
    second, have_figures = entered(carried_by(made), count)
    assert len({*first, *second}) == 2 * count
    assert have_figures == [False] * count


def test_a_name_of_a_request_that_is_gone_is_replaced():
    carried = carried_by(prompt())
    assert not request_context._prompts
    (first, second), _ = zip(*(entered(carried) for _ in range(2)), strict=True)
    assert len({carried[IDENTITY], *first, *second}) == 3


@pytest.mark.parametrize("ending", [".1", ".7", ".-1", ".x", ".0.0", "." + "9" * 9000, "٣", "."])
def test_a_foreign_ending_is_replaced_and_takes_nothing(ending):
    made = prompt()
    foreign = {**made.carried(), IDENTITY: f"{made.identity}{ending}"}
    (name,), have_figures = entered(foreign)
    if ending == ".":  # Another spelling of the name itself.
        assert have_figures == [True]
        return
    assert name != foreign[IDENTITY]
    assert have_figures == [False]
    assert entered(carried_by(made))[1] == [True]


@pytest.mark.parametrize("identity", [7, [], {}, "", "1-2-3"])
def test_what_is_no_name_is_replaced(identity):
    (name,), _ = entered({DIVERSITY: 0.5, IDENTITY: identity})
    assert isinstance(name, str)
    assert name != identity


def test_without_a_name_nothing_is_added():
    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={DIVERSITY: 0.5}))
    statistics.note(SimpleNamespace(request_states={}), request)
    assert IDENTITY not in request.sampling_params.extra_args
