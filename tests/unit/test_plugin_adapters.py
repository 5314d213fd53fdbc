"""A `style` that names LoRA adapters of several strengths: which one vLLM uses, what the answer
reports, and what is refused."""

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
"""Adapters of two styles; one with a profile's name; four not named as `checkpoint scale` does."""


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
    """A serving object with these adapters and without an engine."""

    def __init__(self, *names):
        lora = {name: SimpleNamespace(lora_name=name) for name in names}
        self.models = SimpleNamespace(lora_requests=lora, is_base_model=lambda name: name == "demo")


def adapter_of(request, names=SERVED):
    """The name of the adapter that vLLM would use."""
    hooked = request_params.select_adapter(BaseServing._maybe_get_adapters)
    adapter = hooked(Serving(*names), request)
    return None if adapter is None else adapter.lora_name


def make_request(style=None, kind=CompletionRequest, model="demo", **fields):
    base = {"prompt": "x"} if kind is CompletionRequest else {}
    return kind(model=model, **base, **fields, **({} if style is None else {"style": style}))


def run(request, names=SERVED, defaults=None):
    """The adapter's name, the sampling parameters and the members added to the answer."""
    name = adapter_of(request, names)
    params = request.to_sampling_params(8, defaults or {})
    current = request_context.current.get()
    return name, params, current.members() if current.prompts else {}


def refused(request, names=SERVED) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refusal:
        run(request, names)
    return refusal.value


CHAT = {"messages": [{"role": "user", "content": "x"}]}
REQUESTS = {
    "completions": make_request("tales"),
    "xargs": make_request(vllm_xargs={"style": "tales"}),
    "chat": make_request("tales", ChatCompletionRequest, **CHAT),
    "responses": make_request("tales", ResponsesRequest, input="x"),
}


@pytest.mark.parametrize("route", REQUESTS)
def test_the_adapter_is_used_and_reported_in_the_answer(route):
    name, params, answer = run(REQUESTS[route])
    assert name == "tales-1"
    assert not set(params.extra_args or {}) & {"style", "diversity_id"}, "not passed to the sampler"
    style = {"name": "tales", "strength": 1.0, "adapter": "tales-1", "effective_strength": 1.0}
    assert answer == {"style": style}


def test_a_batch_of_conversations_uses_the_adapter_too():
    request = BatchChatCompletionRequest(
        model="demo", messages=[CHAT["messages"]] * 2, style="tales"
    )
    assert adapter_of(request) == "tales-1"
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
def test_the_nearest_strength_is_used_and_in_a_tie_the_weaker(strength, name):
    style = {"name": "tales"} | ({} if strength is None else {"strength": strength})
    assert adapter_of(make_request(style)) == name


def test_the_nearer_of_each_pair_of_strengths_is_used():
    """Also in ties that are exact in decimals but not in binary."""
    for pair in itertools.combinations(range(1, 21), 2):
        served = adapters.served(Serving(*(f"a-{each / 20:g}" for each in pair)).models)
        for requested in range(1, 21):
            style = spec.Style(name="a", strength=requested / 20)
            got = round(20 * adapters.nearest(served, style, Limits()).strength)
            assert got == min(pair, key=lambda each: (abs(each - requested), each)), (
                pair,
                requested,
            )


def test_an_adapter_works_with_a_diversity_and_at_temperature_0():
    _, params, answer = run(make_request("tales", diversity=0.5), defaults={"top_p": 0.9})
    assert params.extra_args["diversity"]["level"] == 0.5
    assert "style" not in params.extra_args
    assert answer["diversity"]["dropped"] == {"top_p": 0.9}
    assert answer["style"]["adapter"] == "tales-1"
    request_context.current.get().prompts.clear()
    _, params, answer = run(make_request("tales", temperature=0), defaults={"top_p": 0.9})
    assert answer["style"]["effective_strength"] == 1
    assert params.temperature == 0


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"stop_token_ids": [*range(65)]}])
def test_an_operators_default_applies_with_an_adapter_or_is_skipped(monkeypatch, fields):
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.5))
    _, params, answer = run(make_request("tales", **fields))
    assert answer["style"]["adapter"] == "tales-1"
    assert len(request_context.current.get().prompts) == 1
    assert bool(params.extra_args) == ("diversity" in answer) == (not fields)


CUTS = {"top_p": 0.8, "top_k": 20, "min_p": 0.1}


@pytest.mark.parametrize("style", [None, "tales"])
def test_a_request_that_skips_the_operators_default_keeps_the_models_cuts(monkeypatch, style):
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.5))
    many = {"stop_token_ids": list(range(65)), "temperature": 0.7}
    _, params, answer = run(make_request(style, **many), defaults=CUTS)
    assert (params.top_p, params.top_k, params.min_p) == (0.8, 20, 0.1)
    assert "dropped" not in str(answer)
    _, params, _ = run(make_request(style, temperature=0.7), defaults=CUTS)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0), "the law has its own cut"


def test_strength_0_uses_the_model_without_an_adapter():
    name, params, answer = run(make_request({"name": "tales", "strength": 0}))
    assert name is None
    assert answer["style"]["strength"] == 0
    assert params.extra_args is None


def test_a_profile_takes_precedence_over_an_adapter_even_if_it_was_refused():
    name, params, _ = run(make_request("habits"))
    assert name is None
    assert params.extra_args["style"]["name"] == "habits"
    assert "which was refused" in str(refused(make_request("old"), ["old-1"]))


@pytest.mark.parametrize("model", ["sql", "tales-1"])
def test_a_profile_can_be_used_with_an_adapter_as_the_model(model):
    name, params, _ = run(make_request("habits", model=model))
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
def test_invalid_adapter_requests_are_refused(case):
    fields, parameter, message = REFUSED[case]
    error = refused(make_request(**fields))
    assert error.parameter == parameter
    assert message in str(error)
    assert len(str(error)) < 300


def test_beam_search_is_refused():
    request = make_request("tales", use_beam_search=True)
    adapter_of(request)
    beam = request_params.refuse_beam_search(CompletionRequest.to_beam_search_params)
    with pytest.raises(VLLMValidationError, match="use_beam_search"):
        beam(request, 8, {})


def test_without_the_hook_the_name_is_refused_and_not_ignored():
    """A vLLM that looks adapters up elsewhere, or a route that does not look them up."""
    honour = request_params.honour(CompletionRequest.to_sampling_params)
    with pytest.raises(VLLMValidationError, match="accepted: habits"):
        honour(make_request("tales"), 8, {})
    adapter_of(make_request(None))  # Adapters were looked up, but none for the style.
    with pytest.raises(VLLMValidationError, match=r"style\.name"):
        honour(make_request("tales"), 8, {})


def test_an_engine_that_refuses_the_fields_gives_the_reason(monkeypatch):
    monkeypatch.setattr(engine, "refusal", lambda: "no")
    assert "style: no." in str(refused(make_request("tales")))


def test_adapters_are_available_even_if_profiles_are_not(monkeypatch):
    monkeypatch.setattr(engine, "styles", lambda: Styles(unavailable="no text is told"))
    assert adapter_of(make_request("tales")) == "tales-1"
    assert "accepted: letters, tales" in str(refused(make_request("x"), ["letters-1", "tales-1"]))


def test_other_requests_are_unchanged():
    """Also those without sampling parameters (tokenization, scoring)."""
    assert adapter_of(SimpleNamespace(model="sql", model_extra={"style": "tales"})) == "sql"
    assert adapter_of(make_request(None)) is None
    assert adapter_of(make_request("tale"), []) is None


class Transcription(BaseModel):
    """A vLLM request that is sampled without `honour` and keeps unknown form fields."""

    model_config = ConfigDict(extra="allow")
    model: str = "demo"

    def to_sampling_params(self, *args):
        raise AssertionError("never called")


def test_no_adapter_is_used_if_the_answer_cannot_report_it():
    assert adapter_of(Transcription(style="tales")) is None
    assert adapter_of(Transcription(style="x" * 5000)) is None

    class Scoring(BaseModel):
        model_config = ConfigDict(extra="allow")
        model: str = "demo"

    assert adapter_of(Scoring(style="tales", to_sampling_params=1)) is None


def set_policy(monkeypatch, **limits):
    made = Policy(on_excess=limits.pop("on_excess", "reject"), server=Limits(**limits))
    monkeypatch.setattr(policy, "policy", lambda: made)


def test_a_policys_list_of_styles_applies_to_adapters(monkeypatch):
    set_policy(monkeypatch, styles=("letters",))
    assert adapter_of(make_request("letters")) == "letters-0.5"
    error = refused(make_request("tales"))
    assert error.parameter == "style.name"
    assert "accepted: letters" in str(error)


def test_a_cap_on_max_kl_refuses_adapters(monkeypatch):
    set_policy(monkeypatch, max_kl=0.02)
    error = refused(make_request("tales"))
    assert error.parameter == "style.name"
    assert "caps max_kl at 0.02" in str(error)
    assert adapter_of(make_request("habits")) is None, "a profile's max_kl is lowered"


def test_an_adapters_caps_apply_however_it_was_requested(monkeypatch):
    made = Policy(on_excess="reject", models={"tales-1": Limits(level=0.2)})
    monkeypatch.setattr(policy, "policy", lambda: made)
    for request in (
        make_request("tales", diversity=0.9),
        make_request(model="tales-1", diversity=0.9),
    ):
        assert refused(request).parameter == "diversity.level"
    run(make_request("tales", diversity=0.2))
    run(make_request({"name": "tales", "strength": 0.5}, diversity=0.9))


def test_no_adapter_exceeds_the_cap_on_strength(monkeypatch):
    set_policy(monkeypatch, strength=0.4)
    assert adapter_of(make_request({"name": "tales", "strength": 0.4})) == "tales-0.25", (
        "0.5 is nearer"
    )
    assert adapter_of(make_request("tales")) == "tales-0.25", "a default is lowered"
    assert refused(make_request({"name": "tales", "strength": 0.9})).parameter == "style.strength"
    error = refused(make_request("letters"))
    assert error.parameter == "style.strength"
    assert "0.5" in str(error)


def test_a_clamped_strength_is_reported(monkeypatch):
    set_policy(monkeypatch, strength=0.6, on_excess=CLAMP)
    name, _, answer = run(make_request({"name": "tales", "strength": 0.9}))
    assert name == "tales-0.5"
    assert answer["style"]["clamped"] == {"strength": 0.9}
    assert answer["style"]["strength"] == 0.6


def test_the_audit_log_has_the_adapters_style(monkeypatch):
    request = make_request("tales")
    assert audit._requested_fields(request) == {"style": "unknown"}
    adapter_of(request)
    assert audit._requested_fields(request) == {"style": {"name": "tales"}}


def test_capabilities_list_the_adapters_that_a_style_may_name(monkeypatch):
    models = Serving(*SERVED).models
    assert capabilities.capabilities(models)["adapters"] == {
        "tales": [0.25, 0.5, 1.0],
        "letters": [0.5],
    }
    assert capabilities.capabilities()["adapters"] == {}
    monkeypatch.setattr(hooks, "problems", lambda: {hooks.ADAPTERS.name: "renamed"})
    assert capabilities.capabilities(models)["adapters"] == {}
