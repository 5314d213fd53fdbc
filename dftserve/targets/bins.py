"""Sorts positions into a few bins by what is known before their token is seen.

    bins = Bins(match=(1, 3), count=(8,), entropy=(1.5, 3.5), position=(64,))
    bins.of(match_T, count_T, entropy_T, position_T)

Shapes: T positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MOST = 512
"""Bins; more could not be fitted."""


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Rising edges of each quantity; a value equal to an edge is in the class above it. No edges:
    one class."""

    match: tuple[float, ...] = (1, 3)
    """Length, in tokens, of the longest preceding context that occurs in other documents."""
    count: tuple[float, ...] = (8,)
    """Continuations of that context in other documents."""
    entropy: tuple[float, ...] = (1.5, 3.5)
    """Of the prediction of the model before tuning, in nats."""
    position: tuple[float, ...] = (64,)
    """Tokens before it in the document."""

    def __post_init__(self) -> None:
        for name in self.names:
            edges = getattr(self, name)
            if any(low >= high for low, high in pairwise(edges)):
                raise ValueError(f"{name}: got {list(edges)}; accepted: numbers that rise.")
        if self.number > MOST:
            raise ValueError(
                f"got edges of {self.number} bins; accepted: at most {MOST}. Give fewer edges."
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self))

    @property
    def number(self) -> int:
        return math.prod(len(getattr(self, name)) + 1 for name in self.names)

    def of(self, **values_T: "np.ndarray") -> "np.ndarray":
        """int64 [T]: the bin of each position; `values_T` by the names of the edges."""
        import numpy as np  # Not at the top: recipes are read before heavy imports.

        bins_T = np.zeros(len(values_T[self.names[0]]), dtype=np.int64)
        for name in self.names:
            edges = np.array(getattr(self, name), dtype=np.float64)
            bins_T = bins_T * (len(edges) + 1) + np.searchsorted(edges, values_T[name], "right")
        return bins_T

    def title(self, number: int) -> str:
        """A description of a bin, such as `match 1 to 3, count ≥ 8`."""
        parts = []
        for name in reversed(self.names):
            edges = getattr(self, name)
            number, index = divmod(number, len(edges) + 1)
            if edges:
                parts.append(f"{name} {_span(edges, index)}")
        return ", ".join(reversed(parts)) or "all"


def _span(edges: Sequence[float], index: int) -> str:
    if index == 0:
        return f"< {edges[0]:g}"
    if index == len(edges):
        return f"≥ {edges[-1]:g}"
    return f"{edges[index - 1]:g} to {edges[index]:g}"
