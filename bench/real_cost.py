"""What the laws cost on a real model: throughput, and the time to the first token.

    python bench/real_cost.py --model FOLDER [--pairs 8] [--concurrency C ...] [--dtype float32]
                              [--output bench/results/real_cost.json]

One engine in this process, with several numbers of concurrent requests. The variants take turns on
it, round by round:
    stock     without the plug-in's processor
    no field  with the processor, without the field in any request
    gated, words   every request with level 1 of that law
    min_p     stock, with vLLM's own min_p .02 and temperature 1.3
    top_p     stock, with vLLM's own top_p .95
A round answers one story prompt per request, with 32 tokens each. Measured are output tokens per
second of all requests together, and the time to the first token, as the median of the round. The
last line is one JSON document. Absolute times depend on the machine; the ratios to stock are the
result.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import click
from model_option import model_option
from overhead import without_ours
from real_answers import GATED, MIN_P, SETTINGS, STORIES, WORDS, data_folder, prompt_set
from vllm import LLM, SamplingParams

from provenance import machine, versions
from ratios import ratio, shown

CONCURRENCIES = (1, 8, 32, 64)
TOKENS = 32
"""Tokens of an answer."""
RESULTS = Path(__file__).parent / "results" / "real_cost.json"


@dataclass(frozen=True)
class Way:
    sampling: dict[str, Any]
    """Arguments of SamplingParams, and `diversity`."""
    is_stock: bool = False
    """Whether it runs without the plug-in's processor."""


WAYS = {
    "stock": Way({}, is_stock=True),
    "no field": Way({}),
    "gated": Way(dict(SETTINGS[GATED])),
    "words": Way(dict(SETTINGS[WORDS])),
    "min_p": Way(dict(SETTINGS[MIN_P]), is_stock=True),
    "top_p": Way({"top_p": 0.95}, is_stock=True),
}


@dataclass(frozen=True)
class Round:
    tokens_per_second: float
    first_token_seconds: float
    """Median over the requests."""


@click.command()
@model_option
@click.option("--dtype", default="auto")
@click.option(
    "--pairs", default=8, type=click.IntRange(min=2), help="Rounds; each runs every variant once."
)
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=click.IntRange(min=1),
    default=CONCURRENCIES,
    show_default=True,
)
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def main(model: Path, dtype: Any, pairs: int, concurrencies: tuple[int, ...], output: Path) -> None:
    prompts = prompt_set(STORIES, data_folder()).prompts
    llm = engine(model, dtype, max(concurrencies))
    rows = []
    for count in concurrencies:
        rows.append(measure(llm, prompts, count, pairs))
        print(line_of(rows[-1]), flush=True)
    document = {
        "what": "SmolLM2-135M-Instruct in one engine, ratios to stock, 95 % intervals",
        "machine": machine(),
        "versions": versions("dftserve-vllm", "vllm", "transformers", "numpy"),
        "pairs": pairs,
        "tokens": TOKENS,
        "dtype": str(dtype),
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def engine(model: Path, dtype: Any, slots: int) -> LLM:
    return LLM(
        str(model),
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=slots,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        generation_config="vllm",
        # Every round prefills its prompts, even if an earlier one had them.
        enable_prefix_caching=False,
        # The times of single requests are part of the statistics.
        disable_log_stats=False,
        seed=0,
    )


def measure(llm: LLM, prompts: Sequence[str], count: int, pairs: int) -> dict[str, Any]:
    """Alternating rounds of all variants; the order rotates so that none is always first."""
    ways = {name: rounds(llm, way, prompts, count) for name, way in WAYS.items()}
    for once in ways.values():
        once()
    found: dict[str, list[Round]] = {name: [] for name in ways}
    names = list(ways)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            found[name].append(ways[name]())
    rates = {name: [each.tokens_per_second for each in found[name]] for name in names}
    waits = {name: [each.first_token_seconds for each in found[name]] for name in names}
    return {
        "requests": count,
        "stock_tokens_per_second": round(statistics.median(rates["stock"]), 1),
        "throughput": {name: ratio(rates[name], rates["stock"]) for name in names[1:]},
        "words_to_gated": ratio(rates["words"], rates["gated"]),
        "first_token": {name: ratio(waits[name], waits["stock"]) for name in names[1:]},
    }


def rounds(llm: LLM, way: Way, prompts: Sequence[str], count: int) -> Callable[[], Round]:
    sampling = {key: value for key, value in way.sampling.items() if key != "diversity"}
    diversity = way.sampling.get("diversity")
    parameters = SamplingParams(
        max_tokens=TOKENS,
        ignore_eos=True,
        extra_args=None if diversity is None else {"diversity": diversity},
        **sampling,
    )
    chats = [[{"role": "user", "content": prompts[n % len(prompts)]}] for n in range(count)]

    def once() -> Round:
        start = time.perf_counter()
        outputs = llm.chat(chats, parameters, use_tqdm=False)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        waits = [each.metrics.first_token_latency for each in outputs]  # type: ignore[union-attr]
        return Round(count * TOKENS / seconds, statistics.median(waits))

    return without_ours(llm, once) if way.is_stock else once


def line_of(row: dict[str, Any]) -> str:
    cells = [f"{name} {shown(found)}" for name, found in row["throughput"].items()]
    return f"{row['requests']:>3} requests: {', '.join(cells)}"


if __name__ == "__main__":
    main()
