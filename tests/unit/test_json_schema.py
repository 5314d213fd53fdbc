"""The fields' JSON Schemas accept and refuse the same values as `spec`, except for the cases of
`is_beyond_a_schema`. The values are accepted ones, each with one change. Mutation tests of the
schemas show that these values detect a wrong schema.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jsonschema
import pytest

from dftserve import json_schema
from dftserve.spec import (
    BOUNDS,
    DEFAULT_LAW,
    DRY_BOUNDS,
    DRY_BREAKERS,
    DRY_NAMES,
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
    DiversityError,
    is_required,
    parse,
    parse_style,
)

JSON = dict[str, Any]
Place = tuple[str | int, ...]
Validator = jsonschema.Draft202012Validator
SMALLEST, LARGEST = GROUP_SIZE


def around(bounds: Bounds) -> list[float]:
    """Each bound and values on both sides of it; for whole numbers also as floats, and one
    fraction."""
    edges = (bounds.low, bounds.high)
    if not bounds.whole:
        return [edge + step for edge in edges for step in (-1e-6, 0, 1e-6)]
    whole = [int(edge) + step for edge in edges for step in (-1, 0, 1)]
    return [*whole, *map(float, whole), bounds.low + 0.5]


def texts(longest: int) -> list[str]:
    return ["", "a", "é" * longest, "a" * (longest + 1), "a\ud800"]


ANYTHING = [None, True, "a", "", 0, 1, 0.5, -1, 1e300, [], ["a"], {}]
"""Replacements for any value."""
OTHERS: dict[str, list[Any]] = {
    "": [*around(BOUNDS["level"]), *texts(LONGEST_NAME)],
    **{name: around(each) for name, each in {**BOUNDS, **DRY_BOUNDS, **STYLE_BOUNDS}.items()},
    "law": [*LAWS, "other"],
    DRY_BREAKERS: [
        *([each] for each in (*texts(LONGEST_BREAKER), None, 1, ["a"])),
        *(["a"] * count for count in (MOST_BREAKERS, MOST_BREAKERS + 1)),
    ],
    "id": [
        *texts(LONGEST_NAME),
        *("a b", "🦉", "a\n", "\rb"),
        *"\x00\x1f\x7f\x80\x9f\u2028\u2029",
        *"\u200b\u3000\ue000\ud800",
    ],
    "index": around(Bounds(low=0, high=LARGEST - 1, whole=True)),
    "size": around(Bounds(low=SMALLEST, high=LARGEST, whole=True)),
    "name": texts(LONGEST_NAME),
}
"""Replacements for a value of that name."""
LEAST = {"id": "g", "index": 0, "size": SMALLEST}
MOST = {"id": "g", "index": LARGEST - 1, "size": LARGEST}
DRY = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, DRY_BREAKERS: ["\n"]}
KEYS = {*BOUNDS, *DRY, "law", GROUP, TRACE, "name", *STYLE_BOUNDS, "leevl"}
ONE = 0.5
"""Within the bounds of every number that a law or a style takes."""


def diversities() -> Iterator[Any]:
    """Accepted values of `diversity`: a number, a word, each law with and without DRY and a trace,
    the default law without its name, DRY alone with few and with many keys."""
    yield from (ONE, None, HUMAN)
    for law, takes in LAWS.items():
        whole = {"law": law} | dict.fromkeys(takes, ONE)
        yield whole | DRY | {TRACE: True, GROUP: LEAST}
        yield whole | {GROUP: MOST}
    yield {"law": None, "level": ONE}
    optional = {name: ONE for name in LAWS[DEFAULT_LAW] if not is_required(DEFAULT_LAW, name)}
    yield {"law": None, "level": None} | optional | DRY | {TRACE: True, GROUP: LEAST}
    yield {"dry_multiplier": ONE, GROUP: MOST}


def styles() -> Iterator[Any]:
    """Accepted values of `style`."""
    yield from ("human", None, {"name": "human"} | dict.fromkeys(STYLE_BOUNDS, ONE))


def changed(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Variants of a value with one change, each with the name of what was changed: a replacement;
    for an object also a removed key, an added key, or one changed value."""
    yield from ((name, other) for other in [*ANYTHING, *OTHERS.get(name, [])])
    if not isinstance(value, dict):
        return
    for key in value:
        yield key, without(value, key)
        yield from (
            (key_name, value | {key: other}) for key_name, other in changed(value[key], key)
        )
    yield from ((key, value | {key: other}) for key in KEYS - value.keys() for other in (1, None))


def without(content: JSON, key: str) -> JSON:
    return {each: content[each] for each in content if each != key}


HALVES = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs."""


def is_beyond_a_schema(value: Any) -> bool:
    """Errors that our schemas do not express: half a surrogate pair; DRY keys without the
    multiplier; in an otherwise valid group, an index not below the size, or unprintable characters
    in the id."""
    if HALVES.search(json.dumps(value, ensure_ascii=False)):
        return True
    if not isinstance(value, dict):
        return False
    given = {name for name, each in value.items() if each is not None}
    if given & set(DRY_NAMES) and "dry_multiplier" not in given:
        return True
    group = value.get(GROUP)
    if not isinstance(group, dict) or group.keys() != LEAST.keys():
        return False
    name, index, size = group["id"], group["index"], group["size"]
    are_whole = is_whole(index, 0, LARGEST - 1) and is_whole(size, SMALLEST, LARGEST)
    is_plain = isinstance(name, str) and not any(map(is_control, name))
    return are_whole and is_plain and (index >= size or not name.isprintable())


def is_whole(value: Any, low: int, high: int) -> bool:
    return type(value) in (int, float) and low <= value <= high and value == int(value)


def is_control(character: str) -> bool:
    """A control character, or a line or paragraph separator."""
    return unicodedata.category(character) in ("Cc", "Zl", "Zp")


@dataclass(frozen=True)
class Case:
    """A value, and whether the server and each part of the schema (of its `anyOf`) accept it."""

    base: tuple[int, ...]
    """The parts that accept the value before the change."""
    name: str
    """The name of what was changed."""
    value: Any
    is_accepted: bool
    accepting: tuple[int, ...]

    def agrees(self, is_valid: bool) -> bool:
        return self.is_accepted == (is_valid and not is_beyond_a_schema(self.value))


class Field:
    """`diversity` or `style`: the parts of its schema, and the cases made from accepted values."""

    def __init__(
        self, schema: JSON, accepted: Iterator[Any], parse: Callable[[Any], object], *words: Any
    ) -> None:
        """`words`: values that the server accepts in addition to those that `parse` accepts."""
        self.schema = schema
        self.parts: list[JSON] = schema["anyOf"]
        self.accepted = list(accepted)
        self._validators = [Validator(part) for part in self.parts]
        self._parse, self._words = parse, words

    @cached_property
    def cases(self) -> list[Case]:
        """The accepted values, and each with one change."""
        return [
            Case(self.accepting(whole), name, value, self.accepts(value), self.accepting(value))
            for whole in self.accepted
            for name, value in (("", whole), *changed(whole))
        ]

    def accepting(self, value: Any) -> tuple[int, ...]:
        """The indices of the parts that accept a value."""
        return tuple(n for n, each in enumerate(self._validators) if each.is_valid(value))

    def accepts(self, value: Any) -> bool:
        """Whether the server accepts a value."""
        if value in self._words:
            return True
        try:
            self._parse(value)
        except DiversityError:
            return False
        return True


DIVERSITY = Field(json_schema.diversity(), diversities(), parse, None, HUMAN)
STYLE = Field(json_schema.style(), styles(), parse_style, None)
BOTH = pytest.mark.parametrize("field", [DIVERSITY, STYLE], ids=["diversity", "style"])


@BOTH
def test_the_schema_accepts_what_the_server_accepts(field):
    assert [case.value for case in field.cases if not case.agrees(bool(case.accepting))] == []
    for value in field.accepted:
        assert field.accepts(value)
        Validator(field.schema).validate(value)


def test_there_are_cases_of_each_kind():
    """Including those with an invalid group only, and those that a schema cannot express."""
    cases = DIVERSITY.cases
    group = [case for case in cases if case.name in LEAST and len(case.base) == 1]
    assert sum(not case.is_accepted for case in group) > 100 < sum(c.is_accepted for c in group)
    for name in ("id", "index", "size", "dry_base"):
        assert any(is_beyond_a_schema(case.value) for case in cases if case.name == name)


@dataclass(frozen=True)
class Mutant:
    """A part of a schema with one change."""

    part: int
    name: str
    """The name of the changed property."""
    change: str
    schema: JSON

    def is_found(self, cases: list[Case]) -> bool:
        """Whether a case disagrees with it. The cases of its part and property are tried first."""
        validator = Validator(self.schema)

        def is_far(case: Case) -> int:
            return (self.part not in case.base) + (case.name != self.name)

        def is_valid(case: Case) -> bool:
            by_another = any(part != self.part for part in case.accepting)
            return by_another or validator.is_valid(case.value)

        return not all(case.agrees(is_valid(case)) for case in sorted(cases, key=is_far))


def mutants(parts: list[JSON]) -> Iterator[Mutant]:
    for number, part in enumerate(parts):
        yield Mutant(number, "", "none", {"not": {}})
        for name, path, schema in within(part):
            for key, change, other in variants(schema):
                yield Mutant(number, key or name, change, replaced(part, path, other))


def within(schema: JSON, name: str = "", path: Place = ()) -> Iterator[tuple[str, Place, JSON]]:
    """A schema and its subschemas, each with the property that it belongs to, and its path."""
    yield name, path, schema
    for key, each in schema.get("properties", {}).items():
        yield from within(each, key, (*path, "properties", key))
    for number, each in enumerate(schema.get("anyOf", [])):
        yield from within(each, name, (*path, "anyOf", number))
    for keyword in schema.keys() & {"items", "not"}:
        yield from within(schema[keyword], name, (*path, keyword))


def replaced(schema: Any, path: Place, other: JSON) -> Any:
    """A schema with the subschema at a path replaced."""
    if not path:
        return other
    changed_schema = copy(schema)
    changed_schema[path[0]] = replaced(schema[path[0]], path[1:], other)
    return changed_schema


def variants(schema: JSON) -> Iterator[tuple[str, str, JSON]]:
    """Variants of a schema with one change at its top level, each with the property concerned, if
    any, and the change: a keyword removed or with another value; a property removed, accepting
    anything, or required."""
    for keyword in schema.keys() - {"title", "description"}:
        yield "", f"no {keyword}", without(schema, keyword)
        for other in other_values(schema[keyword]):
            yield "", f"{keyword} {other}", schema | {keyword: other}
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for key in properties:
        yield key, f"no {key}", schema | {"properties": without(properties, key)}
        yield key, f"any {key}", schema | {"properties": properties | {key: {}}}
        if key not in required:
            yield key, f"{key} required", schema | {"required": [*required, key]}


def other_values(value: Any) -> list[Any]:
    """Other values of a keyword: a number ± 1, a list without one item, `number` for `integer`."""
    if type(value) in (int, float):
        return [value - 1, value + 1]
    if value == "integer":
        return ["number"]
    if not isinstance(value, list):
        return []
    fewer = [value[:index] + value[index + 1 :] for index in range(len(value))]
    return [*fewer, ["number", *value]] if "integer" in value else fewer


WORDS = [part.get("title") for part in DIVERSITY.parts].index("words")


def is_equivalent(mutant: Mutant) -> bool:
    """Whether a mutant accepts the same values as the schema: `words` takes what the default law
    takes, which needs no name; and a non-string matches every pattern, so that an id's `not`
    refuses it even without `type`."""
    is_nameless = (mutant.part, mutant.change) == (WORDS, "required ['level']")
    return is_nameless or (mutant.name, mutant.change) == ("id", "no type")


@BOTH
def test_each_mutant_of_the_schema_is_detected(field):
    relevant = [mutant for mutant in mutants(field.parts) if not is_equivalent(mutant)]
    assert [(m.part, m.name, m.change) for m in relevant if not m.is_found(field.cases)] == []


def test_every_law_has_mutants():
    changes = {(each.part, each.name, each.change) for each in mutants(DIVERSITY.parts)}
    for part, schema in enumerate(DIVERSITY.parts):
        if schema.get("title") in (*LAWS, "DRY alone"):
            assert {
                (part, GROUP, "required ['id', 'size']"),
                (part, GROUP, "no additionalProperties"),
                *((part, name, f"any {name}") for name in (*LEAST, *DRY, TRACE)),
            } <= changes


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        (HUMAN, True),
        ("h", False),
        ({"level": 0.5}, True),
        ({"law": "guard"}, False),
        ({"law": "words", "level": 1, "group": True}, True),
        ({"law": "words"}, False),
        ({"dry_multiplier": 0.8}, True),
        ({"dry_multiplier": 0.8, "target_entropy": 1}, False),
        ({"level": 0.5, "group": {"id": "g", "index": 0, "size": 2}}, True),
        ({"level": 0.5, "group": {"id": "g", "index": 0.0, "size": 2.0}}, True),
        ({"level": 0.5, "group": {"id": "g\n", "index": 0, "size": 2}}, False),
        ({"level": 0.5, "group": {"id": "g", "index": 0}}, False),
    ],
)
def test_examples(value, is_valid):
    assert Validator(DIVERSITY.schema).is_valid(value) is is_valid


@BOTH
def test_the_schemas_are_valid(field):
    Validator.check_schema(field.schema)
