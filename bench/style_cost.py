"""What a style adds to the cost of the field: a step's stages, in this process.

    python bench/style_cost.py [--pairs 40] [--output bench/results/style_cost.json]

    field    the diversity of every row, as the plug-in runs it in a step
    style    the same, after the style stage, on the same logits
The variants take turns on the GPU if there is one, for several rows and vocabularies; on a CPU
the CPU time of one thread is measured. The profile has 200 phrases of two to five tokens, and a
tilt of 300 tokens and as many pairs; each row's text ends inside a phrase. An engine's step
consists of these stages and the model. The throughput with a style is estimated as
step / (step + added time), with the time of a `field` step from `overhead.json`. The last line is
one JSON document.
"""

import argparse
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sampler import logits

from dftserve.sampling import (
    Controls,
    Step,
    StyleControls,
    Texts,
    control_row,
    get_backend,
    get_style_stage,
    transform_step,
)
from dftserve.spec import parse
from dftserve.styles.automaton import Pattern, build

from provenance import machine, versions
from ratios import ratio, shown

ROWS, VOCABULARIES = (8, 32), (4096, 131_072)
PHRASES, TILTED, TEXT = 200, 300, 64
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS / "style_cost.json")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs: got {options.pairs}; accepted: at least 1.")
    steps = engine_steps(RESULTS / "overhead.json")
    with torch.inference_mode():
        rows = [
            measured(rows, vocabulary, options.pairs, steps)
            for vocabulary in VOCABULARIES
            for rows in ROWS
        ]
    document = {
        "what": "a step's stages with a style and without, CPU seconds; medians of turns",
        "machine": machine(),
        "versions": versions("numpy"),
        "pairs": options.pairs,
        "rows": rows,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        size = f"{row['vocabulary']:>7} {row['rows']:>3}"
        print(f"{size} stages {shown(row['style_to_field'])}, throughput {row['throughput']}")
    print(json.dumps(document))


def engine_steps(path: Path) -> dict[tuple[int, int], float]:
    """Seconds of a step with the field on every row, by vocabulary and rows."""
    found = json.loads(path.read_text())["rows"]
    return {(row["vocabulary"], row["batch"]): row["ms_per_token"]["field"] / 1000 for row in found}


def measured(
    rows: int, vocabulary: int, pairs: int, steps: dict[tuple[int, int], float]
) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profile = made_profile(vocabulary)
    source_RV = logits(rows, vocabulary, device)
    ways = {
        "field": runner(rows, profile, source_RV, has_style=False),
        "style": runner(rows, profile, source_RV, has_style=True),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(pairs):
        for name in sorted(ways, reverse=pair % 2 == 1):
            seconds[name].append(ways[name]())
    median = {name: float(np.median(each)) for name, each in seconds.items()}
    added = np.array(seconds["style"]) - np.array(seconds["field"])
    step = steps.get((vocabulary, rows))
    return {
        "vocabulary": vocabulary,
        "rows": rows,
        "seconds": {name: float(f"{value:.3g}") for name, value in median.items()},
        "style_to_field": ratio(seconds["style"], seconds["field"]),
        "added_seconds": float(f"{np.median(added):.3g}"),
        "engine_step_seconds": step,
        "throughput": None if step is None else round(step / (step + float(np.median(added))), 3),
    }


def made_profile(vocabulary: int) -> Any:
    """Random phrases and a random tilt, with the arrays of `styles.profile.Profile`."""
    source = np.random.default_rng(0)
    patterns = []
    for phrase in range(PHRASES):
        tokens = tuple(source.integers(0, vocabulary, source.integers(2, 6)).tolist())
        patterns.append(Pattern(phrase, tokens, tuple(range(1, len(tokens) + 1))))
    automaton = build(patterns, vocabulary=vocabulary)
    factor_A = -source.exponential(0.5, len(automaton.row_start_A) - 1).astype(np.float32)
    factor_A[0] = 0.0
    unigram_V = np.zeros(vocabulary, np.float32)
    unigram_V[source.choice(vocabulary, TILTED, replace=False)] = source.normal(0, 1, TILTED)
    contexts = np.sort(source.choice(vocabulary, TILTED, replace=False)).astype(np.int32)
    return SimpleNamespace(
        vocabulary=vocabulary,
        texts=[pattern.tokens[:-1] for pattern in patterns],
        root_next_V=automaton.root_next_V,
        root_log_factor_V=factor_A[automaton.root_next_V],
        row_start_A=automaton.row_start_A,
        row_token_N=automaton.row_token_N,
        row_next_N=automaton.row_next_N,
        row_log_factor_N=factor_A[automaton.row_next_N],
        unigram_V=unigram_V,
        bigram_context_C=contexts,
        bigram_start_C=np.arange(TILTED + 1, dtype=np.int32),
        bigram_token_M=source.integers(0, vocabulary, TILTED).astype(np.int32),
        bigram_delta_M=source.normal(0, 1, TILTED).astype(np.float32),
    )


def runner(rows: int, profile: Any, source_RV: torch.Tensor, *, has_style: bool) -> Any:
    """A function that runs a step once on fresh logits and returns its seconds."""
    device = source_RV.device
    style = StyleControls(profile=0, strength=1.0, max_kl=0.05) if has_style else None
    row = control_row(
        parse(0.5), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({0}), style=style
    )
    texts_SL = np.ones((rows, TEXT), np.int32)
    for slot in range(rows):
        ending = profile.texts[slot % len(profile.texts)]
        texts_SL[slot, TEXT - len(ending) :] = ending
    at_R = torch.full((rows,), TEXT - 1, dtype=torch.int64, device=device)
    texts = Texts(
        torch.from_numpy(texts_SL).to(device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        at_R,
        torch.from_numpy(texts_SL[:, -1].copy()).to(device),
    )
    step = Step(
        Controls.stack([row] * rows, device),
        torch.arange(rows, device=device),
        at_R,
        torch.zeros(rows, dtype=torch.int32, device=device),
        texts=texts if has_style else None,
    )
    backend = get_backend(device)
    slots = backend.create_slots(rows, 1)
    stage = get_style_stage(device, [profile]) if has_style else None
    for slot in range(rows):
        slots.open(slot)
    logits_RV = torch.empty_like(source_RV)
    # The CPU time leaves out other processes on the machine; only one thread computes.
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def once() -> float:
        logits_RV.copy_(source_RV)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        transform_step(logits_RV, step, slots, backend, stage)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return once


if __name__ == "__main__":
    main()
