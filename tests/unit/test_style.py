"""Style features, compared with counts in plain Python; and properties of their scale."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.evaluate.metrics.stylometry import (
    FUNCTION_WORDS,
    MARKS,
    NAMES,
    Scale,
    features,
    function_share,
)
from dftserve.evaluate.text.tokenize import normalise
from tests.texts import human_like, write


def words_and_marks(text):
    """Words as written, and marks, from a scan of the characters."""
    found_words, marks, i = [], [], 0
    while i < len(text):
        start = i
        while i < len(text) and (
            text[i].isalnum()
            or (
                text[i] in "'-"
                and start < i
                and text[i - 1].isalnum()
                and text[i + 1 :][:1].isalnum()
            )
        ):
            i += 1
        if i > start:
            found_words.append(text[start:i])
        elif text.startswith("...", i):
            marks.append("...")
            i += 3
        else:
            marks.append(text[i])
            i += 1
    return found_words, marks


def sentence_lengths(text):
    """Numbers of words between sentence ends, from a scan of the characters."""
    lengths, start, i = [], 0, 0
    while i < len(text):
        j = i + 1
        if text[i] in ".!?":
            while text[j : j + 1] and text[j] in "\"')]*":
                j += 1
            k = j
            while text[k : k + 1].isspace():
                k += 1
            opened = text[k:].lstrip("\"'([*")[:1]
            if k > j and opened.isalpha() and not "a" <= opened <= "z":
                lengths.append(text[start:k])
                start = j = k
        if text.startswith("\n\n", i) and start <= i:
            lengths.append(text[start:i])
            start = i
        i = j
    lengths.append(text[start:])
    return [len(words_and_marks(each)[0]) for each in lengths if each.strip()]


def expected_features(text):
    words, marks = words_and_marks(text)
    if not words:
        return dict.fromkeys(NAMES, 0.0)
    low = [word.lower() for word in words]

    def share(count):
        return math.sqrt(100 * count / len(words))

    endings = ("n't", "'s", "'m", "'re", "'ve", "'ll", "'d", "'em")
    hapaxes = [word for word in set(low) if low.count(word) == 1]
    lengths = sentence_lengths(text)
    mean = sum(lengths) / len(lengths)
    spread = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    values = {f"word {word}": share(low.count(word)) for word in FUNCTION_WORDS}
    values |= {f"mark {mark}": share(marks.count(mark)) for mark in MARKS}
    for end in ("ly", "ing", "ed", "tion", "ness", "ful", "ous"):
        values[f"suffix -{end}"] = share(sum(word[-len(end) :] == end for word in low))
    for a, b in ((1, 3), (4, 6), (7, 9), (10, 99)):
        values[f"words of {a} to {b}"] = share(sum(len(word) in range(a, b + 1) for word in low))
    return values | {
        "contractions": share(sum(word.endswith(endings) for word in low)),
        "capitals": share(sum("A" <= c <= "Z" for c in text)),
        "digits": share(sum(c.isdecimal() for c in text)),
        "paragraphs": share(text.count("\n\n")),
        "sentence length": math.log(1 + mean),
        "sentence length spread": math.log(1 + spread),
        "distinct words": len(set(low)) / len(low),
        "words said once": len(hapaxes) / len(low),
    }


def check(text):
    text = normalise(text)
    (row,) = features([text])
    expected = expected_features(text)
    assert sorted(expected) == sorted(NAMES)
    wrong = {
        name: (value, expected[name])
        for name, value in zip(NAMES, row, strict=True)
        if not math.isclose(value, expected[name], rel_tol=1e-12, abs_tol=1e-12)
    }
    assert not wrong


def test_each_feature_has_one_name():
    assert len(set(FUNCTION_WORDS)) == len(FUNCTION_WORDS)
    assert len(set(NAMES)) == len(NAMES) == features(["One."]).shape[1]
    assert features([]).shape == (0, len(NAMES))


@pytest.mark.parametrize("seed", range(30))
def test_features_of_prose_equal_plain_counts(seed):
    check(write(f"{seed}", f"{seed}"))


PIECES = [*FUNCTION_WORDS[:20], *MARKS, *" .!?'\"()*", "\n\n", " ", "don't", "He's", "1999", "A b"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "happily", "kindness", "nation-wide"]), max_size=40))
def test_features_of_any_text_equal_plain_counts(pieces):
    check("".join(pieces))
    check(" ".join(pieces))


def test_a_text_without_words_has_no_style():
    assert not features(["", "...", "— ! —"]).any()


def test_function_share_is_the_share_of_function_words():
    assert function_share([]) == function_share([""]) == 0
    assert function_share(["the of and", "house"]) == 0.75
    assert 0.4 < function_share(human_like(20)) < 0.75


def test_generated_texts_are_reproducible_and_different():
    assert human_like(3) == human_like(3) != human_like(3, seed=1)
    assert len(set(human_like(50))) == 50


def uniform(seed, texts=2000, features=50):
    """Values with standard deviation 1 that are never clipped."""
    return np.random.default_rng(seed).uniform(-math.sqrt(3), math.sqrt(3), (texts, features))


def test_the_reference_has_mean_zero_and_standard_deviation_one():
    first_TF, second_TF = 3 + uniform(0), 3 + uniform(1)
    z_NF = Scale.fit(first_TF, second_TF).z(np.concatenate((first_TF, second_TF)))
    assert abs(z_NF.mean(axis=0)).max() < 1e-12
    assert z_NF.std(axis=0) == pytest.approx(1, abs=0.0012)


def test_z_is_clipped():
    scale = Scale.fit(uniform(0), uniform(1))
    extreme_F = np.full((1, 50), 1e9)
    assert (scale.z(extreme_F) == 3).all()
    assert (scale.z(-extreme_F) == -3).all()


def test_equal_halves_are_fully_reliable():
    both_TF = uniform(0)
    assert Scale.fit(both_TF, both_TF).reliability_F == pytest.approx(1, abs=0.003)


def test_independent_halves_are_not_reliable():
    """Each is normal around 0 with a standard deviation of .022: any of 50 is above .15, which is
    6.7 of these, in fewer than 1 of 1e9 runs."""
    reliability_F = Scale.fit(uniform(0), uniform(1)).reliability_F
    assert ((reliability_F >= 0) & (reliability_F < 0.15)).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_reliability_is_the_share_of_variance_common_to_both_halves(share):
    """The standard error is below .022·√2; .2 is more than 6 of these."""
    author_TF = math.sqrt(share) * uniform(0)
    first_TF, second_TF = (author_TF + math.sqrt(1 - share) * uniform(seed) for seed in (1, 2))
    assert Scale.fit(first_TF, second_TF).reliability_F == pytest.approx(share, abs=0.2)
    assert Scale.fit(first_TF, second_TF).reliability_F.mean() == pytest.approx(share, abs=0.03)


def test_opposite_halves_are_not_reliable():
    assert not Scale.fit(uniform(0), -uniform(0)).reliability_F.any()


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, math.sqrt(7)])
def test_features_that_are_constant_in_the_reference_do_not_count(constant):
    first_TF, second_TF = uniform(0), uniform(1)
    first_TF[:, 4] = second_TF[:, 4] = constant
    scale = Scale.fit(first_TF, second_TF)
    assert scale.reliability_F[4] == 0
    assert (scale.z(uniform(2))[:, 4] == 0).all()


def test_halves_of_one_author_agree_more_than_halves_of_two():
    texts = [write(f"{author}", f"{text} {author}") for text in "ab" for author in range(100)]
    first_TF, second_TF = features(texts[:100]), features(texts[100:])
    order = random.Random(0).sample(range(100), 100)
    same = Scale.fit(first_TF, second_TF).reliability_F.sum()
    assert same > 3 * Scale.fit(first_TF, second_TF[order]).reliability_F.sum()
