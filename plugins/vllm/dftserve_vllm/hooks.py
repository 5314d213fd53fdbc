"""Where the plug-in meets vLLM: every change to vLLM is listed here, and nowhere else.

    InputProcessor.__init__             remember the engine's configuration
    *Request.to_sampling_params         the field, with its early 400
    *Request.to_beam_search_params      refuse the field
    ParentRequest.get_child_info        give each of n choices its own statistics, and its place
                                          in their group
    WorkerWrapperBase.execute_model,    a step's statistics travel with its output:
      .sample_tokens                      from the worker …
    Scheduler.update_from_output          … through the engine core …
    OutputProcessor.add_request,          … to the API process
      .process_outputs
    build_app                           header, body, route, metrics
    BaseServing._maybe_get_adapters     take the adapter that a style names
    _rebind_kernels                     survive that numba is loaded, as our kernels need it
    GPUModelRunner._sample,             survive seeds on a CPU (seeds.py)
      ._bookkeeping_sync

Each is made when vLLM imports the module, once in a process. Whatever goes wrong with one stops
nothing: the server starts, stock requests stay stock, and the field is refused with the reason
(`problems`). On a vLLM that is not supported only the refusal is put in place.
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
"""On every function of ours that stands in the place of one of vLLM's."""

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Hook:
    """One function of vLLM, and what we put around it."""

    module: str
    target: str
    """A function, or `Class.method`."""
    wrapper: Wrapper
    passes_on: str | None = None
    """The class need not have the method: it passes unknown ones on to its `worker`, whose base
    class, named here, must have it. Else vLLM calls another one, and nothing would be seen."""
    is_needed: bool = True
    """Without it the field is refused; else less is done, and nothing wrong."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.target}"

    def apply(self, module: ModuleType) -> None:
        """Put the wrapper in place, once, if the function is as `vllm_contract` says.

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
            original = _passing_on(attribute)
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
        """Also under somebody else's wrapper, if that says what it wraps."""
        found: Any = module
        for part in self.target.split("."):
            found = getattr(found, part, None)
        while found is not None:
            if MARK in getattr(found, "__dict__", {}) and found.__dict__[MARK]:
                return True
            found = getattr(found, "__wrapped__", None)
        return False


def _passing_on(attribute: str) -> Callable[..., Any]:
    def passed_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.worker, attribute)(*args, **kwargs)

    passed_on.__name__ = attribute
    return passed_on


# What is put around vLLM's functions


def _remembers_configuration(construct: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from dftserve_vllm import body_limit
        from dftserve_vllm.policy import policy
        from dftserve_vllm.request_params import default_diversity

        engine.record(vllm_config)
        _import_what_the_engine_runs()
        engine.styles()  # What is refused is logged as the server starts.
        default_diversity()  # A wrong one stops the server here, not a request.
        policy()  # Likewise.
        body_limit.largest()
        _log_what_is_in_force()
        construct(self, vllm_config, *args, **kwargs)

    return wrapped


def _log_what_is_in_force() -> None:
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


def _import_what_the_engine_runs() -> None:
    """The engine core and its workers may be other processes, from which nobody can refuse: what
    is missing there is missing here as well, and is seen when it is imported."""
    for hook in _installed:
        if hook.is_needed and hook.module.startswith("vllm.v1."):
            with contextlib.suppress(ImportError):  # `problems` names it.
                importlib.import_module(hook.module)


def _honours_field(to_sampling_params: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.honour(to_sampling_params)


def _refuses_beam_search(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.refuse_beam_search(to_beam_search_params)


def _takes_named_adapter(maybe_get_adapters: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import request_params

    return request_params.take_adapter(maybe_get_adapters)


def _tells_choices_apart(get_child_info: Callable[..., Any]) -> Callable[..., Any]:
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
    """On a CPU, vLLM 0.32 looks at `vars` of all that any module holds, for kernels to replace.
    llvmlite's library answers that with a function of its own, and a second engine in a process,
    or one after numba was imported, would not start."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        with logged_once("numba's library may keep an engine from starting"):
            if (llvmlite := sys.modules.get("llvmlite.binding.ffi")) is not None:
                llvmlite.lib._fntab["__dict__"] = {}
        rebind(*args, **kwargs)

    return wrapped


def _takes_draws_back(sample: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import seeds

    return seeds.takes_back(sample)


def _leaves_offsets(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    from dftserve_vllm import seeds

    return seeds.leaves_offsets(bookkeeping)


PROTOCOLS = {
    "ChatCompletionRequest": "vllm.entrypoints.openai.chat_completion.protocol",
    "CompletionRequest": "vllm.entrypoints.openai.completion.protocol",
    "ResponsesRequest": "vllm.entrypoints.openai.responses.protocol",
}
"""The requests that take the fields, and their modules."""

REQUEST_HOOKS = (
    *(Hook(m, f"{name}.to_sampling_params", _honours_field) for name, m in PROTOCOLS.items()),
    *(
        Hook(PROTOCOLS[name], f"{name}.to_beam_search_params", _refuses_beam_search)
        for name in ("ChatCompletionRequest", "CompletionRequest")
    ),
)
"""What sees the field in a request. Where one is missing, `app` refuses in its place."""

_WORKER = "vllm.v1.worker.worker_base"
_OUTPUTS = "vllm.v1.engine.output_processor"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_APP = "vllm.entrypoints.launchers.app"
ADAPTERS = Hook(
    "vllm.entrypoints.serve.engine.serving",
    "BaseServing._maybe_get_adapters",
    _takes_named_adapter,
    is_needed=False,
)
"""Without it no style names an adapter."""
HOOKS = (
    *REQUEST_HOOKS,
    ADAPTERS,
    Hook("vllm.v1.engine.input_processor", "InputProcessor.__init__", _remembers_configuration),
    Hook("vllm.v1.engine.parallel_sampling", "ParentRequest.get_child_info", _tells_choices_apart),
    Hook(_WORKER, "WorkerWrapperBase.execute_model", _reports),
    Hook(_WORKER, "WorkerWrapperBase.sample_tokens", _reports, passes_on="WorkerBase"),
    Hook("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", _forwards_reports),
    Hook(_OUTPUTS, "OutputProcessor.add_request", _notes_choices),
    Hook(_OUTPUTS, "OutputProcessor.process_outputs", _collects_statistics),
    # The second holds its own name for the first's function, and may have been imported before us.
    Hook(_APP, "build_app", _extends_app),
    Hook("vllm.entrypoints.launchers.api_server.entry", "build_app", _extends_app),
    Hook("vllm.triton_utils.dispatcher", "_rebind_kernels", _survives_numba, is_needed=False),
    Hook(_RUNNER, "GPUModelRunner._sample", _takes_draws_back, is_needed=False),
    Hook(_RUNNER, "GPUModelRunner._bookkeeping_sync", _leaves_offsets, is_needed=False),
)
APP = f"{_APP}.build_app"
"""The name of the hook that answers go through."""

_installed: tuple[Hook, ...] = ()
_failed: dict[str, str] = {}
_present: set[str] = set()
"""Modules that are not imported and were found: the file system is searched once for each."""


def install() -> None:
    """Ask for every change; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = REQUEST_HOOKS if engine.unsupported_here() else HOOKS
    for hook in _installed:
        when_imported(hook.module, partial(_apply, hook))


def _apply(hook: Hook, module: ModuleType) -> None:
    """Nothing that goes wrong here may keep vLLM from importing its module."""
    try:
        hook.apply(module)
    except Exception as error:  # noqa: BLE001 - the server must start
        failed(hook.name, error)


def failed(name: str, error: Exception) -> None:
    """A hook does not do what it is there for, although the server goes on."""
    _failed[name] = f"{type(error).__name__}: {error}"
    logger.warning("dftserve: %s is not in place: %s", name, error)


def problems() -> dict[str, str]:
    """The hooks that are not in place in this process, by name, with the reason."""
    return _problems_of(_installed)


def refusal() -> str | None:
    """Why the field is refused: what is missing that it needs; None where nothing is. Asked several
    times a request, in the server's event loop."""
    found = _problems_of(hook for hook in _installed if hook.is_needed)
    if not found:
        return None
    first, reason = next(iter(found.items()))
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
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
    """None for a module that is there, and will be changed when it is imported."""
    if module in _present:
        return None
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # noqa: BLE001 - its package does not import: vLLM will say so
        return f"{type(error).__name__}: {error}"
    if found is None:
        return "this vLLM has no such module"
    _present.add(module)
    return None
