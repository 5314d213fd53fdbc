"""bench/prompted.py: which answers have the form that is asked for."""

import importlib

import pytest

prompted = importlib.import_module("prompted")
RESPONSE = "<response>\n  <text>A {}.</text>\n  <probability>{}</probability>\n</response>\n"


@pytest.mark.parametrize("numbers", [("0.2", "0.1"), ("20 %", "5%"), ("1", ".5", "0.3")])
def test_responses_with_a_text_and_a_number_follow(numbers):
    text = "Here are some:\n" + "".join(RESPONSE.format(n, n) for n in numbers)
    assert prompted.follows("verbalised", text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog.",
        RESPONSE.format("dog", "0.2"),
        2 * RESPONSE.format("dog", "likely"),
        "1. A dog (0.2)\n2. A cat (0.1)",
    ],
)
def test_other_answers_do_not_follow_verbalised_sampling(text):
    assert not prompted.follows("verbalised", text)


@pytest.mark.parametrize(
    ("text", "is_followed"),
    [
        ("<random_string>x7Kq</random_string>\n<answer>A dog.</answer>", True),
        ("<random_string>\nx7Kq\n</random_string>\n<answer>A text that was cut", True),
        ("<random_string></random_string><answer>A dog.</answer>", False),
        ("<answer>A dog.</answer><random_string>x7Kq</random_string>", False),
        ("x7Kq\nA dog.", False),
    ],
)
def test_a_seed_is_followed_by_an_answer(text, is_followed):
    assert prompted.follows("seed", text) == is_followed
