"""JSON Schemas of the fields `diversity` and `style`, generated from the definitions in `spec`.

Every value that `spec.parse` accepts is valid. `spec.parse` refuses a few valid values, whose rules
a schema cannot express: DRY's other fields without `dry_multiplier`; a group's index that is not
below its size; unprintable Unicode in a group's id other than control characters and line breaks;
half a surrogate pair in a text, which in some dialects a pattern would also find in whole pairs.
Standard library only.
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
"""Control characters and line breaks. Unicode's full definition of printable cannot be written in a
pattern that all dialects of regular expressions accept."""


def diversity() -> JSONSchema:
    """Schema of the field `diversity` of a request body: a level, `human`, or an object."""
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
    """Schema of the field `style` of a request body: a style's name, or an object."""
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
    return {"title": name} | _object({"law": law, **numbers, **_common()}, [*named, *required])


def _dry_alone() -> JSONSchema:
    """DRY without a law or a level; an object with a level would select the default law."""
    nothing = {"type": "null"}
    takes = {
        field: nothing if is_required(DEFAULT_LAW, field) else _optional(BOUNDS[field])
        for field in LAWS[DEFAULT_LAW]
    }
    multiplier = {"dry_multiplier": _number(DRY_BOUNDS["dry_multiplier"])}
    properties = {"law": nothing, **takes, **_common(), **multiplier}
    return {"title": "DRY alone"} | _object(properties, list(multiplier))


def _common() -> JSONSchema:
    """Properties that every law accepts."""
    breaker = {"type": "string", "minLength": 1, "maxLength": LONGEST_BREAKER}
    low, high = GROUP_SIZE
    group = {
        # Not `^[^…]*$`: in some dialects $ also matches before a final line break.
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
    """Null means absent. Schema bounds apply to numbers only, so null passes them."""
    schema = _number(bounds)
    return schema | {"type": [schema["type"], "null"]}
