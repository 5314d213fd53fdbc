"""Faults in one hook of the plug-in, injected before vLLM is imported.

A fault is named `HOOK:KIND`; a hook has its name in vLLM's code (`ParentRequest.get_child_info`):

    moved      vLLM has the module under another name
    renamed    … the class, function or method
    signature  … the function or method with one more parameter, before all others
    lost       other code requests the module's spec before vLLM imports it
    raises     an exception when the plug-in accesses the module's class or function
    decorated  build_app only: another plug-in has wrapped it first

The first three edit vLLM's source when it is loaded, including callers, so vLLM itself still works.
Only the standard library is used: this runs before everything else.
"""

import functools
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = ("moved", "renamed", "signature", "lost", "raises", "decorated")
MOVED = "_moved"
INJECTED = "an injected fault"


@dataclass(frozen=True)
class Edit:
    """A replacement in the sources of vLLM whose path contains one of `files`; in all if empty."""

    pattern: str
    replacement: str
    files: tuple[str, ...] = ()

    def of(self, path: str, source: str) -> str:
        if self.files and not any(name in path for name in self.files):
            return source
        return re.sub(self.pattern, self.replacement, source)


@dataclass(frozen=True)
class Hook:
    """A function that the plug-in changes, and how another version of vLLM might differ there."""

    module: str
    path: str
    """A function, a class or a method of the module."""
    new_path: str
    """The path under `renamed`."""
    renamed: tuple[Edit, ...]
    signature: tuple[Edit, ...] = ()
    """Empty if the fault does not apply."""
    relative: tuple[Edit, ...] = field(default=())
    """Edits of relative imports of the module, for `moved`."""

    def edits(self, kind: str) -> Iterable[Edit]:
        if kind == "moved":
            return (Edit(rf"\b{re.escape(self.module)}\b", self.module + MOVED), *self.relative)
        return {"renamed": self.renamed, "signature": self.signature}.get(kind, ())


def _method(name: str, new_name: str, *files: str) -> dict[str, tuple[Edit, ...]]:
    """The edits of a method that is called as `request.NAME(`, in these files only."""
    return {
        "renamed": (Edit(rf"\b{name}\b", new_name, files),),
        "signature": (
            Edit(rf"(def {name}\(\s*self,)", r"\1 extra,", files),
            Edit(rf"(\w\.{name}\()", r"\1None, ", files),
        ),
    }


def _request(owner: str, folder: str, name: str, new_name: str) -> Hook:
    return Hook(
        f"vllm.entrypoints.openai.{folder}.protocol",
        f"{owner}.{name}",
        f"{owner}.{new_name}",
        **_method(name, new_name, f"/entrypoints/openai/{folder}/"),
    )


def _output_processor(name: str, new_name: str) -> Hook:
    definition = ("v1/engine/output_processor.py",)
    return Hook(
        "vllm.v1.engine.output_processor",
        f"OutputProcessor.{name}",
        f"OutputProcessor.{new_name}",
        renamed=(
            Edit(rf"def {name}\(", f"def {new_name}(", definition),
            Edit(rf"output_processor\.{name}\(", f"output_processor.{new_name}("),
        ),
        signature=(
            Edit(rf"(def {name}\(\s*self,)", r"\1 extra,", definition),
            Edit(rf"(output_processor\.{name}\()", r"\1None, "),
        ),
    )


def _runner(name: str, new_name: str) -> Hook:
    return Hook(
        "vllm.v1.worker.gpu_model_runner",
        f"GPUModelRunner.{name}",
        f"GPUModelRunner.{new_name}",
        **_method(name, new_name, "v1/worker/gpu_model_runner.py", "v1/worker/cpu_model_runner.py"),
    )


_CHAT, _TEXT, _RESPONSES = "chat_completion", "completion", "responses"
_SAMPLE = ("to_sampling_params", "to_params_for_sampling")
_BEAM = ("to_beam_search_params", "to_params_for_beam_search")
_WRAPPER = ("v1/worker/worker_base.py",)
_WORKERS = ("v1/worker/worker_base.py", "v1/worker/gpu_worker.py")
_EXECUTORS = ("v1/executor/",)
_SCHEDULING = ("v1/core/sched/", "v1/engine/core.py")
_ENTRY = "/launchers/api_server/entry.py"
_APP_SIGNATURE = (
    Edit(r"(def build_app\()(?=\s*args)", r"\1extra, "),
    Edit(r"(= build_app\()", r"\1None, "),
)

HOOKS = {
    "InputProcessor.__init__": Hook(
        "vllm.v1.engine.input_processor",
        "InputProcessor.__init__",
        "RequestProcessor.__init__",
        renamed=(Edit(r"\bInputProcessor\b", "RequestProcessor"),),
        signature=(
            Edit(r"(def __init__\(\s*self,)(?=\s*vllm_config)", r"\1 extra,", ("input_processor",)),
            Edit(r"(= InputProcessor\()", r"\1None, "),
        ),
    ),
    "ChatCompletionRequest.to_sampling_params": _request("ChatCompletionRequest", _CHAT, *_SAMPLE),
    "CompletionRequest.to_sampling_params": _request("CompletionRequest", _TEXT, *_SAMPLE),
    "ResponsesRequest.to_sampling_params": _request("ResponsesRequest", _RESPONSES, *_SAMPLE),
    "ChatCompletionRequest.to_beam_search_params": _request("ChatCompletionRequest", _CHAT, *_BEAM),
    "CompletionRequest.to_beam_search_params": _request("CompletionRequest", _TEXT, *_BEAM),
    "ParentRequest.get_child_info": Hook(
        "vllm.v1.engine.parallel_sampling",
        "ParentRequest.get_child_info",
        "ParentRequest.child_info",
        **_method("get_child_info", "child_info"),
    ),
    "WorkerWrapperBase.execute_model": Hook(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.execute_model",
        "WorkerWrapperBase.run_model",
        renamed=(
            Edit(r"def execute_model\(", "def run_model(", _WRAPPER),
            Edit('"execute_model"', '"run_model"', _EXECUTORS),
        ),
        signature=(
            Edit(r"(def execute_model\(\s*self,)", r"\1 extra,", _WRAPPER),
            Edit(r'("execute_model",\s*args=\()', r"\1None, ", _EXECUTORS),
        ),
    ),
    "WorkerWrapperBase.sample_tokens": Hook(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.sample_tokens",
        "WorkerWrapperBase.sample_rows",
        renamed=(
            Edit(r"def sample_tokens\(", "def sample_rows(", _WORKERS),
            Edit(r"self\.sample_tokens\b", "self.sample_rows", _WORKERS),
            Edit('"sample_tokens"', '"sample_rows"', _EXECUTORS),
        ),
    ),
    "Scheduler.update_from_output": Hook(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        "Scheduler.update_with_output",
        renamed=(Edit(r"\bupdate_from_output\b", "update_with_output", _SCHEDULING),),
        signature=(
            Edit(r"(def update_from_output\(\s*self,)", r"\1 extra,", _SCHEDULING),
            Edit(r"(scheduler\.update_from_output\()", r"\1None, ", _SCHEDULING),
        ),
    ),
    "OutputProcessor.add_request": _output_processor("add_request", "take_request"),
    "OutputProcessor.process_outputs": _output_processor("process_outputs", "handle_outputs"),
    "build_app": Hook(
        "vllm.entrypoints.launchers.app",
        "build_app",
        "make_app",
        renamed=(Edit(r"\bbuild_app\b", "make_app"),),
        signature=_APP_SIGNATURE,
        relative=(Edit(r"from \.\.app import", f"from ..app{MOVED} import"),),
    ),
    "entry.build_app": Hook(
        "vllm.entrypoints.launchers.api_server.entry",
        "build_app",
        "make_app",
        renamed=(
            Edit(r"import build_app", "import build_app as make_app", (_ENTRY,)),
            Edit(r"= build_app\(", "= make_app(", (_ENTRY,)),
        ),
        signature=_APP_SIGNATURE,
        relative=(Edit(r"from \.api_server\.entry", f"from .api_server.entry{MOVED}"),),
    ),
    "BaseServing._maybe_get_adapters": Hook(
        "vllm.entrypoints.serve.engine.serving",
        "BaseServing._maybe_get_adapters",
        "BaseServing._adapters_of",
        **_method("_maybe_get_adapters", "_adapters_of", "/entrypoints/"),
    ),
    "GPUModelRunner._sample": _runner("_sample", "_draw"),
    "GPUModelRunner._bookkeeping_sync": _runner("_bookkeeping_sync", "_keep_books"),
    "_rebind_kernels": Hook(
        "vllm.triton_utils.dispatcher",
        "_rebind_kernels",
        "_bind_kernels_anew",
        renamed=(Edit(r"\b_rebind_kernels\b", "_bind_kernels_anew"),),
        signature=(
            Edit(r"(def _rebind_kernels\()", r"\1extra, "),
            Edit(r"(\n    _rebind_kernels\()", r"\1None, "),
        ),
    ),
}

FAULTS = [
    f"{name}:{kind}"
    for name, hook in HOOKS.items()
    for kind in KINDS
    if kind != "signature" or hook.signature
    if kind != "decorated" or hook.path == "build_app"
]


def install(fault: str) -> None:
    """Inject the fault into every import from now on."""
    name, _, kind = fault.rpartition(":")
    hook = HOOKS[name]
    if edits := tuple(hook.edits(kind)):
        _edit_sources(edits)
    if kind == "moved":
        _move(hook.module)
    elif kind == "raises":
        _after(hook.module, lambda module: _make_raising(module, hook.path.partition(".")[0]))
    elif kind == "decorated":
        _after(hook.module, lambda module: _decorate(module, hook.path))
    elif kind == "lost":
        _after("dftserve_vllm.hooks", lambda module: _ask_after_install(module, hook.module))


def _edit_sources(edits: tuple[Edit, ...]) -> None:
    loader = importlib.machinery.SourceFileLoader
    get_code = loader.get_code

    def edited(self, fullname):
        if not fullname.startswith("vllm."):
            return get_code(self, fullname)
        path = self.get_filename(fullname)
        source = text = self.get_data(path).decode()
        for edit in edits:
            text = edit.of(path, text)
        return get_code(self, fullname) if text == source else compile(text, path, "exec")

    loader.get_code = edited


def _move(name: str) -> None:
    """The module is found as NAME_moved, and no longer as NAME."""
    finder = importlib.machinery.FileFinder
    find_spec = finder.find_spec

    def moved(self, fullname, target=None):
        if fullname == name:
            return None
        if fullname != name + MOVED:
            return find_spec(self, fullname, target)
        spec = find_spec(self, name, target)
        return spec and importlib.util.spec_from_file_location(fullname, spec.origin)

    finder.find_spec = moved


def _after(name: str, change) -> None:
    """Call `change(module)` directly after the module is executed, before other such callbacks."""
    loader = importlib.machinery.SourceFileLoader
    exec_module = loader.exec_module

    def executed(self, module):
        exec_module(self, module)
        if module.__name__ == name:
            change(module)

    loader.exec_module = executed


def _make_raising(module: types.ModuleType, name: str) -> None:
    """Raise only for accesses by the plug-in, as vLLM must work."""

    class Raising(types.ModuleType):
        def __getattribute__(self, attribute):
            if attribute in (name, "__dict__") and _is_ours(sys._getframe(1)):
                raise RuntimeError(INJECTED)
            return super().__getattribute__(attribute)

    module.__class__ = Raising


def _decorate(module: types.ModuleType, name: str) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def decorated(*args, **kwargs):
        return function(*args, **kwargs)

    setattr(module, name, decorated)


def _is_ours(frame: types.FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("dftserve_vllm")


def _ask_after_install(hooks: types.ModuleType, name: str) -> None:
    install = hooks.install

    def installed():
        install()
        if name not in sys.modules:
            importlib.util.find_spec(name)

    vars(hooks)["install"] = installed
