"""The Triton kernels compile to machine code and can be launched repeatedly, checked without a GPU
by Triton's own launch code, which compares globals at every launch. Their results are tested in
Triton's interpreter (test_backend_triton.py, test_slots.py)."""

import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dftserve_vllm.v1 import V1Processor
from dftserve_vllm.v2 import V2Processor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve.sampling import (
    Controls,
    Step,
    StyleControls,
    StyleTables,
    Texts,
    TokenClasses,
    control_row,
    transform_step,
)
from dftserve.sampling.backends import self_check
from dftserve.sampling.backends.triton import TritonBackend
from dftserve.sampling.backends.triton_style import TritonStyleStage
from dftserve.spec import parse
from tests.fake_gpu import KERNELS, compiled_kernels, fake_gpu
from tests.profiles import random_profile

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets: nothing is compiled", allow_module_level=True)

CPU = torch.device("cpu")
STEP = ["_maxima", "_decide", "_write"]
LAUNCHED = {*STEP, "_open"}
STYLE_KERNEL = "_restyle"
"""Launched in addition if a row has a style."""
OTHER_TYPES = {
    **dict.fromkeys(("rows", "stop_ids", "slot", "position"), "*i64"),
    **dict.fromkeys(("steered", "tokens", "base", "invalid"), "*i64"),
    **dict.fromkeys(("offset", "last_token", "known", "active"), "*i32"),
    **dict.fromkeys(("stride", "vocabulary", "chunks", "tiles", "width", "count"), "i32"),
    **dict.fromkeys(("classified", "rows_per_request", "has_slots"), "i32"),
    **dict.fromkeys(("has_styles", "has_idle_rows"), "i32"),
    "valid_rows": "*u1",
    "classes": "*u8",
    "order": "*fp64",
}
"""The types of arguments that are not pointers to float32."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def gpu(cache):
    with fake_gpu(90, cache) as gpu:
        yield gpu


class Engine:
    """Runs the backend on a batch, like an engine at every step."""

    def __init__(self, slots=8, rows_per_request=2):
        self.backend = TritonBackend(CPU)
        self.slots = self.backend.create_slots(slots, rows_per_request)

    def step(self, logits_XV, rows_R=None, stop_counts=(1,)):
        rows = len(logits_XV) if rows_R is None else len(rows_R)
        slot_R = torch.arange(rows) % 2
        zero_R = torch.zeros(rows, dtype=torch.int32)
        step = Step(controls_of(2, stop_counts), slot_R, slot_R, zero_R, zero_R, rows_R)
        return lambda: self.backend.step(logits_XV, step, self.slots)


def controls_of(rows, stop_counts=(1,)):
    controls = [
        control_row(
            parse({"law": "budget", "target_entropy": 1.5}),
            temperature=0.8,
            logits_divisor=1.0,
            stop_ids=frozenset(range(stop_counts[r % len(stop_counts)])),
        )
        for r in range(rows)
    ]
    return Controls.stack(controls)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("vocabulary", [257, 4096], ids=["any V", "V=16n"])
def test_every_kernel_is_compiled_once_and_launched_again(capability, vocabulary, cache):
    with fake_gpu(capability, cache) as gpu:
        engine = Engine()
        for times in (1, 2):
            engine.slots.open(1)
            engine.step(torch.randn(3, vocabulary))()
            assert gpu.launched() == dict.fromkeys(LAUNCHED, times)
        assert gpu.loaded == dict.fromkeys(LAUNCHED, 1)


def test_every_kernel_is_launched_or_called_by_another():
    """So the test above covers all of them."""
    sources = {name: kernel.src for name, kernel in KERNELS.items()}
    for name in KERNELS.keys() - LAUNCHED - {STYLE_KERNEL}:
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
            assert kind == expected, (name, argument)


def test_aligned_rows_are_loaded_and_stored_sixteen_bytes_at_a_time(gpu):
    """None are loaded through the read-only cache, as kernels change them."""
    Engine().step(torch.randn(3, 4096))()
    code = {compiled.name: compiled.asm["ptx"] for compiled in compiled_kernels()}
    assert "ld.global.v4" in code["_maxima"]
    assert "ld.global.v4" in code["_write"]
    assert "st.global.v4" in code["_write"]
    assert not any("ld.global.nc" in each for each in code.values())


def test_the_self_check_compiles_every_variant_that_a_request_can_need(gpu):
    """For any length, address and number of rows, any stop tokens and any drafts."""
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
        (wide_XW[1:], torch.arange(9)[1:]),
        (torch.randn(64, 17), None),
        (torch.randn(1, 1), None),
    ]
    for logits_XV, rows_R in cases:
        for stop_counts in ((0,), (1, 2), (3, 0, 70), (300,)):
            engine = Engine(slots=2, rows_per_request=1 + len(stop_counts))
            engine.slots.open(0)
            engine.step(logits_XV, rows_R, stop_counts)()
            controls = controls_of(5).select(torch.arange(5)[1:2])
            controls = controls.after(torch.arange(9)[5:6])
            engine.backend(logits_XV, controls, torch.arange(3)[1:2] * 0)
    assert len(gpu.launches) > launches
    assert gpu.loaded == loaded


class TorchOperations(TorchDispatchMode):
    """Records operations of torch that do more than make a view or allocate a result."""

    FREE = ("view", "slice", "select", "unbind", "empty", "as_strided", "detach", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in self.FREE:
            self.done.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows_R", [None, torch.tensor([2, 0])], ids=["all", "some"])
def test_a_steady_step_is_three_launches(gpu, rows_R):
    """Each costs the host tens of microseconds, whatever the batch."""
    engine = Engine()
    step = engine.step(torch.randn(3, 257), rows_R)
    step()
    gpu.launches.clear()
    with TorchOperations() as operations:
        step()
    assert [name for name, _ in gpu.launches] == STEP
    assert operations.done == []


CLASSES = TokenClasses(np.zeros(257, np.uint8))
ASKED = ({"law": "words", "level": 0.5}, {"law": "budget", "target_entropy": 1.5}, 0.7)


@pytest.fixture
def engine(gpu, monkeypatch):
    """An engine's configuration, whose plug-in has Triton's backend."""

    def triton_backend(device, token_classes):
        return TritonBackend(device, token_classes=token_classes)

    monkeypatch.setattr("dftserve_vllm.worker_state.get_backend", triton_backend)
    monkeypatch.setattr("dftserve_vllm.vocabulary.token_classes", lambda config: CLASSES)
    scheduler = SimpleNamespace(max_num_seqs=8)
    drafts = SimpleNamespace(num_speculative_tokens=2)
    return SimpleNamespace(scheduler_config=scheduler, speculative_config=drafts)


def params(diversity):
    """Parameters of a request with its own stop tokens."""
    parameters = SamplingParams(temperature=0.9, extra_args={"diversity": diversity})
    parameters._all_stop_token_ids = {3, 7}
    return parameters


def third_step(gpu, processor, step):
    """Kernel launches and torch operations of the third step."""
    step()
    step()
    gpu.launches.clear()
    with TorchOperations() as operations:
        step()
    assert processor.state.faults == 0
    return [name for name, _ in gpu.launches], operations.done


@pytest.mark.parametrize("others", [0, 2])
def test_a_step_of_the_v1_runner_is_three_launches(gpu, engine, others):
    """With every law, stop tokens and statistics; with and without other requests."""
    outputs = [[5] for _ in range(len(ASKED) + others)]
    processor = V1Processor(engine, CPU, False)
    parameters = [*map(params, ASKED), *[SamplingParams()] * others]
    added = [(i, each, [1], outputs[i]) for i, each in enumerate(parameters)]
    processor.update_state(BatchUpdate(len(parameters), removed=[], added=added, moved=[]))
    logits_XV = torch.randn(len(parameters), 257)

    def step():
        processor.apply(logits_XV)
        for output in outputs:
            output.append(9)

    assert third_step(gpu, processor, step) == (STEP, [])
    assert processor.state.take_report() is not None


@pytest.mark.parametrize("others", [0, 1])
def test_a_step_of_the_v2_runner_is_three_launches(gpu, engine, others):
    """Likewise, with drafts; the tensors have the types of vLLM's."""
    known_S = torch.ones(8, dtype=torch.int32)
    known = SimpleNamespace(np=known_S.numpy(), gpu=known_S)
    states = SimpleNamespace(max_num_reqs=8, device=CPU, prefill_len=known, prompt_len=known)
    processor = V2Processor(engine, states)
    for slot, diversity in enumerate(ASKED):
        assert processor.add_request(slot, params(diversity))
    for slot in range(len(ASKED), len(ASKED) + others):
        assert not processor.add_request(slot, SamplingParams())
    processor.apply_staged_writes()
    slots = [0, 0, 0, 1, 2, 2, 3][: 6 + others]
    logits_XV = torch.randn(len(slots), 257)
    context = SimpleNamespace(
        idx_mapping_np=np.arange(len(ASKED) + others),
        expanded_idx_mapping=torch.tensor(slots),
        expanded_local_pos=torch.tensor([0, 1, 2, 0, 0, 1, 0][: len(slots)], dtype=torch.int32),
        pos=torch.tensor([4, 5, 6, 9, 1, 2, 3][: len(slots)]),
        input_ids=torch.tensor([3, 4, 5, 7, 1, 1, 1][: len(slots)], dtype=torch.int32),
    )
    assert third_step(gpu, processor, lambda: processor.apply(logits_XV, context)) == (STEP, [])
    assert processor.state.take_report() is not None


@pytest.mark.parametrize("vocabulary", [257, 4096], ids=["any V", "V=16n"])
def test_a_style_adds_one_launch_to_a_step(gpu, vocabulary):
    """It is compiled once, torch does nothing else, and its arguments have the right types."""
    engine = Engine()
    stage = TritonStyleStage(StyleTables.of([random_profile(1, 64), random_profile(2, 64)]))
    style = StyleControls(profile=1, strength=0.5, max_kl=0.05)
    row = control_row(
        parse(0.5), temperature=0.8, logits_divisor=1.0, stop_ids=frozenset({3}), style=style
    )
    slot_R, zero_R = torch.arange(3) % 2, torch.zeros(3, dtype=torch.int32)
    tokens_SL = torch.zeros(2, 9, dtype=torch.int32)
    texts = Texts(tokens_SL, torch.zeros(2, dtype=torch.int32), slot_R + 3, zero_R)
    step = Step(Controls.stack([row] * 2), slot_R, slot_R, zero_R, texts=texts)
    logits_XV = torch.randn(3, vocabulary)
    for _ in range(2):
        gpu.launches.clear()
        with TorchOperations() as operations:
            transform_step(logits_XV, step, engine.slots, engine.backend, stage)
    assert [name for name, _ in gpu.launches] == [STYLE_KERNEL, *STEP]
    assert gpu.launches[0][1] == (3, 1, 1)
    assert operations.done == []
    assert gpu.loaded == dict.fromkeys([STYLE_KERNEL, *STEP], 1)
    integers = {"slot", "position", "rows", "stop_ids", "at", "base"}
    floats = {"logits", "numbers", "root_log_factor", "row_log_factor", "unigram", "bigram_delta"}
    floats |= {"sums", "waiting", "maxima", "stop_value", "style_stats"}
    for argument, kind in gpu.signatures[STYLE_KERNEL].items():
        if argument in integers:
            assert kind == "*i64", argument
        elif argument in floats:
            assert kind == "*fp32", argument
        elif not argument.isupper():
            assert kind in ("*i32", "i32"), argument


def test_kernels_are_launched_on_the_device_of_their_tensors(gpu):
    """Triton launches on the current device, which may not be theirs; it is restored afterwards."""
    engine = Engine(slots=2)
    stage = TritonStyleStage(StyleTables.of([random_profile(1, 64)]))
    style = StyleControls(profile=0, strength=0.5, max_kl=0.05)
    row = control_row(
        parse(0.5), temperature=0.8, logits_divisor=1.0, stop_ids=frozenset({3}), style=style
    )
    slot_R, zero_R = torch.arange(2), torch.zeros(2, dtype=torch.int32)
    texts = Texts(torch.zeros(2, 9, dtype=torch.int32), zero_R, slot_R + 3, zero_R)
    step = Step(Controls.stack([row] * 2), slot_R, slot_R, zero_R, texts=texts)
    logits_XV, own = torch.randn(2, 257), controls_of(2)
    with gpu.tensors_on(1):
        engine.slots.open(0)
        transform_step(logits_XV, step, engine.slots, engine.backend, stage)
        engine.backend(logits_XV, own)
        engine.slots.open(1)
        engine.slots.read(1)
    assert gpu.launched() == {"_open": 2, STYLE_KERNEL: 1, **dict.fromkeys(STEP, 2)}
    assert set(gpu.devices) == {1}
    assert gpu.current == 0


def test_a_barrier_separates_the_reads_of_waiting_rows_from_their_clearing(gpu):
    """Every thread of the program reads them, and some may be behind the one that clears them."""
    Engine().step(torch.randn(3, 257))()
    (code,) = [each.asm["ttir"] for each in compiled_kernels() if each.name == "_maxima"]
    done = re.findall(r"\b(?:barrier|tt\.load|tt\.store)\b", code)
    assert done.count("barrier") == 1
    at = done.index("barrier")
    assert done[at - 1 : at + 2] == ["tt.load", "barrier", "tt.store"]


def test_new_requests_share_one_launch(gpu):
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
def test_globals_of_a_kernel_are_constant_numbers(name):
    """Triton compares them at every launch, and raises if one differs from the compiled value: NaN
    would."""
    kernel = KERNELS[name]
    assert kernel.cache_key
    for (global_name, _), (value, _) in kernel.used_global_vals.items():
        assert isinstance(value, tl.constexpr), global_name
        assert isinstance(value.value, int | float), global_name
        assert not math.isnan(value.value), global_name
        assert value == value, global_name


class AllTorchOperations(TorchOperations):
    """Records every operation but views, also allocations and copies to the host."""

    FREE = ("view", "slice", "select", "unbind", "as_strided", "detach")


def test_a_step_can_be_captured_in_a_cuda_graph(gpu):
    """At a fixed number of rows it allocates nothing, reads nothing back, and passes the same
    addresses to its kernels at each call, so that a graph can be replayed."""
    engine = Engine()
    step = engine.step(torch.randn(3, 257), stop_counts=(2,))
    step()
    arguments_by_call = []
    for _ in range(2):
        gpu.launches.clear()
        gpu.arguments.clear()
        with AllTorchOperations() as operations:
            step()
        assert operations.done == []
        addresses = [
            [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
            for arguments in gpu.arguments
        ]
        arguments_by_call.append(addresses)
        assert [name for name, _ in gpu.launches] == STEP
    assert all(sum(map(len, each)) > 20 for each in arguments_by_call)
    assert arguments_by_call[0] == arguments_by_call[1]
