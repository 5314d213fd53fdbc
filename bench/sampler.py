"""The time of one call of the transform, compared with a copy and with other laws that heat rows.

    python bench/sampler.py [--quick] [--pairs 20] [--output bench/results/sampler.json]

Variants, taking turns on the same logits [R, V], float32, on the GPU if there is one:
    copy      a device copy of the logits: one read and one write, the minimum cost
    ours      `dftserve.sampling.transform`, every row active
    half      the same, every second row active; tenth: every tenth
    naive     the law in plain torch: softmax, entropy, mask, divide
    sampler   vLLM's own sampler step: divide by the temperature, softmax, exponential race
    peer      the law of qr-sampler, on the host (`entropy_laws.py`)

On a GPU, variants that can be captured in a CUDA graph are timed as replays, which leaves out the
launches. A GPU machine needs only torch and Triton: PYTHONPATH=. python bench/sampler.py
The last line is one JSON document; ratios are the result. It records whether there was a GPU.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling import Controls, control_row, get_backend, transform
from dftserve.spec import parse

import entropy_laws
from provenance import machine, versions
from ratios import ratio, shown

ROWS, VOCABULARIES = (1, 8, 64, 512), (4096, 32_768, 131_072, 262_144)
QUICK_ROWS, QUICK_VOCABULARIES = (1, 8, 32), (4096, 32_768, 131_072)
LIFTED = 32
"""Tokens of a row that stand out from the rest, as in a trained model's logits."""
LEVEL = 0.5
RESULTS = Path(__file__).parent / "results" / "sampler.json"

Way = Callable[[Tensor], object]
Timer = Callable[[], float]
"""Runs once on fresh logits; returns seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="Smaller sizes: seconds on a CPU.")
    parser.add_argument("--pairs", type=int, default=20, help="Rounds; each runs every variant.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick and options.output == RESULTS:
        parser.error("--quick needs another --output: the default one is for all sizes.")
    if options.pairs < 1:
        parser.error(f"--pairs: got {options.pairs}; accepted: at least 1.")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_rows, vocabularies = (
        (QUICK_ROWS, QUICK_VOCABULARIES) if options.quick else (ROWS, VOCABULARIES)
    )
    with torch.inference_mode():
        measured = [
            measure(rows, vocabulary, device, options.pairs)
            for vocabulary in vocabularies
            for rows in all_rows
        ]
    document = {
        "what": "seconds of one call on [rows, vocabulary] float32, medians; ratios to ours",
        "gpu": "run on a GPU" if device.type == "cuda" else "not run on a GPU",
        "machine": machine(),
        "versions": installed(),
        "pairs": options.pairs,
        "rows": measured,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(measured))
    print(document["gpu"])
    print(json.dumps(document))


def measure(
    rows: int,
    vocabulary: int,
    device: torch.device,
    pairs: int,
    ways: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Alternating rounds of the given variants, which must include `copy` and `ours`, or of all;
    the order rotates so that none is always first."""
    source_RV = logits(rows, vocabulary, device)
    names = list(ways or WAYS)
    timers = {name: timer(WAYS[name](rows, device), source_RV) for name in names}
    for once in timers.values():
        once()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            seconds[name].append(timers[name]())
    row: dict[str, Any] = {"rows": rows, "vocabulary": vocabulary}
    row["seconds"] = {name: float(f"{statistics.median(seconds[name]):.3g}") for name in names}
    row["to_ours"] = {name: ratio(seconds[name], seconds["ours"]) for name in names}
    row["ours_to_copy"] = ratio(seconds["ours"], seconds["copy"])
    return row


def logits(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    made = torch.Generator(device).manual_seed(0)
    logits_RV = 2.5 * torch.randn(rows, vocabulary, device=device, generator=made)
    chosen_RK = torch.randint(0, vocabulary, (rows, LIFTED), device=device, generator=made)
    lifts_RK = 5 + 10 * torch.rand(rows, LIFTED, device=device, generator=made)
    return logits_RV.scatter_add_(1, chosen_RK, lifts_RK)


def timer(way: Way, source_RV: Tensor) -> Timer:
    logits_RV = torch.empty_like(source_RV)
    if source_RV.is_cuda:
        return _cuda_timer(way, source_RV, logits_RV)

    def once() -> float:
        logits_RV.copy_(source_RV)
        start = time.perf_counter()
        way(logits_RV)
        return time.perf_counter() - start

    return once


def _cuda_timer(way: Way, source_RV: Tensor, logits_RV: Tensor) -> Timer:
    # `peer` computes on the host, which cannot be captured.
    run = way if way is entropy_laws.peer else _captured(way, source_RV, logits_RV)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        logits_RV.copy_(source_RV)
        torch.cuda.synchronize()
        begin.record()
        run(logits_RV)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    return once


@dataclass(frozen=True)
class Captured:
    """A CUDA graph, with references to everything whose memory its kernels read and write. A graph
    stores addresses only, so if the variant were freed, its memory could be allocated again."""

    graph: torch.cuda.CUDAGraph
    way: Way
    logits_RV: Tensor

    def __call__(self, logits_RV: Tensor) -> None:
        """Replay the graph; `logits_RV` must be the captured logits."""
        assert logits_RV is self.logits_RV
        self.graph.replay()


def _captured(way: Way, source_RV: Tensor, logits_RV: Tensor) -> Captured:
    """Capture the variant after warm-up calls, which compile its kernels and allocate buffers."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            logits_RV.copy_(source_RV)
            way(logits_RV)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way(logits_RV)
    return Captured(graph, way, logits_RV)


def copy(rows: int, device: torch.device) -> Way:
    target: list[Tensor] = []

    def run(logits_RV: Tensor) -> None:
        if not target:
            target.append(torch.empty_like(logits_RV))
        target[0].copy_(logits_RV)

    return run


def ours(rows: int, device: torch.device) -> Way:
    controls, backend = controls_of(rows, device), get_backend(device)
    return lambda logits_RV: transform(logits_RV, controls, None, backend)


def every(nth: int, rows: int, device: torch.device) -> Way:
    """Ours, with every nth row active."""
    rows_R = torch.arange(0, rows, nth, device=device)
    controls, backend = controls_of(len(rows_R), device), get_backend(device)
    return lambda logits_XV: transform(logits_XV, controls, rows_R, backend)


def controls_of(rows: int, device: torch.device) -> Controls:
    row = control_row(parse(LEVEL), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({0}))
    return Controls.stack([row] * rows, device)


def naive(rows: int, device: torch.device) -> Way:
    return entropy_laws.naive


def sampler(rows: int, device: torch.device) -> Way:
    """vLLM's class if vLLM is installed, otherwise the same steps in torch."""
    temperature_R1 = torch.ones(rows, 1, device=device)
    if importlib.util.find_spec("vllm") is not None:
        from vllm.platforms import current_platform
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

        current_platform.import_kernels()
        draw = TopKTopPSampler()
        return lambda logits_RV: draw(logits_RV.div_(temperature_R1), {}, None, None)

    def run(logits_RV: Tensor) -> Tensor:
        p_RV = torch.softmax(logits_RV.div_(temperature_R1), dim=-1)
        return p_RV.div_(torch.empty_like(p_RV).exponential_()).argmax(dim=-1)

    return run


def peer(rows: int, device: torch.device) -> Way:
    return entropy_laws.peer


WAYS: dict[str, Callable[[int, torch.device], Way]] = {
    "copy": copy,
    "ours": ours,
    "half": partial(every, 2),
    "tenth": partial(every, 10),
    "naive": naive,
    "sampler": sampler,
    "peer": peer,
}


def installed() -> dict[str, str]:
    try:
        return versions("numpy", "triton")
    except PackageNotFoundError:  # Run from a checkout, on a machine with only torch and Triton.
        return {"torch": torch.__version__, "numpy": np.__version__}


def table(measured: list[dict[str, Any]]) -> str:
    others = [name for name in WAYS if name not in ("copy", "ours")]
    lines = [
        f"{'V':>7} {'R':>4} {'copy':>9} {'ours':>9} {'ours/copy':>22} "
        + " ".join(f"{name + '/ours':>22}" for name in others)
    ]
    for row in measured:
        times = " ".join(f"{1e6 * row['seconds'][name]:>7.0f}us" for name in ("copy", "ours"))
        cells = [row["ours_to_copy"], *(row["to_ours"][name] for name in others)]
        lines.append(
            f"{row['vocabulary']:>7} {row['rows']:>4} {times} "
            + " ".join(f"{shown(found):>22}" for found in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
