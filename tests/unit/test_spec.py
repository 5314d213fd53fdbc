"""The field `diversity` of requests, and the dft.json of a checkpoint."""

import contextlib
import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.spec import (
    BOUNDS,
    DRY_NAMES,
    GROUP,
    LAWS,
    MAX_JSON_CHARACTERS,
    TRACE,
    CheckpointInfo,
    Diversity,
    DiversityError,
    parse,
    parse_json,
)

KNOWN = {*BOUNDS, *DRY_NAMES, "law", GROUP, TRACE}
REQUIRED = {
    "gated": "level",
    "budget": "target_entropy",
    "dynatemp": "dynatemp_range",
    "words": "level",
    "guard": "min_p",
    "top_n_sigma": "n_sigma",
    "xtc": "xtc_probability",
}


def numbers(name):
    """Floats and integers that a field accepts."""
    bounds = BOUNDS[name]
    floats = st.floats(bounds.low, bounds.high, exclude_min=not bounds.low_included)
    integers = st.integers(math.ceil(bounds.low), math.floor(bounds.high))
    return floats | integers.filter(lambda value: value in bounds)


@st.composite
def objects(draw):
    """Accepted objects: the required field of the law and any optional ones, which may be null."""
    law = draw(st.sampled_from(sorted(LAWS)))
    optional = [name for name in LAWS[law] if name != REQUIRED[law]]
    chosen = draw(st.sets(st.sampled_from(optional))) if optional else ()
    content = {name: draw(numbers(name) | st.none()) for name in chosen}
    content[REQUIRED[law]] = draw(numbers(REQUIRED[law]))
    if law != "gated" or draw(st.booleans()):
        content["law"] = law
    return content


WHOLE = {
    "dry_allowed_length": lambda value: {"dry_multiplier": 1, "dry_allowed_length": value},
    "group.size": lambda value: {"level": 1, "group": {"id": "g", "index": 0, "size": value}},
    "group.index": lambda value: {"level": 1, "group": {"id": "g", "index": value, "size": 8}},
}
"""Functions that make an object from the value of a field that accepts only whole numbers."""

accepted = numbers("level") | objects()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
not_numbers = st.booleans() | st.text() | st.lists(st.integers()) | st.binary() | st.just({})


def refusal(value, parameter="diversity"):
    with pytest.raises(DiversityError) as raised:
        parse(value, parameter)
    error = raised.value
    assert str(error).startswith(f"{error.parameter}: got ")
    assert "; accepted: " in str(error)
    return error


# What is accepted


@given(accepted)
def test_the_object_form_is_parsed_to_an_equal_value(value):
    diversity = parse(value)
    assert parse(diversity.as_dict()) == diversity
    assert parse_json(json.dumps(diversity.as_dict())) == diversity


SURROGATES = st.characters(categories=["Cs"])


@given(st.text(st.characters() | SURROGATES, max_size=8))
def test_an_accepted_text_can_be_sent_to_an_engine(text):
    """vLLM encodes requests with msgspec, which refuses half a surrogate pair."""
    values = (
        {"level": 0.5, "group": {"id": text, "index": 0, "size": 2}},
        {"dry_multiplier": 1, "dry_sequence_breakers": ["a", text]},
    )
    for value in values:
        for read in (parse, lambda each: parse_json(json.dumps(each))):
            with contextlib.suppress(DiversityError):
                msgspec.msgpack.encode(read(value).as_dict())


@given(st.text(max_size=4), SURROGATES, st.text(max_size=4))
def test_half_a_surrogate_pair_is_refused(before, half, after):
    error = refusal({"dry_multiplier": 1, "dry_sequence_breakers": ["a", before + half + after]})
    assert error.parameter == "diversity.dry_sequence_breakers"
    assert str(error).isprintable()


@given(accepted)
def test_json_text_is_parsed_like_its_value(value):
    assert parse_json(json.dumps(value)) == parse(value)


@given(objects())
def test_fields_have_the_given_values_or_the_defaults_of_the_law(value):
    diversity = parse(value)
    defaults = LAWS[diversity.law]
    for name in BOUNDS:
        given_value = value.get(name)
        expected = given_value if given_value is not None else defaults.get(name)
        assert getattr(diversity, name) == expected
        assert isinstance(getattr(diversity, name), float | None)


@given(numbers("level"))
def test_a_number_is_the_level_of_the_gated_law(level):
    assert parse(level) == parse({"law": "gated", "level": level})
    assert parse(level).is_off == (level == 0)


def test_only_a_level_of_zero_is_off():
    assert parse(0).is_off
    assert parse({"law": "dynatemp", "dynatemp_range": 0.5, "level": 0}).is_off
    assert not parse({"law": "budget", "target_entropy": 1}).is_off


# What is refused


@given(st.none() | st.text() | st.booleans() | st.lists(st.floats(0, 1)) | st.binary())
def test_a_value_must_be_a_number_or_an_object(value):
    error = refusal(value)
    assert (error.parameter, error.value) == ("diversity", value)


@pytest.mark.parametrize("name", sorted(BOUNDS))
@given(st.data())
def test_a_field_refuses_everything_but_numbers_within_its_bounds(name, data):
    bounds = BOUNDS[name]
    outside = st.floats().filter(lambda x: math.isnan(x) or x not in bounds)
    outside |= st.integers(max_value=-1) | st.integers(min_value=math.floor(bounds.high) + 1)
    wrong = data.draw(not_numbers | outside)
    law = next(law for law in LAWS if name in LAWS[law])
    error = refusal({"law": law, REQUIRED[law]: 1, name: wrong}, "p")
    assert error.parameter == f"p.{name}"
    assert str(bounds) in str(error)


@pytest.mark.parametrize(
    "level", [math.nan, math.inf, -math.inf, -1e-9, 1 + 1e-9, 10**400, -(10**400)]
)
def test_a_level_outside_zero_to_one_is_refused(level):
    assert refusal(level).parameter == "diversity.level"


def test_errors_about_huge_integers_are_short():
    long = 10**5000
    for value in (long, [long], {"level": long}, {"law": long}, {"level": 0.5, long: 1}):
        assert len(str(refusal(value))) < 500


@pytest.mark.parametrize("law", sorted(LAWS))
@pytest.mark.parametrize("absent", [{}, None])
def test_a_missing_required_field_is_named(law, absent):
    content = {"law": law} if absent == {} else {"law": law, REQUIRED[law]: None}
    error = refusal(content)
    assert error.parameter == f"diversity.{REQUIRED[law]}"
    assert f"the law {law!r} needs it" in str(error)


@pytest.mark.parametrize("law", sorted(LAWS))
@given(name=st.text(max_size=40).filter(lambda name: name not in KNOWN), value=json_values)
def test_an_unknown_field_is_refused_whatever_its_value(law, name, value):
    error = refusal({"law": law, REQUIRED[law]: 0.5, name: value})
    assert error.parameter.isprintable()
    if name.isprintable() and not set(name) & {"'", '"', "\\"}:  # Otherwise it is shown escaped.
        assert error.parameter == f"diversity.{name}"
    assert all(field in str(error) for field in LAWS[law])


@pytest.mark.parametrize("law", sorted(LAWS))
def test_the_refusal_of_a_field_of_another_law_names_that_law(law):
    for name in set(BOUNDS) - set(LAWS[law]):
        error = refusal({"law": law, REQUIRED[law]: 0.5, name: 0.5})
        owners = [other for other in LAWS if name in LAWS[other]]
        assert all(repr(owner) in str(error) for owner in owners)


@given(json_values.filter(lambda law: law is not None and law not in list(LAWS)))
def test_an_unknown_law_is_refused(law):
    error = refusal({"law": law, "level": 0.5})
    assert error.parameter == "diversity.law"
    assert all(name in str(error) for name in LAWS)


def test_a_field_of_other_laws_is_refused_with_their_names():
    error = refusal({"law": "budget", "target_entropy": 1, "level": 0.5})
    assert str(error).endswith("('level' is a field of 'gated', 'dynatemp', 'words').")


def test_the_intended_spelling_is_suggested():
    assert "did you mean 'level'?" in str(refusal({"levle": 0.5}))
    assert "did you mean 'dynatemp'?" in str(refusal({"law": "dynatmp"}))


@given(json_values)
def test_nothing_but_a_diversity_error_is_raised(value):
    with contextlib.suppress(DiversityError):
        assert isinstance(parse(value), Diversity)


@given(st.text())
def test_text_is_parsed_or_refused(text):
    with contextlib.suppress(DiversityError):
        assert isinstance(parse_json(text), Diversity)


@pytest.mark.parametrize(
    "text", ["", "half", "{", "null", "true", '"0.5"', "[0.5]", "NaN", "0.5 0.5"]
)
def test_text_of_another_kind_is_refused(text):
    with pytest.raises(DiversityError):
        parse_json(text)


@pytest.mark.parametrize("opening", ["[", '{"level":', '{"law":', '{"a":'])
def test_deeply_nested_json_is_refused(opening):
    closing = "]" if opening == "[" else "}"
    for depth in range(2, MAX_JSON_CHARACTERS // (len(opening) + 1)):
        with pytest.raises(DiversityError):
            parse_json(opening * depth + "1" + closing * depth)


def test_a_value_nested_beyond_the_recursion_limit_is_refused():
    deep = 1
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"level": deep}, {"law": deep}, {"a": deep}):
        assert len(str(refusal(value))) < 500


@given(st.integers(MAX_JSON_CHARACTERS - 3, MAX_JSON_CHARACTERS * 3))
def test_long_text_is_refused_by_its_length(length):
    text = "0." + "5" * (length - 2)
    if length <= MAX_JSON_CHARACTERS:
        assert parse_json(text) == parse(float(text))
        return
    with pytest.raises(DiversityError, match=f"{length} characters"):
        parse_json(text)


def test_errors_about_long_values_are_short():
    for value in ("x" * 10**6, {"x" * 10**6: 1}, {"law": "x" * 10**6}, {"level": [1] * 10**6}):
        assert len(str(refusal(value))) < 500


# The dft.json of a checkpoint


@given(
    recipe=st.text(st.characters(exclude_categories=["Cs"])),
    diversity=st.none() | accepted.map(parse),
    target_entropy=st.none() | st.floats(0, 20),
    model_entropy=st.none() | st.floats(0, 20),
)
def test_a_dft_json_is_read_as_it_was_written(tmp_path_factory, **content):
    folder = tmp_path_factory.mktemp("checkpoint")
    CheckpointInfo(**content).write(folder)
    assert CheckpointInfo.read(folder) == CheckpointInfo(**content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "more than 64 levels"),
        ("[]", "an object with `recipe`"),
        ("null", "an object with `recipe`"),
        ("{}", "an object with `recipe`"),
        ('{"recipe": "r", "divresity": 0.5}', "did you mean 'diversity'?"),
        ('{"recipe": "r", "diversity": 2}', "from 0 to 1"),
        ('{"recipe": "r", "diversity": {"levle": 0.5}}', "did you mean 'level'?"),
        ('{"recipe": 7}', "recipe"),
        ('{"recipe": "r", "target_entropy": "high"}', "target_entropy"),
        ('{"recipe": "r", "model_entropy": NaN}', "model_entropy"),
    ],
)
def test_an_invalid_dft_json_is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "dft.json").write_text(text)
    with pytest.raises(ValueError, match=r"dft\.json") as raised:
        CheckpointInfo.read(tmp_path)
    assert message in str(raised.value)


def test_a_dft_json_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "dft.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"dft\.json"):
        CheckpointInfo.read(tmp_path)


def test_a_folder_without_a_dft_json_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError):
        CheckpointInfo.read(tmp_path)


def nested_value(content, name):
    for key in name.split("."):
        content = content[key]
    return content


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_float_is_accepted_as_an_integer(name):
    diversity = parse(WHOLE[name](2.0))
    assert diversity == parse(WHOLE[name](2))
    for content in (diversity.as_dict(), diversity.without_texts()):
        assert type(nested_value(content, name)) is int


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [2.5, True, "2", [2], math.nan, math.inf, -1, 1e300, 10**400])
def test_anything_but_a_whole_number_in_range_is_refused_with_the_field(name, value):
    with pytest.raises(DiversityError, match="a whole number from") as error:
        parse(WHOLE[name](value))
    assert error.value.parameter == f"diversity.{name}"
