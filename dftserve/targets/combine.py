"""Combines sources position by position: arithmetic mean, geometric mean, power.

    Mix([teacher, ngram], [0.7, 0.3])       Σ_i w_i q_i, w normalised to sum 1
    Geomix([teacher, other], [1.0, 0.5])    Π_i q_i^{w_i} / Z
    Temper(teacher, 0.8)                    q^β / Z; β above 1 sharpens, below 1 flattens

Shapes: R rows of one chunk, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows, Source


class Mix(DenseSource):
    """Σ_i w_i q_i: a token is likely if any of the sources gives it a high probability."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        """
        Args:
            weights: one for each source, above 0; only their proportions count.

        Raises:
            ValueError: fewer than two sources, one that provides top tokens only, unequal
                vocabularies, or invalid weights.
        """
        self._sources = _accepted(sources, "mix")
        total = sum(_positive(weights, len(sources), "mix"))
        self._weights = [weight / total for weight in weights]
        self.vocabulary = self._sources[0].vocabulary

    def describe(self) -> Mapping[str, Any]:
        return _description("mix", self._sources, self._weights)

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        return _combined(self._sources, documents, self._mix)

    def _mix(self, parts_RV: Sequence[Tensor]) -> Tensor:
        mixed_RV = parts_RV[0] + math.log(self._weights[0])
        for part_RV, weight in zip(parts_RV[1:], self._weights[1:], strict=True):
            mixed_RV = torch.logaddexp(mixed_RV, part_RV + math.log(weight))
        return mixed_RV


class Geomix(DenseSource):
    """Π_i q_i^{w_i} / Z: a token is likely if all of the sources give it a high probability."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        """
        Args:
            weights: one for each source, above 0; not normalised, so a sum above or below 1
                sharpens or flattens.

        Raises:
            ValueError: as for `Mix`.
        """
        self._sources = _accepted(sources, "geomix")
        self._weights = _positive(weights, len(sources), "geomix")
        self.vocabulary = self._sources[0].vocabulary

    def describe(self) -> Mapping[str, Any]:
        return _description("geomix", self._sources, self._weights)

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        """The rows raise ValueError if no token is possible in all sources."""
        return _combined(self._sources, documents, self._product)

    def _product(self, parts_RV: Sequence[Tensor]) -> Tensor:
        product_RV = parts_RV[0] * self._weights[0]
        for part_RV, weight in zip(parts_RV[1:], self._weights[1:], strict=True):
            product_RV = product_RV + part_RV * weight
        if not bool((product_RV.amax(dim=1) > -torch.inf).all()):
            raise ValueError(
                "geomix: at some position no token is possible in all sources, so their product "
                "is 0; use mix, or smooth the narrower source first."
            )
        return product_RV.log_softmax(dim=1)


class Temper(DenseSource):
    """q^β / Z, which is temperature 1/β."""

    def __init__(self, source: Source, power: float) -> None:
        """Raises ValueError: a power of 0 or less, or a source that provides top tokens only."""
        if not 0 < power < math.inf:
            raise ValueError(f"temper: got the power {power}; accepted: a number above 0.")
        self._source = dense(source, "temper")
        self._power = power
        self.vocabulary = source.vocabulary

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "temper", "power": self._power, "source": self._source.describe()}

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        return _combined([self._source], documents, self._temper)

    def _temper(self, parts_RV: Sequence[Tensor]) -> Tensor:
        return (parts_RV[0] * self._power).log_softmax(dim=1)


def dense(source: Source, kind: str) -> DenseSource:
    """Return the source; raise ValueError if it does not give the probability of every token.

    Args:
        kind: the kind of source that needs it, for the message.
    """
    if not isinstance(source, DenseSource) or source.tail == "lumped":
        raise ValueError(
            f"{kind}: got a {type(source).__name__}, which gives top tokens only (a lumped tail); "
            "accepted: sources that give every token's probability. Load the model as a teacher "
            "instead of using a server."
        )
    return source


def _combined(
    sources: Sequence[DenseSource],
    documents: Sequence[Document],
    combine: Callable[[Sequence[Tensor]], Tensor],
) -> list[Rows]:
    read = [source.read(documents) for source in sources]
    return [_rows(parts, combine) for parts in zip(*read, strict=True)]


def _rows(parts: Sequence[Rows], combine: Callable[[Sequence[Tensor]], Tensor]) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        return combine(on_one_device([part(start, stop) for part in parts]))

    return rows


def on_one_device(parts_RV: Sequence[Tensor]) -> list[Tensor]:
    """Move all parts to the first accelerator that any of them is on, or leave them on the CPU."""
    devices = [part_RV.device for part_RV in parts_RV]
    device = next((each for each in devices if each.type != "cpu"), devices[0])
    return [part_RV.to(device) for part_RV in parts_RV]


def _accepted(sources: Sequence[Source], kind: str) -> list[DenseSource]:
    if len(sources) < 2:
        raise ValueError(f"{kind}: got {len(sources)} sources; accepted: two or more.")
    dense_sources = [dense(source, kind) for source in sources]
    sizes = [source.vocabulary for source in dense_sources]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{kind}: got sources of {', '.join(map(str, sizes))} tokens; accepted: one vocabulary "
            "for all. Build every source with the same tokenizer."
        )
    return dense_sources


def _positive(weights: Sequence[float], count: int, kind: str) -> list[float]:
    if len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"{kind}: got the weights {list(weights)}; accepted: {count} numbers above 0, one for "
            "each source."
        )
    return [float(weight) for weight in weights]


def _description(
    kind: str, sources: Sequence[DenseSource], weights: Sequence[float]
) -> Mapping[str, Any]:
    return {
        "kind": kind,
        "weights": list(weights),
        "sources": [source.describe() for source in sources],
    }
