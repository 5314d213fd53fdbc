"""Where the plug-in hooks into vLLM: all changes to vLLM are listed here, and only here.

    InputProcessor.__init__             record the engine's configuration
    *Request.to_sampling_params         the field, with its early 400
    *Request.to_beam_search_params      refuse the field
    ParentRequest.get_child_info        give each of n choices its own statistics, and its index
                                          in their group
    WorkerWrapperBase.execute_model,    a step's statistics travel with its output:
      .sample_tokens                      from the worker …
    Scheduler.update_from_output          … through the engine core …
    OutputProcessor.add_request,          … to the API process
      .process_outputs
    build_app                           header, body, route, metrics
    BaseServing._maybe_get_adapters     select the adapter that a style names
    _rebind_kernels                     make it work with numba loaded, which our kernels need
    GPUModelRunner._sample,             keep seeds on a CPU from ending the engine (seeds.py)
      ._bookkeeping_sync

Each change is made once per process, when vLLM imports the module. If one fails, the server still
starts, requests without the field are not affected, and the field is refused with the reason
(`problems`). On an unsupported vLLM only the hooks that refuse the field are installed.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from types import ModuleType
from typing import Any

import dftserve
from dftserve import vllm_contract
from dftserve.vllm_contract import Symbol
from dftserve_vllm import engine
from dftserve_vllm.imports import when_imported
from dftserve_vllm.log import logged_once, logger

MARK = "__dftserve__"
"""Attribute of every function of ours that replaces one of vLLM's."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Hook:
    """One function of vLLM, and our wrapper of it."""

    module: str
    target: str
    """A function, or `Class.method`."""
    wrapper: Wrapper
    passes_on: str | None = None
    """Set if the class forwards unknown methods to its `worker`: the worker's base class, named
    here, must have the method; if it does not, vLLM calls another one, bypassing the hook."""
    is_needed: bool = True
    """Whether the field is refused without this hook; otherwise only some function is lost."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.target}"

    def apply(self, module: ModuleType) -> None:
        """Install the wrapper, once, if the function is as `vllm_contract` describes it.

        Raises:
            AttributeError, TypeError: it is not.
        """
        if self.is_in_place(module):
            return
        if faults := vllm_contract.missing_in_module(module, self.symbols()):
            raise TypeError("; ".join(map(str, faults)))
        owner, _, attribute = self.target.rpartition(".")
        holder = getattr(module, owner) if owner else module
        original = getattr(holder, attribute, None)
        if original is None and self.passes_on:
            if not hasattr(getattr(module, self.passes_on, None), attribute):
                raise AttributeError(f"{module.__name__} has no {self.passes_on}.{attribute}")
            original = _forwarding_to_worker(attribute)
        if original is None:
            raise AttributeError(f"{module.__name__} has no {self.target}")
        wrapped = wraps(original)(self.wrapper(original))
        setattr(wrapped, MARK, True)
        setattr(holder, attribute, wrapped)

    def symbols(self) -> list[Symbol]:
        return [
            symbol
            for symbol in vllm_contract.SYMBOLS
            if (symbol.module, symbol.name) == (self.module, self.target)
        ]

    def is_in_place(self, module: ModuleType) -> bool:
        """Whether the wrapper is installed, also below another wrapper that sets `__wrapped__`."""
        function: Any = module
        for part in self.target.split("."):
            function = getattr(function, part, None)
        while function is not None:
            if MARK in getattr(function, "__dict__", {}) and function.__dict__[MARK]:
                return True
            function = getattr(function, "__wrapped__", None)
        return False


def _forwarding_to_worker(attribute: str) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, attribute)(*args, **kwargs)

    forward.__name__ = attribute
    return forward


# Wrappers of vLLM's functions


def _records_configuration(construct: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from dftserve_vllm import body_limit
        from dftserve_vllm.policy import policy
        from dftserve_vllm.request_params import default_diversity

        engine.record(vllm_config)
        _import_engine_modules()
        engine.styles()  # Logs refused profiles when the server starts.
        # A wrong setting stops the server here, rather than failing a request.
        default_diversity()
        policy()
        body_limit.largest()
        _log_status()
        construct(self, vllm_config, *args, **kwargs)

    return wrapped


def _log_status() -> None:
    from dftserve_vllm.request_params import default_diversity, default_refusal

    if (reason := engine.refusal()) is not None:
        logger.warning(
            "diversity: %s. Requests with the field are answered with 400, "
            "and no default is applied.",
            reason,
        )
        return
    default = default_diversity()
    shown = json.dumps(default.as_dict()) if default else "off"
    about = (dftserve.__version__, engine.runner())
    if (reason := default_refusal()) is None:
        logger.info("dftserve %s is active on the %s runner; default diversity: %s", *about, shown)
        return
    logger.info("dftserve %s is active on the %s runner", *about)
    logger.warning("diversity: the default %s is not applied: %s.", shown, reason)


def _import_engine_modules() -> None:
    """Import the hooked modules of the engine core and its workers. These may run in other
    processes, which cannot refuse a request; what is missing there is also missing here."""
    for hook in _installed:
        if hook.is_needed and hook.module.startswith("vllm.v1."):
            with contextlib.suppress(ImportError):  # `problems` reports it.
                importlib.import_module(hook.module)


def _honours_field(to_sampling_params: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.honour(to_sampling_params)


def _refuses_beam_search(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.refuse_beam_search(to_beam_search_params)


def _selects_named_adapter(maybe_get_adapters: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.select_adapter(maybe_get_adapters)


def _identifies_choices(get_child_info: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import extra_args

    def wrapped(self: Any, index: int, *args: Any, **kwargs: Any) -> tuple[str, Any]:
        request_id, params = get_child_info(self, index, *args, **kwargs)
        return request_id, extra_args.of_choice(params, index, self)

    return wrapped


def _reports(run: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import worker

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return worker.with_report(self, run(self, *args, **kwargs))

    return wrapped


def _forwards_reports(update_from_output: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import engine_core

    def wrapped(
        self: Any, scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        outputs = update_from_output(self, scheduler_output, model_runner_output, *args, **kwargs)
        engine_core.forward(self, model_runner_output, outputs)
        return outputs

    return wrapped


def _notes_choices(add_request: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import statistics

    def wrapped(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add_request(self, request, *args, **kwargs)
        statistics.note(self, request)
        return result

    return wrapped


def _collects_statistics(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import statistics

    def wrapped(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        choices = statistics.collect(self, engine_core_outputs)
        result = process_outputs(self, engine_core_outputs, *args, **kwargs)
        statistics.count_ended(self, choices)
        return result

    return wrapped


def _extends_app(build_app: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import app

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return app.extend(build_app(*args, **kwargs))

    return wrapped


def _survives_numba(rebind: Callable[..., None]) -> Callable[..., None]:
    """On a CPU, vLLM 0.32 calls `vars` on every attribute of every module, to find kernels to
    replace. llvmlite's library object answers `__dict__` with a library function, so a second
    engine in a process, or one created after numba was imported, would not start."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        with logged_once("numba's library may keep an engine from starting"):
            if (llvmlite := sys.modules.get("llvmlite.binding.ffi")) is not None:
                llvmlite.lib._fntab["__dict__"] = {}
        rebind(*args, **kwargs)

    return wrapped


def _restores_generators(sample: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import seeds

    return seeds.restore_generators(sample)


def _hides_generators(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import seeds

    return seeds.hide_generators(bookkeeping)


PROTOCOLS = {
    "ChatCompletionRequest": "vllm.entrypoints.openai.chat_completion.protocol",
    "CompletionRequest": "vllm.entrypoints.openai.completion.protocol",
    "ResponsesRequest": "vllm.entrypoints.openai.responses.protocol",
}
"""The request classes that take the fields, and their modules."""

REQUEST_HOOKS = (
    *(Hook(m, f"{name}.to_sampling_params", _honours_field) for name, m in PROTOCOLS.items()),
    *(
        Hook(PROTOCOLS[name], f"{name}.to_beam_search_params", _refuses_beam_search)
        for name in ("ChatCompletionRequest", "CompletionRequest")
    ),
)
"""The hooks that read the fields. If one is missing, `app` adds `FieldGuard` instead."""

_WORKER = "vllm.v1.worker.worker_base"
_OUTPUTS = "vllm.v1.engine.output_processor"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_APP = "vllm.entrypoints.launchers.app"
ADAPTERS = Hook(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._maybe_get_adapters",
    _selects_named_adapter,
    is_needed=False,
)
"""Without this hook no style can name an adapter."""
HOOKS = (
    *REQUEST_HOOKS,
    ADAPTERS,
    Hook("vllm.v1.engine.input_processor", "InputProcessor.__init__", _records_configuration),
    Hook("vllm.v1.engine.parallel_sampling", "ParentRequest.get_child_info", _identifies_choices),
    Hook(_WORKER, "WorkerWrapperBase.execute_model", _reports),
    Hook(_WORKER, "WorkerWrapperBase.sample_tokens", _reports, passes_on="WorkerBase"),
    Hook("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", _forwards_reports),
    Hook(_OUTPUTS, "OutputProcessor.add_request", _notes_choices),
    Hook(_OUTPUTS, "OutputProcessor.process_outputs", _collects_statistics),
    # The second module imports the function by name, and may have been imported before us.
    Hook(_APP, "build_app", _extends_app),
    Hook("vllm.entrypoints.launchers.api_server.entry", "build_app", _extends_app),
    Hook("vllm.triton_utils.dispatcher", "_rebind_kernels", _survives_numba, is_needed=False),
    Hook(_RUNNER, "GPUModelRunner._sample", _restores_generators, is_needed=False),
    Hook(_RUNNER, "GPUModelRunner._bookkeeping_sync", _hides_generators, is_needed=False),
)
APP = f"{_APP}.build_app"
"""The name of the hook that adds the answers' middleware."""

_installed: tuple[Hook, ...] = ()
_failed: dict[str, str] = {}
_present: set[str] = set()
"""Cache of modules that exist but are not imported yet, to search the file system only once."""


def install() -> None:
    """Register every change; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = REQUEST_HOOKS if engine.unsupported_here() else HOOKS
    for hook in _installed:
        when_imported(hook.module, partial(_apply, hook))


def _apply(hook: Hook, module: ModuleType) -> None:
    """Apply a hook; a failure must not keep vLLM from importing its module."""
    try:
        hook.apply(module)
    except Exception as error:  # noqa: BLE001 - the server must start
        record_failure(hook.name, error)


def record_failure(name: str, error: Exception) -> None:
    """Record that a hook does not work; the server continues."""
    _failed[name] = f"{type(error).__name__}: {error}"
    logger.warning("dftserve: %s is not in place: %s", name, error)


def problems() -> dict[str, str]:
    """The hooks that are not installed in this process, by name, with the reason."""
    return _problems_of(_installed)


def refusal() -> str | None:
    """Why the field is refused: a hook that it needs is missing; None if none is. Called several
    times per request, in the server's event loop."""
    missing = _problems_of(hook for hook in _installed if hook.is_needed)
    if not missing:
        return None
    first, reason = next(iter(missing.items()))
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"the plug-in could not change {first}{more} of vLLM ({reason}); "
        "`dftserve doctor` lists what is missing"
    )


def _problems_of(hooks: Iterable[Hook]) -> dict[str, str]:
    return {hook.name: reason for hook in hooks if (reason := _problem(hook)) is not None}


def _problem(hook: Hook) -> str | None:
    if hook.name in _failed:
        return _failed[hook.name]
    module = sys.modules.get(hook.module)
    if module is None:
        return _absence(hook.module)
    if getattr(module.__spec__, "_initializing", False) or hook.is_in_place(module):
        return None
    return "it was imported without the change, or replaced since"


def _absence(module: str) -> str | None:
    """Why a module cannot be imported; None if it exists, and so is changed on import."""
    if module in _present:
        return None
    try:
        module_spec = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001 - its package does not import: vLLM will say so
        return f"{type(error).__name__}: {error}"
    if module_spec is None:
        return "this vLLM has no such module"
    _present.add(module)
    return None
