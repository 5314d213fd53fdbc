"""The field `style`: accepted names and objects, and refused values."""

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.spec import LONGEST_NAME, DiversityError, Style, parse_style, parse_style_json

TEXTS = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)
VALUES = TEXTS | st.none() | st.integers() | st.floats() | st.lists(st.text())


@given(VALUES)
def test_nothing_but_a_diversity_error_is_raised(value):
    for content in (value, {"name": value}, {"name": "a", "strength": value}, {"max_kl": value}):
        for read in (parse_style, lambda each: parse_style_json(json.dumps(each))):
            with contextlib.suppress(DiversityError):
                style = read(content)
                assert parse_style(style.as_dict()) == style
                assert 0 < len(style.name) <= LONGEST_NAME
                msgspec.msgpack.encode(style.as_dict())  # As vLLM does for its engine.


def test_a_style_is_a_name_or_an_object():
    human = Style(name="human")
    assert parse_style("human") == parse_style_json("human") == human
    assert parse_style({"name": "human", "strength": None}) == human
    assert parse_style_json('{"name": "human", "strength": 0}').is_off
    assert parse_style({"name": "human", "max_kl": 1}).max_kl == 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"name": "human", "strength": 1.5}, "style.strength: got 1.5; accepted: a number"),
        ({"name": "human", "strength": True}, "style.strength: got true"),
        ({"name": ""}, "style.name: got ''; accepted: the name of a style"),
        ({"name": "a\ud800"}, r"style.name: got 'a\\ud800'; accepted: valid Unicode"),
        ({"nmae": "human"}, "style.nmae: got 'human'; accepted: name, .*did you mean 'name'"),
        (None, "style: got null; accepted: the name of a style, or an object"),
    ],
)
def test_invalid_values_are_refused_with_the_field(value, message):
    with pytest.raises(DiversityError, match=message):
        parse_style(value)


def test_invalid_json_text_is_refused():
    with pytest.raises(DiversityError, match=r"style: got .*; accepted: as JSON text"):
        parse_style_json("{")
