"""That the Triton kernels compile to machine code, and may be launched as often as one likes: by
Triton's own bookkeeping, its comparison of globals at every launch included, without a GPU. What
they compute is tested by the interpreter (test_backend_triton.py, test_slots.py)."""

import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl

from dftserve.sampling import Controls, control_row
from dftserve.sampling.backends import self_check
from dftserve.sampling.backends.triton import TritonBackend
from dftserve.spec import parse
from tests.fake_gpu import KERNELS, compiled_kernels, fake_gpu

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets: nothing is compiled", allow_module_level=True)

CPU = torch.device("cpu")
LAUNCHED = {"_maxima", "_decide", "_write", "_commit_accepted", "_stage_step", "_open"}
OTHER_TYPES = {
    **dict.fromkeys(("rows", "stop_ids", "last_token", "slot", "position", "offset"), "*i64"),
    **dict.fromkeys(("steered", "tokens", "base", "invalid"), "*i64"),
    **dict.fromkeys(("valid_rows", "samples", "valid"), "*u1"),
    **dict.fromkeys(("stride", "vocabulary", "chunks", "width", "count", "known"), "i32"),
    "rows_per_request": "i32",
    "active": "*i32",
    "classes": "*u8",
    "order": "*fp64",
}
"""Of arguments that are no pointers to float32. `rows` of slots is a number."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def gpu(cache):
    with fake_gpu(90, cache) as gpu:
        yield gpu


class Engine:
    """What an engine does to a batch at every step."""

    def __init__(self, slots=8, rows_per_request=2):
        self.backend = TritonBackend(CPU)
        self.slots = self.backend.create_slots(slots, rows_per_request)

    def step(self, logits_XV, rows_R=None, stop_counts=(1,)):
        rows = len(logits_XV) if rows_R is None else len(rows_R)
        controls = controls_of(rows, stop_counts)
        slot_R = torch.arange(rows) % 2
        offset_R, samples_R = slot_R * 0, slot_R == 0
        return lambda: self.run(logits_XV, rows_R, controls, (slot_R, slot_R, offset_R), samples_R)

    def run(self, logits_XV, rows_R, controls, places, samples_R):
        controls = self.slots.commit_accepted(controls, *places)
        statistics = self.backend(logits_XV, controls, rows_R)
        self.slots.stage_step(*places, samples_R, statistics)


def controls_of(rows, stop_counts=(1,)):
    made = [
        control_row(
            parse({"law": "budget", "target_entropy": 1.5}),
            temperature=0.8,
            logits_divisor=1.0,
            stop_ids=frozenset(range(stop_counts[r % len(stop_counts)])),
        )
        for r in range(rows)
    ]
    return Controls.stack(made)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocabulary", [257, 4096], ids=["any V", "V=16n"])
def test_every_kernel_is_compiled_once_and_launched_again(capability, vocabulary, cache):
    with fake_gpu(capability, cache) as gpu:
        engine = Engine()
        for times in (1, 2):
            engine.slots.open(1)
            engine.step(torch.randn(3, vocabulary))()
            assert gpu.launched() == dict.fromkeys(LAUNCHED, times)
        assert gpu.loaded == dict.fromkeys(LAUNCHED, 1)


def test_every_function_is_launched_or_called_by_another():
    """So that the test above left none out."""
    sources = {name: kernel.src for name, kernel in KERNELS.items()}
    for name in KERNELS.keys() - LAUNCHED:
        callers = [other for other in sources if other != name and f"{name}(" in sources[other]]
        assert callers, name


def test_arguments_have_the_types_that_the_kernels_read(gpu):
    engine = Engine()
    engine.slots.open(1)
    engine.step(torch.randn(3, 257))()
    for name, signature in gpu.signatures.items():
        for argument, kind in signature.items():
            expected = OTHER_TYPES.get(argument, "*fp32")
            if argument.isupper():
                expected = "constexpr"
            elif (name, argument) == ("_commit_accepted", "rows"):
                expected = "i32"
            assert kind == expected, (name, argument)


def test_aligned_rows_are_moved_sixteen_bytes_at_a_time(gpu):
    """And none through the cache for data that no kernel changes."""
    Engine().step(torch.randn(3, 4096))()
    code = {compiled.name: compiled.asm["ptx"] for compiled in compiled_kernels()}
    assert "ld.global.v4" in code["_maxima"]
    assert "ld.global.v4" in code["_write"]
    assert "st.global.v4" in code["_write"]
    assert not any("ld.global.nc" in each for each in code.values())


def test_the_self_check_compiles_all_that_a_request_could_wait_for(gpu):
    """Rows of any length, from any address, as many as may be; any stop tokens, any drafts."""
    assert not self_check(TritonBackend, CPU), "it ran nothing"
    assert set(gpu.loaded) == LAUNCHED
    loaded, launches = gpu.loaded.copy(), len(gpu.launches)
    wide_XW = torch.randn(9, 50_304)
    some_R = torch.arange(20)[1:6]
    cases = [
        (torch.randn(1, 128_256), None),
        (torch.randn(2, 50_257), None),
        (wide_XW[:, :50_257], some_R),
        (wide_XW[:, 1:], some_R),
        (wide_XW[1:], torch.arange(8)[::2]),
        (torch.randn(64, 17), None),
        (torch.randn(1, 1), None),
    ]
    for logits_XV, rows_R in cases:
        for stop_counts in ((0,), (1, 2), (3, 0, 70), (300,)):
            engine = Engine(slots=2, rows_per_request=1 + len(stop_counts))
            engine.slots.open(0)
            engine.step(logits_XV, rows_R, stop_counts)()
            controls = controls_of(5).select(torch.arange(5)[1:2])
            engine.backend(logits_XV, controls, torch.arange(3)[1:2] * 0)
    assert len(gpu.launches) > launches
    assert gpu.loaded == loaded


class Work(TorchDispatchMode):
    """Operations of torch that are more than another view or room for a result."""

    FREE = ("view", "slice", "select", "unbind", "empty", "empty_like", "as_strided", "detach")

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in self.FREE:
            self.done.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows_R", [None, torch.tensor([2, 0])], ids=["all", "some"])
def test_a_steady_step_is_five_launches(gpu, rows_R):
    """Each costs the host tens of microseconds, whatever the batch."""
    engine = Engine()
    step = engine.step(torch.randn(3, 257), rows_R)
    step()
    gpu.launches.clear()
    with Work() as work:
        step()
    assert [name for name, _ in gpu.launches] == [
        "_commit_accepted",
        "_maxima",
        "_decide",
        "_write",
        "_stage_step",
    ]
    assert work.done == []


def test_requests_begin_by_one_launch(gpu):
    engine = Engine(slots=8)
    sent = []
    engine.slots._staging.to_device = lambda values: sent.append(values) or torch.tensor(values)
    step = engine.step(torch.randn(1, 257))
    for slot in range(7):
        engine.slots.open(slot, produced=slot)
    assert not gpu.launches
    step()
    step()
    assert [grid for name, grid in gpu.launches if name == "_open"] == [(7, 1, 1)]
    assert len(sent) == 1


@pytest.mark.parametrize("name", list(KERNELS))
def test_what_a_kernel_reads_from_outside_is_equal_to_itself_and_stays(name):
    """Triton compares it at every launch, and raises where it is not what was compiled."""
    kernel = KERNELS[name]
    assert kernel.cache_key
    for (global_name, _), (value, _) in kernel.used_global_vals.items():
        assert isinstance(value, tl.constexpr), global_name
        assert isinstance(value.value, int | float), global_name
        assert not math.isnan(value.value), global_name
        assert value == value, global_name
