"""The operator's policy: a YAML file of caps for the server, a served model and an API key.

    on_excess: reject                 # or clamp
    server: {level: 0.6, laws: [gated, guard], styles: [plain]}
    models:
      demo: {level: 0.4}
    keys:                             # by the SHA-256 of the key: printf %s "$KEY" | sha256sum
      DIGEST_OF_THE_KEY: {level: 1}
    audit: {file: /var/log/dftserve/audit.jsonl}

For each cap, a key's value overrides the model's, which overrides the server's.
Standard library only, except for YAML.
"""

import string
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dftserve import settings, spec

VARIABLE = "DFTSERVE_POLICY"
"""The environment variable from which the plug-in reads the path of the file."""
REJECT, CLAMP = "reject", "clamp"
KEY_DIGITS = 64
"""Hexadecimal digits of a SHA-256."""
MIB = 1 << 20

BOUNDS: Mapping[str, spec.Bounds] = {
    **spec.BOUNDS,
    **spec.DRY_BOUNDS,
    spec.DRY_BREAKERS: spec.Bounds(low=0, high=spec.MOST_BREAKERS, whole=True),
    "group_size": spec.Bounds(low=1, high=spec.GROUP_SIZE[1], whole=True),
    **spec.STYLE_BOUNDS,
}
"""The accepted values of each cap, by its name."""

Field = TypeVar("Field", spec.Diversity, spec.Style)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The maximum of each number; None: not set at this level."""

    level: float | None = None
    max_temperature: float | None = None
    target_entropy: float | None = None
    dynatemp_range: float | None = None
    n_sigma: float | None = None
    xtc_probability: float | None = None
    dry_multiplier: float | None = None
    """0: no DRY."""
    dry_base: float | None = None
    dry_allowed_length: float | None = None
    dry_sequence_breakers: float | None = None
    """The number of breakers; the first ones are kept."""
    group_size: float | None = None
    """Texts in a group. A larger group is refused, since it cannot be clamped; 1: no groups."""
    strength: float | None = None
    """A style's strength."""
    max_kl: float | None = None
    """A style's bound, in nats per token."""
    laws: tuple[str, ...] | None = None
    """The laws that may be requested."""
    styles: tuple[str, ...] | None = None
    """The styles that may be requested."""

    def __post_init__(self) -> None:
        for name in self.laws or ():
            if name not in spec.LAWS:
                raise ValueError(
                    f"laws: got {name!r}; accepted: {settings.accepted_names(name, spec.LAWS)}"
                )
        for name, bounds in BOUNDS.items():
            cap = getattr(self, name, None)
            if cap is not None and cap not in bounds:
                raise ValueError(f"{name}: got {cap:g}; accepted: {bounds}.")

    def over(self, outer: "Limits") -> "Limits":
        """These limits, with unset ones taken from `outer`."""
        return replace(outer, **self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The limits that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def refusal_of(self, requested: spec.Diversity | spec.Style) -> tuple[str, str, str] | None:
        """For a law or a style that is not allowed: the field's name, its value and the values
        accepted; None if it is allowed."""
        if isinstance(requested, spec.Diversity):
            name, value, accepted = "law", requested.law, self.laws
            is_in_force = requested.level != 0  # At level 0 only DRY or a group has an effect.
        else:
            name, value, accepted = "name", requested.name, self.styles
            is_in_force = not requested.is_off
        if not is_in_force or accepted is None or value in accepted:
            return None
        return name, value, ", ".join(accepted) or "none"

    def allows_group(self, diversity: spec.Diversity, choices: int) -> bool:
        """Whether the size of the request's group is within the limit.

        Args:
            choices: the request's number of choices, which form the group if `group` is true.
        """
        return self.group_size is None or size_of_group(diversity, choices) <= self.group_size

    def excess(self, requested: spec.Diversity | spec.Style) -> dict[str, float]:
        """The caps that a request exceeds, by name."""
        if requested.is_off:
            return {}
        return {
            name: cap
            for name, value in numbers(requested).items()
            if (cap := getattr(self, name, None)) is not None and value > cap
        }

    def lowered(self, requested: Field) -> Field:
        """The request with every number clamped to its cap."""
        caps: dict[str, Any] = self.excess(requested)
        of_dry = {name: caps.pop(name) for name in spec.DRY_NAMES if name in caps}
        if of_dry and isinstance(requested, spec.Diversity) and requested.dry is not None:
            caps["dry"] = _lowered_dry(requested.dry, of_dry)
        return replace(requested, **caps) if caps else requested


def numbers(requested: spec.Diversity | spec.Style) -> dict[str, float]:
    """The numbers of a request that can be capped, by the names of `Limits`; the breakers appear as
    their number."""
    values = {each.name: getattr(requested, each.name) for each in fields(requested)}
    if (dry := values.pop("dry", None)) is not None:
        values |= dry.as_dict() | {spec.DRY_BREAKERS: len(dry.sequence_breakers)}
    return {name: values[name] for name in BOUNDS if values.get(name) is not None}


def size_of_group(diversity: spec.Diversity, choices: int) -> int:
    """The size of a request's group; 1 without a group."""
    if isinstance(diversity.group, spec.Group):
        return diversity.group.size
    return choices if diversity.group else 1


def _lowered_dry(dry: spec.Dry, caps: Mapping[str, float]) -> spec.Dry | None:
    lowered: dict[str, Any] = {
        name.removeprefix("dry_"): cap for name, cap in caps.items() if name != spec.DRY_BREAKERS
    }
    if "allowed_length" in lowered:
        lowered["allowed_length"] = int(lowered["allowed_length"])
    if spec.DRY_BREAKERS in caps:
        lowered["sequence_breakers"] = dry.sequence_breakers[: int(caps[spec.DRY_BREAKERS])]
    dry = replace(dry, **lowered)
    return dry if dry.multiplier else None


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The log of requests with a `diversity` or `style`; it contains none of their texts."""

    file: str
    largest_mib: int = 64
    """Size in MiB at which the file is renamed to FILE.1, FILE.1 to FILE.2 and so on."""
    keep: int = 4
    """The number of renamed files to keep; older ones are deleted."""

    def __post_init__(self) -> None:
        if not Path(self.file).is_absolute():
            raise ValueError(f"file: got {self.file!r}; accepted: a path that begins with /.")
        for name, value in (("largest_mib", self.largest_mib), ("keep", self.keep)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; accepted: a whole number from 1.")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy file."""

    on_excess: str = REJECT
    server: Limits = Limits()
    models: Mapping[str, Limits] = field(default_factory=dict)
    """By the model name in the request."""
    keys: Mapping[str, Limits] = field(default_factory=dict)
    """By the SHA-256 of the API key, in hexadecimal digits."""
    audit: Audit | None = None

    def __post_init__(self) -> None:
        if self.on_excess not in (REJECT, CLAMP):
            raise ValueError(f"on_excess: got {self.on_excess!r}; accepted: {REJECT}, {CLAMP}.")
        for number, digest in enumerate(self.keys, start=1):
            _check_digest(digest, number)
        for name in ("models", "keys"):
            object.__setattr__(self, name, _limits(getattr(self, name), name))

    def limits(self, models: Collection[str], key: str | None) -> Limits:
        """The limits that apply to a request.

        Args:
            models: the requested model name, followed by fallback names; the first that has an
                entry is used.
            key: the SHA-256 of the request's API key; None without one.
        """
        of_key = Limits() if key is None else self.keys.get(key, Limits())
        of_model = next((self.models[name] for name in models if name in self.models), Limits())
        return of_key.over(of_model.over(self.server))


def read(path: str | Path) -> Policy:
    """The policy of a YAML file.

    Raises:
        ValueError: the file cannot be read or is not a valid policy; names the key at fault.
    """
    path = Path(path)
    return settings.load(Policy, settings.read_yaml(path), path.name)


def _check_digest(digest: object, number: int) -> None:
    """The error does not quote the value, which may be the API key itself."""
    digits = set(string.digits + "abcdef")
    if not isinstance(digest, str) or len(digest) != KEY_DIGITS or not set(digest) <= digits:
        raise ValueError(
            f"keys: got an entry (number {number}) that is not a SHA-256; accepted: {KEY_DIGITS} "
            'digits, 0-9 and a-f, of the key: printf %s "$KEY" | sha256sum.'
        )


def _limits(limits_by_name: Mapping[Any, Any], where: str) -> dict[str, Limits]:
    labels = (name if where == "models" else f"{name:.8}…" for name in limits_by_name)
    return {
        name: each if isinstance(each, Limits) else settings.load(Limits, each, f"{where}.{label}")
        for (name, each), label in zip(limits_by_name.items(), labels, strict=True)
    }
