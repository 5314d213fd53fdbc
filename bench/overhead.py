"""What the field costs an engine: output tokens per second, with and without it.

    python bench/overhead.py [--pairs 24] [--batch B ...] [--vocabulary V ...]
                             [--output bench/results/overhead.json]

One engine for each vocabulary, in this process, with several numbers of concurrent requests. The
variants take turns on it, round by round:
    stock     without the plug-in's processor
    min_p     stock, with vLLM's own min_p .05 and temperature 1.5
    no field  with the processor, without the field in any request
    tenth     a tenth of the requests, at least one, with diversity .5: a mixed batch
    field     every request with diversity .5; here and above with statistics in the outputs
    naive     the same law on every row, in plain torch
    peer      the law of qr-sampler on every row (`entropy_laws.py` has both)
Reported are tokens per second of all requests together, and milliseconds per token of one request,
which is the time of a step. The last line is one JSON document. Absolute times depend on the
machine; the ratios are the result. The minimum cost of a processor that changes a row is one read
and one write of it, so the bench also times a copy of the logits and prints its share of a step.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import click
import torch
from dftserve_vllm.request_context import PromptContext
from vllm import LLM, SamplingParams

from dftserve import spec

import processors
from provenance import machine, versions
from ratios import ratio, shown
from tiny_model import MAX_LENGTH, TOKENS, VOCABULARIES, save_model

T = TypeVar("T")
BATCHES = (1, 8, 32, 64)
DIVERSITY = spec.parse(0.5)
RESULTS = Path(__file__).parent / "results" / "overhead.json"


@dataclass
class Calls:
    """How often the plug-in's transform ran."""

    count: int = 0


def main() -> None:
    run()


@click.command()
@click.option(
    "--pairs", default=24, type=click.IntRange(min=1), help="Rounds; each runs every variant once."
)
@click.option("--batch", "batches", multiple=True, type=int, default=BATCHES, show_default=True)
@click.option(
    "--vocabulary", "vocabularies", multiple=True, type=int, default=VOCABULARIES, show_default=True
)
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def run(pairs: int, batches: tuple[int, ...], vocabularies: tuple[int, ...], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for vocabulary in vocabularies:
        with TemporaryDirectory() as folder:
            save_model(Path(folder), vocabulary)
            llm = engine(folder, max(batches))
            rows += [measure(llm, vocabulary, batch, pairs) for batch in batches]
            del llm
    document = {
        "what": "output tokens per second of one engine, ratios to stock, 95 % intervals",
        "machine": machine(),
        "versions": versions("dftserve-vllm", "vllm", "transformers", "numpy"),
        "pairs": pairs,
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(document))


def engine(folder: str, batch: int) -> LLM:
    """An engine that also has the processors of the other laws, which are off at first."""
    processors.Naive.is_on = processors.Peer.is_on = False
    return LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        max_num_seqs=batch,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        logits_processors=[processors.Naive, processors.Peer],
        seed=0,
    )


def measure(llm: LLM, vocabulary: int, batch: int, pairs: int) -> dict[str, Any]:
    """Alternating rounds of all variants; the order rotates so that none is always first."""
    calls = count_transforms()
    ways = {name: way(llm, vocabulary, batch) for name, way in WAYS.items()}
    for once in ways.values():
        once()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    transforms = dict.fromkeys(ways, 0)
    names = list(ways)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            before = calls.count
            speeds[name].append(ways[name]())
            transforms[name] += calls.count - before
    row: dict[str, Any] = {"vocabulary": vocabulary, "batch": batch}
    row["stock_tokens_per_second"] = round(statistics.median(speeds["stock"]), 1)
    row["ms_per_token"] = {
        name: round(1000 * batch / statistics.median(speeds[name]), 3) for name in names
    }
    for name in names[1:]:
        row[name] = ratio(speeds[name], speeds["stock"])
    for name in ("no field", "tenth", "field"):
        row[f"{name}_transforms"] = transforms[name]
    row["copy_share_of_step"] = round(copy_seconds(batch, vocabulary) * step_rate(row), 4)
    return row


def step_rate(row: dict[str, Any]) -> float:
    return row["stock_tokens_per_second"] / row["batch"]


def rounds(
    llm: LLM, vocabulary: int, batch: int, *, asking: int = 0, **settings: Any
) -> Callable[[], float]:
    """A function that runs one round and returns output tokens per second: `batch` requests of
    equal length, the first `asking` of them with the field. `settings`: other SamplingParams."""
    tokens = TOKENS.get(vocabulary, 32)
    prompts = [{"prompt_token_ids": [1 + i, 7, 11, 13]} for i in range(batch)]

    def once() -> float:
        asked = PromptContext(DIVERSITY, count=asking)
        params = [
            SamplingParams(
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=asking_for(asked, i) if i < asking else {},
                **{"temperature": 1.0, **settings},
            )
            for i in range(batch)
        ]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        reported = [choice.as_dict() for choice in asked.choices]
        seconds = time.perf_counter() - start
        assert [stats and stats["tokens"] for stats in reported] == [tokens] * asking
        return batch * tokens / seconds

    return once


def asking_for(asked: PromptContext, choice: int) -> dict[str, Any]:
    """The arguments that the plug-in's API process adds to a request to get its statistics."""
    return {"diversity": asked.diversity.level, "diversity_id": f"{asked.identity}.{choice}"}


def stock(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return without_ours(llm, rounds(llm, vocabulary, batch))


def min_p(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return without_ours(llm, rounds(llm, vocabulary, batch, temperature=1.5, min_p=0.05))


def without_ours(llm: LLM, plain: Callable[[], T]) -> Callable[[], T]:
    """Run `plain` without the plug-in's processor in the engine's list."""
    listed = processor_list(llm)
    ours = next(p for p in listed if type(p).__name__ == "V1Processor")

    def once() -> T:
        index = listed.index(ours)
        listed.remove(ours)
        try:
            return plain()
        finally:
            listed.insert(index, ours)

    return once


def no_field(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return rounds(llm, vocabulary, batch)


def tenth(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return rounds(llm, vocabulary, batch, asking=max(1, batch // 10))


def with_field(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return rounds(llm, vocabulary, batch, asking=batch)


def naive(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return _switched_on(processors.Naive, rounds(llm, vocabulary, batch))


def peer(llm: LLM, vocabulary: int, batch: int) -> Callable[[], float]:
    return _switched_on(processors.Peer, rounds(llm, vocabulary, batch))


def _switched_on(other: type[processors.Naive], plain: Callable[[], float]) -> Callable[[], float]:
    def once() -> float:
        other.is_on = True
        try:
            return plain()
        finally:
            other.is_on = False

    return once


WAYS = {
    "stock": stock,
    "min_p": min_p,
    "no field": no_field,
    "tenth": tenth,
    "field": with_field,
    "naive": naive,
    "peer": peer,
}


def processor_list(llm: LLM) -> list[Any]:
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    runner = core.model_executor.driver_worker.worker.model_runner
    return runner.input_batch.logitsprocs.argmax_invariant


def count_transforms() -> Calls:
    """A counter of the calls of the transform from now on."""
    from dftserve_vllm import worker_state

    now = worker_state.transform_step
    calls, transform_step = Calls(), getattr(now, "counted", now)

    def counting(*args: Any) -> Any:
        calls.count += 1
        return transform_step(*args)

    counting.counted = transform_step  # type: ignore[attr-defined]
    worker_state.transform_step = counting
    return calls


def copy_seconds(batch: int, vocabulary: int) -> float:
    """Seconds of one read and one write of the logits, the minimum cost."""
    source, target = torch.randn(batch, vocabulary), torch.empty(batch, vocabulary)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def table(rows: list[dict[str, Any]]) -> str:
    names = list(WAYS)[1:]
    head = f"{'V':>7} {'B':>3} {'stock tok/s':>12} " + " ".join(f"{name:>22}" for name in names)
    lines = [f"{head} floor"]
    for row in rows:
        cells = [shown(row[name]) for name in names]
        lines.append(
            f"{row['vocabulary']:>7} {row['batch']:>3} {row['stock_tokens_per_second']:>12.0f} "
            + " ".join(f"{cell:>22}" for cell in cells)
            + f" {1 / (1 + row['copy_share_of_step']):.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
