"""A readable summary of a target store: statistics, a histogram of entropies, examples.

    summary = inspect(TargetStore(folder), tokenizer)
    print(as_text(summary))

Shapes: T trained positions.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.page import bars, code_table, page, section, table
from dftserve.targets import calibrated
from dftserve.targets.document import Document
from dftserve.targets.sparse import Targets
from dftserve.targets.store import SPLITS, StoreError, TargetStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BIN_NATS = 0.5
"""Width of a bin of the histogram of entropies."""
BINS = 24
"""The last bin includes everything above."""
EXAMPLES = 3
"""Documents from which examples are shown."""
POSITIONS = 40
"""Trained positions shown per example."""
SHOWN = 3
"""Top entries of a target shown per position."""


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of a split; means are over trained positions."""

    documents: int
    tokens: int
    trained: int
    entropy_nats: float
    tail_mass: float
    """Mean probability outside the top k."""
    token_nats: float
    """Mean −ln of the text's own token's probability in the target, where this is not 0."""
    token_ruled_out: float
    """Share of positions at which the text's own token has probability 0 in the target."""
    entropy_histogram: tuple[int, ...]
    """Number of positions by entropy, in bins of half a nat from 0; the last bin is open."""


@dataclass(frozen=True)
class Position:
    """A token of a text and the target at its position."""

    token: str
    probability: float
    top: tuple[tuple[str, float], ...]
    entropy_nats: float


@dataclass(frozen=True)
class Example:
    """A stretch of a document, with the target at each of its positions."""

    before: str
    """The text before the first position."""
    positions: tuple[Position, ...]


@dataclass(frozen=True)
class Summary:
    """What `dftserve target inspect` shows of a store."""

    folder: str
    plan: Mapping[str, Any]
    bytes_a_token: float
    splits: Mapping[str, SplitStatistics]
    examples: tuple[Example, ...]


def inspect(store: TargetStore, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Summary:
    """Summarise a store; reads all of it once.

    Args:
        tokenizer: decodes the examples' tokens; without one their ids are shown.

    Raises:
        StoreError: the store was built with another tokenizer, or cannot be read.
    """
    plan = store.manifest.plan
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != plan.tokenizer:
        raise StoreError(f"{store.folder} was built with another tokenizer; name its model.")
    splits = {split: _statistics(store, split) for split in SPLITS}
    tokens = sum(map(store.manifest.tokens, SPLITS))
    return Summary(
        folder=store.folder.name,
        plan=asdict(plan),
        bytes_a_token=store.bytes / max(1, tokens),
        splits=splits,
        examples=tuple(_examples(store, _writer(tokenizer))),
    )


def _statistics(store: TargetStore, split: str) -> SplitStatistics:
    shards = [shard for shard in store.manifest.shards if shard.split == split]
    histogram = np.zeros(BINS, dtype=np.int64)
    trained = ruled_out = 0
    entropy = tail = token = 0.0
    for number in range(store.count(split)):
        _, targets = store[split, number]
        bins_T = np.minimum(np.maximum(targets.entropy_T, 0) // BIN_NATS, BINS - 1).astype(int)
        histogram += np.bincount(bins_T, minlength=BINS)
        possible_T = targets.token_logprob_T > -np.inf
        trained += len(targets)
        ruled_out += int((~possible_T).sum())
        entropy += float(targets.entropy_T.sum(dtype=np.float64))
        tail += float(np.exp(targets.tail_logprob_T.astype(np.float64)).sum())
        token -= float(targets.token_logprob_T[possible_T].sum(dtype=np.float64))
    return SplitStatistics(
        documents=store.count(split),
        tokens=sum(shard.tokens for shard in shards),
        trained=trained,
        entropy_nats=entropy / max(1, trained),
        tail_mass=tail / max(1, trained),
        token_nats=token / max(1, trained - ruled_out),
        token_ruled_out=ruled_out / max(1, trained),
        entropy_histogram=tuple(histogram.tolist()),
    )


def _examples(store: TargetStore, write: "Callable[[Sequence[int]], str]") -> Iterable[Example]:
    count = store.count("train")
    for number in sorted({i * count // EXAMPLES for i in range(EXAMPLES)} if count else ()):
        yield _example(*store["train", number], write)


def _example(document: Document, targets: Targets, write: "Callable[[Sequence[int]], str]"):
    positions = document.positions_T[:POSITIONS]
    before = document.tokens_N[: positions[0]].tolist() if len(positions) else []
    return Example(
        before=write(before),
        positions=tuple(
            Position(
                token=write([int(document.tokens_N[position])]),
                probability=_probability(targets.token_logprob_T[i]),
                top=tuple(
                    (write([int(token)]), _probability(logprob))
                    for token, logprob in zip(
                        targets.top_ids_TK[i, :SHOWN],
                        targets.top_logprobs_TK[i, :SHOWN],
                        strict=True,
                    )
                ),
                entropy_nats=float(targets.entropy_T[i]),
            )
            for i, position in enumerate(positions)
        ),
    )


def _probability(logprob: float) -> float:
    return round(float(np.exp(logprob)), 4)


def _writer(tokenizer: "PreTrainedTokenizerBase | None") -> "Callable[[Sequence[int]], str]":
    if tokenizer is None:
        return lambda ids: " ".join(f"#{token}" for token in ids)
    return lambda ids: str(tokenizer.decode(list(ids)))


# ── Terminal and JSON ────────────────────────────────────────────────────────────────────────────


def as_json(summary: Summary) -> str:
    """The summary for a program."""
    return json.dumps(asdict(summary), indent=2, ensure_ascii=False)


def as_text(summary: Summary) -> str:
    """For a terminal; control characters of the text are shown as escapes."""
    plan = summary.plan
    lines = [
        f"{summary.folder}: {_plan_line(plan)}, {summary.bytes_a_token:.1f} bytes a token",
        "",
        f"{'':12}{'documents':>10}{'tokens':>12}{'trained':>12}{'entropy':>9}{'tail':>7}"
        f"{'-ln token':>11}{'ruled out':>11}",
    ]
    for split, of in summary.splits.items():
        lines.append(
            f"{split:12}{of.documents:>10,}{of.tokens:>12,}{of.trained:>12,}"
            f"{of.entropy_nats:>9.3f}{of.tail_mass:>7.1%}{of.token_nats:>11.3f}"
            f"{of.token_ruled_out:>11.1%}"
        )
    for calibration in calibrated.calibrations(plan.get("source")):
        lines += ["", calibrated.as_text(calibration)]
    lines += ["", "entropy of the training targets, nats", *_bars(summary.splits["train"])]
    for number, example in enumerate(summary.examples, 1):
        lines += ["", f"example {number}: {_visible(example.before)[-60:]}"]
        lines += [f"  {_row(position)}" for position in example.positions]
    return "\n".join(lines)


def _plan_line(plan: Mapping[str, Any]) -> str:
    return f"top {plan['k']}, {plan['draws']} draws, {plan['tail']} tail, seed {plan['seed']}"


def _bars(statistics: SplitStatistics) -> Iterable[str]:
    highest = max(1, *statistics.entropy_histogram)
    for low, count in _bins(statistics):
        yield f"  {low:>5.1f}  {count:>10,}  {'█' * round(40 * count / highest)}"


def _bins(statistics: SplitStatistics) -> list[tuple[float, int]]:
    """Lower ends in nats, and counts, up to the last nonempty bin."""
    counts = statistics.entropy_histogram
    last = max((i for i, count in enumerate(counts) if count), default=0)
    return [(i * BIN_NATS, count) for i, count in enumerate(counts[: last + 1])]


def _row(position: Position) -> str:
    top = "  ".join(f"{_visible(token)} {share:.2f}" for token, share in position.top)
    return f"{_visible(position.token):16} {position.probability:.3f}   {top}"


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────


def as_html(summary: Summary) -> str:
    """A self-contained HTML file; all text in it is escaped."""
    plan = json.dumps(summary.plan, indent=2, ensure_ascii=False)
    return page(
        summary.folder,
        Markup("<p>{}, {:.1f} bytes a token</p>").format(
            _plan_line(summary.plan), summary.bytes_a_token
        ),
        table(_HEAD, (_split_cells(*each) for each in summary.splits.items())),
        section("Entropy of the training targets, nats", bars(_bins(summary.splits["train"]))),
        *(
            section(
                f"Example {number}",
                Markup("<pre>{}</pre>").format(_visible(example.before)),
                code_table(_EXAMPLE_HEAD, map(_cells, example.positions), (0, 3)),
            )
            for number, example in enumerate(summary.examples, 1)
        ),
        section("Plan", Markup("<pre>{}</pre>").format(plan)),
    )


_EXAMPLE_HEAD = ("token", "probability", "entropy", "target")
_HEAD = (
    "split",
    "documents",
    "tokens",
    "trained",
    "mean entropy, nats",
    "tail mass",
    "−ln token, nats",
    "token ruled out",
)


def _split_cells(split: str, of: SplitStatistics) -> tuple[str, ...]:
    return (
        split,
        f"{of.documents:,}",
        f"{of.tokens:,}",
        f"{of.trained:,}",
        f"{of.entropy_nats:.3f}",
        f"{of.tail_mass:.1%}",
        f"{of.token_nats:.3f}",
        f"{of.token_ruled_out:.1%}",
    )


def _cells(position: Position) -> tuple[str, ...]:
    top = "   ".join(f"{_visible(token)} {share:.2f}" for token, share in position.top)
    token = _visible(position.token)
    return token, f"{position.probability:.3f}", f"{position.entropy_nats:.2f}", top
