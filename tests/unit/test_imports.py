"""Patching a module when it is imported, and the hooks on vLLM's real request classes."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

FORKS = """
import json, os, sys, traceback
import torch, transformers, fastapi, openai.types.chat, openai.types.responses
for line in sys.stdin:
    order = json.loads(line)
    got, gave = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(gave, 1)
        os.environ.update(order["env"])
        code = 0
        try:
            exec(order["code"], {"__name__": "__main__"})
        except BaseException:
            code = 1
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(code)
    os.close(gave)
    with open(got) as said:
        text = said.read()
    _, status = os.waitpid(child, 0)
    sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), text]) + "\\n")
    sys.stdout.flush()
"""
"""Each input line is code to run in a fork of this process, which has imported vLLM's slow
dependencies, but neither vLLM nor the plug-in."""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(code, **environment): what the code prints in its own process."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None

        def in_fork(code: str, **env: str) -> str:
            print(json.dumps({"code": textwrap.dedent(code), "env": env}), file=forks.stdin)
            forks.stdin.flush()
            status, printed = json.loads(forks.stdout.readline())
            assert status == 0, printed[-3000:]
            return printed

        yield in_fork
        forks.stdin.close()


def test_a_patch_is_applied_once_right_after_the_import(run):
    printed = run(
        """
        from dftserve_vllm.imports import when_imported
        when_imported("tabnanny", lambda module: print("changed", module.__name__))
        print("before")
        import tabnanny, importlib
        print("after", type(tabnanny.__spec__.loader).__name__)
        importlib.import_module("tabnanny")
        when_imported("tabnanny", lambda module: print("at once"))
        """
    )
    assert printed.split("\n")[:-1] == [
        "before",
        "changed tabnanny",
        "after SourceFileLoader",
        "at once",
    ]


def test_registering_twice_patches_once_and_does_not_import_vllm(run):
    printed = run(
        """
        import sys, dftserve_vllm
        dftserve_vllm.register(); dftserve_vllm.register()
        print(any(name == "vllm" or name.startswith("vllm.") for name in sys.modules))
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        method = CompletionRequest.to_sampling_params
        print(hasattr(method, "__wrapped__"), hasattr(method.__wrapped__, "__wrapped__"))
        """
    )
    assert printed.split() == ["False", "True", "False"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled_changes_nothing(run, value):
    printed = run(
        """
        import dftserve_vllm
        dftserve_vllm.register()
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        print(hasattr(CompletionRequest.to_sampling_params, "__wrapped__"))
        """,
        DFTSERVE_DISABLE=value,
    )
    assert printed.strip() == "False"


def test_the_operators_default_and_the_requests_that_it_skips(run):
    printed = run(
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
    assert printed.split() == ["0.4", "0.4", "None", "0.9", "None", "None", "None", "0.4", "0.9"]


def test_an_invalid_default_is_refused_by_name(run):
    printed = run(
        """
        from dftserve_vllm.request_params import default_diversity
        try:
            default_diversity()
        except ValueError as error:
            print(error)
        """,
        DFTSERVE_DEFAULT_DIVERSITY="1.5",
    )
    assert "DFTSERVE_DEFAULT_DIVERSITY.level: got 1.5" in printed


def test_the_operators_generation_config_counts_as_explicit(run):
    printed = run(
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
    assert printed.split() == ["0.8", "0", "0.0", "0.6", "0.1"]


def test_speculative_decoding_on_v1_is_refused_with_the_reason(run):
    printed = run(
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
    assert printed.split() == ["VLLMValidationError", "diversity", "True"]


def test_an_unsupported_vllm_is_refused_with_the_reason(run):
    printed = run(
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
    assert printed.split() == ["Inert", "VLLMValidationError", "True"]
