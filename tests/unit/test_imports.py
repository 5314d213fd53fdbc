"""Changing a module when it is imported, and the hooks on vLLM's real request classes."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str, **env: str) -> str:
    """In a fresh interpreter, since modules are imported once."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_change_comes_right_after_the_import_and_once():
    said = run(
        """
        from dftserve_vllm.imports import when_imported
        when_imported("colorsys", lambda module: print("changed", module.__name__))
        print("before")
        import colorsys, importlib
        print("after", type(colorsys.__spec__.loader).__name__)
        importlib.import_module("colorsys")
        when_imported("colorsys", lambda module: print("at once"))
        """
    )
    assert said.split("\n")[:-1] == [
        "before",
        "changed colorsys",
        "after SourceFileLoader",
        "at once",
    ]


def test_registering_twice_changes_once_and_imports_nothing_of_vllm():
    said = run(
        """
        import sys, dftserve_vllm
        dftserve_vllm.register(); dftserve_vllm.register()
        print(any(name == "vllm" or name.startswith("vllm.") for name in sys.modules))
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        method = CompletionRequest.to_sampling_params
        print(hasattr(method, "__wrapped__"), hasattr(method.__wrapped__, "__wrapped__"))
        """
    )
    assert said.split() == ["False", "True", "False"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled_changes_nothing(value):
    said = run(
        """
        import dftserve_vllm
        dftserve_vllm.register()
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        print(hasattr(CompletionRequest.to_sampling_params, "__wrapped__"))
        """,
        DFTSERVE_DISABLE=value,
    )
    assert said.strip() == "False"


def test_the_operators_default_and_what_it_skips():
    said = run(
        """
        import dftserve_vllm
        dftserve_vllm.register()
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        def level(**fields):
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
            params = ChatCompletionRequest(**body).to_sampling_params(8, {})
            return ((params.extra_args or {}).get("diversity") or {}).get("level")

        form = {"type": "json_object"}
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        print(level(), level(diversity=None), level(diversity=0), level(diversity=0.9))
        print(level(temperature=0), level(response_format=form), level(tools=[tool]))
        print(level(response_format={"type": "text"}), level(response_format=form, diversity=0.9))
        """,
        DFTSERVE_DEFAULT_DIVERSITY="0.4",
    )
    assert said.split() == ["0.4", "0.4", "None", "0.9", "None", "None", "None", "0.4", "0.9"]


def test_a_wrong_default_is_named():
    said = run(
        """
        from dftserve_vllm.request_params import default_diversity
        try:
            default_diversity()
        except ValueError as error:
            print(error)
        """,
        DFTSERVE_DEFAULT_DIVERSITY="1.5",
    )
    assert "DFTSERVE_DEFAULT_DIVERSITY.level: got 1.5" in said


def test_the_operators_own_cuts_are_explicit():
    said = run(
        """
        import types, dftserve_vllm
        dftserve_vllm.register()
        from dftserve_vllm import engine, request_context
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        model = types.SimpleNamespace(override_generation_config={"top_p": 0.8, "min_p": 0.1})
        config = types.SimpleNamespace(model_config=model, speculative_config=None)
        engine.record(config)
        defaults = {"top_p": 0.8, "top_k": 40, "min_p": 0.1, "temperature": 0.6}
        request = CompletionRequest(model="m", prompt="x", diversity=0.5)
        params = request.to_sampling_params(8, defaults)
        print(params.top_p, params.top_k, params.min_p, params.temperature)
        print(params.extra_args["diversity"]["min_p"])
        """
    )
    assert said.split() == ["0.8", "0", "0.0", "0.6", "0.1"]


def test_speculative_decoding_on_v1_is_refused_with_the_reason():
    said = run(
        """
        import types, dftserve_vllm
        dftserve_vllm.register()
        from dftserve_vllm import engine
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        speculative = types.SimpleNamespace(method="ngram", num_speculative_tokens=3)
        engine.record(types.SimpleNamespace(
            model_config=types.SimpleNamespace(override_generation_config={}),
            speculative_config=speculative, use_v2_model_runner=False))
        def ask(value):
            request = CompletionRequest(model="m", prompt="x", diversity=value)
            return request.to_sampling_params(8, {})
        ask(0)
        try:
            ask(0.5)
        except Exception as error:
            print(type(error).__name__, error.parameter, "V2" in str(error))
        """
    )
    assert said.split() == ["VLLMValidationError", "diversity", "True"]


def test_an_unsupported_vllm_is_refused_with_the_reason():
    said = run(
        """
        import vllm, dftserve_vllm
        vllm.__version__ = "0.99.0"
        dftserve_vllm.register()
        from dftserve_vllm.processor import DiversityProcessor
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        CompletionRequest(model="m", prompt="x").to_sampling_params(8, {})
        print(type(DiversityProcessor(object(), None, False)).__name__)
        try:
            CompletionRequest(model="m", prompt="x", diversity=0.5).to_sampling_params(8, {})
        except Exception as error:
            print(type(error).__name__, "0.99.0" in str(error))
        """
    )
    assert said.split() == ["Inert", "VLLMValidationError", "True"]
