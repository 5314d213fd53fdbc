"""LoRA adapters that `style` may name: those that vLLM serves as NAME-S, where S is the strength
(the naming scheme of `dftserve checkpoint scale`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dftserve import spec
from dftserve.policy import Limits


@dataclass(frozen=True)
class Adapter:
    """A served LoRA adapter."""

    model: str
    """The name under which vLLM serves it."""
    style: str
    """The name without the strength."""
    strength: float


@dataclass(frozen=True)
class ChosenAdapter:
    """The adapter chosen for a request's style."""

    adapter: Adapter
    requested: spec.Style
    """The requested style, after the operator's policy was applied."""
    clamped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, str | float]:
        """The `style` object of the answer."""
        chosen = {"adapter": self.adapter.model, "effective_strength": self.adapter.strength}
        return self.requested.as_dict() | chosen


def served(models: Any) -> tuple[Adapter, ...]:
    """The adapters of vLLM's `OpenAIServingModels`, including those loaded at run time."""
    names = list(getattr(models, "lora_requests", ()))
    return tuple(each for name in names if (each := _parse_name(name)) is not None)


def strengths(adapters: Iterable[Adapter]) -> dict[str, list[float]]:
    """The strengths available for each style name; names and strengths in ascending order."""
    by_style: dict[str, list[float]] = {}
    for each in sorted(adapters, key=lambda each: (each.style, each.strength)):
        by_style.setdefault(each.style, []).append(each.strength)
    return by_style


def nearest(adapters: Iterable[Adapter], style: spec.Style, limits: Limits) -> Adapter:
    """The style's adapter whose strength is nearest to the requested one; the weaker of two that
    are equally near.

    Args:
        limits: adapters stronger than these allow are not considered.

    Raises:
        DiversityError: all adapters are stronger than the limits allow.
    """
    own = [each for each in adapters if each.style == style.name]
    requested = 1.0 if style.strength is None else style.strength
    allowed = [each for each in own if not limits.excess(replace(style, strength=each.strength))]
    if not allowed:
        weakest = min(each.strength for each in own)
        accepted = (
            f"0, since the weakest adapter has {weakest:g}, which is more than the operator's "
            "policy allows here"
        )
        raise spec.DiversityError("style.strength", requested, accepted)
    # Rounded: in binary, .3 is nearer to .4 than .5 is.
    return min(allowed, key=lambda each: (round(abs(each.strength - requested), 9), each.strength))


def _parse_name(model: str) -> Adapter | None:
    """Parses a name of the form that `checkpoint scale` gives; None for any other name."""
    style, _, number = model.rpartition("-")
    try:
        strength = float(number)
    except ValueError:
        return None
    is_ours = 0 < strength <= 1 and number == f"{strength:g}"
    return Adapter(model, style, strength) if is_ours and style else None
