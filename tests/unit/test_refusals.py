"""What the field does not support, or what would harm other requests, is refused with the name of
the field and in a short message."""

from types import SimpleNamespace

import pytest
from dftserve_vllm import capabilities, engine, hooks, log, request_context, request_params
from dftserve_vllm.extra_args import MAX_STOP_IDS
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.styles import Styles
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from dftserve import spec
from tests.vllm_requests import params_of, refused

to_sampling_params = request_params.honour(CompletionRequest.to_sampling_params)
MAX_MESSAGE = 1024


def config(*, runner="V2", diffusion=False, **speculative):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            is_diffusion=diffusion, override_generation_config={}, served_model_name="m"
        ),
        speculative_config=SimpleNamespace(**speculative) if speculative else None,
        use_v2_model_runner=runner == "V2",
    )


@pytest.mark.parametrize(
    ("engine_config", "names"),
    [
        (config(diffusion=True), "diffusion"),
        (config(method="eagle", rejection_sample_method="fly"), "'fly'"),
        (config(method="eagle", rejection_sample_method="synthetic"), "'synthetic'"),
        (config(runner="V1", method="ngram", rejection_sample_method="standard"), "V1"),
        (config(runner="V1", method="ngram"), "V1"),  # A vLLM that has only the standard method.
    ],
)
def test_an_engine_that_would_ignore_the_field_refuses_it(monkeypatch, engine_config, names):
    monkeypatch.setattr(engine, "_config", engine_config)
    assert names in str(refused(diversity=0.5))
    assert params_of(diversity=0).extra_args is None
    assert params_of().extra_args is None


@pytest.mark.parametrize(
    "engine_config", [config(), config(method="eagle", rejection_sample_method="standard")]
)
def test_other_engines_accept_the_field(monkeypatch, engine_config):
    monkeypatch.setattr(engine, "_config", engine_config)
    assert params_of(diversity=0.5).extra_args["diversity"]["level"] == 0.5


SLIPS = {
    "diversity": (
        "diversty",
        "Diversity",
        "iversity",
        "diversit",
        "diverstiy",
        "divarsity",
        "diversityy",
    ),
    "style": ("stlye", "STYLE", "styl", "tyle", "stile", "styyle"),
}
OTHERS = (
    *("diversity_penalty", "diverse", "adversity", "top_diversity", "diversities", "d"),
    *("styles", "style2", "stylize", "_style", "stylistic", "title", "state", "", "x" * 10_000),
)


@pytest.mark.parametrize("name", SLIPS)
def test_a_misspelt_field_is_refused(name):
    clients = {f"sampler_{number}": 1 for number in range(100)}
    for key in SLIPS[name]:
        for more in ({}, clients):
            error = refused(**more, **{key: 0.5})
            assert error.parameter == name
            assert repr(key) in str(error)
        assert not params_of(**{key: None}).extra_args


def test_a_misspelt_diversity_is_refused_in_vllm_xargs_too():
    for key in SLIPS["diversity"]:
        error = refused(vllm_xargs={"other": 1, key: "0.5"})
        assert error.parameter == "diversity"
        assert repr(key) in str(error)
    for key in (*SLIPS["style"], *OTHERS):
        assert params_of(vllm_xargs={key: "0.5"}).extra_args == {key: "0.5"}


def test_a_misspelt_field_is_refused_with_beam_search():
    to_beam_search_params = request_params.refuse_beam_search(
        CompletionRequest.to_beam_search_params
    )
    request = CompletionRequest(model="m", prompt="x", use_beam_search=True, n=2, diversty=0.5)
    with pytest.raises(VLLMValidationError, match="'diversty'"):
        to_beam_search_params(request, 8, {})


def test_other_unknown_keys_are_ignored():
    for key in OTHERS:
        assert not params_of(**{key: 0.5}).extra_args, key


@given(st.sampled_from(list(SLIPS)), st.text(alphabet="diverstyl_2", max_size=11))
def test_a_slip_is_one_edit_away(name, key):
    """Edits are: a letter left out, doubled or replaced, or two letters swapped."""
    cuts = range(len(name))
    edits = {name[:i] + name[i + 1 :] for i in cuts}
    edits |= {name[: i + 1] + name[i:] for i in cuts}
    edits |= {name[:i] + letter + name[i + 1 :] for i in cuts for letter in "diverstyl_2"}
    edits |= {name[:i] + name[i : i + 2][::-1] + name[i + 2 :] for i in cuts}
    assert spec.is_slip_of(key, name) == (key in edits - {name})
    assert all(spec.is_slip_of(each, name) for each in edits - {name})


def test_a_misspelt_field_is_ignored_if_the_engine_refuses_the_field(monkeypatch):
    monkeypatch.setattr(engine, "_config", config(diffusion=True))
    assert not params_of(diversty=0.5).extra_args


def test_too_many_stop_tokens_are_refused_with_the_field_only():
    many = list(range(MAX_STOP_IDS + 1))
    error = refused(diversity=0.5, stop_token_ids=many)
    assert error.parameter == "stop_token_ids"
    assert str(MAX_STOP_IDS) in str(error)
    error = refused(vllm_xargs={"diversity": "0.5"}, stop_token_ids=many)
    assert error.parameter == "stop_token_ids"
    assert params_of(stop_token_ids=many).stop_token_ids == many
    assert params_of(diversity=0, stop_token_ids=many).stop_token_ids == many
    assert params_of(diversity=0.5, stop_token_ids=many[:-1]).extra_args["diversity"]


@pytest.mark.parametrize(
    "carried", [{"diversity": 0.5}, {"diversity": '{"level": 1}'}, {"style": "s"}]
)
def test_too_many_stop_tokens_are_refused_with_extra_args_too(monkeypatch, carried):
    """Offline, and on routes where `extra_args` reach the engine unchanged."""
    profile = SimpleNamespace(name="s", strength=1.0, max_kl=0.05)
    monkeypatch.setattr(engine, "styles", lambda: Styles((profile,)))
    many = list(range(MAX_STOP_IDS + 1))

    def validate(ids, extra_args, **more):
        params = SamplingParams(stop_token_ids=ids, extra_args=extra_args, **more)
        DiversityProcessor.validate_params(params)

    with pytest.raises(ValueError, match=rf"stop_token_ids: got 65.*at most {MAX_STOP_IDS}"):
        validate(many, carried)
    validate(many[:-1], carried)
    validate(many, None)
    validate(many, {"diversity": 0})
    validate(many, carried, temperature=0)  # Greedy stays greedy: no row is changed.


def test_a_default_is_not_applied_to_many_stop_tokens(monkeypatch):
    monkeypatch.setattr(request_params, "default_diversity", lambda: request_params.spec.parse(0.5))
    many = list(range(MAX_STOP_IDS + 1))
    assert params_of(stop_token_ids=many).extra_args is None
    assert params_of(stop_token_ids=many[:1]).extra_args["diversity"]


OF_THE_SERVER = {"min_p": 0.1, "top_p": 0.9}
"""Given by --override-generation-config."""


@pytest.mark.parametrize(
    ("fields", "carried", "dropped"),
    [
        ({"diversity": 0.5}, 0.1, {}),
        ({"diversity": {"law": "guard", "min_p": 0.05}}, 0.05, {"min_p": 0.1}),
        ({"diversity": {"law": "guard", "min_p": 0.1}}, 0.1, {}),
        ({"diversity": {"law": "xtc", "xtc_probability": 1, "min_p": 0.05}}, 0.05, {"min_p": 0.1}),
        ({"diversity": {"law": "top_n_sigma", "n_sigma": 1}}, None, {"min_p": 0.1}),
        ({"diversity": {"law": "guard", "min_p": 0.05}, "min_p": 0.05}, 0.05, {}),
        ({"diversity": {"law": "top_n_sigma", "n_sigma": 1}, "min_p": 0}, None, {}),
    ],
)
@pytest.mark.parametrize("is_default", [False, True])
def test_a_diversity_with_a_cut_overrides_the_servers_min_p(
    monkeypatch, fields, carried, dropped, is_default
):
    """A refusal would name a parameter that the client did not send."""
    engine_config = config()
    engine_config.model_config.override_generation_config = OF_THE_SERVER
    monkeypatch.setattr(engine, "_config", engine_config)
    fields = dict(fields)
    if is_default:
        default = spec.parse(fields.pop("diversity"))
        monkeypatch.setattr(request_params, "default_diversity", lambda: default)
    token = request_context.current.set(request_context.RequestContext())
    request = CompletionRequest(model="m", prompt="x", **fields)
    params = to_sampling_params(request, 8, dict(OF_THE_SERVER))
    (prompt,) = request_context.current.get().prompts
    request_context.current.reset(token)
    assert params.extra_args["diversity"].get("min_p") == carried
    assert (params.min_p, params.top_p) == (0, 0.9)
    assert prompt.dropped == dropped


@pytest.mark.parametrize(
    "diversity", [{"law": "guard", "min_p": 0.05}, {"law": "top_n_sigma", "n_sigma": 1}]
)
def test_a_clients_min_p_is_refused_with_another_cut(diversity):
    assert refused(diversity=diversity, min_p=0.1).parameter == "min_p"


def test_a_refusal_of_temperature_0_names_the_server_if_the_client_did_not_send_it():
    group = {"level": 0.5, "group": {"id": "a", "index": 0, "size": 2}}
    request = CompletionRequest(model="m", prompt="x", diversity=group)
    with pytest.raises(VLLMValidationError, match="got 0, the server's own, with") as refusal:
        to_sampling_params(request, 8, {"temperature": 0.0})
    assert refusal.value.parameter == "temperature"
    assert "the server's own" not in str(refused(diversity=group, temperature=0))


ASYNCHRONOUS = SimpleNamespace(async_scheduling=True)
DRY = {"level": 0.5, "dry_multiplier": 0.8}
WORDS = {"law": "words", "level": 0.5}
GROUP = {"level": 0.5, "group": True}


@pytest.fixture
def start_engine(monkeypatch, caplog):
    """A function that starts an engine with a default and returns the log."""

    def start(default, engine_config, **more):
        monkeypatch.setattr(engine, "_config", None)
        vars(engine_config).update(more)
        monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(default))
        monkeypatch.setattr(hooks, "_import_engine_modules", lambda: None)
        monkeypatch.setattr(engine, "styles", lambda: Styles())
        monkeypatch.setattr(log.logger, "propagate", True)
        with caplog.at_level("INFO"):
            hooks._records_configuration(lambda *_: None)(None, engine_config)
        return caplog.text

    return start


@pytest.mark.parametrize(
    ("default", "more", "applied"),
    [
        (DRY, {"scheduler_config": ASYNCHRONOUS}, {1: None, 2: None}),
        (WORDS, {"scheduler_config": ASYNCHRONOUS}, {1: None, 2: None}),
        (GROUP, {"watermark_config": object()}, {1: 0.5, 2: None}),
        (GROUP, {}, {1: 0.5, 2: 0.5}),
        (0.5, {"scheduler_config": ASYNCHRONOUS, "watermark_config": object()}, {1: 0.5, 2: 0.5}),
    ],
)
def test_the_log_states_correctly_whether_a_default_is_applied(
    start_engine, default, more, applied
):
    log_text = start_engine(default, config(runner="V1"), **more)
    levels = {}
    for n in applied:
        carried = params_of(n=n).extra_args or {}
        levels[n] = carried.get("diversity", {}).get("level")
    assert levels == applied
    is_applied = None not in applied.values()
    assert ("default diversity: {" in log_text) == is_applied
    assert ("is not applied" in log_text) != is_applied
    assert ("is not applied: for requests with n > 1" in log_text) == (applied[1] != applied[2])
    reason = capabilities.capabilities()["default_refused"]
    assert reason is None if is_applied else reason in log_text


strings = st.text(st.characters(), max_size=50) | st.sampled_from(
    ["\ud800", "a\nb", "\x1b[31mred", "\u2028", "\r\nset-cookie: a", "\x00", "x" * 5_000_000]
)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | strings | st.builds(lambda: 10**5000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=20,
)


@given(value=values | st.dictionaries(st.sampled_from(["level", "law", "min_p"]), values))
def test_a_refusal_is_short_and_printable_for_any_value(value):
    """A client's text must not fill an answer, break its JSON, or inject lines into a log."""
    refusal = None
    try:
        params_of(diversity=value)
    except VLLMValidationError as error:
        refusal = error
    if refusal is not None:
        text = f"{refusal} {refusal.parameter}"
        assert len(text) <= MAX_MESSAGE
        assert refusal.value is None
        assert text.isprintable()
        assert text.encode()
        assert refusal.parameter.startswith("diversity")


def test_the_capabilities_list_every_parameter():
    listed = capabilities.capabilities()
    assert {law: set(bounds) for law, bounds in listed["laws"].items()} == {
        law: set(takes) for law, takes in spec.LAWS.items()
    }
    assert set(listed["dry"]) == set(spec.DRY_NAMES)
