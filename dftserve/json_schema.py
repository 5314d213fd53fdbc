"""JSON Schemas of the fields `diversity` and `style`, from what `spec` accepts.

A value that `spec.parse` takes is valid. A valid value may still be refused where a schema cannot
tell: DRY's other names without `dry_multiplier`; a group's index that is not below its size; in its
id, what Unicode does not call printable beside control characters and line breaks. Standard library
only.
"""

from typing import Any

from dftserve.spec import (
    BOUNDS,
    DEFAULT_LAW,
    DRY_BOUNDS,
    DRY_BREAKERS,
    GROUP,
    GROUP_SIZE,
    HUMAN,
    LAWS,
    LONGEST_BREAKER,
    LONGEST_NAME,
    MOST_BREAKERS,
    STYLE_BOUNDS,
    TRACE,
    Bounds,
    is_required,
)

JSONSchema = dict[str, Any]

CONTROL = r"[\u0000-\u001f\u007f-\u009f\u2028\u2029]"
"""Control characters and line breaks. What is printable besides, by Unicode, is in no pattern that
all dialects of regular expressions read."""


def diversity() -> JSONSchema:
    """Of a body's `diversity`, to a server: a level, `human`, or an object by its law."""
    return {
        "description": "How much more varied to write; 0 is off. See docs/api.md of dftserve.",
        "anyOf": [
            _number(BOUNDS["level"]),
            {"const": HUMAN},
            {"type": "null"},
            *(_law(name) for name in LAWS),
            _dry_alone(),
        ],
    }


def style() -> JSONSchema:
    """Of a body's `style`: a style's name, or an object."""
    name = {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME}
    numbers = {key: _optional(bounds) for key, bounds in STYLE_BOUNDS.items()}
    return {
        "description": "The style to write in. See docs/styles.md of dftserve.",
        "anyOf": [name, {"type": "null"}, _object({"name": name, **numbers}, ["name"])],
    }


def _law(name: str) -> JSONSchema:
    takes = LAWS[name]
    required = [field for field in takes if is_required(name, field)]
    numbers = {
        field: _number(BOUNDS[field]) if field in required else _optional(BOUNDS[field])
        for field in takes
    }
    is_default = name == DEFAULT_LAW
    law = {"enum": [name, None]} if is_default else {"const": name}
    named = [] if is_default else ["law"]
    return {"title": name} | _object({"law": law, **numbers, **_beside()}, [*named, *required])


def _dry_alone() -> JSONSchema:
    """DRY without a law and without a level, with which it would be the default law's."""
    nothing = {"type": "null"}
    takes = {
        field: nothing if is_required(DEFAULT_LAW, field) else _optional(BOUNDS[field])
        for field in LAWS[DEFAULT_LAW]
    }
    multiplier = {"dry_multiplier": _number(DRY_BOUNDS["dry_multiplier"])}
    properties = {"law": nothing, **takes, **_beside(), **multiplier}
    return {"title": "DRY alone"} | _object(properties, list(multiplier))


def _beside() -> JSONSchema:
    """What stands beside every law."""
    breaker = {"type": "string", "minLength": 1, "maxLength": LONGEST_BREAKER}
    low, high = GROUP_SIZE
    group = {
        # Not `^[^…]*$`: in some dialects $ is also before a last line break.
        "id": {
            "type": "string",
            "minLength": 1,
            "maxLength": LONGEST_NAME,
            "not": {"pattern": CONTROL},
        },
        "index": {"type": "integer", "minimum": 0, "maximum": high - 1},
        "size": {"type": "integer", "minimum": low, "maximum": high},
    }
    return {
        **{name: _optional(bounds) for name, bounds in DRY_BOUNDS.items()},
        DRY_BREAKERS: {"type": ["array", "null"], "items": breaker, "maxItems": MOST_BREAKERS},
        GROUP: {"anyOf": [{"type": ["boolean", "null"]}, _object(group, list(group))]},
        TRACE: {"type": ["boolean", "null"]},
    }


def _object(properties: JSONSchema, required: list[str]) -> JSONSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _number(bounds: Bounds) -> JSONSchema:
    low = "minimum" if bounds.low_included else "exclusiveMinimum"
    kind = "integer" if bounds.whole else "number"
    return {"type": kind, low: bounds.low, "maximum": bounds.high}


def _optional(bounds: Bounds) -> JSONSchema:
    """A null is taken for what is not there. Bounds hold of numbers alone."""
    schema = _number(bounds)
    return schema | {"type": [schema["type"], "null"]}
