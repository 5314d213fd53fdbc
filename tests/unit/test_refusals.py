"""What the field cannot do, or must not cost others, is refused: briefly, and by name."""

from types import SimpleNamespace

import pytest
from dftserve_vllm import engine, request_params
from dftserve_vllm.request_params import MAX_STOP_IDS
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

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


def asked(**fields):
    return to_sampling_params(CompletionRequest(model="m", prompt="x", **fields), 8, {})


def refused(**fields) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as refusal:
        asked(**fields)
    return refusal.value


@pytest.mark.parametrize(
    ("engine_config", "names"),
    [
        (config(diffusion=True), "diffusion"),
        (config(method="eagle", rejection_sample_method="fly"), "'fly'"),
        (config(method="eagle", rejection_sample_method="synthetic"), "'synthetic'"),
        (config(runner="V1", method="ngram", rejection_sample_method="standard"), "V1"),
        (config(runner="V1", method="ngram"), "V1"),  # A vLLM that has only the standard way.
    ],
)
def test_an_engine_that_would_ignore_the_field_refuses_it(monkeypatch, engine_config, names):
    monkeypatch.setattr(engine, "_config", engine_config)
    assert names in str(refused(diversity=0.5))
    assert asked(diversity=0).extra_args is None
    assert asked().extra_args is None


@pytest.mark.parametrize(
    "engine_config", [config(), config(method="eagle", rejection_sample_method="standard")]
)
def test_other_engines_do_not(monkeypatch, engine_config):
    monkeypatch.setattr(engine, "_config", engine_config)
    assert asked(diversity=0.5).extra_args["diversity"]["level"] == 0.5


def test_many_stop_tokens_are_refused_with_the_field_only():
    many = list(range(MAX_STOP_IDS + 1))
    error = refused(diversity=0.5, stop_token_ids=many)
    assert error.parameter == "stop_token_ids"
    assert str(MAX_STOP_IDS) in str(error)
    assert asked(stop_token_ids=many).stop_token_ids == many
    assert asked(diversity=0, stop_token_ids=many).stop_token_ids == many
    assert asked(diversity=0.5, stop_token_ids=many[:-1]).extra_args["diversity"]


def test_a_default_is_not_applied_to_many_stop_tokens(monkeypatch):
    monkeypatch.setattr(request_params, "default_diversity", lambda: request_params.spec.parse(0.5))
    many = list(range(MAX_STOP_IDS + 1))
    assert asked(stop_token_ids=many).extra_args is None
    assert asked(stop_token_ids=many[:1]).extra_args["diversity"]


strings = st.text(st.characters(), max_size=50) | st.sampled_from(
    ["\ud800", "a\nb", "\x1b[31mred", "\u2028", "\r\nset-cookie: a", "\x00", "x" * 5_000_000]
)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | strings | st.builds(lambda: 10**5000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=20,
)


@given(value=values | st.dictionaries(st.sampled_from(["level", "law", "min_p"]), values))
def test_a_refusal_is_short_and_printable_whatever_came(value):
    """So that nothing of a client's text can fill an answer, break its JSON, or write in a log."""
    refusal = None
    try:
        asked(diversity=value)
    except VLLMValidationError as error:
        refusal = error
    if refusal is not None:
        text = f"{refusal} {refusal.parameter}"
        assert len(text) <= MAX_MESSAGE
        assert refusal.value is None
        assert text.isprintable()
        assert text.encode()
        assert refusal.parameter.startswith("diversity")
