"""The rounds of a fit: measurements of each, as stored in a profile and as a line for the user."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dftserve import settings
from dftserve.bounded_files import shaped_as

WRITTEN = "the rounds that `dftserve style fit` writes"


@dataclass(frozen=True)
class Round:
    """The measurements of one round. Rates are per 1,000 words, of all phrases together."""

    number: int
    words: int
    rate: float
    held_out_rate: float | None
    human_rate: float
    above: int
    """Number of phrases more than twice as frequent as people's rate predicts."""
    mean_kl: float | None
    largest_step: float
    effective: float
    """Effective share of the answers after the step."""
    unfitted: Mapping[str, float]
    """`sds` and `mmd_style`, if there are anchors."""
    interval: tuple[float, ...] = ()
    """95 % interval of `rate`, that of a Poisson count; empty where it was not stored."""
    held_out_interval: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("interval", "held_out_interval"):
            if len(getattr(self, name)) not in (0, 2):
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted: low and high.")
        for name, value in self.unfitted.items():
            if not isinstance(value, float):
                raise ValueError(f"unfitted.{name}: got {value!r:.80}; accepted: a number.")


@dataclass(frozen=True)
class Fitted:
    """A fit as stored in its profile."""

    ended: str
    """Why it ended."""
    rounds: tuple[Round, ...] = field(default=())


def read(counts: Mapping[str, Any], where: str) -> Fitted | None:
    """The fit in a profile's counts; None where the profile was not fitted.

    Raises:
        ValueError: the content is not what `dftserve style fit` writes.
    """
    if "fit" not in counts:
        return None
    with shaped_as(where, WRITTEN):
        return settings.load(Fitted, counts["fit"], f"{where}: counts.fit")


def round_text(one: Round) -> str:
    """A line for the user."""
    parts = [
        f"Round {one.number}: {one.rate:.2f} phrases per 1,000 words (people {one.human_rate:.2f}"
        + ("" if one.held_out_rate is None else f", held-out prompts {one.held_out_rate:.2f}")
        + ")",
        f"{one.above} above twice people's rate",
        *([] if one.mean_kl is None else [f"KL {one.mean_kl:.4f} nats per token"]),
        f"largest step {one.largest_step:.2f}",
        f"{one.effective:.0%} effective",
        *(f"{name} {value:.3f}" for name, value in one.unfitted.items()),
    ]
    return "; ".join(parts) + "."
