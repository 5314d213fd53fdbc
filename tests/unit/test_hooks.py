"""Hooks: installed once, reported with a reason if missing, and never harmful to vLLM."""

import subprocess
import sys
import types

import pytest
from dftserve_vllm import hooks, request_params, seeds
from dftserve_vllm.hooks import Hook
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from dftserve import vllm_contract

SEARCH = """
import numba
from dftserve_vllm import register
register()
from vllm.triton_utils import dispatcher
kept, original, wrapper = lambda: None, object(), object()
kept.kernel = original
dispatcher.kept = kept
dispatcher._rebind_kernels([(original, wrapper)])
assert kept.kernel is wrapper
numba.njit(lambda x: x + 1)(1)
"""

SEEDS = """
import types, torch, numpy as np
from dftserve_vllm import register
from vllm.v1.worker import gpu_model_runner
stock = {name: getattr(gpu_model_runner.GPUModelRunner, name) for name in NAMES}
register()
ours = {name: getattr(gpu_model_runner.GPUModelRunner, name) for name in NAMES}

class Reached(Exception):
    "What vLLM does after the generators."

class Rows:
    num_reqs = 3
    def __init__(self):
        seeded = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
        self.generators = {0: seeded[0], 2: seeded[1]}
        self.sampling_metadata = None
    def update_async_output_token_ids(self):
        pass
    @property
    def req_ids(self):
        raise Reached

def runner():
    rows = Rows()
    def sampler(logits, sampling_metadata):
        by_row = sorted(rows.generators.items())
        return [torch.rand(2, generator=each).tolist() for _, each in by_row]
    mask = types.SimpleNamespace(np=np.array([True, True, False]))
    return types.SimpleNamespace(
        input_batch=rows, discard_request_mask=mask, device=torch.device("cpu"), sampler=sampler,
        use_async_scheduling=True, _get_nans_in_logits=lambda logits: {},
    )

def end(run, function):
    try:
        function(run, None, None, None, None, 0)
    except Exception as error:
        return type(error).__name__

one = runner()
print(end(one, stock["_bookkeeping_sync"]), end(one, ours["_bookkeeping_sync"]))
print(sorted(one.input_batch.generators))
first, second = (ours["_sample"](one, None, None) for _ in range(2))
print(first[0] == second[0], first[1] == second[1])
""".replace("NAMES", "('_sample', '_bookkeeping_sync')")

ALL = """
import importlib
from dftserve_vllm import engine, hooks, register
register()
for hook in hooks.HOOKS:
    importlib.import_module(hook.module)
print(hooks.problems(), engine.refusal())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_vllms_search_for_kernels_works_after_numba_is_imported():
    """Without our change an AttributeError ends the search and the engine."""
    run(SEARCH)


def test_generators_of_seeds_survive_a_chunked_prompt_on_a_cpu():
    """The first result is stock vLLM's: if it is no RuntimeError, `seeds` is no longer needed."""
    ends, generators, draws = run(SEEDS).splitlines()
    assert ends == "RuntimeError Reached"
    assert generators == "[0, 2]", "a generator was lost"
    # Row 0's token is discarded and its draw undone; row 2's counts.
    assert draws == "True False"


def test_every_hook_is_installed_on_this_vllm():
    assert run(ALL) == "{} None"


OPTIONAL = {
    "BaseServing._maybe_get_adapters",
    "_rebind_kernels",
    "GPUModelRunner._sample",
    "GPUModelRunner._bookkeeping_sync",
}
"""The hook for the adapter of a style, which is refused without it, and fixes of vLLM on a CPU."""


def test_all_hooks_but_the_optional_are_needed_and_all_are_in_the_contract():
    for hook in hooks.HOOKS:
        assert hook.is_needed != (hook.target in OPTIONAL)
        assert hook.symbols() or hook.passes_on, hook.name
        assert all(symbol.required == hook.is_needed for symbol in hook.symbols())


SYMBOL = vllm_contract.Symbol(
    module="engine", name="Engine.run", parameters=("step",), hook="statistics", required=True
)


@pytest.fixture
def module(monkeypatch):
    """A stub module of vLLM with one method, which is in the contract, and without a hook."""

    class Engine:
        def run(self, step):
            return step + 1

    made = types.ModuleType("engine")
    made.__spec__ = types.SimpleNamespace()
    made.Engine = Engine
    monkeypatch.setitem(sys.modules, "engine", made)
    monkeypatch.setattr(vllm_contract, "SYMBOLS", (SYMBOL,))
    monkeypatch.setattr(hooks, "_failed", {})
    return made


def doubling(run):
    def wrapped(self, *args, **kwargs):
        return 2 * run(self, *args, **kwargs)

    return wrapped


def install_hook(monkeypatch, **changes) -> Hook:
    hook = Hook("engine", "Engine.run", doubling, **changes)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    return hook


def test_a_hook_is_installed_once(monkeypatch, module):
    hook = install_hook(monkeypatch)
    hooks._apply(hook, module)
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 4
    assert hooks.problems() == {}
    assert hooks.refusal() is None


def test_a_hook_inside_a_third_party_wrapper_counts_as_installed(monkeypatch, module):
    import functools

    hook = install_hook(monkeypatch)
    hooks._apply(hook, module)
    ours = module.Engine.run

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    module.Engine.run = theirs
    assert hooks.problems() == {}


def test_a_third_party_wrapper_is_wrapped(monkeypatch, module):
    import functools

    stock = module.Engine.run

    @functools.wraps(stock)
    def theirs(self, *args, **kwargs):
        return 10 * stock(self, *args, **kwargs)

    module.Engine.run = theirs
    hook = install_hook(monkeypatch)
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 40


def removed(module):
    del module.Engine.run


def renamed_class(module):
    module.Machine = module.Engine
    del module.Engine


def changed_signature(module):
    module.Engine.run = lambda self, batch, step: step + 1


@pytest.mark.parametrize("fault", [removed, renamed_class, changed_signature])
def test_a_function_that_differs_from_the_contract_is_left_unchanged(monkeypatch, module, fault):
    fault(module)
    before = dict(vars(getattr(module, "Engine", object)))
    hook = install_hook(monkeypatch)
    hooks._apply(hook, module)
    assert dict(vars(getattr(module, "Engine", object))) == before
    assert "Engine.run" in hooks.refusal()


class Base:
    """A worker, whose methods the wrapper does not define."""

    def run(self, step):
        return step + 1


class Wrapper:
    """As vLLM's: it passes on the attributes that it does not have."""

    worker = Base()

    def __getattr__(self, attribute):
        return getattr(self.worker, attribute)


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_method_that_is_passed_on_must_exist_on_the_worker(monkeypatch, module, is_renamed):
    """Around a name that the engine no longer calls, a hook would be installed but never called."""
    monkeypatch.setattr(vllm_contract, "SYMBOLS", ())
    module.Wrapper, module.Base = type("Wrapper", (Wrapper,), {}), object if is_renamed else Base
    hook = Hook("engine", "Wrapper.run", doubling, passes_on="Base")
    monkeypatch.setattr(hooks, "_installed", (hook,))
    hooks._apply(hook, module)
    assert module.Wrapper().run(1) == (2 if is_renamed else 4)
    assert ("Base.run" in (hooks.refusal() or "")) == is_renamed


def test_an_exception_while_wrapping_does_not_reach_vllm(monkeypatch, module):
    def breaking(_):
        raise OSError("no")

    hook = Hook("engine", "Engine.run", breaking)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 2
    assert "OSError: no" in hooks.refusal()


def test_a_lost_or_replaced_hook_is_reported(monkeypatch, module):
    hook = install_hook(monkeypatch)
    assert "without the change" in hooks.refusal()  # Imported, but our hook was not applied.
    hooks._apply(hook, module)
    assert hooks.refusal() is None
    module.Engine.run = lambda self, step: 0
    assert "replaced" in hooks.refusal()


def test_a_missing_module_is_reported(monkeypatch):
    hook = Hook("vllm.no_such_module", "run", doubling)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    assert "no such module" in hooks.refusal()


def test_a_hook_that_is_not_needed_refuses_nothing(monkeypatch, module):
    install_hook(monkeypatch, is_needed=False)
    assert hooks.problems()
    assert hooks.refusal() is None


def test_the_file_system_is_searched_once_and_only_for_needed_modules(monkeypatch):
    """Every request with a field checks them, some several times, in the server's event loop."""
    needed, other = "xml.dom.pulldom", "xml.dom.expatbuilder"  # Installed, but not imported.
    for name in (needed, other):
        monkeypatch.delitem(sys.modules, name, raising=False)
    both = Hook(needed, "parse", doubling), Hook(other, "parse", doubling, is_needed=False)
    monkeypatch.setattr(hooks, "_installed", both)
    monkeypatch.setattr(hooks, "_present", set())
    searched = []
    search = hooks.importlib.util.find_spec
    monkeypatch.setattr(
        hooks.importlib.util, "find_spec", lambda name: searched.append(name) or search(name)
    )
    assert [hooks.refusal() for _ in range(3)] == [None] * 3
    assert searched == [needed]
    assert [hooks.problems() for _ in range(3)] == [{}] * 3
    assert searched == [needed, other]


def test_a_missing_module_is_searched_for_again(monkeypatch):
    """Its package may still have been importing."""
    monkeypatch.setattr(hooks, "_installed", (Hook("xml.dom.pulldom", "parse", doubling),))
    monkeypatch.delitem(sys.modules, "xml.dom.pulldom", raising=False)
    monkeypatch.setattr(hooks, "_present", set())
    with monkeypatch.context() as patch:
        patch.setattr(hooks.importlib.util, "find_spec", lambda _: None)
        assert "no such module" in hooks.refusal()
    assert hooks.refusal() is None


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_of_to_sampling_params_are_passed_unchanged(by_name):
    """Also those that a later vLLM may add; with the field the model's own cuts are removed."""

    def to_sampling_params(
        request, default_max_tokens, default_sampling_params=None, *rest, **named
    ):
        given.append((default_max_tokens, default_sampling_params, rest, named))
        return SamplingParams()

    given = []
    honoured = request_params.honour(to_sampling_params)
    for extra in ({}, {"diversity": 0.5}):
        request = CompletionRequest(model="m", prompt="x", **extra)
        if by_name:
            honoured(request, new=1, default_sampling_params={"top_p": 0.9}, default_max_tokens=8)
        else:
            honoured(request, 8, {"top_p": 0.9}, "rest", new=1)
    rest = () if by_name else ("rest",)
    assert given == [(8, {"top_p": 0.9}, rest, {"new": 1}), (8, {}, rest, {"new": 1})]


@pytest.mark.parametrize("wrapper", [seeds.restore_generators, seeds.hide_generators])
def test_a_runner_with_unknown_seed_handling_runs_unchanged(wrapper):
    ran = wrapper(lambda self, *args, **kwargs: (self, args, kwargs))
    runner = object()
    assert ran(runner, 1, two=2) == (runner, (1,), {"two": 2})


def test_an_unknown_numba_does_not_stop_an_engine_from_starting(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding.ffi", types.ModuleType("ffi"))
    seen = []
    hooks._survives_numba(seen.append)("overrides")
    assert seen == ["overrides"]
