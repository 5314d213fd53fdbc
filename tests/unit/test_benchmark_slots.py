"""Slot errors and wording, on hand-written meanings and on the E2E sets."""

import csv
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.evaluate.benchmark import slots
from dftserve.evaluate.benchmark.slots import (
    NAMED,
    PATTERNS,
    SAME,
    error_rate,
    errors,
    parse,
    wording,
)
from dftserve.evaluate.text.tokenize import ngrams, normalise, tokens

MEANING = parse(
    "name[Café Zoë], eatType[pub], food[Thai], priceRange[less than £20], "
    "customer rating[5 out of 5], area[riverside], familyFriendly[no], near[The Rice Boat]"
)
TEXT = (
    "By the river, near the Rice Boat, is Cafe Zoe, a cheap pub with Thai food and a high customer "
    "rating. It is not family-friendly."
)

values = st.sampled_from(
    [(slot, value) for slot, known in PATTERNS.items() for value in SAME.get(slot, known)]
)


def test_a_meaning_is_parsed():
    assert parse("name[Blue Spice], eatType[coffee shop]") == {
        "name": "Blue Spice",
        "eatType": "coffee shop",
    }


@pytest.mark.parametrize("wrong", ["", "Blue Spice", "name[a", "name[a], name[b]", "name[a] and b"])
def test_an_invalid_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match="accepted: slot"):
        parse(wrong)


def test_a_text_with_every_slot_has_no_error():
    assert errors(TEXT, MEANING).rate == 0


@pytest.mark.parametrize("text", ["", "Fish swim.", "Yellow stones lie in a garden."])
def test_an_unrelated_text_misses_every_slot(text):
    result = errors(text, MEANING)
    assert (result.slots, result.missing, result.wrong, result.added) == (8, 8, 0, 0)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ({"eatType": "coffee shop"}, "wrong"),
        ({"priceRange": "high"}, "wrong"),
        ({"customer rating": "low"}, "wrong"),
        ({"area": "city centre"}, "wrong"),
        ({"familyFriendly": "yes"}, "wrong"),
        ({"food": "Korean"}, "missing"),
        ({"near": "Crowne Plaza Hotel"}, "missing"),
        ({"name": "Zizzi"}, "missing"),
    ],
)
def test_one_different_slot_is_one_error(other, kind):
    result = errors(TEXT, {**MEANING, **other})
    assert getattr(result, kind) == 1
    assert result.missing + result.wrong + result.added == 1


@pytest.mark.parametrize("slot", [slot for slot in MEANING if slot in PATTERNS and slot != "food"])
def test_a_slot_that_was_not_requested_counts_as_added(slot):
    less = {name: value for name, value in MEANING.items() if name != slot}
    assert errors(TEXT, less).added == 1


def test_a_slot_without_a_pattern_is_matched_literally():
    meaning = parse("name[Acer], screen[15 inch]")
    found = errors("The Acer is a nice laptop.", meaning)
    assert (found.missing, found.wrong, found.added) == (1, 0, 0)
    assert errors("The Acer has a 15 inch screen.", meaning).rate == 0


def test_words_inside_a_name_are_not_values():
    """`Raja Indian Cuisine` does not mean Indian food, nor `Burger King` fast food."""
    meaning = parse("name[Cotto], near[Raja Indian Cuisine], eatType[pub]")
    assert errors("Cotto is a pub near Raja Indian Cuisine.", meaning).rate == 0
    meaning = parse("name[Burger King], area[riverside]")
    assert errors("Burger King is by the river.", meaning).rate == 0


def test_any_place_may_be_called_a_restaurant():
    assert (
        errors("Zizzi is a riverside restaurant.", parse("name[Zizzi], area[riverside]")).added == 0
    )


@given(values)
def test_a_value_worded_as_in_the_meaning_is_found(pair):
    slot, value = pair
    text = {
        "priceRange": f"The price range is {value}.",
        "customer rating": f"The customer rating is {value}.",
        "familyFriendly": f"It is {'' if value == 'yes' else 'not '}family friendly.",
    }.get(slot, f"It is {value}.")
    assert errors(text, {slot: value}).missing + errors(text, {slot: value}).wrong == 0


def test_the_rate_is_over_all_slots():
    texts = [TEXT, "Zizzi."]
    meanings = [MEANING, parse("name[Zizzi], area[riverside]")]
    assert error_rate(texts, meanings).value == pytest.approx(1 / 10)


# ── Wording ──────────────────────────────────────────────────────────────────────────────────────

ANY = "a pub by the river with thai food and high prices for adults only near zizzi"


def sentences(seed: int, count: int = 8) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(ANY.split(), k=12)) for _ in range(count)]


def test_wording_equals_a_plain_count_over_pairs():
    """Computed from sets over all pairs, without matrices."""
    generated, human = ({p: sentences(n + p) for p in (1, 2)} for n in (0, 10))

    def share(a: str, b: str) -> float:
        shares = []
        for size, masked in ((4, False), (6, True)):
            x, y = (
                {tuple(map(mask, g)) if masked else g for g in ngrams(tokens(normalise(t)), size)}
                for t in (a, b)
            )
            shares.append(len(x & y) / min(len(x), len(y)))
        return sum(shares) / 2

    def mask(word: str) -> str:
        content = {"pub", "river", "thai", "food", "high", "prices", "adults", "zizzi"}
        return f"#{word[-2:]}" if word in content else word

    def overlap(texts: dict[int, list[str]]) -> float:
        means = [
            np.mean([share(t[i], t[j]) for i in range(8) for j in range(i)]) for t in texts.values()
        ]
        return max(float(np.mean(means)), 1e-4)

    texts_of_prompts, human_texts = (
        {str(p): t for p, t in each.items()} for each in (generated, human)
    )
    expected = np.log(overlap(generated)) / np.log(overlap(human))
    assert wording(texts_of_prompts, human_texts).value == pytest.approx(expected)


def test_human_texts_compared_with_themselves_score_1_and_copies_0():
    human = {"p": [f"{text} {i}" for i, text in enumerate(sentences(0))]}
    assert wording(human, human).value == 1
    assert wording({"p": [TEXT] * 8}, human).value == 0


@pytest.mark.parametrize("text", ["", "Zizzi.", "a b c d e"])
def test_texts_too_short_to_vary_count_as_copies(text):
    human = {"p": sentences(0)}
    assert wording({"p": [f"{text}" for _ in range(8)]}, human).value == 0
    different = [f"{i}" for i in range(8)]
    assert wording({"p": different}, human).value == 0


def test_prompts_with_too_few_texts_are_left_out():
    human = {"p": sentences(0), "q": sentences(1)}
    generated = {"p": sentences(2), "q": [TEXT] * 7}
    assert wording(generated, human) == wording({"p": generated["p"]}, human)
    with pytest.raises(ValueError, match="no prompt has 8"):
        wording({"q": generated["q"]}, human)
    with pytest.raises(ValueError, match="copies only"):
        wording(generated, {"p": [TEXT] * 8})


# ── Real data ────────────────────────────────────────────────────────────────────────────────────


def rows(name: str) -> list[dict[str, str]]:
    folder = os.environ.get("DFTSERVE_DATA")
    if not folder:
        pytest.skip("DFTSERVE_DATA names no folder of real texts")
    path = Path(folder) / "multiref" / name
    if not path.is_file():
        pytest.skip(f"DFTSERVE_DATA has no multiref/{name}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_human_texts_have_few_errors_and_many_with_shuffled_meanings():
    """On a quarter of the test set; the patterns were written on another set."""
    refs = rows("e2e_testset_w_refs.csv")[::4]
    texts, meanings = [row["ref"] for row in refs], [parse(row["mr"]) for row in refs]
    assert error_rate(texts, meanings).value < 0.10
    others = random.Random(0).sample(meanings, len(meanings))
    assert error_rate(texts, others).value > 0.5


def test_a_changed_value_is_detected():
    """One slot of the meaning of a text without errors is changed to another value."""
    draw, detected = random.Random(0), []
    for row in rows("e2e_testset_w_refs.csv")[::8]:
        meaning = parse(row["mr"])
        changed = {slot: other(slot, value, draw) for slot, value in meaning.items()}
        if errors(row["ref"], meaning).rate == 0:
            for slot in meaning.keys() - NAMED:
                result = errors(row["ref"], {**meaning, slot: changed[slot]})
                detected.append(result.missing + result.wrong >= 1)
    assert len(detected) > 1000
    assert np.mean(detected) > 0.97


def other(slot: str, value: str, draw: random.Random) -> str:
    """A value with another meaning."""
    known = SAME.get(slot) or {each: each for each in slots.PATTERNS.get(slot, ("none",))}
    return draw.choice([each for each in known if known[each] != known.get(value)])


def test_texts_of_one_meaning_are_one_unit():
    """Eight copies of each text have the interval of one."""
    meanings = [{"name": f"Place {number}", "area": "riverside"} for number in range(9)]
    texts = [f"Place {number} is by the {'river' * (number % 3)}." for number in range(9)]
    one = error_rate(texts, meanings)
    groups = [f"{number}" for number in range(9) for _ in range(8)]
    again = [[each for each in items for _ in range(8)] for items in (texts, meanings)]
    eight = error_rate(*again, groups)
    assert (eight.value, eight.low, eight.high) == pytest.approx((one.value, one.low, one.high))
