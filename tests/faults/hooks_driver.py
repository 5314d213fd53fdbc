"""Reports how the plug-in reacts to a vLLM that differs from what it expects, without an engine.

    python -m tests.faults.hooks_driver < faults

Each line of the input is a fault (tests/shim/hook_faults.py), or empty for none; each line of the
output has the findings in JSON. Modules other than vLLM's are imported once: each fault is injected
into a fork of this process, which then imports vLLM as a server does.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "shim"))

import hook_faults
from hook_faults import HOOKS

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
TEXT = {"model": "demo", "prompt": "Once", "max_tokens": 4}
RESPONSES = {"model": "demo", "input": "Once", "max_output_tokens": 4}
BEAM = {"use_beam_search": True, "n": 2}
REQUESTS = {
    "ChatCompletionRequest.to_sampling_params": ("/v1/chat/completions", CHAT),
    "CompletionRequest.to_sampling_params": ("/v1/completions", TEXT),
    "ResponsesRequest.to_sampling_params": ("/v1/responses", RESPONSES),
    "ChatCompletionRequest.to_beam_search_params": ("/v1/chat/completions", CHAT | BEAM),
    "CompletionRequest.to_beam_search_params": ("/v1/completions", TEXT | BEAM),
}
"""For each hook, the path and the body of a request that reaches it."""


def main() -> None:
    for name in _in_a_fork(_third_parties):
        with contextlib.suppress(Exception):  # Some cannot be imported on their own.
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_in_a_fork(partial(_findings, line.strip()))), flush=True)


def _in_a_fork(function: Callable[[], Any]) -> Any:
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        with open(writing, "w") as output:
            json.dump(function(), output)
        os._exit(0)
    os.close(writing)
    with open(reading) as reader:
        text = reader.read()
    os.wait()
    return json.loads(text or '{"error": "the process ended"}')


def _third_parties() -> list[str]:
    """The modules of other packages that vLLM imports, in its order."""
    _Vllm("")
    ours = ("vllm", "dftserve", "dftserve_vllm", "tests", "__main__")
    return [name for name in sys.modules if name.partition(".")[0] not in ours]


def _findings(fault: str) -> dict[str, Any]:
    """The findings on one fault, in a process of its own.

    error       the traceback of a failed import, with which no server would start
    problems    the value of `hooks.problems()`; None if there is no such function
    refusal     the value of `engine.refusal()`
    in_place    whether the hook is in place
    stock       the calls of vLLM for a request without the field that fail or differ from stock
    refused     by hook, `param: message` of the 400 for a request with the field, or None
    """
    try:
        if fault:
            hook_faults.install(fault)
        import dftserve_vllm

        dftserve_vllm.register()
        vllm = _Vllm(fault)
    except BaseException:  # noqa: BLE001 - any exception is a finding
        return {"error": traceback.format_exc()}
    from dftserve_vllm import engine, hooks

    return {
        "error": None,
        "problems": getattr(hooks, "problems", lambda: None)(),
        "refusal": engine.refusal(),
        "in_place": vllm.has_change(vllm.faulty or "build_app"),
        "stock": vllm.failures(),
        "refused": {name: vllm.refused(name) for name in REQUESTS},
    }


class _Vllm:
    """Calls vLLM as its own code does: under a fault by new names and with new arguments."""

    def __init__(self, fault: str) -> None:
        from vllm.platforms import current_platform  # Every process of vLLM imports it first.

        assert current_platform
        self.faulty, _, self._kind = fault.rpartition(":")
        self._modules = {name: _imported(hook.module) for name, hook in HOOKS.items()}
        self._app: Any = None

    def function(self, name: str) -> Callable[..., Any]:
        """The hooked function, by its new name and with the new first argument of a fault."""
        module, hook = self._modules[name], HOOKS[name]
        found = _unbound(module, name)
        both = ("build_app", "entry.build_app")  # The same function in two modules.
        is_changed = name == self.faulty or (name in both and self.faulty in both)
        if self._kind != "signature" or not is_changed:
            return found
        is_method = "." in hook.path
        return (lambda self, *rest: found(self, None, *rest)) if is_method else partial(found, None)

    def app(self) -> Any:
        if self._app is None:
            from vllm.entrypoints.launchers.cli_args import make_arg_parser
            from vllm.utils.argparse_utils import FlexibleArgumentParser

            arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
            self._app = self.function("entry.build_app")(arguments, ("generate",))
        return self._app

    def has_change(self, name: str) -> bool:
        if name.endswith("build_app"):
            return _response(self.app(), "GET", "/v1/dft/capabilities").status_code == 200
        function = _resolved(self._modules[name], HOOKS[name].path)
        return hasattr(function, "__wrapped__")

    def failures(self) -> dict[str, str]:
        """By hook, how a call differs from stock."""
        from vllm import SamplingParams

        child = SimpleNamespace(
            request_id="r",
            sampling_params=SamplingParams(n=2),
            child_requests=set(),
            cached_child_sampling_params=None,
            _get_child_sampling_params=lambda index: SamplingParams(),
        )
        wrapper = SimpleNamespace(
            _apply_mm_cache=lambda scheduled: None,
            worker=SimpleNamespace(execute_model=lambda scheduled: f"output of {scheduled}"),
        )
        calls = {
            **{name: partial(self._params, name, {}) for name in REQUESTS},
            "ParentRequest.get_child_info": lambda: (
                self.function("ParentRequest.get_child_info")(child, 0)[0] == "0_r"
            ),
            "WorkerWrapperBase.execute_model": lambda: (
                self.function("WorkerWrapperBase.execute_model")(wrapper, "s") == "output of s"
            ),
            "build_app": lambda: _response(self.app(), "GET", "/version").status_code == 200,
            "_rebind_kernels": lambda: self.function("_rebind_kernels")([]) is None,
        }
        return {name: problem for name, call in calls.items() if (problem := _problem(call))}

    def _params(self, name: str, field: dict[str, Any]) -> bool:
        """Whether a request's parameters equal stock's.

        Raises:
            VLLMValidationError: the request is refused.
        """
        _, body = REQUESTS[name]
        owner = getattr(self._modules[name], HOOKS[name].path.partition(".")[0])
        request = owner(**body, **field)
        function = self.function(name)
        got = function(request, 16, {})
        plain = inspect.unwrap(_unbound(self._modules[name], name))
        extra = (None,) if self._kind == "signature" and name == self.faulty else ()
        return repr(got) == repr(plain(request, *extra, 16, {}))

    def refused(self, name: str) -> str | None:
        """How a request with the field is refused: by the app, or by the request itself."""
        path, body = REQUESTS[name]
        answer = _response(self.app(), "POST", path, body | {"diversity": 0.5})
        if answer.status_code == 400:
            error = answer.json()["error"]
            return f"{error['param']}: {error['message']}"
        from vllm.exceptions import VLLMValidationError

        try:
            self._params(name, {"diversity": 0.5})
        except VLLMValidationError as error:
            return f"{error.parameter}: {error}"
        except Exception as error:  # noqa: BLE001 - a 500 and not a refusal
            return f"{type(error).__name__}: {error}"
        return None


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return importlib.import_module(name + hook_faults.MOVED)


def _resolved(module: ModuleType, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _unbound(module: ModuleType, name: str) -> Any:
    return _resolved(module, HOOKS[name].path) or _resolved(module, HOOKS[name].new_path)


def _problem(call: Callable[[], bool]) -> str | None:
    try:
        return None if call() else "differs"
    except Exception as error:  # noqa: BLE001 - any exception is a finding
        return f"{type(error).__name__}: {error}"


def _response(app: Any, method: str, path: str, body: Any = None) -> httpx.Response:
    """The app's response; without an engine, a request that is not refused gets a 500."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            return await client.request(method, path, json=body)

    return asyncio.run(ask())


if __name__ == "__main__":
    main()
