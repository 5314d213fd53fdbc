"""Where the plug-in meets vLLM: every change to vLLM is listed here, and nowhere else.

    InputProcessor                  remember the engine's configuration
    *Request.to_sampling_params     the field, with its early 400
    *Request.to_beam_search_params  refuse the field
    ParentRequest                   give each of n choices its own figures
    AsyncLLM.generate               fetch the figures before the last output goes out
    WorkerBase                      answer for the figures
    build_app                       header, body, route, metrics
    _rebind_kernels                 survive that numba is loaded, as our kernels need it

Each is made when vLLM imports the module, once in a process.
"""

import json
import logging
import sys
from collections.abc import Callable
from copy import copy
from functools import wraps
from types import ModuleType
from typing import Any

import dftserve
from dftserve_vllm import engine
from dftserve_vllm.extra_args import IDENTITY
from dftserve_vllm.imports import when_imported

logger = logging.getLogger("vllm.dftserve")

_installed = False


def install() -> None:
    """Ask for every change; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for module, change in CHANGES.items():
        when_imported(module, change)


def _input_processor(module: ModuleType) -> None:
    def remembers(construct: Callable[..., None]) -> Callable[..., None]:
        @wraps(construct)
        def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            from dftserve_vllm.request_params import default_diversity

            engine.record(vllm_config)
            default = default_diversity()  # A wrong one stops the server here, not a request.
            if (reason := engine.refusal()) is not None:
                logger.warning(
                    "diversity: %s. Requests with the field are answered with 400, "
                    "and no default is applied.",
                    reason,
                )
            else:
                shown = json.dumps(default.as_dict()) if default else "off"
                about = (dftserve.__version__, engine.runner(), shown)
                logger.info("dftserve %s is active on the %s runner; default diversity: %s", *about)
            construct(self, vllm_config, *args, **kwargs)

        return wrapped

    module.InputProcessor.__init__ = remembers(module.InputProcessor.__init__)


def _requests(*names: str) -> Callable[[ModuleType], None]:
    def change(module: ModuleType) -> None:
        from dftserve_vllm import request_params

        for name in names:
            request = getattr(module, name)
            request.to_sampling_params = request_params.honour(request.to_sampling_params)
            if hasattr(request, "to_beam_search_params"):
                request.to_beam_search_params = request_params.refuse_beam_search(
                    request.to_beam_search_params
                )

    return change


def _parallel_sampling(module: ModuleType) -> None:
    def tells_apart(get_child_info: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(get_child_info)
        def wrapped(self: Any, index: int) -> tuple[str, Any]:
            request_id, params = get_child_info(self, index)
            identity = (self.sampling_params.extra_args or {}).get(IDENTITY)
            if identity is not None:
                params = copy(params)
                params.extra_args = {**params.extra_args, IDENTITY: f"{identity}.{index}"}
            return request_id, params

        return wrapped

    parent = module.ParentRequest
    parent.get_child_info = tells_apart(parent.get_child_info)


def _async_llm(module: ModuleType) -> None:
    def observes(generate: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(generate)
        def wrapped(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            from dftserve_vllm import request_context, statistics

            outputs = generate(self, prompt, sampling_params, *args, **kwargs)
            identity = (getattr(sampling_params, "extra_args", None) or {}).get(IDENTITY)
            item = request_context.item_of(identity) if identity is not None else None
            return outputs if item is None else statistics.observed(self, outputs, item)

        return wrapped

    module.AsyncLLM.generate = observes(module.AsyncLLM.generate)


def _worker(module: ModuleType) -> None:
    def answers(self: Any, produced: dict[str, int]) -> dict[str, Any] | None:
        """On the rank that samples; None on one that has no figures."""
        from dftserve_vllm.processor import current_stats

        stats = current_stats()
        return None if stats is None else stats.take(produced)

    from dftserve_vllm.statistics import WORKER_METHOD

    setattr(module.WorkerBase, WORKER_METHOD, answers)


def _app(module: ModuleType) -> None:
    def extends(build_app: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(build_app)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            from dftserve_vllm import statistics
            from dftserve_vllm.capabilities import capabilities
            from dftserve_vllm.response_middleware import AnswerMiddleware

            app = build_app(*args, **kwargs)
            statistics.metrics()  # At zero from the start, for whoever watches them.
            app.add_api_route("/v1/dft/capabilities", capabilities, methods=["GET"])
            # vLLM may have built the stack already; ours goes outermost either way.
            if app.middleware_stack is None:
                app.add_middleware(AnswerMiddleware)
            else:
                app.middleware_stack = AnswerMiddleware(app.middleware_stack)
            return app

        return wrapped

    if not hasattr(module.build_app, "__wrapped__"):
        vars(module)["build_app"] = extends(module.build_app)


def _dispatcher(module: ModuleType) -> None:
    """On a CPU, vLLM 0.32 looks at `vars` of all that any module holds, for kernels to replace.
    llvmlite's library answers that with a function of its own, and a second engine in a process,
    or one after numba was imported, would not start."""

    def survives(rebind: Callable[..., None]) -> Callable[..., None]:
        @wraps(rebind)
        def wrapped(overrides: Any) -> None:
            if (llvmlite := sys.modules.get("llvmlite.binding.ffi")) is not None:
                llvmlite.lib._fntab["__dict__"] = {}
            rebind(overrides)

        return wrapped

    if hasattr(module, "_rebind_kernels"):
        vars(module)["_rebind_kernels"] = survives(module._rebind_kernels)


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "vllm.v1.engine.input_processor": _input_processor,
    "vllm.entrypoints.openai.chat_completion.protocol": _requests("ChatCompletionRequest"),
    "vllm.entrypoints.openai.completion.protocol": _requests("CompletionRequest"),
    "vllm.entrypoints.openai.responses.protocol": _requests("ResponsesRequest"),
    "vllm.v1.engine.parallel_sampling": _parallel_sampling,
    "vllm.v1.engine.async_llm": _async_llm,
    "vllm.v1.worker.worker_base": _worker,
    # The second holds its own name for the first's function, and may have been imported before us.
    "vllm.entrypoints.launchers.app": _app,
    "vllm.entrypoints.launchers.api_server.entry": _app,
    "vllm.triton_utils.dispatcher": _dispatcher,
}
