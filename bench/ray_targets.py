"""Targets on Ray: how much faster are two workers than one, and does a worker's memory grow?

    python bench/ray_targets.py [--pairs 3] [--tokens 200000] [--long 1200000]

Starts a temporary cluster of two CPUs on this machine; a worker has one thread. The teacher is a
small untrained Llama (bench/tiny_model.py) with a vocabulary of 4,096 tokens.
    throughput   tokens per second after each worker's first shard; one worker and two take turns
    memory       one worker reads `--long` tokens: its own resident memory, without shared pages,
                 after each shard. Reported is the growth over the second half of the shards, by a
                 fitted line, and the growth that would result if each shard were kept
The last line is one JSON document.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import click
import numpy as np
import psutil

from dftserve.targets import on_ray, store
from dftserve.targets.document import Document
from dftserve.targets.on_ray import Cluster
from dftserve.targets.teacher import Teacher

import tiny_model
from provenance import machine, versions
from ratios import ratio, shown

RESULT = Path(__file__).parent / "results" / "ray_targets.json"
VOCABULARY = 4096
DOCUMENT = 500
"""Tokens."""
SHARD_TOKENS = 20_000
"""Smaller than the usual million, so that a short run has many shards."""
CPUS = 2


@click.command(help=__doc__)
@click.option("--pairs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=200_000, show_default=True, type=click.IntRange(4 * SHARD_TOKENS))
@click.option("--long", default=1_200_000, show_default=True, type=click.IntRange(8 * SHARD_TOKENS))
@click.option("--output", default=RESULT, type=click.Path(path_type=Path))
def main(pairs: int, tokens: int, long: int, output: Path) -> None:
    store.SHARD_TOKENS = SHARD_TOKENS
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tiny_model.saved(VOCABULARY) as model, cluster():
        short = documents(tokens)
        for pair in range(pairs):
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                rates[workers].append(rate(model, short, workers))
            click.echo(f"pair {pair + 1}: {rates[1][-1]:,.0f} and {rates[2][-1]:,.0f} tokens/s")
        sizes_S = [own_bytes(worker()) for _ in shards(model, documents(long), 1)]
    found = ratio(rates[2], rates[1])
    click.echo(f"two workers over one: {shown(found)}")
    document = {
        "what": "targets on Ray: two workers over one, and a worker's memory",
        "machine": machine(),
        "versions": versions("ray", "transformers"),
        "two_over_one": found,
        "tokens": tokens,
        "memory": memory(sizes_S, long),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def cluster() -> Any:
    import ray

    return ray.init(
        "local",
        num_cpus=CPUS,
        object_store_memory=400 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )


def documents(tokens: int) -> dict[str, list[Document]]:
    source = np.random.default_rng(0)

    def document() -> Document:
        tokens_N = source.integers(1, VOCABULARY, size=DOCUMENT).astype(np.int32)
        return Document(tokens_N, np.arange(DOCUMENT) > 0)

    return {"train": [document() for _ in range(tokens // DOCUMENT)]}


def shards(model: str, texts: dict[str, list[Document]], workers: int) -> Iterator[int]:
    """The number of tokens of each shard, when it is finished."""

    def teacher(_: Any = None) -> Teacher:
        return Teacher.load(model, vocabulary=VOCABULARY, dtype="float32")

    plan = store.plan(
        teacher(), texts, tokenizer="none", template=None, corpus={}, k=6, draws=6, seed=0
    )
    wanted = Cluster(address=None, workers=workers, loads_models=False)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "targets"
        store.begin(place, plan)
        yield from on_ray.build(place, plan, texts, teacher, wanted, click.echo)


def rate(model: str, texts: dict[str, list[Document]], workers: int) -> float:
    """Tokens per second after each worker's first shard, which leaves out the start-up."""
    tokens, start = 0, 0.0
    for number, count in enumerate(shards(model, texts, workers), 1):
        if number == workers:
            start = time.perf_counter()
        elif number > workers:
            tokens += count
    return tokens / (time.perf_counter() - start)


def worker() -> psutil.Process:
    """The process of the only worker, which Ray names after its class."""
    mine = psutil.Process().children(recursive=True)
    (found,) = [each for each in mine if each.cmdline()[:1] and "_Worker" in each.cmdline()[0]]
    return found


def own_bytes(process: psutil.Process) -> int:
    return process.memory_full_info().uss


def memory(sizes_S: list[int], tokens: int) -> dict[str, Any]:
    half_S = np.array(sizes_S[len(sizes_S) // 2 :], float)
    slope = float(np.polyfit(np.arange(len(half_S)), half_S, 1)[0])
    shard_bytes = 58 * SHARD_TOKENS
    return {
        "tokens": tokens,
        "shards": len(sizes_S),
        "mib": [round(size / 2**20, 1) for size in sizes_S],
        "growth_mib": round(slope * len(half_S) / 2**20, 2),
        "if_shards_were_kept_mib": round(shard_bytes * len(half_S) / 2**20, 1),
    }


if __name__ == "__main__":
    main()
