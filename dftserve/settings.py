"""Builds frozen dataclasses from user input, with an error message for every kind of mistake.

    settings.load(Filters, {"min_words": 50}, "corpus.filters")

Standard library only, except for YAML, which is read only here.
"""

import contextlib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from dftserve.bounded_files import DEEPEST, INTEGERS, read_text
from dftserve.spec import nearest, question

T = TypeVar("T")

SYNONYMS = {
    "lr": "learning_rate",
    "model_name_or_path": "model",
    "data": "targets",
    "dataset": "targets",
    "store": "targets",
    "out": "output",
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "grad_accum": "accumulation",
    "max_seq_length": "max_length",
    "seq_len": "max_length",
    "context_length": "max_length",
    "optimizer": "optim",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "grad_clip": "clip",
    "bf16": "precision",
    "dtype": "precision",
    "attn_implementation": "attention",
    "lora_r": "lora",
    "r": "rank",
    "lambda": "target_weight",
    "target_weight": "divergence",
    "loss": "divergence",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "eval_steps": "evaluate_every",
    "early_stopping_patience": "patience",
    "logging_steps": "log_every",
}
"""Names of other trainers for our settings, which spelling similarity would not find."""
LARGEST = 1 << 16
"""Maximum size of a settings file, in bytes."""
MOST_NAMED = 5
"""Maximum number of unknown keys that an error lists."""


def load(cls: type[T], value: object, where: str) -> T:
    """Build a `cls` from a mapping, checking each value against its field's annotation. Errors
    describe the accepted type by the field's metadata `kind`, if it has one.

    Supported annotations: bool, int, float, str, tuple[X, ...], Mapping, dataclasses of these, and
    unions with None. Value ranges are checked by the dataclass's own `__post_init__`.

    Args:
        where: the path of the mapping, for errors.

    Raises:
        ValueError: not a mapping, an unknown key (with the nearest name), a missing key, or a
            value of the wrong type.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    required = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if not isinstance(value, Mapping):
        names = ", ".join(required or known)
        raise ValueError(f"{where}: got {quoted(value)}; accepted: keys and values ({names}).")
    hints = typing.get_type_hints(cls)
    refuse_unknown(value, known, where)
    kinds = {name: known[name].metadata.get("kind") or _kind(hints[name]) for name in known}
    for name in required:
        if name not in value:
            raise ValueError(f"{where}.{name}: got nothing; accepted: {kinds[name]}.")
    values = {
        name: _value(hints[name], value[name], f"{where}.{name}", kinds[name]) for name in value
    }
    try:
        return cls(**values)
    except ValueError as error:
        is_of_field = str(error).partition(":")[0] in known
        raise ValueError(f"{where}{'.' if is_of_field else ': '}{error}") from None


def check_mapping(value: object, where: str) -> None:
    """Raises ValueError if `value`, the content of a file or a part of it, has no keys."""
    if not isinstance(value, dict):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where}: got {got}; accepted: keys and values.")


def check_field(cls: type, name: str, value: object, where: str) -> None:
    """Raises ValueError if `value` does not have the type of a field; the message includes the
    values that the field's metadata lists as `accepted`."""
    try:
        _value(typing.get_type_hints(cls)[name], value, where)
    except ValueError as error:
        field = next(each for each in fields(cls) if each.name == name)
        values = field.metadata.get("accepted")
        raise ValueError(
            f"{error} It takes {', '.join(values)}." if values else f"{error}"
        ) from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: missing, not a regular file, too large, not UTF-8, or as `parse_yaml`.
    """
    try:
        text = read_text(path, largest=LARGEST)
    except OSError as error:
        reason = error.strerror or "there is no such file"
        raise ValueError(f"{path}: cannot be read ({reason}); give a YAML file.") from None
    return parse_yaml(text, path.name)


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML text; `where` is the prefix of errors.

    Raises:
        ValueError: not YAML, contains an alias or a key twice, or is nested deeper than `DEEPEST`
            levels.
    """
    import yaml

    try:
        problem = _size_problem(text) or _repeated_key(text)
        content = None if problem else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError) as error:
        # A tag that does not match its value, as in `!!bool maybe`, raises other errors.
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: not YAML ({reason}); correct it there.") from None
    if problem:
        raise ValueError(f"{where}: {problem}.")
    return content


def _size_problem(text: str) -> str | None:
    """Why the parsed document could be too large, found before any object is built; None if it is
    not."""
    import yaml

    level = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            # A few nested aliases can expand to more than fits in memory.
            return "it has an alias (*name); accepted: YAML without them"
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        if level > DEEPEST:
            return f"got more than {DEEPEST} levels of lists and keys; accepted: at most {DEEPEST}"
    return None


def _repeated_key(text: str) -> str | None:
    """Describes a key that one mapping has twice, of which PyYAML would silently use the last
    value; None if there is none. The document must have passed `_size_problem`."""
    import yaml

    waiting = [yaml.compose(text, yaml.SafeLoader)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            waiting.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                return f"got the key {quoted(key.value)} again in line {line}; accepted: each once"
            seen.add((key.tag, key.value))
    return None


def refuse_unknown(names: Iterable[object], known: Iterable[str], where: str) -> None:
    """Raise ValueError for unknown keys, with the nearest known name of each."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if len(unknown) == 1:
        name = unknown[0]
        raise ValueError(
            f"{where}: got the key {quoted(name)}; accepted: {accepted_names(name, known)}."
        )
    if unknown:
        named = ", ".join(quoted(name) + _question(name, known) for name in unknown[:MOST_NAMED])
        more = ", …" if len(unknown) > MOST_NAMED else ""
        raise ValueError(f"{where}: got the keys {named}{more}; accepted: {', '.join(known)}.")


def accepted_names(name: object, known: Iterable[str]) -> str:
    """The known names as a list, followed by "did you mean" if one is close."""
    known = list(known)
    return ", ".join(known) + _question(name, known)


def _question(name: object, known: Sequence[str]) -> str:
    text = name if isinstance(name, str) else quoted(name)
    close = SYNONYMS.get(text)
    return question(close if close in known else nearest(text, known))


def _value(hint: Any, value: object, where: str, kind: str | None = None) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [each for each in arguments if each is not type(None)]
        for each in choices[:-1]:
            try:
                return _value(each, value, where)
            except ValueError:
                continue
        if len(choices) > 1 and not _is_near(choices[-1], value):
            raise ValueError(f"{where}: got {quoted(value)}; accepted: {kind or _kind(hint)}.")
        return _value(choices[-1], value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            example = f", such as [{value}]" if isinstance(value, str) and value else ""
            raise ValueError(f"{where}: got {quoted(value)}; accepted: a list{example:.80}.")
        return tuple(_value(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if hasattr(hint, "__dataclass_fields__"):
        return value if isinstance(value, hint) else load(hint, value, where)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-5 as a text.
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    expected = origin or hint
    if expected is Any:
        return value
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}: got {quoted(value)}; accepted: {_kind(hint)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: got {value}; accepted: a finite number.")
    if isinstance(value, int) and value not in INTEGERS:
        raise ValueError(f"{where}: got {quoted(value)}; accepted: a whole number of 64 bits.")
    return value


def _is_near(hint: Any, value: object) -> bool:
    """Whether a value has the container type of `hint`, so that the mistake is inside it and the
    error for this choice is more specific than one that lists all choices."""
    if isinstance(value, Mapping):
        return typing.get_origin(hint) is not tuple
    return isinstance(value, list | tuple | str)


def _kind(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("nothing" if each is type(None) else _kind(each) for each in arguments)
    if origin is tuple:
        return "a list"
    return names.get(hint, "keys and values")


def quoted(value: object) -> str:
    """The repr of a value for an error message, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # A whole number of thousands of digits.
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}…"
