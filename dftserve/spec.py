"""Request parameters (`Diversity`, `Style`) and a checkpoint's dft.json (`CheckpointInfo`).

Standard library only, so that clients, servers and trainers can share these types without torch.
"""

import difflib
import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeGuard

from dftserve.bounded_files import read_json, with_advice

DEFAULT_VARIABLE = "DFTSERVE_DEFAULT_DIVERSITY"
"""The environment variable from which the plug-in reads the server's default diversity."""
STYLES_VARIABLE = "DFTSERVE_STYLES"
"""The environment variable from which the plug-in reads the folder of style profiles."""
MAX_JSON_CHARACTERS = 4096
CHECKSUMS = "checksums.json"
"""The file of a checkpoint by which its completeness is verified."""
FINAL = "final"
"""The folder of a run's final checkpoint."""


class DiversityError(ValueError):
    """An invalid `diversity`: the parameter, the value received and the values accepted."""

    def __init__(self, parameter: str, value: object, accepted: str) -> None:
        self.parameter = parameter
        self.value = value
        super().__init__(f"{parameter}: got {quoted(value)}; accepted: {accepted}.")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """A closed or half-open interval that a number must lie in."""

    low: float
    high: float
    low_included: bool = True
    whole: bool = False
    """Whether only whole numbers are accepted."""

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        return above and value <= self.high and (not self.whole or value == int(value))

    def __str__(self) -> str:
        low = f"from {self.low:g}" if self.low_included else f"above {self.low:g}"
        return f"a {'whole ' if self.whole else ''}number {low} to {self.high:g}"


BOUNDS: Mapping[str, Bounds] = {
    "level": Bounds(low=0, high=1),
    "max_temperature": Bounds(low=0, high=100, low_included=False),
    "min_p": Bounds(low=0, high=1, low_included=False),
    "target_entropy": Bounds(low=0, high=20, low_included=False),
    "dynatemp_range": Bounds(low=0, high=100),
    "dynatemp_exponent": Bounds(low=0, high=10, low_included=False),
    "n_sigma": Bounds(low=0, high=100, low_included=False),
    # Two tokens cannot both exceed 0.5, so a higher threshold would never exclude anything.
    "xtc_threshold": Bounds(low=0, high=0.5, low_included=False),
    "xtc_probability": Bounds(low=0, high=1, low_included=False),
}

DRY_BOUNDS: Mapping[str, Bounds] = {
    "dry_multiplier": Bounds(low=0, high=5),
    "dry_base": Bounds(low=1, high=4),
    "dry_allowed_length": Bounds(low=1, high=64, whole=True),
}
"""Bounds of DRY's numbers. DRY can be combined with every law."""
DRY_BREAKERS = "dry_sequence_breakers"
MOST_BREAKERS, LONGEST_BREAKER = 32, 64
"""Maximum number of strings, and maximum characters of each."""
BREAKERS_ACCEPTED = (
    f"a list of at most {MOST_BREAKERS} texts, of 1 to {LONGEST_BREAKER} characters each"
)
DRY_NAMES = (*DRY_BOUNDS, DRY_BREAKERS)

# Valid range of the entropies in a `CheckpointInfo`, in nats per token.
ENTROPY_BOUNDS = Bounds(low=0, high=20)

_REQUIRED = object()


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()
"""The value of a `DiversityError` for a parameter that is missing."""

# The fields of each law, with their defaults or `_REQUIRED`.
LAWS: Mapping[str, Mapping[str, Any]] = {
    "gated": {"level": _REQUIRED, "max_temperature": 4.0, "min_p": None},
    "budget": {"target_entropy": _REQUIRED, "max_temperature": 4.0, "min_p": None},
    "dynatemp": {
        "dynatemp_range": _REQUIRED,
        "dynatemp_exponent": 1.0,
        "level": 1.0,
        "min_p": None,
    },
    "words": {"level": _REQUIRED, "max_temperature": 4.0, "min_p": None},
    "guard": {"min_p": _REQUIRED},
    "top_n_sigma": {"n_sigma": _REQUIRED},
    "xtc": {"xtc_probability": _REQUIRED, "xtc_threshold": 0.1, "min_p": None},
}


def is_required(law: str, name: str) -> bool:
    """Whether a field of a law has no default."""
    return LAWS[law][name] is _REQUIRED


WHOLE_ROW_LAWS = ("top_n_sigma", "xtc")
"""Laws whose cuts depend on probabilities that a style would already have changed; they cannot be
combined with a style."""
DEFAULT_LAW = "gated"
GROUP = "group"
"""A field accepted with every law: see `Group`."""
GROUP_SIZE = 2, 1024
GROUP_ACCEPTED = (
    "true, for the choices of a request with n > 1, or an object such as "
    '{"id": "essay-17", "index": 0, "size": 8}'
)
TRACE = "trace"
"""A field accepted with every law: the response then includes the statistics of each token."""
MOST_TRACED = 4096
"""Maximum number of tokens, over all choices of a request, whose statistics a response includes."""
HUMAN = "human"
"""Accepted by a server in place of a number: the served model's `human_diversity`."""

ACCEPTED = (
    "a number from 0 (off) to 1 (the most heat), or an object such as "
    '{"level": 0.5}, {"law": "words", "level": 0.5}, {"law": "budget", "target_entropy": 1.5} or '
    '{"law": "dynatemp", "dynatemp_range": 0.5}'
)


@dataclass(frozen=True, kw_only=True)
class Dry:
    """DRY, "don't repeat yourself": penalises tokens that would continue a sequence that already
    occurs in the text. Can be combined with any law. Fields are named as in the request, without
    the prefix `dry_`."""

    multiplier: float
    """The penalty is multiplier·base^(length of the repeated sequence − allowed_length) nats."""
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Strings that end a repeated sequence."""

    def as_dict(self) -> dict[str, Any]:
        named = {f"dry_{field.name}": getattr(self, field.name) for field in fields(self)}
        return named | {DRY_BREAKERS: list(self.sequence_breakers)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """A request's membership in a group of texts that are sampled jointly: see docs/groups.md."""

    id: str
    """Shared by the requests of the group, and unique to it."""
    index: int
    """From 0 to `size` - 1."""
    size: int


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """One request's `diversity`, with every default filled in.

    Fields that the law does not take are None. Entropies are in nats. Build one with `parse` or
    `parse_json`, which validate the input.
    """

    law: str = DEFAULT_LAW
    level: float | None = None
    """0 = off, 1 = maximum heat; scales the range under `dynatemp`."""
    max_temperature: float | None = None
    """Upper limit of the heated temperature; a request's own temperature may exceed it."""
    min_p: float | None = None
    """Replaces the guard's threshold: a token stays when p >= min_p * p_max, at temperature 1."""
    target_entropy: float | None = None
    """The mean next-token entropy, in nats, that the `budget` law steers the sequence to."""
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    n_sigma: float | None = None
    """A token stays when its logit is at most this many standard deviations below the highest."""
    xtc_threshold: float | None = None
    """Tokens of at least this probability are top choices."""
    xtc_probability: float | None = None
    """The share of steps in which all top choices but the least probable are excluded."""
    dry: Dry | None = None
    """None: off."""
    group: "bool | Group | None" = None
    """True: the request's choices are a group."""
    trace: bool = False
    """Whether the response includes the statistics of each of at most `MOST_TRACED` tokens."""

    @property
    def is_off(self) -> bool:
        """Whether rows are left unchanged. A group at level 0 is guarded but not heated, so it is
        not off."""
        return self.level == 0 and self.dry is None and self.group is None

    @property
    def is_dry_alone(self) -> bool:
        """Whether DRY is the only change: nothing is heated and nothing is cut."""
        return self.level == 0 and self.dry is not None and self.group is None

    def as_dict(self) -> dict[str, Any]:
        """The object form; `parse` turns it back into an equal `Diversity`."""
        everything = {field.name: getattr(self, field.name) for field in fields(self)}
        dry, group = everything.pop("dry"), self.group
        everything[TRACE] = self.trace or None
        given_fields = {name: value for name, value in everything.items() if value is not None}
        if dry is not None:
            given_fields |= dry.as_dict()
        return given_fields | ({GROUP: asdict(group)} if isinstance(group, Group) else {})

    def without_texts(self) -> dict[str, Any]:
        """The object form without text from the client, for headers and logs: breakers are replaced
        by their number, and the group's id by a digest, so that equal ids can still be matched."""
        content = self.as_dict()
        if self.dry is not None:
            content[DRY_BREAKERS] = len(self.dry.sequence_breakers)
        if isinstance(self.group, Group):
            digest = hashlib.sha256(self.group.id.encode(errors="surrogatepass")).hexdigest()
            content[GROUP] = asdict(self.group) | {"id": digest[:DIGEST_DIGITS]}
        return content


def parse(value: object, parameter: str = "diversity") -> Diversity:
    """A `Diversity` from a number or an object.

    Raises:
        DiversityError: names the parameter, the value received and the values accepted.
    """
    if _is_number(value):
        value = {"level": value}
    if not isinstance(value, Mapping):
        raise DiversityError(parameter, value, ACCEPTED)
    law = DEFAULT_LAW if value.get("law") is None else value["law"]
    if not isinstance(law, str) or law not in LAWS:
        accepted = f"one of {', '.join(LAWS)}{_nearest(law, LAWS)}"
        raise DiversityError(f"{parameter}.law", law, accepted)
    takes = LAWS[law]
    for name in value:
        if name not in ("law", GROUP, TRACE) and name not in takes and name not in DRY_NAMES:
            raise _unknown_field(parameter, name, value[name], law)
    dry = _parse_dry(value, parameter)
    settings = {name: value[name] for name in takes if value.get(name) is not None}
    if value.get("law") is None and value.get("dry_multiplier") is not None:
        settings = {"level": 0, **settings}  # DRY can be used without a law.
    numbers = {
        name: _number(settings[name], BOUNDS[name], f"{parameter}.{name}") for name in settings
    }
    for name in takes:
        if name not in numbers and is_required(law, name):
            accepted = f"{BOUNDS[name]} (the law {law!r} needs it)"
            raise DiversityError(f"{parameter}.{name}", value.get(name, NOTHING), accepted)
    defaults = {name: value for name, value in takes.items() if not is_required(law, name)}
    group = _group(value.get(GROUP), f"{parameter}.{GROUP}")
    trace = value.get(TRACE)
    if trace is not None and not isinstance(trace, bool):
        raise DiversityError(f"{parameter}.{TRACE}", trace, "true or false")
    return Diversity(law=law, dry=dry, **{**defaults, **numbers}, group=group, trace=bool(trace))


def _parse_dry(value: Mapping[str, Any], parameter: str) -> Dry | None:
    """The DRY fields of an object whose keys were validated; None without them, or if the
    multiplier is 0."""
    settings = {name: value[name] for name in DRY_NAMES if value.get(name) is not None}
    if not settings:
        return None
    numbers = {
        name.removeprefix("dry_"): _number(settings[name], bounds, f"{parameter}.{name}")
        for name, bounds in DRY_BOUNDS.items()
        if name in settings
    }
    if "multiplier" not in numbers:
        accepted = f"{DRY_BOUNDS['dry_multiplier']} (the other dry_ fields require it)"
        raise DiversityError(f"{parameter}.dry_multiplier", NOTHING, accepted)
    dry = Dry(**numbers)  # pyright: ignore[reportArgumentType]
    dry = replace(dry, allowed_length=int(dry.allowed_length))
    if DRY_BREAKERS in settings:
        breakers = _strings(settings[DRY_BREAKERS], f"{parameter}.{DRY_BREAKERS}")
        dry = replace(dry, sequence_breakers=breakers)
    return dry if dry.multiplier else None


def _strings(value: object, parameter: str) -> tuple[str, ...]:
    """The distinct strings of a list, in their order."""
    if not isinstance(value, list | tuple) or len(value) > MOST_BREAKERS:
        raise DiversityError(parameter, value, BREAKERS_ACCEPTED)
    for each in value:
        if not isinstance(each, str) or not 0 < len(each) <= LONGEST_BREAKER:
            raise DiversityError(parameter, each, BREAKERS_ACCEPTED)
        _check_unicode(each, parameter)
    return tuple(dict.fromkeys(value))


UNICODE = "valid Unicode, without half a surrogate pair"


def _check_unicode(text: str, parameter: str) -> None:
    """Refuses lone surrogates, which JSON escapes can express but UTF-8 cannot, in which vLLM sends
    a request to its engine."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DiversityError(parameter, text, UNICODE) from None


def _group(value: object, parameter: str) -> bool | Group | None:
    if value is None or isinstance(value, bool):
        return value or None
    if not isinstance(value, Mapping):
        raise DiversityError(parameter, value, GROUP_ACCEPTED)
    _refuse_unknown(value, Group, parameter)
    name, low, high = value.get("id", NOTHING), *GROUP_SIZE
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        accepted = f"a text of 1 to {LONGEST_NAME} printable characters, unique to the group"
        raise DiversityError(f"{parameter}.id", name, accepted)
    size = _whole(value.get("size", NOTHING), low, high, f"{parameter}.size")
    index = _whole(value.get("index", NOTHING), 0, size - 1, f"{parameter}.index")
    return Group(id=name, index=index, size=size)


def parse_json(text: str, parameter: str = "diversity") -> Diversity:
    """A `Diversity` from JSON text: `0.5` (or `.5`) or `{"level": 0.5}`.

    Raises:
        DiversityError: not JSON, too long, or refused by `parse`.
    """
    return parse(_from_json(text, parameter, ACCEPTED), parameter)


def parse_default(text: str, parameter: str = DEFAULT_VARIABLE) -> Diversity:
    """A server's default diversity, from JSON text.

    Raises:
        DiversityError: refused by `parse_json`, or it has what only a request can ask for.
    """
    diversity = parse_json(text, parameter)
    if isinstance(diversity.group, Group):
        accepted = "true, for requests with n > 1; one request's index cannot be a default"
        raise DiversityError(f"{parameter}.{GROUP}", asdict(diversity.group), accepted)
    if diversity.trace:
        accepted = "none: an answer has each token's statistics only if its request asks for them"
        raise DiversityError(f"{parameter}.{TRACE}", True, accepted)
    return diversity


STYLE_BOUNDS: Mapping[str, Bounds] = {
    "strength": Bounds(low=0, high=1),
    "max_kl": Bounds(low=0, high=10),
}
STYLE_ACCEPTED = (
    'the name of a style, or an object such as {"name": "plain"} or '
    '{"name": "plain", "strength": 0.6, "max_kl": 0.05}'
)
LONGEST_NAME = 64
"""Maximum number of characters of a style's name and of a group's id."""
DIGEST_DIGITS = 12
"""Hexadecimal digits of the SHA-256 that is shown in place of a group's id."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """One request's `style`. Fields that are None default to the profile's values; the server
    checks the name. Build one with `parse_style` or `parse_style_json`, which validate the rest."""

    name: str
    strength: float | None = None
    """0 = off, 1 = as the profile was built."""
    max_kl: float | None = None
    """Bound on the mean KL divergence of the tilt of word choice, in nats per token."""

    @property
    def is_off(self) -> bool:
        return self.strength == 0

    def as_dict(self) -> dict[str, str | float]:
        """The object form; `parse_style` turns it back into an equal `Style`."""
        everything = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in everything.items() if value is not None}


def parse_style(value: object, parameter: str = "style") -> Style:
    """A `Style` from a name or an object.

    Raises:
        DiversityError: names the parameter, the value received and the values accepted.
    """
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise DiversityError(parameter, value, STYLE_ACCEPTED)
    _refuse_unknown(value, Style, parameter)
    name = value.get("name", NOTHING)
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
        accepted = f"the name of a style, of at most {LONGEST_NAME} characters"
        raise DiversityError(f"{parameter}.name", name, accepted)
    _check_unicode(name, f"{parameter}.name")
    settings = {key: value[key] for key in STYLE_BOUNDS if value.get(key) is not None}
    numbers = {
        key: _number(settings[key], bounds, f"{parameter}.{key}")
        for key, bounds in STYLE_BOUNDS.items()
        if key in settings
    }
    return Style(name=name, **numbers)


def parse_style_json(text: str, parameter: str = "style") -> Style:
    """A `Style` from a name, or from JSON text of the object.

    Raises:
        DiversityError: not JSON, too long, or refused by `parse_style`.
    """
    if not text.lstrip().startswith("{"):
        return parse_style(text, parameter)
    return parse_style(_from_json(text, parameter, STYLE_ACCEPTED), parameter)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The contents of a checkpoint's dft.json: how it was trained and what was measured."""

    recipe: str
    """How the target distribution was made, for human readers."""
    diversity: Diversity | None = None
    """The diversity suggested for serving."""
    target_entropy: float | None = None
    """Mean next-token entropy of the target on held-out text, in nats."""
    model_entropy: float | None = None
    """Mean next-token entropy of the tuned model on the same text, in nats."""
    target_deciles: tuple[float, ...] | None = None
    """The target's next-token entropies at 10, 20, …, 90 % of the tokens, in nats."""
    model_deciles: tuple[float, ...] | None = None
    """The tuned model's, likewise."""

    @property
    def human_diversity(self) -> Diversity | None:
        """The law `budget` at the target's entropy; None where that is not stated, or 0."""
        entropy = self.target_entropy
        if entropy is None or entropy not in BOUNDS["target_entropy"]:
            return None
        return parse({"law": "budget", "target_entropy": entropy})

    FILE = "dft.json"
    LARGEST = 1 << 20
    """Bytes of the file."""

    @classmethod
    def read(cls, folder: Path) -> "CheckpointInfo":
        """The content of a folder's dft.json.

        Raises:
            FileNotFoundError: the folder has no dft.json.
            ValueError: it is not a JSON object as written by `write`, lies outside the folder, or
                is too large.
        """
        path = folder / cls.FILE
        try:
            # `finite` is not needed: each number is checked against its own bounds below.
            content = read_json(path, within=folder, largest=cls.LARGEST, finite=False)
        except ValueError as error:
            raise ValueError(with_advice(error, "write it again with the trainer")) from None
        names = [field.name for field in fields(cls)]
        if not isinstance(content, dict) or "recipe" not in content:
            raise ValueError(f"{path}: got {quoted(content)}; accepted: an object with `recipe`.")
        for name in content:
            if name not in names:
                accepted = f"{', '.join(names)}{_nearest(name, names)}"
                raise ValueError(f"{path}: got the key {name!r}; accepted: {accepted}.")
        if not isinstance(content["recipe"], str):
            raise ValueError(f"{path}: recipe: got {quoted(content['recipe'])}; accepted: a text.")
        for name in ("target_entropy", "model_entropy"):
            if content.get(name) is not None:
                content[name] = _number(content[name], ENTROPY_BOUNDS, f"{path.name}: {name}")
        for name in ("target_deciles", "model_deciles"):
            if content.get(name) is not None:
                content[name] = _deciles(content[name], f"{path.name}: {name}")
        if content.get("diversity") is not None:
            content["diversity"] = parse(content["diversity"], f"{path.name}: diversity")
        return cls(**content)

    def write(self, folder: Path) -> None:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["diversity"] = self.diversity and self.diversity.as_dict()
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # Paths may have bytes that are not UTF-8, which become JSON escapes.
        path = folder / self.FILE
        path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _refuse_unknown(
    value: Mapping[str, Any], kind: type[Group] | type[Style], parameter: str
) -> None:
    """Refuse keys that are not fields of a class."""
    takes = [field.name for field in fields(kind)]
    for key in value:
        if key not in takes:
            accepted = f"{', '.join(takes)}{_nearest(key, takes)}"
            raise DiversityError(f"{parameter}.{_short_key(key)}", value[key], accepted)


def _from_json(text: str, parameter: str, accepted: str) -> object:
    """The value of a JSON text, in which a number may begin with a point."""
    if len(text) > MAX_JSON_CHARACTERS:
        most = f"at most {MAX_JSON_CHARACTERS} characters of JSON"
        raise DiversityError(parameter, f"{len(text)} characters", most)
    try:
        return json.loads(f"0{text}" if text.startswith(".") else text)
    except (ValueError, RecursionError):
        raise DiversityError(parameter, text, f"as JSON text, {accepted}") from None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object, bounds: Bounds, parameter: str) -> float:
    if not _is_number(value):
        raise DiversityError(parameter, value, str(bounds))
    # Compare before converting: an integer may be too large for a float. NaN is never in bounds.
    if value not in bounds:
        raise DiversityError(parameter, value, str(bounds))
    return float(value)


def _whole(value: object, low: int, high: int, parameter: str) -> int:
    """Accepts 2.0 too: some clients send only floats, and for JSON Schema 2.0 is an integer."""
    return int(_number(value, Bounds(low=low, high=high, whole=True), parameter))


def _deciles(value: object, parameter: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 9:
        raise DiversityError(parameter, value, "a list of nine entropies in nats")
    return tuple(_number(each, ENTROPY_BOUNDS, parameter) for each in value)


def _unknown_field(parameter: str, name: object, value: object, law: str) -> DiversityError:
    takes = [*LAWS[law], GROUP, TRACE]
    owners = [other for other, theirs in LAWS.items() if name in theirs]
    hint = f" ({name!r} is a field of {', '.join(map(repr, owners))})" if owners else ""
    names = [*takes, *DRY_NAMES]
    accepted = f"for the law {law!r}: {', '.join(names)}{hint or _nearest(name, names)}"
    return DiversityError(f"{parameter}.{_short_key(name)}", value, accepted)


def _nearest(name: object, names: Iterable[str]) -> str:
    return question(nearest(_short_key(name), names))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one; None if none is close."""
    return next(iter(difflib.get_close_matches(name[:MAX_SHOWN], list(known), n=1)), None)


def question(close: str | None) -> str:
    """The suffix of an error message that suggests a close name; empty without one."""
    return f" (did you mean {close!r}?)" if close else ""


def _short_key(name: object) -> str:
    """A received key, shortened and printable."""
    return repr(name[:MAX_SHOWN])[1:-1] if isinstance(name, str) else quoted(name)


MAX_SHOWN = 80
"""Maximum number of characters of a value in an error message."""


class _Short(reprlib.Repr):
    """Writes true, false and null as a client does, in JSON."""

    def repr_bool(self, x: bool, level: int) -> str:
        return "true" if x else "false"

    def repr_NoneType(self, x: None, level: int) -> str:
        return "null"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Formats only the first keys: the base class would sort all of them."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 3, MAX_SHOWN, MAX_SHOWN


def is_slip_of(key: str, name: str) -> bool:
    """Whether a key differs from a field's name only in case, or by one letter that is omitted,
    doubled or replaced, or by two swapped ones. Any other extra letter does not count: `styles` or
    `style2` may be a field of another application."""
    if key == name or abs(len(key) - len(name)) > 1:
        return False
    slip = key.lower()
    pairs = zip(slip, name, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    rest, due = slip[same:], name[same:]
    if len(key) > len(name):  # A letter may be doubled.
        return same > 0 and slip[same] == slip[same - 1] and rest[1:] == due
    if len(key) < len(name):  # One may be omitted.
        return rest == due[1:]
    # One may be replaced, or two swapped.
    return rest[1:] == due[1:] or (rest[1::-1] == due[:2] and rest[2:] == due[2:])


def quoted(value: object) -> str:
    """Any value as text for an error message: at most `MAX_SHOWN` characters, all printable."""
    try:
        text = _short.repr(value)
    except ValueError:  # An integer of thousands of digits.
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}…"
