"""A mixture fitted on held-out text, which replaces the text's own token only where it is better.

    parts = {"teacher": teacher, "ngram 3": ngram, "cache 0.99": cache}
    calibration = calibrate(parts, ngram, heldout, bins=Bins(), fit=Fit())
    source = Calibrated(parts, ngram, calibration, bins=Bins(), heldout=heldout)

    q'(v) = (1 − g_b)·[v = y] + g_b · Σ_c w_bc p_c(v)        b: the bin of the position

The weights w come from `mixture_weights.fit`, the shares g from `gate.gate`. The text's own token y
cannot have a fitted weight, since it always predicts itself perfectly. Rows of held-out documents
are the mixture alone: nothing is trained on them, and their likelihood and entropy should be those
of the mixture.

Shapes: T trained positions, R of them in one chunk, C components, B bins, V vocabulary.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from dftserve import settings
from dftserve.targets import mixture_weights
from dftserve.targets.bins import Bins
from dftserve.targets.combine import dense
from dftserve.targets.document import Document
from dftserve.targets.gate import LEAST_DOCUMENTS, Gate, Interval, gate, interval
from dftserve.targets.ngram import Ngram
from dftserve.targets.progress import Progress
from dftserve.targets.source import CHUNK_ELEMENTS, AdditiveSource, Adds, DenseSource, Rows
from dftserve.targets.store import batches_of

KIND = "calibrated"
TEACHER, STUDENTS, NGRAM = "teacher", "students", "ngram "
"""Names of components; an n-gram model's name continues with its order."""
LEAST_TOKENS = 1000
"""Fewest trained tokens to fit weights on. They must come from `LEAST_DOCUMENTS` texts, since no
mixture passes the gate with fewer."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How weights are fitted."""

    tokens: int = 30_000
    """Most trained tokens of held-out documents to use: each is read by every component."""
    folds: int = 5
    """Each fold is evaluated with weights fitted on the others; a text is in one fold."""
    shrinkage: float = 200.0
    """Weight of the pooled weights in each bin, as a number of positions."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("tokens", LEAST_TOKENS, 1 << 30),
            ("folds", 2, 100),
            ("shrinkage", 0, 1e9),
        ):
            if not least <= getattr(self, name) <= most:
                got = getattr(self, name)
                raise ValueError(f"{name}: got {got}; accepted: from {least:g} to {most:g}.")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One source of the mixture, and how well it predicts the held-out text."""

    name: str
    weight: float
    """Pooled over all bins."""
    nll: Interval | None
    """Over the held-out tokens that it gives a probability above 0; None: in fewer than two
    texts."""
    ruled_out: float
    """Share of the held-out tokens to which it gives probability 0."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """By how much the mixture lowers the NLL of a baseline, in nats a token."""

    over: str
    nats: Interval


@dataclass(frozen=True, kw_only=True)
class Bin:
    """What was fitted in one class of positions."""

    title: str
    positions: int
    gain: float | None
    """D, see `gate`; None: too few documents."""
    share: float
    """g."""
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was fitted and measured on the held-out documents, in JSON types."""

    inputs: str
    """BLAKE3 of everything it depends on."""
    documents: int
    tokens: int
    mixture: Interval
    """NLL of the held-out text, each document with weights from the other folds."""
    components: tuple[Component, ...]
    gains: tuple[Gain, ...]
    """Of the mixture over each baseline."""
    share: float
    """Mean g over the held-out positions."""
    bins: tuple[Bin, ...]

    @property
    def is_refused(self) -> bool:
        return self.share == 0


def calibrate(
    parts: Mapping[str, DenseSource],
    ngram: Ngram,
    heldout: Sequence[Document],
    *,
    bins: Bins,
    fit: Fit,
    known: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Calibration:
    """Fit the weights on held-out documents, and measure how well the mixture predicts them.

    Args:
        parts: the components by name, the model before tuning (`TEACHER`) first. At least one is
            an n-gram model, which gives every token a probability above 0.
        ngram: its longest contexts determine the bin of a position.
        heldout: documents that no component was built from.
        known: the description of an earlier `Calibrated`, or of a source that contains one; its
            calibration is reused if it has the same inputs.

    Raises:
        ValueError: too few held-out documents or tokens.
    """
    chosen = _select_documents(heldout, fit.tokens)
    inputs = _inputs(parts, chosen, bins, fit)
    for before in calibrations(known):
        if before.inputs == inputs:
            return before
    observed = _read_heldout(parts, ngram, chosen, bins, say)
    number = bins.number
    mixture = mixture_weights.fit(
        observed.logprobs_TC, observed.bins_T, bins=number, shrinkage=fit.shrinkage
    )
    nll_T = _cross_fitted_nll(observed, number, fit)
    baselines = _baselines(list(parts), observed.logprobs_TC)
    gates = gate(nll_T, baselines, observed.groups_T, observed.bins_T, bins=number)
    return Calibration(
        inputs=inputs,
        documents=len(chosen),
        tokens=len(nll_T),
        mixture=interval(nll_T, observed.groups_T),
        components=tuple(
            _component(
                name, float(mixture.pooled_C[c]), observed.logprobs_TC[:, c], observed.groups_T
            )
            for c, name in enumerate(parts)
        ),
        gains=tuple(Gain(over=name, nats=nats) for name, nats in gates.gains.items()),
        share=float(gates.share_B[observed.bins_T].mean()),
        bins=tuple(_bins(bins, observed.bins_T, mixture.bins_BC, gates)),
    )


class Calibrated(DenseSource):
    """The calibrated mixture, and the text's own token where the mixture is not better."""

    def __init__(
        self,
        parts: Mapping[str, DenseSource],
        ngram: Ngram,
        calibration: Calibration,
        *,
        bins: Bins,
        heldout: Sequence[Document],
    ) -> None:
        """
        Args:
            parts, ngram, bins: the arguments of `calibrate`.
            heldout: documents whose rows are the mixture alone.
        """
        self._parts = {name: dense(part, KIND) for name, part in parts.items()}
        self._ngram, self._bins, self.calibration = ngram, bins, calibration
        self.vocabulary = ngram.vocabulary
        self._weights_BC = np.array([each.weights for each in calibration.bins])
        self._share_B = np.array([each.share for each in calibration.bins])
        self._heldout = {document.digest for document in heldout}

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": KIND,
            "parts": {name: part.describe() for name, part in self._parts.items()},
            "edges": asdict(self._bins),
            "calibration": asdict(self.calibration),
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        first, *others = self._parts.values()
        read = [_read(part, documents) for part in others]
        return [
            self._rows(document, rows, parts)
            for document, rows, *parts in zip(documents, first.read(documents), *read, strict=True)
        ]

    def _rows(self, document: Document, first: Rows, others: Sequence[Rows | Adds]) -> Rows:
        features = _Features.of(document, self._ngram)
        labels_T = torch.from_numpy(document.labels_T.astype(np.int64))
        is_trained = document.digest not in self._heldout

        def rows(start: int, stop: int) -> Tensor:
            first_RV = first(start, stop)
            bins_R = features.bins(self._bins, start, stop, _entropy(first_RV))
            weights_RC = torch.from_numpy(self._weights_BC[bins_R]).float().to(first_RV.device)
            mass_RV = torch.zeros_like(first_RV)
            mixed_RV = first_RV + weights_RC[:, :1].log()
            for part, weight_R in zip(others, weights_RC.T[1:], strict=True):
                if isinstance(part, Adds):
                    part.add(mass_RV, start, weight_R)
                else:
                    part_RV = part(start, stop).to(mixed_RV.device)
                    mixed_RV = torch.logaddexp(mixed_RV, part_RV + weight_R[:, None].log())
            mixed_RV = torch.logaddexp(mixed_RV, mass_RV.log_())
            if not is_trained:
                return mixed_RV
            return with_text(mixed_RV, labels_T[start:stop], self._share_B[bins_R])

        return rows


def _read(part: DenseSource, documents: Sequence[Document]) -> Sequence[Rows | Adds]:
    return part.adds(documents) if isinstance(part, AdditiveSource) else part.read(documents)


def with_text(mixed_RV: Tensor, labels_R: Tensor, share_R: np.ndarray) -> Tensor:
    """ln q' of q' = (1 − g)·δ_y + g·q, from ln q."""
    device = mixed_RV.device
    share_R1 = torch.from_numpy(share_R).float().to(device)[:, None]
    labels_R1 = labels_R.to(device)[:, None]
    target_RV = mixed_RV + share_R1.log()
    own_R1 = torch.logaddexp(target_RV.gather(1, labels_R1), torch.log1p(-share_R1))
    return target_RV.scatter(1, labels_R1, own_R1)


# ── Features of a position ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Features:
    """Features of a document's trained positions, except the entropy, which needs a model."""

    match_T: np.ndarray
    count_T: np.ndarray
    position_T: np.ndarray

    @staticmethod
    def of(document: Document, ngram: Ngram) -> "_Features":
        return _Features(*ngram.matches(document), document.positions_T)

    def bins(self, bins: Bins, start: int, stop: int, entropy_R: np.ndarray) -> np.ndarray:
        return bins.of(
            match=self.match_T[start:stop],
            count=self.count_T[start:stop],
            entropy=entropy_R,
            position=self.position_T[start:stop],
        )


def _entropy(logprobs_RV: Tensor) -> np.ndarray:
    """float32 [R], nats."""
    finite_RV = logprobs_RV.clamp_min(torch.finfo(torch.float32).min)
    return -(logprobs_RV.exp() * finite_RV).sum(dim=1).cpu().numpy()


# ── Reading the held-out documents ───────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Observed:
    """All trained positions of the held-out documents, concatenated."""

    logprobs_TC: np.ndarray
    """float64: ln of the probability each component gives to the text's own token."""
    bins_T: np.ndarray
    groups_T: np.ndarray
    """int64: the index of a position's text."""


def _select_documents(heldout: Sequence[Document], tokens: int) -> list[Document]:
    """Whole documents with up to about `tokens` trained tokens, first one of each text and then a
    second of each, in an order given by digests: more texts make narrower intervals.

    Raises:
        ValueError: too few documents or tokens.
    """
    trained = [document for document in heldout if document.trained]
    groups = {_group(document) for document in trained}
    counted = sum(document.trained for document in trained)
    if len(groups) < LEAST_DOCUMENTS or counted < LEAST_TOKENS:
        raise ValueError(
            f"{KIND}: got {counted:,} trained tokens of held-out text, of {len(groups)} texts that "
            f"are no copies of one another; accepted: at least {LEAST_TOKENS:,} tokens of at least "
            f"{LEAST_DOCUMENTS} texts, since weights are fitted and tested on them. Hold out more "
            "(a larger --heldout, or --heldout-from), or give more text."
        )
    chosen, trained_tokens = [], 0
    for document in _interleaved(trained):
        if trained_tokens >= tokens and len(chosen) >= LEAST_DOCUMENTS:
            break
        chosen.append(document)
        trained_tokens += document.trained
    return chosen


def _interleaved(documents: Sequence[Document]) -> list[Document]:
    """The first document of each text, ordered by digests, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    placed = []
    for document in sorted(documents, key=lambda each: each.digest):
        group = _group(document)
        placed.append((seen[group], group, document))
        seen[group] += 1
    return [document for *_, document in sorted(placed, key=lambda each: each[:2])]


def _read_heldout(
    parts: Mapping[str, DenseSource],
    ngram: Ngram,
    documents: Sequence[Document],
    bins: Bins,
    say: Callable[[str], object],
) -> _Observed:
    total = sum(len(document.tokens_N) for document in documents)
    say(f"Fitting a mixture of {len(parts)} components on {total:,} held-out tokens.")
    progress = Progress("held-out tokens read", say, total=total)
    names = sorted({_group(document) for document in documents})
    numbers = {name: number for number, name in enumerate(names)}
    first, *others = [dense(part, KIND) for part in parts.values()]
    logprobs, found_bins, groups = [], [], []
    for places in batches_of(documents):
        some = [documents[place] for place in places]
        read = [part.token_logprobs(some) for part in others]
        for document, rows, *columns in zip(some, first.read(some), *read, strict=True):
            known = _Features.of(document, ngram)
            first_T, bins_T = _read_first_component(document, rows, known, bins, ngram.vocabulary)
            logprobs.append(np.stack([first_T, *columns], axis=1))
            found_bins.append(bins_T)
            groups.append(np.full(len(bins_T), numbers[_group(document)]))
        progress.add(sum(len(document.tokens_N) for document in some))
    return _Observed(np.concatenate(logprobs), np.concatenate(found_bins), np.concatenate(groups))


def _read_first_component(
    document: Document, rows: Rows, known: _Features, bins: Bins, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [T]: ln of the first component's probability of the text's own tokens; their bins."""
    labels_T = torch.from_numpy(document.labels_T.astype(np.int64))
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    logprobs, found_bins = [], []
    for start in range(0, len(labels_T), size):
        stop = min(start + size, len(labels_T))
        first_RV = rows(start, stop)
        found_bins.append(known.bins(bins, start, stop, _entropy(first_RV)))
        labels_R1 = labels_T[start:stop, None].to(first_RV.device)
        logprobs.append(first_RV.gather(1, labels_R1)[:, 0].double().cpu().numpy())
    return np.concatenate(logprobs), np.concatenate(found_bins)


# ── Results ──────────────────────────────────────────────────────────────────────────────────────


def _cross_fitted_nll(observed: _Observed, bins: int, fit: Fit) -> np.ndarray:
    """float64 [T]: −ln q of each position, with weights fitted without the fold of its text."""
    fold_T = observed.groups_T % fit.folds
    nll_T = np.zeros(len(fold_T))
    for fold in np.unique(fold_T):
        in_fold_T = fold_T == fold
        weights = mixture_weights.fit(
            observed.logprobs_TC[~in_fold_T],
            observed.bins_T[~in_fold_T],
            bins=bins,
            shrinkage=fit.shrinkage,
        )
        nll_T[in_fold_T] = mixture_weights.nll(
            observed.logprobs_TC[in_fold_T], weights.bins_BC[observed.bins_T[in_fold_T]]
        )
    return nll_T


def _baselines(names: Sequence[str], logprobs_TC: np.ndarray) -> dict[str, np.ndarray]:
    """−ln p of each baseline that the mixture must beat: the model before tuning, the best of the
    n-gram models, and the students if there are any."""
    ngrams = [c for c, name in enumerate(names) if name.startswith(NGRAM)]
    best = min(ngrams, key=lambda c: -logprobs_TC[:, c].mean())
    models = [c for c, name in enumerate(names) if name in (TEACHER, STUDENTS)]
    return {names[c]: _bounded(-logprobs_TC[:, c]) for c in (*models, best)}


def _component(name: str, weight: float, logprobs_T: np.ndarray, groups_T: np.ndarray) -> Component:
    possible_T = logprobs_T > -np.inf
    has_interval = len(np.unique(groups_T[possible_T])) > 1
    return Component(
        name=name,
        weight=weight,
        nll=interval(-logprobs_T[possible_T], groups_T[possible_T]) if has_interval else None,
        ruled_out=float(1 - possible_T.mean()),
    )


LARGEST_NATS = 100.0
"""Where a baseline gives a token probability 0, its NLL counts as this, so that a mean stays
finite."""


def _bounded(nll_T: np.ndarray) -> np.ndarray:
    """A token to which a baseline gives probability 0 counts as `LARGEST_NATS`."""
    return np.minimum(nll_T, LARGEST_NATS)


def _bins(bins: Bins, bins_T: np.ndarray, weights_BC: np.ndarray, passed: Gate) -> Iterator[Bin]:
    counts_B = np.bincount(bins_T, minlength=bins.number)
    for number in range(bins.number):
        gain = float(passed.gain_B[number])
        yield Bin(
            title=bins.title(number),
            positions=int(counts_B[number]),
            gain=gain if np.isfinite(gain) else None,
            share=float(passed.share_B[number]),
            weights=tuple(weights_BC[number].tolist()),
        )


def calibrations(description: object) -> Iterator[Calibration]:
    """All calibrations in a source's description, at any depth."""
    if isinstance(description, Mapping):
        if description.get("kind") == KIND and "calibration" in description:
            yield settings.load(Calibration, description["calibration"], KIND)
        for each in description.values():
            yield from calibrations(each)
    elif isinstance(description, list | tuple):
        for each in description:
            yield from calibrations(each)


def is_refused(description: object) -> bool:
    """Whether a source's description contains a mixture that is refused."""
    return any(calibration.is_refused for calibration in calibrations(description))


def as_text(calibration: Calibration) -> str:
    """For a terminal: likelihoods, gains, and the bins in which the mixture is used."""
    lines = [
        f"{calibration.documents:,} held-out documents, {calibration.tokens:,} trained tokens",
        f"  {'nats a token':16}{'mean':>8}{'95 % interval':>18}{'weight':>9}{'ruled out':>11}",
        f"  {'mixture':16}{calibration.mixture.mean:8.3f}{_interval_text(calibration.mixture):>18}",
    ]
    for each in calibration.components:
        mean, ends = (
            ("", "") if each.nll is None else (f"{each.nll.mean:.3f}", _interval_text(each.nll))
        )
        cells = f"{mean:>8}{ends:>18}{each.weight:9.3f}{each.ruled_out:11.1%}"
        lines.append(f"  {each.name:16}{cells}")
    for gain in calibration.gains:
        lines.append(
            f"  gain over {gain.over}: {gain.nats.mean:.4f} ({_interval_text(gain.nats, 4)})"
        )
    used = sorted((b for b in calibration.bins if b.share), key=lambda b: -b.share * b.positions)
    for each in used[:MOST_SHOWN]:
        lines.append(f"  share {each.share:.3f}, {each.positions:,} positions: {each.title}")
    if len(used) > MOST_SHOWN:
        lines.append(f"  and {len(used) - MOST_SHOWN} bins more with a share above 0")
    closed = [each.positions for each in calibration.bins if each.positions and each.gain is None]
    if closed:
        lines.append(
            f"  share 0 in {len(closed)} bins, {sum(closed):,} positions, that are in fewer than "
            f"{LEAST_DOCUMENTS} texts"
        )
    lines.append(verdict(calibration))
    return "\n".join(lines)


MOST_SHOWN = 12
"""Number of bins that the summary lists."""


def verdict(calibration: Calibration) -> str:
    """One sentence that says whether the mixture is used or refused, and why."""
    if not calibration.is_refused:
        return (
            f"The mixture takes {calibration.share:.1%} of the targets' mass, the text's own "
            "tokens the rest: train with divergence.target_weight 1."
        )
    least = min(calibration.gains, key=lambda gain: gain.nats.low)
    why = (
        f"it does not predict unseen text better than {least.over} "
        f"({calibration.mixture.mean:.3f} nats a token; gain {least.nats.mean:.4f}, "
        f"{_interval_text(least.nats, 4)})"
        if least.nats.low <= 0
        else f"its gain over {least.over} ({least.nats.mean:.4f} nats a token) is sure in no bin"
    )
    return f"The mixture is refused: {why}, so every target is the text's own token."


def _interval_text(interval: Interval, digits: int = 3) -> str:
    return f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"


# ── Identities ───────────────────────────────────────────────────────────────────────────────────


def _inputs(
    parts: Mapping[str, DenseSource], documents: Sequence[Document], bins: Bins, fit: Fit
) -> str:
    inputs = {
        "parts": {name: part.describe() for name, part in parts.items()},
        "edges": asdict(bins),
        "fit": asdict(fit),
        "documents": [(each.digest.hex(), _group(each)) for each in documents],
    }
    return blake3(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _group(document: Document) -> str:
    return blake3(document.identifier).hexdigest()
