"""How bench/real.py and bench/words.py evaluate measurements."""

import importlib
import math

import numpy as np
import pytest

from dftserve.evaluate.metrics.intervals import from_left_out

real = importlib.import_module("real")
words = importlib.import_module("words")


def estimate(value):
    """An estimate whose value is the same whichever tenth is left out."""
    return from_left_out(value, [value] * 10)


def row(self_bleu, errors):
    return {"self_bleu": estimate(self_bleu), "errors": estimate(errors)}


def test_errors_are_interpolated_between_settings_on_a_log_scale():
    curve = [row(8.0, 4.0), row(32.0, 1.0)]
    errors = real.read_at(curve, "self_bleu", "errors", row(16.0, 9.0))
    assert errors.value == pytest.approx(2.0)
    assert (errors.low, errors.high) == pytest.approx((2.0, 2.0))


@pytest.mark.parametrize("self_bleu", [7.9, 32.1])
def test_errors_are_not_extrapolated(self_bleu):
    curve = [row(8.0, 4.0), row(32.0, 1.0)]
    assert real.read_at(curve, "self_bleu", "errors", row(self_bleu, 1.0)) is None


def test_self_bleu_between_prompts_ignores_repetitions_within_a_prompt():
    """Three prompts with two equal answers each, and nothing in common between them."""
    texts = [list(text) for text in ("abcdefgh", "ijklmnop", "qrstuvwx") for _ in range(2)]
    numbers, prompts = np.array([0, 1] * 3), np.array([0, 0, 1, 1, 2, 2])
    assert real.within(prompts, texts, 3).value == pytest.approx(100.0)
    assert real.between(numbers, prompts, texts, 3)["self_bleu"].value < 10


def test_p_is_that_of_students_t():
    """Ten tenths, a standard error of 1 and a distance of 2.262, the 95 % point of t(9)."""
    spread = math.sqrt(1 / 9)
    left_out = [2.262 + spread, 2.262 - spread] * 5
    assert words.with_p(from_left_out(2.262, left_out))["p"] == pytest.approx(0.05, abs=1e-4)


def followed(share):
    return {"followed": {"value": share}}


@pytest.mark.parametrize(
    ("ratio", "p", "with_words", "law"),
    [
        (0.7, 0.01, 0.2, "words"),
        (0.7, 0.2, 0.2, "gated"),
        (0.9, 0.01, 0.2, "gated"),
        (0.7, 0.01, 0.05, "gated"),
    ],
)
def test_words_is_the_default_only_if_clearly_fewer_errors_cost_no_instructions(
    ratio, p, with_words, law
):
    against = {
        "errors_ratio_at_equal_variety": {"value": ratio, "p": p},
        "self_bleu": {"value": 0.1, "p": 0.9},
        "errors": {"value": -0.1, "p": 0.01},
    }
    instructions = {words.WORDS: followed(with_words), words.GATED: followed(0.1)}
    assert words.default(against, instructions)["law"] == law


def answered(setting, *texts):
    return [
        words.Answer(words.MMLU, setting, place, 0, text, 1) for place, text in enumerate(texts)
    ]


def test_right_and_unreadable_answers_are_counted_and_compared_in_pairs():
    questions = [{"answer": 1}, {"answer": 0}, {"answer": 3}]
    answers = {
        words.WORDS: answered(words.WORDS, "B", "The answer is A.", "C"),
        words.GATED: answered(words.GATED, "B", "I cannot say.", "D"),
    }
    rows = words.questions(answers, questions)["rows"]
    shares = {
        name: (row["right"]["value"], row["unreadable"]["value"]) for name, row in rows.items()
    }
    third = pytest.approx(1 / 3, abs=1e-4)
    two = pytest.approx(2 / 3, abs=1e-4)
    assert shares == {words.WORDS: (two, 0.0), words.GATED: (two, third)}
    assert (rows[words.GATED]["words_wins"], rows[words.GATED]["words_losses"]) == (1, 1)
    assert rows[words.WORDS]["p"] == 1.0
