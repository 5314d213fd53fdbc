"""Policy files, and caps on every path by which a value can reach an engine."""

import hashlib
import json
import re
from types import SimpleNamespace

import pytest
from dftserve_vllm import (
    capabilities,
    engine,
    human,
    policy,
    request_context,
    request_params,
    vocabulary,
)
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.request_context import RequestContext
from dftserve_vllm.styles import Styles
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

from dftserve import policy as policies
from dftserve import spec
from dftserve.serve import launch

KEY = "a-secret-key"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
DYNATEMP = {"law": "dynatemp", "dynatemp_range": 0.1}
"""A law that is not in `CAPS`."""
CAPS = {"level": 0.4, "target_entropy": 1, "max_temperature": 3, "laws": ["gated", "budget"]}
CAPS |= {"styles": ["habits"], "strength": 0.5, "max_kl": 0.02}
CAPS |= {"dry_multiplier": 0.5, "dry_base": 1.5, "dry_allowed_length": 3, "group_size": 4}
CAPS |= {"dry_sequence_breakers": 2}
DRY = {"dry_multiplier": 0.4, "dry_base": 1.2, "dry_sequence_breakers": ["a", "b"]}
"""Within `CAPS`."""


@pytest.fixture
def served(monkeypatch):
    """An engine that has styles and a value for `human`."""
    model_config = SimpleNamespace(
        is_diffusion=False, override_generation_config={}, served_model_name="demo"
    )
    config = SimpleNamespace(
        model_config=model_config, speculative_config=None, use_v2_model_runner=True
    )
    monkeypatch.setattr(engine, "_config", config)
    profiles = [SimpleNamespace(name=name, strength=1.0, max_kl=0.05) for name in ("habits", "b")]
    monkeypatch.setattr(engine, "styles", lambda: Styles(tuple(profiles)))
    of_humans = spec.parse({"law": "budget", "target_entropy": 2})
    monkeypatch.setattr(human, "diversity", lambda: of_humans)
    monkeypatch.setattr(vocabulary, "dry_refusal", lambda *_: None)
    policy.policy.cache_clear()
    yield
    policy.policy.cache_clear()


@pytest.fixture
def set_policy(tmp_path, monkeypatch, served):
    def write(**content):
        path = tmp_path / "policy.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML.
        monkeypatch.setenv(policies.VARIABLE, str(path))
        policy.policy.cache_clear()

    return write


REQUEST_CLASSES = {
    "completions": (CompletionRequest, {"prompt": "x"}),
    "chat": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    "responses": (ResponsesRequest, {"input": "x"}),
}


def params_of(route="completions", model="demo", **fields):
    kind, base = REQUEST_CLASSES[route]
    request = kind(model=model, **base, **fields)
    return request_params.honour(kind.to_sampling_params)(request, 8, {})


def refused(**fields) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refusal:
        params_of(**fields)
    return refusal.value


def open_context(key: str | None):
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return request_context.current.set(RequestContext(headers))


@pytest.fixture
def context():
    token = open_context(None)
    yield request_context.current.get()
    request_context.current.reset(token)


GROUP = {"group": {"id": "a", "index": 5, "size": 8}}
NOT_LOWERED = ("name", "law", "group")
HEAT = {"level": 0.9, "max_temperature": 9}
PATHS = {
    "a number": ({"diversity": 0.9}, "diversity.level"),
    "an object": ({"diversity": {"level": 0.9}}, "diversity.level"),
    "its second number": (
        {"diversity": {"level": 0.1} | {"max_temperature": 9}},
        "diversity.max_temperature",
    ),
    "another law's number": (
        {"diversity": {"law": "budget", "target_entropy": 2}},
        "diversity.target_entropy",
    ),
    "another law": ({"diversity": DYNATEMP}, "diversity.law"),
    "human": ({"diversity": "human"}, "diversity.target_entropy"),
    "xargs: a number": ({"vllm_xargs": {"diversity": 0.9}}, "vllm_xargs.diversity.level"),
    "xargs: a number's text": ({"vllm_xargs": {"diversity": ".9"}}, "vllm_xargs.diversity.level"),
    "xargs: an object's text": (
        {"vllm_xargs": {"diversity": json.dumps(HEAT)}},
        "vllm_xargs.diversity.level",
    ),
    "xargs: human": ({"vllm_xargs": {"diversity": "human"}}, "vllm_xargs.diversity.target_entropy"),
    "both": ({"diversity": 0.9, "vllm_xargs": {"diversity": "0.9"}}, "diversity.level"),
    "a style": ({"style": "b"}, "style.name"),
    "a style's strength": ({"style": {"name": "habits", "strength": 0.9}}, "style.strength"),
    "a style's max_kl": ({"style": {"name": "habits", "max_kl": 1}}, "style.max_kl"),
    "xargs: a style": ({"vllm_xargs": {"style": "b"}}, "vllm_xargs.style.name"),
    "xargs: a style's object": (
        {"vllm_xargs": {"style": '{"name": "habits", "strength": 1}'}},
        "vllm_xargs.style.strength",
    ),
    **{
        f"DRY: {name}": ({"diversity": DRY | {name: value}}, f"diversity.{name}")
        for name, value in {
            "dry_multiplier": 0.6,
            "dry_base": 2,
            "dry_allowed_length": 9,
            "dry_sequence_breakers": ["a", "b", "c"],
        }.items()
    },
    "DRY with a law": (
        {"diversity": {"level": 0.1, "max_temperature": 2} | DRY | {"dry_multiplier": 4}},
        "diversity.dry_multiplier",
    ),
    "xargs: DRY": (
        {"vllm_xargs": {"diversity": json.dumps(DRY | {"dry_multiplier": 4})}},
        "vllm_xargs.diversity.dry_multiplier",
    ),
    "a group's size": ({"diversity": {"level": 0.1} | GROUP}, "diversity.group"),
    "a group's size at level 0": ({"diversity": {"level": 0} | GROUP}, "diversity.group"),
    "xargs: a group": (
        {"vllm_xargs": {"diversity": json.dumps({"level": 0.1} | GROUP)}},
        "vllm_xargs.diversity.group",
    ),
    "with a style that is allowed": ({"diversity": 0.9, "style": "habits"}, "diversity.level"),
}


@pytest.mark.parametrize("route", REQUEST_CLASSES)
@pytest.mark.parametrize("path", PATHS)
def test_a_rejecting_cap_applies_on_every_path(set_policy, route, path):
    fields, parameter = PATHS[path]
    set_policy(server=CAPS)
    assert refused(route=route, **fields).parameter == parameter
    set_policy()
    params_of(route, **fields)  # Accepted without caps.


@pytest.mark.parametrize("route", REQUEST_CLASSES)
@pytest.mark.parametrize(
    "path", [path for path in PATHS if not PATHS[path][1].endswith(NOT_LOWERED)]
)
def test_a_clamping_cap_applies_on_every_path(set_policy, context, route, path):
    set_policy(server=CAPS, on_excess="clamp")
    carried = params_of(route, **PATHS[path][0]).extra_args
    for name in ("diversity", "style"):
        for key, value in carried.get(name, {}).items():
            if key in CAPS:
                assert (len(value) if isinstance(value, list) else value) <= CAPS[key]
    (prompt,) = context.prompts
    assert context.members().keys() == prompt.effective().keys()
    clamped = [context.members()[name]["clamped"] for name in prompt.clamped]
    assert clamped
    assert all(value > CAPS[key] for each in clamped for key, value in each.items())


@pytest.mark.parametrize(
    "fields",
    [
        {"diversity": DYNATEMP},
        {"style": "b"},
        {"diversity": {"level": 0.1} | GROUP},
        {"diversity": {"level": 0, "group": True}, "n": 5},
    ],
)
def test_laws_styles_and_groups_are_refused_and_not_clamped(set_policy, fields):
    set_policy(server=CAPS, on_excess="clamp")
    assert "policy" in str(refused(**fields))


@pytest.mark.parametrize("route", ["completions", "chat"])
@pytest.mark.parametrize("on_excess", ["reject", "clamp"])
def test_the_cap_on_group_size_applies_to_a_requests_choices(set_policy, on_excess, route):
    set_policy(server={"group_size": 4}, on_excess=on_excess)
    group = {"level": 0.1, "group": True}
    assert params_of(route, diversity=group, n=4).n == 4
    refusal = refused(route=route, diversity=group, n=5)
    assert refusal.parameter == "diversity.group"
    assert "at most 4" in str(refusal)
    set_policy(server={"group_size": 1}, on_excess=on_excess)
    assert "no group" in str(refused(route=route, diversity=group, n=2))
    assert params_of(route, diversity=0.1, n=5).n == 5


@pytest.mark.parametrize("count", ["many", [], None, -1])
def test_an_invalid_n_on_a_route_without_n_means_one_choice(set_policy, count):
    set_policy(server=CAPS)
    assert "n = 1" in str(
        refused(route="responses", diversity={"level": 0, "group": True}, n=count)
    )


def test_dry_clamped_to_0_is_off_and_reported(set_policy, context):
    set_policy(server={"dry_multiplier": 0}, on_excess="clamp")
    assert params_of(diversity=DRY).extra_args is None
    answer = context.members()["diversity"]
    assert answer["level"] == 0
    assert answer["clamped"] == {"dry_multiplier": 0.4}
    assert "dry_multiplier" not in answer


def test_excess_breakers_are_dropped_and_their_requested_number_is_reported(set_policy, context):
    set_policy(server={"dry_sequence_breakers": 2}, on_excess="clamp")
    params_of(diversity=DRY | {"dry_sequence_breakers": ["a", "b", "c"]})
    answer = context.members()["diversity"]
    assert answer["dry_sequence_breakers"] == ["a", "b"]
    assert answer["clamped"] == {"dry_sequence_breakers": 3}


def test_dry_and_a_group_are_allowed_without_any_law(set_policy):
    set_policy(server={"laws": ["budget"]})
    assert params_of(diversity=DRY).extra_args is not None
    assert params_of(diversity={"level": 0, "group": True}, n=2).extra_args is not None
    assert "budget" in str(refused(diversity=DRY | {"level": 0.1}))


@pytest.mark.parametrize("on_excess", ["reject", "clamp"])
def test_defaults_of_fields_that_the_client_omitted_are_lowered(set_policy, context, on_excess):
    set_policy(server=CAPS, on_excess=on_excess)
    carried = params_of(diversity=0.3, style="habits").extra_args
    assert carried["diversity"] == {"law": "gated", "level": 0.3, "max_temperature": 3}
    assert carried["style"] == {"name": "habits", "strength": 0.5, "max_kl": 0.02}
    dry = params_of(diversity={"dry_multiplier": 0.5}).extra_args["diversity"]
    assert dry["dry_base"] == 1.5  # Lowered from 1.75; below, the first two of four breakers.
    assert dry["dry_sequence_breakers"] == ["\n", ":"]
    assert [prompt.clamped for prompt in context.prompts] == [{}, {}]


@pytest.mark.parametrize("on_excess", ["reject", "clamp"])
def test_the_operators_default_is_lowered(set_policy, monkeypatch, on_excess):
    set_policy(server=CAPS, on_excess=on_excess, keys={DIGEST: {"level": 0}})
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.9))
    assert params_of().extra_args["diversity"]["level"] == 0.4
    token = open_context(KEY)
    assert params_of().extra_args is None
    request_context.current.reset(token)
    of_dry = spec.parse(DRY | {"dry_multiplier": 4, "group": True})
    monkeypatch.setattr(request_params, "default_diversity", lambda: of_dry)
    lowered = params_of(n=8).extra_args["diversity"]
    assert lowered["dry_multiplier"] == 0.5
    assert spec.parse(lowered).group is None  # A default's group is dropped.
    other = spec.parse(DYNATEMP)
    monkeypatch.setattr(request_params, "default_diversity", lambda: other)
    assert params_of().extra_args is None


@pytest.mark.parametrize("on_excess", ["reject", "clamp"])
@pytest.mark.parametrize(
    "carried",
    [
        {"diversity": 0.9},
        {"diversity": "0.9"},
        {"diversity": DYNATEMP},
        {"style": "b"},
        {"diversity": 0.9, "diversity_id": "1-2-3"},
        {"diversity": DRY | {"dry_multiplier": 4}},
        {"diversity": DRY | {"dry_sequence_breakers": ["a", "b", "c"]}},
        {"diversity": {"level": 0.1, "max_temperature": 2} | GROUP},
        {"diversity": {"level": 0.1, "max_temperature": 3}, "style": '{"name": "habits"}'},
    ],
)
def test_excess_in_extra_args_is_refused(set_policy, on_excess, carried):
    """Routes without the field (speech to text, tokens in and out) and offline use pass
    `extra_args` to the engine unchanged."""
    params = SamplingParams(extra_args=carried)
    set_policy(server=CAPS, on_excess=on_excess)
    with pytest.raises(ValueError, match="policy"):
        DiversityProcessor.validate_params(params)
    set_policy()
    DiversityProcessor.validate_params(params)


def through_json(carried):
    """As a client sends back what it was shown, with 1 for 1.0."""
    return json.loads(re.sub(r"\.0\b", "", json.dumps(carried)))


DECIDED = {
    "a number": {"diversity": 0.8},
    "a number and a style": {"diversity": 1, "style": "habits"},
    "another law": {"diversity": {"law": "xtc", "xtc_probability": 1}},
    "a number and min_p": {"diversity": 0.8, "min_p": 0.05},
    "min_p of 1": {"diversity": {"law": "guard", "min_p": 1}},
    "a trace": {"diversity": {"level": 0.8, "trace": True}},
    "a style": {"style": "b"},
    "a style of strength 1": {"style": {"name": "b", "strength": 1}},
    "a style and min_p": {"style": "b", "min_p": 0.05},
    "a style and level 0": {"style": "b", "diversity": 0},
    "a style and DRY": {"style": "b", "diversity": DRY},
    "DRY": {"diversity": {"dry_multiplier": 4}},
    "DRY without breakers": {"diversity": DRY | {"dry_sequence_breakers": []}},
    "a group": {"diversity": {"level": 0, "group": True}, "n": 5},
    "an index in a group": {"diversity": {"level": 0, "group": {"id": "a", "index": 5, "size": 8}}},
}
NARROW = {"level": 0.2, "strength": 0.5, "laws": ["gated"], "styles": [], "dry_multiplier": 0}
NARROW |= {"group_size": 2, "max_temperature": 2}
WIDE = {"level": 1, "strength": 1, "laws": list(spec.LAWS), "styles": ["habits", "b"]}
WIDE |= {"group_size": 8, "max_temperature": 100, "dry_multiplier": 5}
CLAMPING = WIDE | {"level": 0.3, "strength": 0.6, "max_kl": 0.03, "max_temperature": 3}
CLAMPING |= {"dry_multiplier": 1, "dry_allowed_length": 1, "dry_sequence_breakers": 1}
"""With whole numbers, which the sealed form must not distinguish from floats."""


@pytest.mark.parametrize("of_model", [WIDE, CLAMPING])
@pytest.mark.parametrize("case", DECIDED)
def test_accepted_values_are_not_checked_again(set_policy, case, of_model):
    """Also without an HTTP request, as in `vllm run-batch`, where only the parameters can record
    the decision."""
    set_policy(server=NARROW, models={"alias": of_model}, on_excess="clamp")
    params = params_of(model="alias", **DECIDED[case])
    assert params.extra_args
    DiversityProcessor.validate_params(params)
    shown = SamplingParams(n=params.n, extra_args=through_json(params.extra_args))
    DiversityProcessor.validate_params(shown)


GROUP_OF_CHOICES = {"level": 0.1, "max_temperature": 2, "group": True}
MORE_FOR = {"models": {"alias": {"level": 1}}, "keys": {DIGEST: {"level": 1, "group_size": 8}}}


@pytest.mark.parametrize("is_open", [True, False])
def test_a_decision_on_a_group_is_valid_for_its_number_of_choices_only(set_policy, is_open):
    """Inside and outside of an HTTP request."""
    set_policy(server={"group_size": 4})
    token = open_context(None) if is_open else None
    carried = params_of(diversity=GROUP_OF_CHOICES, n=2).extra_args
    DiversityProcessor.validate_params(SamplingParams(n=2, extra_args=carried))
    with pytest.raises(ValueError, match="at most 4"):
        DiversityProcessor.validate_params(SamplingParams(n=8, extra_args=carried))
    if token is not None:
        request_context.current.reset(token)


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        (KEY, {"diversity": 0.9}),
        (None, {"diversity": 0.9, "model": "alias"}),
        (KEY, {"diversity": GROUP_OF_CHOICES, "n": 8}),
    ],
)
@pytest.mark.parametrize("sent_by", [None, "another key", "no request"])
def test_a_decision_is_valid_for_its_http_request_only(set_policy, key, fields, sent_by):
    """What a render route showed to one client does not lift the caps of another request, which may
    have another key and model."""
    set_policy(server={"level": 0.2, "group_size": 4}, **MORE_FOR)
    token = open_context(key)
    params = params_of(**fields)
    DiversityProcessor.validate_params(params)
    request_context.current.reset(token)
    token = request_context.current.set(None) if sent_by == "no request" else open_context(sent_by)
    shown = SamplingParams(n=params.n, extra_args=through_json(params.extra_args))
    with pytest.raises(ValueError, match="policy"):
        DiversityProcessor.validate_params(shown)
    request_context.current.reset(token)


def test_rendered_parameters_are_accepted_from_the_same_key(set_policy):
    """A render route's answer, sent to `/inference/v1/generate`, which names no model."""
    set_policy(server={"level": 0.2, "group_size": 4}, **MORE_FOR)
    token = open_context(KEY)
    params = params_of(diversity=GROUP_OF_CHOICES | {"level": 0.9}, n=8)
    request_context.current.reset(token)
    token = open_context(KEY)
    DiversityProcessor.validate_params(
        SamplingParams(n=params.n, extra_args=through_json(params.extra_args))
    )
    request_context.current.reset(token)


OTHERS = {
    "diversity": 1,
    "a number of it": {"law": "gated", "level": 0.1, "max_temperature": 9},
    "a style": "habits",
}


@pytest.mark.parametrize("changed", OTHERS)
@pytest.mark.parametrize("of_choice", ["", ".0", ".7", ".x"])
def test_an_active_identity_is_valid_for_its_own_values_only(
    set_policy, context, changed, of_choice
):
    """vLLM's render routes show SamplingParams to clients."""
    set_policy(server={"level": 0.2, "max_temperature": 4, "styles": []})
    carried = params_of(diversity=0.1).extra_args
    assert context.prompts  # The request is in progress.
    carried["style" if "style" in changed else "diversity"] = OTHERS[changed]
    carried["diversity_id"] += of_choice
    with pytest.raises(ValueError, match="policy"):
        DiversityProcessor.validate_params(SamplingParams(extra_args=carried))


@pytest.mark.parametrize("identity", [7, [], "", "-", "é-\ud800", "1-2-3.7", "." * 9000])
def test_a_malformed_identity_is_not_an_error(set_policy, context, identity):
    set_policy(server={"level": 0.2})
    params = SamplingParams(extra_args={"diversity": 0.1, "diversity_id": identity})
    DiversityProcessor.validate_params(params)


@pytest.mark.parametrize("on_excess", ["reject", "clamp"])
def test_clients_cannot_set_an_identity(set_policy, on_excess):
    set_policy(server=CAPS, on_excess=on_excess)
    assert params_of(vllm_xargs={"diversity_id": "1"}).extra_args is None
    made = params_of(diversity=0.1, vllm_xargs={"diversity_id": "1"}).extra_args
    assert made["diversity_id"] != "1"


def test_a_keys_caps_override_a_models_and_those_override_the_servers(set_policy):
    set_policy(
        server={"level": 0.1, "laws": ["gated"]},
        models={"demo": {"level": 0.2}, "adapter": {"level": 0.3}},
        keys={DIGEST: {"level": 0.4}},
    )

    def most(model, key):
        token = open_context(key)
        try:
            refusal = refused(model=model, diversity=1)
            assert "law" in refused(diversity=DYNATEMP).parameter
        finally:
            request_context.current.reset(token)
        return float(str(refusal).partition("at most ")[2].partition(",")[0])

    assert most("demo", None) == 0.2
    assert most("adapter", None) == 0.3
    assert most("adapter", "another key") == 0.3
    assert most("adapter", KEY) == 0.4
    # A name without an entry counts as the server's first name, so an alias cannot avoid a cap.
    assert most("alias", None) == most(None, None) == 0.2


def test_off_is_always_allowed(set_policy):
    set_policy(server={"level": 0, "laws": [], "styles": []})
    assert params_of(diversity=0).extra_args is None
    assert params_of(diversity=DYNATEMP | {"level": 0}).extra_args is None
    assert params_of(style={"name": "habits", "strength": 0}).extra_args is None
    assert "none" in str(refused(style="habits"))


def test_capabilities_report_the_caps(set_policy):
    set_policy(server=CAPS, models={"demo": {"level": 0.2}})
    reported = capabilities.capabilities()["policy"]
    assert reported["level"] == 0.2
    assert reported["on_excess"] == "reject"
    json.dumps(reported)
    set_policy()
    assert capabilities.capabilities()["policy"] == {"on_excess": "reject"}


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {levle: 1}", "did you mean 'level'"),
        ("sever: {}", "did you mean 'server'"),
        ("on_excess: refuse", "accepted: reject, clamp"),
        ("server: {level: 2}", "server.level: got 2; accepted: a number from 0 to 1"),
        ("server: {level: yes}", "server.level"),
        ("server: {max_temperature: 0}", "above 0"),
        ("server: {dry_multiplier: 9}", "from 0 to 5"),
        ("server: {dry_allowed_length: 1.5}", "whole number"),
        ("server: {dry_sequence_breakers: 33}", "to 32"),
        ("server: {group_size: 0}", "from 1 to 1024"),
        ("server: {laws: [gatd]}", "did you mean 'gated'"),
        ("server: {laws: gated}", "accepted: a list"),
        ("models: {demo: 1}", "models.demo"),
        ("audit: {file: audit.jsonl}", "begins with /"),
        ("audit: {file: /a, keep: 0}", "keep"),
        ("[]", "keys and values"),
        ("server: &a {level: 1}\nmodels: {x: *a}", "alias"),
    ],
)
def test_an_invalid_file_is_refused_with_the_location(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"policy\.yaml") as refusal:
        policies.read(path)
    assert message in str(refusal.value)


@pytest.mark.parametrize("digest", [KEY, DIGEST.upper(), DIGEST[1:], f"sha256:{DIGEST}", 7])
def test_an_invalid_key_hash_is_refused_and_not_shown(tmp_path, digest):
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"keys": {digest: {"level": 1}}}).replace('"7"', "7"))
    with pytest.raises(ValueError, match="sha256sum") as refusal:
        policies.read(path)
    assert str(digest) not in str(refusal.value).replace("SHA-256", "").replace("number 1", "")


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path):
    path = tmp_path / "policy.yaml"
    with pytest.raises(ValueError, match="give a YAML file"):
        policies.read(path)
    path.write_text("#" * 70_000)
    with pytest.raises(ValueError, match=r"65,?536"):
        policies.read(path)


def test_serve_checks_the_file_and_passes_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text("server: {level: 0.5}")
    environment = launch("m", policy="policy.yaml").environment
    assert environment == {policies.VARIABLE: str(tmp_path / "policy.yaml")}
    (tmp_path / "policy.yaml").write_text("server: {levle: 0.5}")
    with pytest.raises(ValueError, match="'level'"):
        launch("m", policy="policy.yaml")
