"""What Distribution Fine-Tuning costs compared with plain fine-tuning (SFT), on this machine's CPU.

    OMP_NUM_THREADS=1 python bench/train_cost.py [--pairs 16] [--output FILE.json]

All in one process; the variants take turns, round by round, in a rotating order:
    head     forward and backward pass of the head with its loss, including the matrix products:
             each divergence on k = M = 6 cached targets, against F.linear + F.cross_entropy (stock)
             and against our own chunked SFT
    step     a whole optimizer step: forward KL, with its batch read from a target store, against
             the stock model's own loss; once with a head of less than a quarter of the FLOPs, once
             with more than half
    memory   the peak of one optimizer step, each in a fresh process, and what the head saves for
             the backward pass
    targets  tokens per second of building the targets, which is done once before training
CPU time of one thread is measured, to reduce the effect of other processes. The last line is one
JSON document. Absolute times depend on the machine; the ratios are the result: medians of the
rounds' ratios with 95 % bootstrap intervals.

Shapes: N trained positions, D hidden size, V vocabulary, K top entries, M draws, B rows of tokens.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaConfig, LlamaForCausalLM

from dftserve.lm import Head
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.ngram import Ngram
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets
from dftserve.targets.store import TargetStore
from dftserve.targets.teacher import Teacher
from dftserve.train.config import DivergenceConfig
from dftserve.train.data import Collator, Rows
from dftserve.train.divergences import Divergence, ForwardKL, TargetRows
from dftserve.train.head import head_loss
from dftserve.train.model import attach

from provenance import machine, versions
from ratios import ratio, shown

RESULTS = Path(__file__).parent / "results" / "train_cost.json"
HIDDEN, INNER = 256, 768
LENGTH = 129
"""Tokens of a document, of which 128 are trained on."""
K = DRAWS = 6
DIVERGENCES = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "sliced_w1", "sft")
HEAD_CALLS = 2
"""Calls in one timed turn."""
PEAKS = 3
"""Processes for each variant, of which the median is used."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch."""

    vocabulary: int
    layers: int
    rows: int

    @property
    def positions(self) -> int:
        return self.rows * (LENGTH - 1)


LIGHT = Size(vocabulary=8192, layers=8, rows=4)
"""The head has less than a quarter of the FLOPs, as in a model with a billion parameters."""
HEAVY = Size(vocabulary=32_768, layers=2, rows=4)
"""The head has more than half of the FLOPs: the worst case."""
SIZES = {"light": LIGHT, "heavy": HEAVY}


def main() -> None:
    run()


@click.command()
@click.option("--pairs", default=16, help="Rounds; each runs every variant once.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
@click.option("--peak", nargs=2, hidden=True, help="(size, variant): print one step's peak, exit.")
def run(pairs: int, output: Path, peak: tuple[str, str] | None) -> None:
    torch.manual_seed(0)
    if peak:
        print(json.dumps(peak_of(SIZES[peak[0]], peak[1])))
        return
    start = time.perf_counter()
    document = {
        "what": "cost of Distribution Fine-Tuning over SFT: ratios of times, 95 % intervals",
        "machine": machine(),
        "versions": versions("transformers", "numpy"),
        "pairs": pairs,
        "head": [heads(size, pairs) for size in SIZES.values()],
        "step": [steps(name, pairs) for name in SIZES],
        "memory": [memory(name) for name in SIZES],
        "targets": targets(LIGHT),
    }
    document["bench_seconds"] = round(time.perf_counter() - start, 1)
    print(table(document))
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


# ── Material ─────────────────────────────────────────────────────────────────────────────────────


def model_of(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def documents_of(size: Size, count: int) -> list[Document]:
    """Documents with tokens drawn by Zipf's law."""
    random = np.random.default_rng(0)
    trained_N = np.arange(LENGTH) > 0
    return [
        Document((random.zipf(1.2, LENGTH) % size.vocabulary).astype(np.int32), trained_N)
        for _ in range(count)
    ]


class RandomTargets(Source):
    """Random targets of the same shape as real ones; the values do not affect the cost."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "drawn"}

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        return [self._of(*each, k, draws) for each in zip(documents, seeds, strict=True)]

    def _of(self, document: Document, seed: int, k: int, draws: int) -> Targets:
        random = np.random.default_rng(seed)
        count = len(document.positions_T)
        shares_TK = -np.sort(-random.dirichlet(np.ones(k + 1), size=count)).astype(np.float32)
        ids_TK = np.stack([random.choice(self.vocabulary, k, replace=False) for _ in range(count)])
        return Targets(
            top_ids_TK=ids_TK,
            top_logprobs_TK=np.log(shares_TK[:, :k]),
            tail_ids_TM=random.integers(0, self.vocabulary, (count, draws)),
            tail_logprob_T=np.log(shares_TK[:, k]),
            token_logprob_T=np.full(count, -5.0, dtype=np.float32),
            entropy_T=np.full(count, 3.0, dtype=np.float32),
        )


def rows_of(size: Size, folder: Path, count: int = 32) -> Rows:
    """The rows of a new store in `folder`, as training reads them."""
    source, splits = RandomTargets(size.vocabulary), {"train": documents_of(size, count)}
    plan = store.plan(
        source, splits, tokenizer="", template=None, corpus={}, k=K, draws=DRAWS, seed=0
    )
    store.write(folder, plan, source, splits)
    return Rows(TargetStore(folder), "train", longest=LENGTH, packing=True, seed=0)


# ── Head ─────────────────────────────────────────────────────────────────────────────────────────


def heads(size: Size, pairs: int) -> dict[str, Any]:
    """Times of every divergence, of our SFT and of the stock head, on one batch."""
    hidden_ND, weight_VD, target = head_batch(size)

    def stock() -> None:
        cross_entropy(linear(hidden_ND, weight_VD), target.labels_R, reduction="sum").backward()

    def ours(divergence: Divergence) -> Callable[[], None]:
        head = Head(weight_VD, None)
        return lambda: head_loss(head, hidden_ND, target, divergence).loss.backward()

    ways = {"stock": stock} | {
        name: ours(DivergenceConfig(name=name).build(weight_VD)) for name in DIVERGENCES
    }
    ways = {name: cleared(way, hidden_ND, weight_VD) for name, way in ways.items()}
    seconds = in_turns(ways, pairs)
    row: dict[str, Any] = {"vocabulary": size.vocabulary, "positions": size.positions}
    row["stock_sec"] = round(statistics.median(seconds["stock"]) / HEAD_CALLS, 5)
    row["to_stock"] = {name: ratio(seconds[name], seconds["stock"]) for name in DIVERGENCES}
    row["to_own_sft"] = {name: ratio(seconds[name], seconds["sft"]) for name in DIVERGENCES[:-1]}
    return row


def head_batch(size: Size) -> tuple[Tensor, Tensor, TargetRows]:
    hidden_ND = torch.randn(size.positions, HIDDEN, requires_grad=True)
    weight_VD = (3.0 / HIDDEN**0.5 * torch.randn(size.vocabulary, HIDDEN)).requires_grad_()
    documents = documents_of(size, size.rows)
    source = RandomTargets(size.vocabulary)
    drawn = source.targets(documents, k=K, draws=DRAWS, seeds=range(size.rows))
    labels_N = np.concatenate([document.labels_T for document in documents])
    return hidden_ND, weight_VD, TargetRows.of(labels_N, Targets.concatenate(drawn))


def cleared(way: Callable[[], None], *leaves: Tensor) -> Callable[[], None]:
    """HEAD_CALLS calls, each without earlier gradients, as after an optimizer step."""

    def once() -> None:
        for _ in range(HEAD_CALLS):
            for leaf in leaves:
                leaf.grad = None
            way()

    return once


# ── Step ─────────────────────────────────────────────────────────────────────────────────────────


def steps(name: str, pairs: int) -> dict[str, Any]:
    size = SIZES[name]
    with TemporaryDirectory() as folder:
        rows = rows_of(size, Path(folder))
        ways = {way: step_of(size, rows, way) for way in ("forward_kl", "sft")}
        seconds = in_turns(ways, pairs)
    model = model_of(size)
    median = statistics.median(seconds["sft"])
    return {
        "size": name,
        "vocabulary": size.vocabulary,
        "parameters": sum(each.numel() for each in model.parameters()),
        "head_flops_share": round(head_share(size, model), 4),
        "sft_step_sec": round(median, 4),
        "sft_tokens_per_sec": round(size.positions / median, 1),
        "forward_kl": ratio(seconds["forward_kl"], seconds["sft"]),
    }


def step_of(size: Size, rows: Rows, way: str) -> Callable[[], None]:
    """A function that makes one optimizer step on the next rows of the store; `sft` is the stock
    model with its own loss."""
    model = model_of(size)
    if way != "sft":
        attach(model, ForwardKL())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    collate, taken = Collator(), batches(size, rows)

    def loss() -> Tensor:
        items = [rows[i] for i in next(taken)]
        if way == "sft":
            return stock_loss(model, [document for item in items for document, _ in item])
        batch = collate(items)
        return model(**batch).loss / len(batch["positions_T"])

    def once() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def batches(size: Size, rows: Rows) -> Iterator[list[int]]:
    start = 0
    while True:
        yield [(start + i) % len(rows) for i in range(size.rows)]
        start += size.rows


def stock_loss(model: LlamaForCausalLM, documents: Sequence[Document]) -> Tensor:
    tokens_BN = torch.from_numpy(np.stack([d.tokens_N for d in documents])).long()
    return model(input_ids=tokens_BN, labels=tokens_BN, use_cache=False).loss


def head_share(size: Size, model: LlamaForCausalLM) -> float:
    """The head's share of the multiplications for one token, with the weights and attention."""
    head = model.lm_head.weight.numel()
    body = sum(each.numel() for each in model.model.layers.parameters())
    attention = size.layers * 2 * HIDDEN * LENGTH
    return head / (head + body + attention)


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────


def memory(name: str) -> dict[str, Any]:
    peaks = {way: peaks_of(name, way) for way in ("sft", "forward_kl")}
    size = SIZES[name]
    return {
        "size": name,
        "vocabulary": size.vocabulary,
        "positions": size.positions,
        "peak_rss_bytes": {way: peak["peak"] for way, peak in peaks.items()},
        "step_rss_bytes": {way: each["peak"] - each["before"] for way, each in peaks.items()},
        "head_kept_bytes": kept_bytes(size),
        "peak_ratio": round(peaks["forward_kl"]["peak"] / peaks["sft"]["peak"], 4),
    }


def peaks_of(name: str, way: str) -> dict[str, int]:
    """`peak_of` in fresh processes."""
    command = [sys.executable, __file__, "--peak", name, way]
    runs = [
        subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PEAKS)
    ]
    found = [json.loads(each.stdout.splitlines()[-1]) for each in runs]
    return sorted(found, key=lambda each: each["peak"])[PEAKS // 2]


def peak_of(size: Size, way: str) -> dict[str, int]:
    """The resident set before a second step and at its peak, in bytes; Linux."""
    with TemporaryDirectory() as folder:
        once = step_of(size, rows_of(size, Path(folder)), way)
        once()
        Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
        before = resident("VmRSS")
        once()
    return {"before": before, "peak": resident("VmHWM")}


def resident(name: str) -> int:
    """From /proc; getrusage's peak is inherited from the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def kept_bytes(size: Size) -> dict[str, int]:
    """Bytes that the head saves from its forward for its backward pass, without its inputs."""
    hidden_ND, weight_VD, target = head_batch(size)
    inputs = {each.data_ptr() for each in (hidden_ND, weight_VD, target.labels_R)}
    kept = {}
    with counted(inputs) as sizes:
        cross_entropy(linear(hidden_ND, weight_VD), target.labels_R, reduction="sum")
    kept["sft"] = sum(sizes.values())
    with counted(inputs) as sizes:
        head_loss(Head(weight_VD, None), hidden_ND, target, ForwardKL())
    kept["forward_kl"] = sum(sizes.values())
    return kept


@contextmanager
def counted(inputs: set[int]) -> Iterator[dict[int, int]]:
    sizes: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.data_ptr() not in inputs:
            sizes[value.data_ptr()] = value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield sizes


# ── Targets ──────────────────────────────────────────────────────────────────────────────────────


def targets(size: Size, count: int = 8) -> dict[str, Any]:
    """Speed with a teacher of the trained model's size, and with n-grams over 400 documents."""
    documents = documents_of(size, 400)
    teacher = Teacher(model_of(size).eval(), vocabulary=size.vocabulary, name="same size")
    start = time.process_time()
    ngram = Ngram(documents, vocabulary=size.vocabulary)
    counting = time.process_time() - start
    return {
        "vocabulary": size.vocabulary,
        "teacher_tokens_per_sec": rate(teacher, documents[:count], rounds=4),
        "ngram_tokens_per_sec": rate(ngram, documents[:count], rounds=4),
        "ngram_count_tokens_per_sec": round(sum(len(d.tokens_N) for d in documents) / counting),
    }


def rate(source: Source, documents: Sequence[Document], *, rounds: int) -> float:
    """Tokens per second, the median over the rounds, after one to warm up."""
    tokens, seconds = sum(len(d.positions_T) for d in documents), []
    for _ in range(rounds + 1):
        start = time.process_time()
        source.targets(documents, k=K, draws=DRAWS, seeds=range(len(documents)))
        seconds.append(time.process_time() - start)
    return round(tokens / statistics.median(seconds[1:]), 1)


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────


def in_turns(ways: Mapping[str, Callable[[], None]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after two to warm up, in a rotating order."""
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(pairs + 2):
        turn = pair % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - start)
    return {name: each[2:] for name, each in seconds.items()}


def table(document: Mapping[str, Any]) -> str:
    lines = [f"{'head':<11} {'V':>6} {'to stock':>24} {'to own SFT':>24}"]
    for row in document["head"]:
        for name, found in row["to_stock"].items():
            own = row["to_own_sft"].get(name)
            cells = [shown(found), shown(own) if own else "–"]
            lines.append(f"{name:<11} {row['vocabulary']:>6} {cells[0]:>24} {cells[1]:>24}")
    lines.append(f"{'step':<11} {'V':>6} {'forward KL to SFT':>24} {'parameters':>12} head's FLOPs")
    for row in document["step"]:
        lines.append(
            f"{row['size']:<11} {row['vocabulary']:>6} {shown(row['forward_kl']):>24} "
            f"{row['parameters']:>12,} {row['head_flops_share']:.0%}"
        )
    lines.append(
        f"{'memory, MiB':<11} {'V':>6} {'peak SFT, forward KL':>24} {'kept by the head':>24}"
    )
    for row in document["memory"]:
        pairs = [mib(row[name]) for name in ("peak_rss_bytes", "head_kept_bytes")]
        lines.append(f"{row['size']:<11} {row['vocabulary']:>6} {pairs[0]:>24} {pairs[1]:>24}")
    built = document["targets"]
    lines.append(
        f"targets, tokens/s: teacher {built['teacher_tokens_per_sec']:,.0f}, "
        f"n-grams {built['ngram_tokens_per_sec']:,.0f}; an SFT step does "
        f"{document['step'][0]['sft_tokens_per_sec']:,.0f}"
    )
    return "\n".join(lines)


def mib(values: Mapping[str, int]) -> str:
    return ", ".join(f"{values[way] / MIB:.0f}" for way in ("sft", "forward_kl"))


if __name__ == "__main__":
    main()
