"""The supported versions of vLLM, and every symbol of vLLM that the plug-in depends on.

The plug-in, `dftserve doctor` and the tests read both from here. The symbols are checked in two
ways: in source files by `ast`, before anything is installed or imported, and in a module that vLLM
has just imported, before the plug-in changes it.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from zipfile import Path as ZipPath

SUPPORTED: tuple[tuple[int, int], ...] = ((0, 31), (0, 32), (0, 33))
"""vLLM's minor versions that the tests run on, oldest first."""

TRANSFORMERS = ("5.16.1", "5.25")
"""The oldest version of transformers with which training and evaluation are tested, and the first
newer one with which they are not. vLLM itself allows only a narrower range."""

Hook = Literal[
    "field",
    "statistics",
    "answer",
    "adapters",
    "processor V1",
    "processor V2",
    "numba",
    "seeds",
]


def minor(version: str) -> tuple[int, int] | None:
    """`"0.32.1+cpu"` -> `(0, 32)`; None for a text that does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def supported_range() -> str:
    """For a reader: `0.31 to 0.33`."""
    return " to ".join(_dotted(SUPPORTED[end]) for end in (0, -1))


def requirement() -> str:
    """For pip: `>=0.31,<0.34`."""
    major, newest = SUPPORTED[-1]
    return f">={_dotted(SUPPORTED[0])},<{_dotted((major, newest + 1))}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def unsupported(version: str) -> str | None:
    """Why the plug-in changes nothing on this version of vLLM, or None."""
    if minor(version) in SUPPORTED:
        return None
    supported = ", ".join(map(_dotted, SUPPORTED))
    return f"vLLM {version} is not supported (supported: {supported}); install one of these"


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """Something of vLLM that the plug-in calls, replaces, inherits from or reads."""

    module: str
    name: str
    """A function, a class, or `Class.member`: a method, a property or a field."""
    parameters: tuple[str, ...] | None = None
    """The leading parameters after `self`, or keyword-only ones, that the plug-in uses."""
    hook: Hook
    """The part of the plug-in that needs it."""
    required: bool
    """Whether the field needs it; otherwise only some other function is lost without it."""

    @property
    def signature(self) -> str:
        """The name, with the parameters where they matter."""
        return (
            self.name if self.parameters is None else f"{self.name}({', '.join(self.parameters)})"
        )

    def __str__(self) -> str:
        return f"{self.module}: {self.signature}"


@dataclass(frozen=True)
class Problem:
    """A symbol that is missing, or not as the plug-in needs it."""

    symbol: Symbol
    text: str
    """What was found instead."""

    def __str__(self) -> str:
        return f"{self.symbol}: {self.text}"


def _needed(
    hook: Hook, module: str, *members: str | tuple[str, tuple[str, ...]], required: bool = True
) -> Iterator[Symbol]:
    for member in members:
        name, parameters = member if isinstance(member, tuple) else (member, None)
        yield Symbol(module=module, name=name, parameters=parameters, hook=hook, required=required)


_OPENAI = "vllm.entrypoints.openai"
_V1 = "vllm.v1.sample.logits_processor.interface"
_V2 = "vllm.v1.worker.gpu.sample.logits_processor.interface"
_ASKED = ("max_tokens", "default_sampling_params")
_CUTS = ("min_p", "top_k", "top_p")
_CARRIED = ("extra_args", "temperature", *_CUTS, "n", "seed", "stop_token_ids", "ignore_eos")

SYMBOLS: tuple[Symbol, ...] = (
    *_needed(
        "field",
        f"{_OPENAI}.chat_completion.protocol",
        ("ChatCompletionRequest.to_sampling_params", _ASKED),
        ("ChatCompletionRequest.to_beam_search_params", _ASKED),
    ),
    *_needed(
        "field",
        f"{_OPENAI}.completion.protocol",
        ("CompletionRequest.to_sampling_params", _ASKED),
        ("CompletionRequest.to_beam_search_params", _ASKED),
    ),
    *_needed(
        "field",
        f"{_OPENAI}.responses.protocol",
        ("ResponsesRequest.to_sampling_params", ("default_max_tokens", "default_sampling_params")),
    ),
    *_needed(
        "field",
        "vllm.v1.engine.input_processor",
        ("InputProcessor.__init__", ("vllm_config",)),
    ),
    *_needed(
        "field",
        "vllm.sampling_params",
        *(f"SamplingParams.{name}" for name in (*_CARRIED, "stop", "all_stop_token_ids")),
    ),
    *_needed(
        "field",
        "vllm.exceptions",
        ("VLLMValidationError.__init__", ("message", "parameter", "value")),
    ),
    *_needed(
        "field",
        "vllm.config.vllm",
        "VllmConfig.use_v2_model_runner",
        "VllmConfig.speculative_config",
        "VllmConfig.model_config",
        "VllmConfig.scheduler_config",
    ),
    *_needed(
        "field",
        "vllm.config.model",
        "ModelConfig.override_generation_config",
        "ModelConfig.is_diffusion",
    ),
    *_needed(
        "field",
        "vllm.config.speculative",
        "SpeculativeConfig.method",
        "SpeculativeConfig.num_speculative_tokens",
        "SpeculativeConfig.rejection_sample_method",
    ),
    *_needed(
        "processor V1",
        _V1,
        ("LogitsProcessor.__init__", ("vllm_config", "device", "is_pin_memory")),
        ("LogitsProcessor.validate_params", ("sampling_params",)),
        ("LogitsProcessor.update_state", ("batch_update",)),
        ("LogitsProcessor.apply", ("logits",)),
        ("LogitsProcessor.is_argmax_invariant", ()),
        "BatchUpdate.added",
        "BatchUpdate.removed",
        "BatchUpdate.moved",
        "MoveDirectionality.SWAP",
    ),
    *_needed("processor V1", "vllm.config.scheduler", "SchedulerConfig.max_num_seqs"),
    *_needed(
        "processor V2",
        _V2,
        ("LogitsProcessor.__init__", ("vllm_config", "req_states")),
        ("LogitsProcessor.validate_params", ("sampling_params",)),
        ("LogitsProcessor.add_request", ("req_idx", "sampling_params")),
        ("LogitsProcessor.apply_staged_writes", ()),
        ("LogitsProcessor.apply", ("logits", "ctx")),
        "LogitsProcRequestState.device",
        "LogitsProcRequestState.max_num_reqs",
        "LogitsProcRequestState.prefill_len",
        "LogitsProcRequestState.prompt_len",
        "LogitsContext.idx_mapping_np",
        "LogitsContext.expanded_idx_mapping",
        "LogitsContext.expanded_local_pos",
        "LogitsContext.pos",
    ),
    # Only for the law `words`: without it, its rows stay unchanged, which counts as a fault.
    *_needed("processor V2", _V2, "LogitsContext.input_ids", required=False),
    # Also only for parts of the field: without it, these are answered with 400.
    *_needed(
        "field",
        "vllm.tokenizers",
        ("cached_tokenizer_from_config", ("model_config",)),
        required=False,
    ),
    *_needed(
        "processor V2",
        "vllm.v1.worker.gpu.buffer_utils",
        "UvaBackedTensor.np",
        "UvaBackedTensor.gpu",
    ),
    *_needed(
        "statistics",
        "vllm.v1.engine.parallel_sampling",
        ("ParentRequest.get_child_info", ("index",)),
        "ParentRequest.request_id",
        "ParentRequest.sampling_params",
    ),
    *_needed(
        "statistics",
        "vllm.v1.worker.worker_base",
        ("WorkerWrapperBase.execute_model", ("scheduler_output",)),
        "WorkerWrapperBase.__getattr__",
        ("WorkerBase.sample_tokens", ("grammar_output",)),
    ),
    *_needed(
        "statistics",
        "vllm.v1.core.sched.scheduler",
        ("Scheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    ),
    *_needed(
        "statistics",
        "vllm.v1.engine.output_processor",
        ("OutputProcessor.add_request", ("request",)),
        ("OutputProcessor.process_outputs", ("engine_core_outputs",)),
        "OutputProcessor.request_states",
    ),
    *_needed(
        "statistics",
        "vllm.v1.outputs",
        "ModelRunnerOutput.req_ids",
        "ModelRunnerOutput.req_id_to_index",
        ("AsyncModelRunnerOutput.get_output", ()),
    ),
    *_needed(
        "statistics",
        "vllm.v1.engine",
        "EngineCoreOutput.request_id",
        "EngineCoreOutput.new_token_ids",
        "EngineCoreOutput.finish_reason",
        "EngineCoreOutput.kv_transfer_params",
        "EngineCoreOutputs.outputs",
        "EngineCoreRequest.request_id",
        "EngineCoreRequest.sampling_params",
    ),
    *_needed("statistics", "vllm.config.parallel", "ParallelConfig.data_parallel_index"),
    *_needed("statistics", "vllm.v1.metrics.prometheus", ("get_prometheus_registry", ())),
    *_needed("answer", "vllm.entrypoints.launchers.app", ("build_app", ("args",))),
    *_needed("answer", "vllm.entrypoints.launchers.api_server.entry", "build_app"),
    *_needed(
        "adapters",
        "vllm.entrypoints.serve.engine.serving",
        ("BaseServing._maybe_get_adapters", ("request",)),
        "BaseServing.models",
        required=False,
    ),
    *_needed(
        "adapters",
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.lora_requests",
        required=False,
    ),
    *_needed(
        "numba",
        "vllm.triton_utils.dispatcher",
        ("_rebind_kernels", ("overrides",)),
        required=False,
    ),
    *_needed(
        "seeds",
        "vllm.v1.worker.gpu_model_runner",
        ("GPUModelRunner._sample", ("logits",)),
        ("GPUModelRunner._bookkeeping_sync", ("scheduler_output", "sampler_output")),
        "GPUModelRunner.input_batch",
        "GPUModelRunner.discard_request_mask",
        "GPUModelRunner.device",
        required=False,
    ),
)

INHERITED: tuple[tuple[str, str], ...] = ((_V1, "LogitsProcessor"), (_V2, "LogitsProcessor"))
"""(module, class) of the vLLM classes that ours inherit from. Each of their abstract methods must
be a symbol, since our classes cannot be instantiated without a definition of it."""


# In source files

Root = Path | ZipPath


def missing_in_source(root: Root) -> list[Problem]:
    """Which of `SYMBOLS` these source files lack; nothing is imported.

    Args:
        root: a folder, or a path in a .whl, that contains `vllm/`; or that folder itself.

    Raises:
        FileNotFoundError: there is no vLLM there.
    """
    folder = package(root)
    sources = {name: _Source(folder, name) for name in {symbol.module for symbol in SYMBOLS}}
    lacking = [
        Problem(symbol, text)
        for symbol in SYMBOLS
        if (text := sources[symbol.module].fault(symbol)) is not None
    ]
    return lacking + [
        Problem(symbol, "it is abstract, and the plug-in has no such method")
        for module, owner in INHERITED
        for symbol in _not_known(module, owner, sources[module].abstract(owner))
    ]


def _not_known(module: str, owner: str, methods: Iterable[str]) -> Iterator[Symbol]:
    known = {symbol.name: symbol for symbol in SYMBOLS if symbol.module == module}
    hook = known[f"{owner}.__init__"].hook
    for name in (f"{owner}.{method}" for method in methods):
        if name not in known:
            yield Symbol(module=module, name=name, hook=hook, required=True)


def package(root: Root) -> Root:
    """The `vllm` folder at, or in, this path.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (root / "vllm", root):
        if (folder / "__init__.py").is_file() and (folder / "v1").is_dir():
            return folder
    raise FileNotFoundError(
        f"{root}: no vLLM there; accepted: a vllm folder, the folder that holds it, or a .whl of it"
    )


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.stmt


class _Source:
    """The names that one module's source defines."""

    def __init__(self, folder: Root, module: str) -> None:
        self._folder = folder
        inside = "/".join(module.split(".")[1:])
        files = (folder / f"{inside}.py", folder / inside / "__init__.py")
        file = next((file for file in files if file.is_file()), None)
        self._unread = "the module is not there" if file is None else None
        self._names: dict[str, Definition] = {}
        if file is not None:
            self._read(file)

    def _read(self, file: Root) -> None:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as problem:  # Also for syntax of a newer Python.
            self._unread = f"its source cannot be read: {problem}"
        else:
            self._names = dict(_defined(tree.body))

    def fault(self, symbol: Symbol) -> str | None:
        """What is wrong with the symbol here, or None."""
        if self._unread is not None:
            return self._unread
        owner, _, member = symbol.name.partition(".")
        definition = self._names.get(owner)
        if definition is not None and member:
            definition = self.member(owner, member)
        if definition is None:
            return "it is not there"
        return _signature_fault(symbol, _parameters_of(definition))

    def member(self, owner: str, name: str) -> Definition | None:
        """A class's own member, or that of the first base class with one in the source."""
        definition = self._names.get(owner)
        if isinstance(definition, ast.ImportFrom):
            return self._elsewhere(definition, owner, name)
        if not isinstance(definition, ast.ClassDef):
            return None
        own = dict(_defined(definition.body)) | dict(_assigned_to_self(definition))
        if name in own:
            return own[name]
        bases = (base.id for base in definition.bases if isinstance(base, ast.Name))
        inherited = (self.member(base, name) for base in bases)
        return next((one for one in inherited if one is not None), None)

    def abstract(self, owner: str) -> list[str]:
        """The class's abstract methods."""
        definition = self._names.get(owner)
        if not isinstance(definition, ast.ClassDef):
            return []
        return [name for name, member in _defined(definition.body) if _is_abstract(member)]

    def _elsewhere(self, imported: ast.ImportFrom, owner: str, name: str) -> Definition | None:
        module = imported.module or ""
        if imported.level or not module.startswith("vllm."):
            return None
        original = next(a.name for a in imported.names if owner in (a.asname, a.name))
        return _Source(self._folder, module).member(original, name)


def _defined(body: Iterable[ast.stmt]) -> Iterator[tuple[str, Definition]]:
    """The names that these statements bind, including those bound conditionally."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name, statement
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.Assign(targets=targets):
                yield from ((t.id, statement) for t in targets if isinstance(t, ast.Name))
            case ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name, statement) for alias in names)
            case ast.If(body=then, orelse=otherwise):
                yield from _defined([*then, *otherwise])
            case ast.Try(body=tried, handlers=handlers):
                yield from _defined([*tried, *(s for h in handlers for s in h.body)])


def _is_abstract(definition: Definition) -> bool:
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    names = (ast.unparse(decorator) for decorator in definition.decorator_list)
    return any(name.rpartition(".")[2] == "abstractmethod" for name in names)


def _assigned_to_self(definition: ast.ClassDef) -> Iterator[tuple[str, Definition]]:
    """Attributes that the constructor sets."""
    for method in definition.body:
        if not isinstance(method, ast.FunctionDef) or method.name != "__init__":
            continue
        for node in ast.walk(method):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    yield name, ast.Expr(node)


# Signatures


@dataclass(frozen=True)
class _Parameters:
    positional: tuple[str, ...]
    """Without `self` or `cls`."""
    keyword_only: tuple[str, ...]
    takes_any: bool
    """Whether it has `*args`: a wrapper whose signature does not show that of the function."""

    def __str__(self) -> str:
        star = ("*",) if self.keyword_only else ()
        return f"({', '.join((*self.positional, *star, *self.keyword_only))})"


def _signature_fault(symbol: Symbol, got: _Parameters | None) -> str | None:
    if symbol.parameters is None or got is None or got.takes_any:
        return None
    leading = got.positional[: len(symbol.parameters)]
    is_as_needed = all(
        name in got.keyword_only or leading[index : index + 1] == (name,)
        for index, name in enumerate(symbol.parameters)
    )
    return None if is_as_needed else f"it takes {got}"


def _parameters_of(definition: Definition) -> _Parameters | None:
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    arguments = definition.args
    positional = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args))
    return _Parameters(
        _without_self(positional),
        tuple(a.arg for a in arguments.kwonlyargs),
        arguments.vararg is not None,
    )


def _without_self(positional: tuple[str, ...]) -> tuple[str, ...]:
    return positional[1:] if positional[:1] in (("self",), ("cls",)) else positional


# In a module that is imported


def missing_in_module(module: ModuleType, symbols: Iterable[Symbol] = SYMBOLS) -> list[Problem]:
    """Which of the module's symbols it lacks.

    Args:
        module: imported, and not changed by the plug-in. Functions wrapped by others are checked as
            they were before, if the wrappers set `__wrapped__`.
    """
    return [
        Problem(symbol, text)
        for symbol in symbols
        if symbol.module == module.__name__ and (text := _fault(module, symbol)) is not None
    ]


def _fault(module: ModuleType, symbol: Symbol) -> str | None:
    owner, _, member = symbol.name.partition(".")
    holder = getattr(module, owner, None)
    if holder is None or (member and not (isinstance(holder, type) and _has(holder, member))):
        return "it is not there"
    attribute = getattr(holder, member, None) if member else holder
    if symbol.parameters is None or not inspect.isroutine(attribute):
        return None
    return _signature_fault(symbol, _signature(attribute))


def _has(holder: type, member: str) -> bool:
    """Whether a class has a member. Fields without a default exist only as annotations, and those
    that a constructor sets only in its code."""
    inherited = vars(object).get(member)
    if getattr(holder, member, inherited) is not inherited:
        return True
    declared = any(member in vars(one).get("__annotations__", {}) for one in holder.__mro__)
    code = getattr(inspect.unwrap(holder.__init__), "__code__", None)
    return declared or (code is not None and member in code.co_names)


def _signature(function: Any) -> _Parameters | None:
    try:
        kinds = inspect.signature(function).parameters.values()
    except ValueError:  # Compiled functions may have no signature.
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return _Parameters(
        _without_self(tuple(p.name for p in kinds if p.kind in positional)),
        tuple(p.name for p in kinds if p.kind is inspect.Parameter.KEYWORD_ONLY),
        any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in kinds),
    )
