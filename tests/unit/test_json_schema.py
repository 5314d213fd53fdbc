"""The fields' JSON Schemas accept what `spec` accepts, and refuse what it refuses."""

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve import json_schema
from dftserve.spec import (
    BOUNDS,
    DRY_BOUNDS,
    HUMAN,
    LAWS,
    STYLE_BOUNDS,
    DiversityError,
    parse,
    parse_style,
)

DIVERSITY, STYLE = (
    jsonschema.Draft202012Validator(each) for each in (json_schema.diversity(), json_schema.style())
)
NUMBERS = st.sampled_from([0, 0.1, 0.5, 1, 1.75, 2, 3.5, 4, 5, 20, 64, 100, -1, 101, 1e300])
OTHER = st.sampled_from([None, True, "a", "", [], {}, "x" * 65, [""], ["a"]])
GROUPS = st.none() | st.booleans() | st.fixed_dictionaries(
    {}, optional={"id": st.sampled_from(["g", "", 1]), "index": st.sampled_from([0, 1, -1, 2000]),
                  "size": st.sampled_from([1, 2, 1024, 1025, "2"]), "more": st.none()},
)  # fmt: skip


@st.composite
def objects(draw):
    """Mostly of the names that a law takes, mostly with numbers."""
    law = draw(st.sampled_from([*LAWS, None, "other", 1]))
    own = list(LAWS.get(law, LAWS["gated"])) if isinstance(law, str | None) else ["level"]
    names = st.sampled_from([*own, *own, *own, *BOUNDS, *DRY_BOUNDS, "leevl"])
    value = draw(st.dictionaries(names, NUMBERS | NUMBERS | OTHER, max_size=5))
    if draw(st.booleans()) or law not in (None, "gated"):
        value["law"] = law
    extras = {
        "group": GROUPS,
        "trace": st.sampled_from([True, False, None, 1]),
        "dry_sequence_breakers": OTHER | st.lists(st.just("\n"), max_size=40),
    }
    for name, values in extras.items():
        if draw(st.integers(0, 3)) == 0:
            value[name] = draw(values)
    return value


def is_beyond_a_schema(value) -> bool:
    """What no schema of ours tells: names of DRY without its multiplier; an index above the
    size; characters that are not printable, which none of the values here has."""
    if not isinstance(value, dict):
        return False
    given = {name for name, each in value.items() if each is not None}
    lacks = any(name.startswith("dry_") for name in given) and "dry_multiplier" not in given
    group = value.get("group")
    if isinstance(group, dict) and isinstance(group.get("size"), int):
        return lacks or not (isinstance(group.get("index"), int) and group["index"] < group["size"])
    return lacks


@given(objects() | NUMBERS | OTHER)
def test_diversity(value):
    try:
        parse(value)
        is_accepted = True
    except DiversityError:
        is_accepted = value is None
    if is_accepted:
        DIVERSITY.validate(value)
    elif not is_beyond_a_schema(value):
        assert not DIVERSITY.is_valid(value)


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
        ({"level": 0.5, "group": {"id": "g", "index": 0}}, False),
    ],
)
def test_examples(value, is_valid):
    assert DIVERSITY.is_valid(value) is is_valid


@given(
    st.dictionaries(st.sampled_from(["name", *STYLE_BOUNDS, "nmae"]), NUMBERS | OTHER) | OTHER
)  # fmt: skip
def test_style(value):
    try:
        parse_style(value)
        is_accepted = True
    except DiversityError:
        is_accepted = value is None
    assert STYLE.is_valid(value) is is_accepted


@pytest.mark.parametrize("schema", [json_schema.diversity(), json_schema.style()])
def test_they_are_schemas(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
