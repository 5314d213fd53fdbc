"""A `style` that names LoRA adapters of several strengths: which one vLLM is told to use, what the
answer says of it, and what is refused."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
from dftserve_vllm import (
    adapters,
    audit,
    capabilities,
    engine,
    hooks,
    policy,
    request_context,
    request_params,
)
from dftserve_vllm.request_context import RequestContext
from dftserve_vllm.styles import Styles
from pydantic import BaseModel, ConfigDict
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError

from dftserve import spec
from dftserve.policy import CLAMP, Limits, Policy
from tests.vllm_config import config

SERVED = ["tales-0.25", "tales-0.5", "tales-1", "letters-0.5", "habits-1"]
SERVED += ["sql", "v-2", "-1", "tales-0.50"]
"""Adapters of two styles; one whose name is a profile's; four not named by `checkpoint scale`."""


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    model = SimpleNamespace(
        is_diffusion=False, override_generation_config={}, served_model_name="demo"
    )
    monkeypatch.setattr(engine, "_config", config(model_config=model, use_v2_model_runner=True))
    profile = SimpleNamespace(name="habits", strength=1.0, max_kl=0.05)
    monkeypatch.setattr(engine, "styles", lambda: Styles((profile,), {"old": "it is."}))
    for kind in (CompletionRequest, ChatCompletionRequest, ResponsesRequest):
        hooked = request_params.honour(inspect.unwrap(kind.to_sampling_params))
        monkeypatch.setattr(kind, "to_sampling_params", hooked)
    token = request_context.current.set(RequestContext())
    yield
    request_context.current.reset(token)


class Serving(BaseServing):
    """With these adapters, and without an engine."""

    def __init__(self, *names):
        lora = {name: SimpleNamespace(lora_name=name) for name in names}
        self.models = SimpleNamespace(lora_requests=lora, is_base_model=lambda name: name == "demo")


def taken(request, names=SERVED):
    """The name of the adapter that vLLM would use."""
    hooked = request_params.take_adapter(BaseServing._maybe_get_adapters)
    found = hooked(Serving(*names), request)
    return None if found is None else found.lora_name


def asked(style=None, kind=CompletionRequest, model="demo", **fields):
    base = {"prompt": "x"} if kind is CompletionRequest else {}
    return kind(model=model, **base, **fields, **({} if style is None else {"style": style}))


def said(request, names=SERVED, defaults=None):
    """The adapter, the parameters and the answer's members."""
    name = taken(request, names)
    params = request.to_sampling_params(8, defaults or {})
    current = request_context.current.get()
    return name, params, current.members() if current.prompts else {}


def refused(request, names=SERVED) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refusal:
        said(request, names)
    return refusal.value


CHAT = {"messages": [{"role": "user", "content": "x"}]}
REQUESTS = {
    "completions": asked("tales"),
    "xargs": asked(vllm_xargs={"style": "tales"}),
    "chat": asked("tales", ChatCompletionRequest, **CHAT),
    "responses": asked("tales", ResponsesRequest, input="x"),
}


@pytest.mark.parametrize("route", REQUESTS)
def test_the_adapter_is_taken_and_the_answer_says_so(route):
    name, params, answer = said(REQUESTS[route])
    assert name == "tales-1"
    assert not set(params.extra_args or {}) & {"style", "diversity_id"}, "no sampler sees it"
    style = {"name": "tales", "strength": 1.0, "adapter": "tales-1", "effective_strength": 1.0}
    assert answer == {"style": style}


def test_a_batch_of_conversations_has_it_too():
    request = BatchChatCompletionRequest(
        model="demo", messages=[CHAT["messages"]] * 2, style="tales"
    )
    assert taken(request) == "tales-1"
    single = request.to_chat_completion_request(CHAT["messages"])
    single.to_sampling_params(8, {})
    assert request_context.current.get().members()["style"]["adapter"] == "tales-1"


@pytest.mark.parametrize(
    ("strength", "name"),
    [
        (0.001, "tales-0.25"),
        (0.375, "tales-0.25"),
        (0.6, "tales-0.5"),
        (0.75, "tales-0.5"),
        (0.76, "tales-1"),
        (None, "tales-1"),
    ],
)
def test_the_nearest_strength_is_taken_of_two_the_weaker(strength, name):
    style = {"name": "tales"} | ({} if strength is None else {"strength": strength})
    assert taken(asked(style)) == name


def test_of_all_pairs_the_nearer_is_taken():
    """Also where two are as near in decimals, and not in binary."""
    for pair in itertools.combinations(range(1, 21), 2):
        served = adapters.served(Serving(*(f"a-{each / 20:g}" for each in pair)).models)
        for wanted in range(1, 21):
            style = spec.Style(name="a", strength=wanted / 20)
            got = round(20 * adapters.nearest(served, style, Limits()).strength)
            assert got == min(pair, key=lambda each: (abs(each - wanted), each)), (pair, wanted)


def test_beside_a_diversity_and_at_temperature_0():
    _, params, answer = said(asked("tales", diversity=0.5), defaults={"top_p": 0.9})
    assert params.extra_args["diversity"]["level"] == 0.5
    assert "style" not in params.extra_args
    assert answer["diversity"]["dropped"] == {"top_p": 0.9}
    assert answer["style"]["adapter"] == "tales-1"
    request_context.current.get().prompts.clear()
    _, params, answer = said(asked("tales", temperature=0), defaults={"top_p": 0.9})
    assert answer["style"]["effective_strength"] == 1
    assert params.temperature == 0


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"stop_token_ids": [*range(65)]}])
def test_an_operator_s_default_stands_beside_it_or_steps_back(monkeypatch, fields):
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.5))
    _, params, answer = said(asked("tales", **fields))
    assert answer["style"]["adapter"] == "tales-1"
    assert len(request_context.current.get().prompts) == 1
    assert bool(params.extra_args) == ("diversity" in answer) == (not fields)


CUTS = {"top_p": 0.8, "top_k": 20, "min_p": 0.1}


@pytest.mark.parametrize("style", [None, "tales"])
def test_a_request_that_the_operator_s_default_is_not_for_keeps_the_model_s_cuts(
    monkeypatch, style
):
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.5))
    many = {"stop_token_ids": list(range(65)), "temperature": 0.7}
    _, params, answer = said(asked(style, **many), defaults=CUTS)
    assert (params.top_p, params.top_k, params.min_p) == (0.8, 20, 0.1)
    assert "dropped" not in str(answer)
    _, params, _ = said(asked(style, temperature=0.7), defaults=CUTS)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0), "the law cuts by itself"


def test_off_is_the_model_itself():
    name, params, answer = said(asked({"name": "tales", "strength": 0}))
    assert name is None
    assert answer["style"]["strength"] == 0
    assert params.extra_args is None


def test_a_profile_s_name_is_the_profile_s_also_where_it_was_refused():
    name, params, _ = said(asked("habits"))
    assert name is None
    assert params.extra_args["style"]["name"] == "habits"
    assert "which was refused" in str(refused(asked("old"), ["old-1"]))


@pytest.mark.parametrize("model", ["sql", "tales-1"])
def test_a_profile_goes_with_a_model_that_is_an_adapter(model):
    name, params, _ = said(asked("habits", model=model))
    assert name == model
    assert params.extra_args["style"]["name"] == "habits"


NAMES = "accepted: habits, letters, tales."
REFUSED = {
    "unknown": ({"style": "tale"}, "style.name", NAMES),
    "an adapter's own name": ({"style": "tales-1"}, "style.name", NAMES),
    "no strength": ({"style": "sql"}, "style.name", NAMES),
    "max_kl": ({"style": {"name": "tales", "max_kl": 0.1}}, "style.max_kl", "none with"),
    "an adapter as the model": (
        {"style": "tales", "model": "sql"},
        "style.name",
        "selects the adapter 'sql'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused(case):
    fields, parameter, says = REFUSED[case]
    error = refused(asked(**fields))
    assert error.parameter == parameter
    assert says in str(error)
    assert len(str(error)) < 300


def test_beam_search_is_refused():
    request = asked("tales", use_beam_search=True)
    taken(request)
    beam = request_params.refuse_beam_search(CompletionRequest.to_beam_search_params)
    with pytest.raises(VLLMValidationError, match="use_beam_search"):
        beam(request, 8, {})


def test_without_the_hook_the_name_is_refused_and_never_ignored():
    """A vLLM that looks adapters up elsewhere, and a route that looks up none."""
    honour = request_params.honour(CompletionRequest.to_sampling_params)
    with pytest.raises(VLLMValidationError, match="accepted: habits"):
        honour(asked("tales"), 8, {})
    taken(asked(None))  # Adapters are known, and none was taken for the style.
    with pytest.raises(VLLMValidationError, match=r"style\.name"):
        honour(asked("tales"), 8, {})


def test_an_engine_that_honours_nothing_says_why(monkeypatch):
    monkeypatch.setattr(engine, "refusal", lambda: "no")
    assert "style: no." in str(refused(asked("tales")))


def test_where_profiles_are_unavailable_adapters_are_not(monkeypatch):
    monkeypatch.setattr(engine, "styles", lambda: Styles(unavailable="no text is told"))
    assert taken(asked("tales")) == "tales-1"
    assert "accepted: letters, tales" in str(refused(asked("x"), ["letters-1", "tales-1"]))


def test_other_requests_pass_as_they_are():
    """Among them what makes no sampling parameters (tokenization, scoring)."""
    assert taken(SimpleNamespace(model="sql", model_extra={"style": "tales"})) == "sql"
    assert taken(asked(None)) is None
    assert taken(asked("tale"), []) is None


class Transcription(BaseModel):
    """A request of vLLM's that is sampled past `honour`, and keeps what else a form has."""

    model_config = ConfigDict(extra="allow")
    model: str = "demo"

    def to_sampling_params(self, *args):
        raise AssertionError("never called")


def test_no_adapter_is_taken_where_the_answer_could_not_say_so():
    assert taken(Transcription(style="tales")) is None
    assert taken(Transcription(style="x" * 5000)) is None

    class Scoring(BaseModel):
        model_config = ConfigDict(extra="allow")
        model: str = "demo"

    assert taken(Scoring(style="tales", to_sampling_params=1)) is None


def under(monkeypatch, **limits):
    found = Policy(on_excess=limits.pop("on_excess", "reject"), server=Limits(**limits))
    monkeypatch.setattr(policy, "policy", lambda: found)


def test_a_policy_holds_for_it(monkeypatch):
    under(monkeypatch, styles=("letters",))
    assert taken(asked("letters")) == "letters-0.5"
    error = refused(asked("tales"))
    assert error.parameter == "style.name"
    assert "accepted: letters" in str(error)


def test_no_adapter_where_the_divergence_is_capped(monkeypatch):
    under(monkeypatch, max_kl=0.02)
    error = refused(asked("tales"))
    assert error.parameter == "style.name"
    assert "caps max_kl at 0.02" in str(error)
    assert taken(asked("habits")) is None, "a profile is lowered"


def test_the_caps_of_an_adapter_hold_however_it_was_asked_for(monkeypatch):
    found = Policy(on_excess="reject", models={"tales-1": Limits(level=0.2)})
    monkeypatch.setattr(policy, "policy", lambda: found)
    for request in (asked("tales", diversity=0.9), asked(model="tales-1", diversity=0.9)):
        assert refused(request).parameter == "diversity.level"
    said(asked("tales", diversity=0.2))
    said(asked({"name": "tales", "strength": 0.5}, diversity=0.9))


def test_no_adapter_is_stronger_than_the_cap(monkeypatch):
    under(monkeypatch, strength=0.4)
    assert taken(asked({"name": "tales", "strength": 0.4})) == "tales-0.25", "0.5 is nearer"
    assert taken(asked("tales")) == "tales-0.25", "a default is lowered"
    assert refused(asked({"name": "tales", "strength": 0.9})).parameter == "style.strength"
    error = refused(asked("letters"))
    assert error.parameter == "style.strength"
    assert "0.5" in str(error)


def test_what_was_clamped_is_told(monkeypatch):
    under(monkeypatch, strength=0.6, on_excess=CLAMP)
    name, _, answer = said(asked({"name": "tales", "strength": 0.9}))
    assert name == "tales-0.5"
    assert answer["style"]["clamped"] == {"strength": 0.9}
    assert answer["style"]["strength"] == 0.6


def test_the_audit_log_knows_its_name(monkeypatch):
    request = asked("tales")
    assert audit._asked(request) == {"style": "unknown"}
    taken(request)
    assert audit._asked(request) == {"style": {"name": "tales"}}


def test_capabilities_list_what_a_style_may_name(monkeypatch):
    models = Serving(*SERVED).models
    assert capabilities.capabilities(models)["adapters"] == {
        "tales": [0.25, 0.5, 1.0],
        "letters": [0.5],
    }
    assert capabilities.capabilities()["adapters"] == {}
    monkeypatch.setattr(hooks, "problems", lambda: {hooks.ADAPTERS.name: "renamed"})
    assert capabilities.capabilities(models)["adapters"] == {}
