"""All GPU measurements in one script: exactness, the sampler, a step, training, targets.

    python bench/gpu.py [--device cpu] [--quick] [--model FOLDER] [--output FILE.json]

Runs from a copy of the tree, on a machine with torch, Triton, transformers and numba and without a
network, in under four minutes on one GPU. `--device cpu --quick` is a trial run without a GPU, in
under three minutes. Stages:
    exactness  rows of every kind and law against the law in fp64 numpy (tests/reference.py), and
               repeated, bit for bit; steps with a style, DRY, a group and two rows per request
               against plain torch on a CPU
    sampler    the variants of bench/sampler.py: ours over a copy of the logits
    step       the time of a whole step, with statistics, stop tokens and token classes: on the host
               until the call returns, on the device, and as a replay of a CUDA graph
    train      a training step, forward and backward, against the stock model's own loss; and in it
               the pass over one chunk's logits, by the kernel and by plain torch
    targets    tokens per second of building targets from a teacher
    generate   transformers' generate() with and without the field, for the model in FOLDER
The failure of a stage is recorded in the result, and the other stages run. The last line is one
JSON document. It is written to FILE.json; by default, after a full run on a GPU, to
bench/results/gpu.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))


import numpy as np
import sampler
import torch
from torch import Tensor

from dftserve.sampling import (
    Controls,
    SlotControls,
    Step,
    StyleControls,
    StyleTables,
    Texts,
    TokenClasses,
    control_row,
    get_backend,
    get_style_stage,
    transform_step,
)
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.dry import DryControls, SlotRepeats
from dftserve.sampling.group import GroupCodes, GroupRow
from dftserve.sampling.style import PlainStyleStage
from dftserve.spec import parse
from tests.profiles import random_profile
from tests.reference import cut_reference, reference, words_reference
from tests.rows import KINDS, make_rows

from provenance import machine
from ratios import ratio

RESULTS = Path(__file__).parent / "results" / "gpu.json"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of all stages: those of a real engine, or smaller ones for a trial run."""

    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]
    step_vocabulary: int
    step_rows: tuple[int, ...]
    pairs: int
    calls: int
    hidden: int
    layers: int
    tokens: int
    """Tokens of a training step."""
    train_steps: int
    documents: int
    batches: tuple[int, ...]
    """Batch sizes of `generate`."""
    new_tokens: int


WHOLE = Size(
    vocabularies=(4096, 32_768, 131_072, 262_144),
    rows=(1, 8, 64, 256, 512),
    step_vocabulary=131_072,
    step_rows=(1, 32, 256),
    pairs=15,
    calls=200,
    hidden=2048,
    layers=16,
    tokens=8192,
    train_steps=5,
    documents=32,
    batches=(1, 64),
    new_tokens=64,
)
QUICK = Size(
    vocabularies=(4096,),
    rows=(1, 8),
    step_vocabulary=8192,
    step_rows=(1, 32),
    pairs=2,
    calls=10,
    hidden=64,
    layers=2,
    tokens=128,
    train_steps=1,
    documents=1,
    batches=(1,),
    new_tokens=2,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="A trial run with small sizes.")
    parser.add_argument(
        "--model", type=Path, help="A model's folder for `generate`, which is skipped without it."
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device, size = torch.device(options.device), QUICK if options.quick else WHOLE
    if options.model and not options.model.is_dir():
        parser.error(f"--model: got {options.model}; accepted: a model's folder.")
    is_whole_run = device.type == "cuda" and not options.quick
    output = options.output or (RESULTS if is_whole_run else None)
    stand_in_for_absent_packages()
    start = time.perf_counter()
    stages: dict[str, Callable[[], Any]] = {
        "exactness": lambda: exactness(device, size),
        "sampler": lambda: samplers(device, size),
        "step": lambda: steps(device, size),
        "train": lambda: training(device, size),
        "targets": lambda: targets(device, size),
        "generate": lambda: generation(device, size, options.model),
    }
    document = {
        "what": "exactness against fp64; ratios to a copy, to stock training, to no field",
        "machine": machine() | {"device": device_name(device)},
        "versions": {name: version_of(name) for name in ("torch", "triton", "transformers")},
        "is_whole_run": is_whole_run,
        **{name: guarded(name, stage) for name, stage in stages.items()},
    }
    document["bench_seconds"] = round(time.perf_counter() - start, 1)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


class Absent(ModuleType):
    """A stand-in for a package that this machine lacks, so that importing it does not fail."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in_for_absent_packages() -> None:
    for package in ("blake3", "click", "yaml"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            sys.modules[package] = Absent(package)


def guarded(name: str, stage: Callable[[], Any]) -> dict[str, Any]:
    """A stage's result, or its error, with the seconds that it took."""
    start = time.perf_counter()
    try:
        found = {"result": stage()}
    except Exception as error:  # noqa: BLE001  The other stages run whatever the error is.
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found["seconds"] = round(time.perf_counter() - start, 1)
    print(f"{name}: {found}", flush=True)
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def version_of(name: str) -> str | None:
    try:
        return str(__import__(name).__version__)
    except ModuleNotFoundError:
        return None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ── Exactness ────────────────────────────────────────────────────────────────────────────────────

LAWS = (
    {"level": 0.7},
    {"level": 1.0, "min_p": 1e-3},
    {"law": "dynatemp", "dynatemp_range": 0.8, "dynatemp_exponent": 0.7, "level": 1.0},
    {"law": "words", "level": 0.8},
)
CUTTING_LAWS = (
    {"law": "top_n_sigma", "n_sigma": 1.3},
    {"law": "xtc", "xtc_probability": 1.0, "xtc_threshold": 0.01},
)
SURE, RESOLUTION = 1e-4, 2.0**-22
"""Minimum distance in nats from the guard's threshold, and its addition per unit of the row's
largest logit: closer to the threshold, fp32 and fp64 may cut differently."""


def exactness(device: torch.device, size: Size) -> dict[str, Any]:
    """The largest difference from fp64, of log-probabilities above -30 and of entropies (nats)."""
    backend_classes = TokenClasses((np.arange(size.step_vocabulary) % 3).astype(np.uint8))
    backend = get_backend(device, token_classes=backend_classes)
    worst = {"log_p": 0.0, "nats": 0.0}
    compared = 0
    for seed, vocabulary in enumerate((257, 4096, size.step_vocabulary)):
        kinds = sorted(KINDS) if vocabulary <= 4096 else ["few", "grammar"]
        for law, asked in enumerate((*LAWS, *CUTTING_LAWS)):
            logits_RV = make_rows(kinds, vocabulary, seed)
            stops = (frozenset(), frozenset({3}), frozenset({1, 5, 9}))[(seed + law) % 3]
            after_RV, entropy_R = rewritten(logits_RV.to(device), asked, stops, backend)
            for r in range(len(kinds)):
                expected = in_fp64(logits_RV[r].numpy(), asked, stops, backend_classes.packed_V)
                largest = logits_RV[r].nan_to_num(neginf=0.0).abs().max().item()
                if expected.margin < SURE + RESOLUTION * largest:
                    continue
                got_V = torch.log_softmax(after_RV[r].double() / 0.9, dim=0).cpu().numpy()
                if not np.array_equal(np.isinf(got_V), np.isinf(expected.log_p_V)):
                    raise ArithmeticError(f"{kinds[r]}, {vocabulary}, {asked}: another support")
                likely_V = expected.log_p_V > -30
                off = np.abs(got_V[likely_V] - expected.log_p_V[likely_V]).max()
                worst["log_p"] = max(worst["log_p"], float(off))
                off = abs(float(entropy_R[r]) - expected.entropy_after)
                worst["nats"] = max(worst["nats"], off)
                compared += 1
    found = {"backend": type(backend).__name__, "rows": compared, "worst": worst}
    repeated(device, size, backend)
    return found | {"steps": engine_steps(device)}


def repeated(device: torch.device, size: Size, backend: Any) -> None:
    """Raises ArithmeticError unless repetitions give the same bits: a race would not."""
    for asked in (*LAWS, *CUTTING_LAWS):
        logits_RV = make_rows(["few", "gaussian"] * 16, size.step_vocabulary, 5).to(device)
        first_RV, _ = rewritten(logits_RV, asked, frozenset({1, 5}), backend)
        for _ in range(REPEATS):
            again_RV, _ = rewritten(logits_RV, asked, frozenset({1, 5}), backend)
            if not torch.equal(first_RV.view(torch.int32), again_RV.view(torch.int32)):
                raise ArithmeticError(f"{asked}: a repetition gave different bits")


REPEATS = 20


def engine_steps(device: torch.device) -> dict[str, Any]:
    """Steps with a style, DRY, `budget`, a group and an idle slot, two rows per slot, on the device
    and in plain torch on a CPU. Returns the largest differences of logits and of slots."""
    cpu, profiles = torch.device("cpu"), [random_profile(1, SMALL)]
    stage = get_style_stage(device, profiles)
    engines = (
        engine_on(device, get_backend(device), stage),
        engine_on(cpu, TorchBackend(cpu), PlainStyleStage(StyleTables.of(profiles))),
    )
    worst = {"logits": 0.0, "slots": 0.0}
    for at in range(STEPS):
        logits_RV = make_rows(["few", "gaussian"] * SLOTS, SMALL, at)
        both = zip(*(step_once(logits_RV, at) for step_once in engines), strict=True)
        for name, (got, expected) in zip(worst, both, strict=True):
            if not np.array_equal(np.isinf(got), np.isinf(expected)):
                raise ArithmeticError(f"step {at}: another support, or another token of a group")
            there = ~np.isinf(got)
            off = float(np.abs(got[there] - expected[there]).max())
            if not off < FAR:
                raise ArithmeticError(f"step {at}: {name} are {off:.2g} from plain torch's")
            worst[name] = max(worst[name], off)
    return {"style stage": type(stage).__name__, "worst": worst}


SMALL, SLOTS, STEPS = 257, 4, 30
FAR = 5e-3
"""The largest difference that float32 explains, by a wide margin; a race or a wrong index gives far
larger ones."""


def engine_on(
    device: torch.device, backend: Any, stage: Any
) -> Callable[[Tensor, int], tuple[np.ndarray, np.ndarray]]:
    """A function that runs one step, given its logits and number, and returns the rewritten logits
    and the slots' statistics."""
    style = StyleControls(profile=0, strength=0.7, max_kl=0.05)
    budget = parse({"law": "budget", "target_entropy": 1.5})
    controls, slots = SlotControls(SLOTS, device), backend.create_slots(SLOTS, 2)
    repeats, codes = SlotRepeats(SLOTS, device), GroupCodes(SLOTS, 2, device)
    for slot, (asked, own) in enumerate(((parse(0.5), style), (budget, None), (parse(0.5), None))):
        common = {"temperature": 0.9, "logits_divisor": 1.0, "stop_ids": frozenset({3})}
        controls.put(slot, control_row(asked, style=own, **common))
        slots.open(slot)
    repeats.put(1, DryControls(0.8, 1.75, 2, np.zeros(SMALL, bool)))
    codes.open(2, GroupRow(code=0.3, bits=4.0, scale=1 / 0.9))
    slot_R = torch.arange(2 * SLOTS, device=device) // 2
    offset_R = (torch.arange(2 * SLOTS, device=device) % 2).int()
    tokens_SL = (torch.arange(64, device=device) % 5).int().repeat(SLOTS, 1)
    begin_S = torch.zeros(SLOTS, dtype=torch.int32, device=device)

    def step_once(logits_RV: Tensor, at: int) -> tuple[np.ndarray, np.ndarray]:
        logits_RV = logits_RV.to(device, copy=True)
        at_R = at + 8 + offset_R.long()
        texts = Texts(tokens_SL, begin_S, at_R, (at_R % 5).int())
        penalties = repeats.penalties(
            *(texts, slot_R, offset_R), slots=np.array([1]), most_rows=2, longest_text=64
        )
        step = Step(
            *(controls.on_device(), slot_R, at_R, offset_R),
            has_idle_rows=True,
            texts=texts,
            penalties=penalties,
        )
        transform_step(logits_RV, step, slots, backend, stage)
        codes.draw(logits_RV, step, 2)
        snapshot = slots.snapshot()
        snapshot.copy.wait()
        return logits_RV.cpu().numpy(), snapshot.rows(np.arange(SLOTS))

    return step_once


def rewritten(
    logits_RV: Tensor, asked: dict[str, Any], stops: frozenset[int], backend: Any
) -> tuple[Tensor, Tensor]:
    row = control_row(parse(asked), temperature=0.9, logits_divisor=1.0, stop_ids=stops)
    controls = Controls.stack([row] * len(logits_RV), logits_RV.device)
    after_RV = logits_RV.clone()
    return after_RV, backend(after_RV, controls).entropy_after_R.clone()


def in_fp64(
    row_V: np.ndarray, asked: dict[str, Any], stops: frozenset[int], packed_V: np.ndarray
) -> Any:
    if asked.get("law") == "words":
        given = {key: value for key, value in asked.items() if key != "law"}
        class_V = packed_V[: len(row_V)] & 3
        return words_reference(row_V, class_V, temperature=0.9, stop_ids=stops, **given)
    if asked in CUTTING_LAWS:
        return cut_reference(row_V, temperature=0.9, stop_ids=stops, draw=0.0, **asked)
    return reference(row_V, temperature=0.9, stop_ids=stops, **asked)


# ── Sampler and step ─────────────────────────────────────────────────────────────────────────────


def samplers(device: torch.device, size: Size) -> list[dict[str, Any]]:
    """One call; on a GPU, a replay of a CUDA graph."""
    ways = ("copy", "ours", "naive", "sampler")
    with torch.inference_mode():
        return [
            sampler.measure(rows, vocabulary, device, size.pairs, ways)
            for vocabulary in size.vocabularies
            for rows in size.rows
        ]


def steps(device: torch.device, size: Size) -> list[dict[str, Any]]:
    """A whole step as an engine calls it, with rows under different laws, and a copy of logits."""
    with torch.inference_mode():
        return [step_cost(rows, device, size) for rows in size.step_rows]


def step_cost(rows: int, device: torch.device, size: Size) -> dict[str, Any]:
    """Median microseconds: `host` until the call returns, `whole` until its work is done; on a GPU
    also `captured` for a replay of the step, and `copy` for a copy of its logits."""
    source_RV = sampler.logits(rows, size.step_vocabulary, device)
    logits_RV = source_RV.clone()
    call = step_of(rows, device, size)
    for _ in range(3):
        call(logits_RV, 0)
    host: list[float] = []
    whole: list[float] = []
    for at in range(size.calls):
        logits_RV.copy_(source_RV)
        wait(device)
        start = time.perf_counter()
        call(logits_RV, at)
        host.append(1e6 * (time.perf_counter() - start))
        wait(device)
        whole.append(1e6 * (time.perf_counter() - start))
    row: dict[str, Any] = {"rows": rows, "vocabulary": size.step_vocabulary}
    row["host_us"], row["whole_us"] = (round(statistics.median(each), 1) for each in (host, whole))
    if device.type == "cuda":
        ways = {"captured_us": lambda x: call(x, 0), "copy_us": sampler.copy(rows, device)}
        for name, way in ways.items():
            once = sampler.timer(way, source_RV)
            taken = [once() for _ in range(size.calls)]
            row[name] = round(1e6 * statistics.median(taken), 1)
    return row


def step_of(rows: int, device: torch.device, size: Size) -> Callable[[Tensor, int], None]:
    classes = TokenClasses((np.arange(size.step_vocabulary) % 3).astype(np.uint8))
    backend = get_backend(device, token_classes=classes)
    slots, controls = backend.create_slots(rows, 1), SlotControls(rows, device)
    for slot in range(rows):
        diversity = parse(LAWS[slot % len(LAWS)])
        slots.open(slot)
        controls.put(
            slot,
            control_row(diversity, temperature=0.9, logits_divisor=1.0, stop_ids=frozenset({3, 7})),
        )
    slot_R = torch.arange(rows, device=device)
    offset_R = torch.zeros(rows, dtype=torch.int32, device=device)
    positions_R = [slot_R * 0 + at for at in range(size.calls)]
    last_R = offset_R + 5

    def call(logits_RV: Tensor, at: int) -> None:
        step = Step(controls.on_device(), slot_R, positions_R[at], offset_R, last_R)
        transform_step(logits_RV, step, slots, backend)

    return call


# ── Training and targets ─────────────────────────────────────────────────────────────────────────


def model_of(device: torch.device, size: Size) -> Any:
    """A Llama with 1.24 billion parameters at the full size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.step_vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=max(size.hidden // 64, 1),
        num_key_value_heads=max(size.hidden // 256, 1),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


DIVERGENCES = ("sft", "forward_kl", "reverse_kl", "skew_kl", "jsd")
LENGTH = 1024
K = 6


def training(device: torch.device, size: Size) -> dict[str, Any]:
    """Forward and backward pass of `size.tokens` tokens: time, and peak memory beyond the weights,
    each as a ratio to the stock model's."""
    from dftserve.lm import Head
    from dftserve.train import divergences
    from dftserve.train.head import head_loss

    classes = divergences.SFT, divergences.ForwardKL, divergences.ReverseKL
    built = [kind() for kind in (*classes, divergences.SkewKL, divergences.JSD)]
    model = model_of(device, size)
    length = min(LENGTH, size.tokens)
    ids_BN = torch.randint(0, size.step_vocabulary, (size.tokens // length, length), device=device)
    target = target_rows(ids_BN[:, 1:].reshape(-1), size.step_vocabulary)

    def stock() -> None:
        model(input_ids=ids_BN, labels=ids_BN, use_cache=False).loss.backward()

    def ours(divergence: Any) -> Callable[[], None]:
        def once() -> None:
            states = model.model(input_ids=ids_BN, use_cache=False).last_hidden_state
            hidden_ND = states[:, :-1].reshape(-1, size.hidden)
            head = Head(model.lm_head.weight, None)
            (head_loss(head, hidden_ND, target, divergence).loss / len(hidden_ND)).backward()

        return once

    ways = {"stock": stock} | dict(zip(DIVERGENCES, map(ours, built), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for step in range(1 + size.train_steps):
        for name, way in ways.items():
            taken, peak = one_step(model, way, device)
            if step:  # The first step of each compiles and allocates.
                seconds[name].append(taken)
                peaks[name] = peak
    return {
        "row_pass": row_passes(dict(zip(DIVERGENCES, built, strict=True)), target, size),
        "parameters": sum(each.numel() for each in model.parameters()),
        "tokens": ids_BN.numel(),
        "stock_seconds": round(statistics.median(seconds["stock"]), 4),
        "stock_peak_bytes": peaks["stock"],
        "time": {name: ratio(seconds[name], seconds["stock"]) for name in DIVERGENCES},
        "memory": {
            name: round(peaks[name] / peaks["stock"], 4) if peaks["stock"] else None
            for name in DIVERGENCES
        },
    }


CHUNK_ROWS = 512


def row_passes(divergences: dict[str, Any], target: Any, size: Size) -> dict[str, Any]:
    """Median microseconds of the pass over a chunk's logits: as in training, by plain torch, and of
    a copy."""
    from dftserve.train import row_pass

    device = target.labels_R.device
    target = target[slice(0, CHUNK_ROWS)].to(torch.float32)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source_RV = torch.randn(len(target), size.step_vocabulary, device=device).to(dtype)
    whole = slice(0, len(target))

    def taken(way: Callable[[Tensor], Any]) -> float:
        seconds = []
        for _ in range(2 + size.train_steps):
            raw_RV = source_RV.clone()
            wait(device)
            start = time.perf_counter()
            way(raw_RV)
            wait(device)
            seconds.append(time.perf_counter() - start)
        return round(1e6 * statistics.median(seconds[2:]), 1)

    given = {"scale": 1.0, "cap": None}
    found: dict[str, Any] = {
        "rows": len(target),
        "by_kernel": row_pass.has_kernel(device),
        "copy_us": taken(lambda raw_RV: source_RV.copy_(raw_RV)),
    }
    for name, divergence in divergences.items():
        ours = row_pass.row_pass(divergence, target, dtype=dtype, **given)
        plain = row_pass.PlainPass(divergence, target, **given)
        found[name] = {
            "us": taken(lambda raw_RV, way=ours: way(raw_RV, whole)),
            "plain_us": taken(lambda raw_RV, way=plain: way(raw_RV, whole)),
        }
    return found


def one_step(model: Any, way: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """Seconds, and the bytes allocated at the peak beyond those before the step; 0 on a CPU."""
    model.zero_grad(set_to_none=True)
    wait(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    way()
    wait(device)
    taken = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return taken, peak


def target_rows(labels_R: Tensor, vocabulary: int) -> Any:
    """Random targets of the same shape as stored ones; the values do not affect the cost."""
    from dftserve.train.divergences import TargetRows

    rows, device = len(labels_R), labels_R.device
    shares_RK = torch.rand(rows, K + 1, device=device) + 0.01
    log_RK = (shares_RK / shares_RK.sum(dim=1, keepdim=True)).log()
    top_ids_RK = (labels_R[:, None] + 1 + torch.arange(K, device=device)) % vocabulary
    return TargetRows(
        labels_R=labels_R,
        top_ids_RK=top_ids_RK,
        top_logprobs_RK=log_RK[:, :K],
        tail_ids_RM=torch.randint(0, vocabulary, (rows, K), device=device),
        tail_logprob_R=log_RK[:, K],
        token_logprob_R=torch.full((rows,), -5.0, device=device),
        entropy_R=torch.full((rows,), 3.0, device=device),
    )


def targets(device: torch.device, size: Size) -> dict[str, Any]:
    """With a teacher of the same shape, after one document to warm it up."""
    from dftserve.targets.document import Document
    from dftserve.targets.teacher import Teacher

    teacher = Teacher(model_of(device, size), vocabulary=size.step_vocabulary, name="bench")
    length = min(LENGTH, size.tokens)
    random = np.random.default_rng(0)
    trained_N = np.arange(length) > 0
    documents = [
        Document(random.integers(0, size.step_vocabulary, length).astype(np.int32), trained_N)
        for _ in range(size.documents)
    ]
    teacher.targets(documents[:1], k=K, draws=K, seeds=[0])
    wait(device)
    start, done = time.perf_counter(), 0
    for first in range(0, len(documents), 8):
        batch = documents[first : first + 8]
        teacher.targets(batch, k=K, draws=K, seeds=range(len(batch)))
        done += sum(len(each.positions_T) for each in batch)
        if time.perf_counter() - start > TARGET_SECONDS:
            break
    wait(device)
    return {"tokens": done, "tokens_per_second": round(done / (time.perf_counter() - start), 1)}


TARGET_SECONDS = 20.0
"""No batch is started after this time."""


# ── generate() ───────────────────────────────────────────────────────────────────────────────────


def generation(device: torch.device, size: Size, folder: Path | None) -> Any:
    """Tokens per second with and without the field's processor, in turns."""
    if folder is None:
        return "not run: no --model"
    from transformers import AutoModelForCausalLM

    from dftserve.hf import DiversityProcessor, sampling

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    settings = sampling(
        0.8, max_new_tokens=size.new_tokens, min_new_tokens=size.new_tokens, pad_token_id=0
    )

    def once(batch: int, processors: list[Any]) -> float:
        ids_BN = torch.randint(5, 1000, (batch, 16), device=device)
        mask_BN = torch.ones_like(ids_BN)
        wait(device)
        start = time.perf_counter()
        model.generate(
            ids_BN,
            attention_mask=mask_BN,
            generation_config=settings,
            logits_processor=processors,
        )
        wait(device)
        return time.perf_counter() - start

    rows = []
    for batch in size.batches:
        seconds: dict[str, list[float]] = {"none": [], "field": []}
        for pair in range(1 + size.train_steps):
            taken = {"none": once(batch, [])}
            processor = DiversityProcessor(0.5, temperature=0.8, stop_ids=[2])
            taken["field"] = once(batch, [processor])
            for name in taken if pair else ():
                seconds[name].append(taken[name])
        tokens = batch * size.new_tokens
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": round(tokens / statistics.median(seconds["field"]), 1),
                "throughput": ratio(seconds["none"], seconds["field"]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
