"""Hooks: in place once, missing with a reason, and never in the way of vLLM."""

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


def test_vllms_search_for_kernels_survives_numba_and_still_finds_them():
    """Without the change it ends in an AttributeError, and the engine with it."""
    run(SEARCH)


def test_a_seed_on_a_cpu_survives_a_prompt_in_two_parts():
    """The first word is stock vLLM's: where it is no RuntimeError, `seeds` has become needless."""
    ends, generators, draws = run(SEEDS).splitlines()
    assert ends == "RuntimeError Reached"
    assert generators == "[0, 2]", "a generator was lost"
    # Row 0's token is thrown away and its draw taken back; row 2's counts.
    assert draws == "True False"


def test_every_hook_is_in_place_on_this_vllm():
    assert run(ALL) == "{} None"


NOT_NEEDED = {
    "BaseServing._maybe_get_adapters",
    "_rebind_kernels",
    "GPUModelRunner._sample",
    "GPUModelRunner._bookkeeping_sync",
}
"""What takes a style's adapter, refused without it, and what mends vLLM itself on a CPU."""


def test_every_other_hook_is_needed_and_all_are_in_the_contract():
    for hook in hooks.HOOKS:
        assert hook.is_needed != (hook.target in NOT_NEEDED)
        assert hook.symbols() or hook.passes_on, hook.name
        assert all(symbol.required == hook.is_needed for symbol in hook.symbols())


SYMBOL = vllm_contract.Symbol(
    module="engine", name="Engine.run", parameters=("step",), hook="statistics", required=True
)


@pytest.fixture
def module(monkeypatch):
    """A module of vLLM's with one function, which the contract knows, and no hook installed."""

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


def installed(monkeypatch, **changes) -> Hook:
    hook = Hook("engine", "Engine.run", doubling, **changes)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    return hook


def test_a_hook_is_put_in_place_once(monkeypatch, module):
    hook = installed(monkeypatch)
    hooks._apply(hook, module)
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 4
    assert hooks.problems() == {}
    assert hooks.refusal() is None


def test_a_hook_under_anothers_wrapper_is_in_place(monkeypatch, module):
    import functools

    hook = installed(monkeypatch)
    hooks._apply(hook, module)
    ours = module.Engine.run

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    module.Engine.run = theirs
    assert hooks.problems() == {}


def test_a_wrapper_of_anothers_is_wrapped(monkeypatch, module):
    import functools

    stock = module.Engine.run

    @functools.wraps(stock)
    def theirs(self, *args, **kwargs):
        return 10 * stock(self, *args, **kwargs)

    module.Engine.run = theirs
    hook = installed(monkeypatch)
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 40


def gone(module):
    del module.Engine.run


def renamed_class(module):
    module.Machine = module.Engine
    del module.Engine


def changed_signature(module):
    module.Engine.run = lambda self, batch, step: step + 1


@pytest.mark.parametrize("fault", [gone, renamed_class, changed_signature])
def test_a_function_that_is_not_as_we_know_it_is_left_alone(monkeypatch, module, fault):
    fault(module)
    before = dict(vars(getattr(module, "Engine", object)))
    hook = installed(monkeypatch)
    hooks._apply(hook, module)
    assert dict(vars(getattr(module, "Engine", object))) == before
    assert "Engine.run" in hooks.refusal()


class Base:
    """A worker's, of whose methods the wrapper knows nothing."""

    def run(self, step):
        return step + 1


class Wrapper:
    """As vLLM's: it passes on what it has not."""

    worker = Base()

    def __getattr__(self, attribute):
        return getattr(self.worker, attribute)


@pytest.mark.parametrize("is_renamed", [False, True])
def test_a_method_that_is_passed_on_must_be_the_workers(monkeypatch, module, is_renamed):
    """Around a name that the engine no longer calls, a hook would be in place and see nothing."""
    monkeypatch.setattr(vllm_contract, "SYMBOLS", ())
    module.Wrapper, module.Base = type("Wrapper", (Wrapper,), {}), object if is_renamed else Base
    hook = Hook("engine", "Wrapper.run", doubling, passes_on="Base")
    monkeypatch.setattr(hooks, "_installed", (hook,))
    hooks._apply(hook, module)
    assert module.Wrapper().run(1) == (2 if is_renamed else 4)
    assert ("Base.run" in (hooks.refusal() or "")) == is_renamed


def test_an_exception_of_ours_stays_ours(monkeypatch, module):
    def breaking(_):
        raise OSError("no")

    hook = Hook("engine", "Engine.run", breaking)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    hooks._apply(hook, module)
    assert module.Engine().run(1) == 2
    assert "OSError: no" in hooks.refusal()


def test_a_hook_that_was_lost_or_replaced_is_missed(monkeypatch, module):
    hook = installed(monkeypatch)
    assert "without the change" in hooks.refusal()  # Imported, and never told to us.
    hooks._apply(hook, module)
    assert hooks.refusal() is None
    module.Engine.run = lambda self, step: 0
    assert "replaced" in hooks.refusal()


def test_a_module_that_is_not_there_is_missed(monkeypatch):
    hook = Hook("vllm.no_such_module", "run", doubling)
    monkeypatch.setattr(hooks, "_installed", (hook,))
    assert "no such module" in hooks.refusal()


def test_a_hook_that_is_not_needed_refuses_nothing(monkeypatch, module):
    installed(monkeypatch, is_needed=False)
    assert hooks.problems()
    assert hooks.refusal() is None


def test_the_file_system_is_searched_once_and_for_what_is_needed(monkeypatch):
    """Every request with a field asks, some of them several times, in the server's event loop."""
    needed, other = "xml.dom.pulldom", "xml.dom.expatbuilder"  # There, and not imported.
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


def test_a_module_that_is_missed_is_looked_for_again(monkeypatch):
    """Its package may have been importing itself."""
    monkeypatch.setattr(hooks, "_installed", (Hook("xml.dom.pulldom", "parse", doubling),))
    monkeypatch.delitem(sys.modules, "xml.dom.pulldom", raising=False)
    monkeypatch.setattr(hooks, "_present", set())
    with monkeypatch.context() as patch:
        patch.setattr(hooks.importlib.util, "find_spec", lambda _: None)
        assert "no such module" in hooks.refusal()
    assert hooks.refusal() is None


@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_request_s_parameters_are_made_from_passes_as_it_came(by_name):
    """Also what a later vLLM may add; the model's own cuts are taken out of the second."""

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
def test_a_runner_whose_seeds_we_do_not_understand_runs_as_it_is(wrapper):
    ran = wrapper(lambda self, *args, **kwargs: (self, args, kwargs))
    runner = object()
    assert ran(runner, 1, two=2) == (runner, (1,), {"two": 2})


def test_a_numba_that_we_do_not_understand_keeps_no_engine_from_starting(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding.ffi", types.ModuleType("ffi"))
    seen = []
    hooks._survives_numba(seen.append)("overrides")
    assert seen == ["overrides"]
