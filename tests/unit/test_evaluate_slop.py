"""Phrases typical of models: matched like a regular expression, and more frequent in model text."""

import json
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.evaluate.metrics import slop
from dftserve.evaluate.metrics.slop import Phrases, Repeated
from dftserve.evaluate.text.tokenize import normalise, tokens, words
from tests.cpu_time import least_seconds

SEEDS = range(100)
LETTERS = "abcd"
some_texts = st.lists(st.text("ab ,.", max_size=40), min_size=1, max_size=5)


def random_phrases(chosen: random.Random) -> list[str]:
    return [" ".join(chosen.choices(LETTERS, k=chosen.randint(1, 4))) for _ in range(6)]


def random_text(chosen: random.Random, size: int = 40) -> str:
    return " ".join(chosen.choices([*LETTERS, *LETTERS, "a,", "B.", "c —"], k=size))


# Finding


def test_phrases_match_leftmost_longest():
    for seed in SEEDS:
        chosen = random.Random(seed)
        lines, text = random_phrases(chosen), random_text(chosen)
        ordered = "|".join(re.escape(line) for line in sorted(lines, key=len, reverse=True))
        wanted = re.findall(rf"(?<!\S)(?:{ordered})(?!\S)", " ".join(tokens(normalise(text))))
        assert list(Phrases.of(lines).found(text)) == wanted


@pytest.mark.parametrize(
    ("line", "text", "times"),
    [
        ("barely above a whisper", "“Barely above a\nwhisper,” he said.", 1),
        ("it's worth noting", "It’s worth noting IT'S WORTH NOTING", 2),
        ("delve", "delves delve-ish delved", 0),
        ("a testament to", "a testament, to", 0),
        ("moreover,", "Moreover, it rains. Moreover it pours.", 1),
        ("a b", "a b a b", 2),
        ("a a", "a a a", 1),
    ],
)
def test_a_phrase_matches_whole_normalised_tokens(line, text, times):
    assert len(list(Phrases.of([line]).found(normalise(text)))) == times


def test_each_of_our_phrases_matches_itself():
    ours = slop.read_phrases()
    lines = [
        line
        for line in slop.OURS.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert len(ours) == len(lines) >= 150, "no duplicates"
    for line in lines:
        assert list(ours.found(line)) == [" ".join(tokens(normalise(line)))]


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "# ours\nDeep  breath # often\n\nwhisper\r\n"),
        ("a.json", '[["deep breath"], ["whisper"]]'),
        ("a.json", '[["deep breath", 12], ["whisper", 0.5]]'),
        ("a.json", '["deep breath", "whisper", "Whisper"]'),
    ],
)
def test_phrase_files_are_read_in_each_format(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    assert slop.read_phrases(tmp_path / name) == Phrases.of(["deep breath", "whisper"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"# nothing\n", "none"),
        ("a.txt", b"--\n", "'--'"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.json", b"[", "JSON"),
        ("a.json", b'{"a": 1}', "dict"),
        ("a.json", b"[]", "none"),
        ("a.json", b'[["a"], [1]]', r"\[1\]: got \[1\]"),
        ("a.json", b'[["a", "b"]]', r"\[0\]"),
        ("a.json", b'[[["a"]]]', r"\[0\]"),
        ("a.json", b'[""]', "''"),
    ],
)
def test_invalid_phrase_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        slop.read_phrases(tmp_path / name)


# Rates


def test_rate_is_matches_per_thousand_words():
    for seed in SEEDS:
        chosen = random.Random(seed)
        phrases = Phrases.of(random_phrases(chosen))
        texts = [random_text(chosen, chosen.randint(1, 30)) for _ in range(5)]
        found = sum(len(list(phrases.found(text))) for text in texts)
        counted = sum(len(words(normalise(text))) for text in texts)
        rate = slop.rate(texts, phrases)
        assert rate.value == pytest.approx(1000 * found / counted)
        assert rate.low <= rate.value <= rate.high
        assert slop.rate(texts[::-1] * 3, phrases).value == pytest.approx(rate.value)


@given(some_texts)
def test_rates_are_bounded_and_need_words(texts):
    phrases = Phrases.of(["a b", "b"])
    if not any(words(text) for text in texts):
        for rate in (lambda: slop.rate(texts, phrases), lambda: slop.contrast_rate(texts)):
            with pytest.raises(ValueError, match="no words"):
                rate()
        return
    assert 0 <= slop.rate(texts, phrases).value <= 1000
    assert slop.contrast_rate(texts).value == 0


@pytest.mark.parametrize(
    "text",
    [
        "It was not the wind, but the silence.",
        "He spoke not with anger, but with pity.",
        "She wasn't afraid, but angry.",
        "This is not just a house, it is a home.",
        "It isn’t merely a tool — it is a friend.",
        "It's not a bug; it's a feature.",
        "It wasn't fear. It was hunger.",
        "They were not enemies — they were brothers.",
        "It was less a question, more a threat.",
        "Less about the money and more about the man.",
        "No doubts, no fears, just the road.",
        "Not a sound. Not a breath. Only the dark.",
    ],
)
def test_contrasts_are_counted(text):
    found = slop.contrast_rate([normalise(text), "The rain fell all day long."])
    assert found.value == pytest.approx(1000 / (len(words(normalise(text))) + 6))


@pytest.mark.parametrize(
    "text",
    [
        "I did not go, but he did.",
        "He is not here. The rain falls.",
        "I knew nothing, but the house was warm.",
        "It's not my car. It's not yours either.",
        "There is less of it now than there was.",
        "No, I have no time for that.",
        "Not long ago there was a king. He had one son, but no daughter.",
    ],
)
def test_similar_sentences_are_not_counted_as_contrasts(text):
    assert slop.contrast_rate([text]).value == 0


def test_contrasts_are_searched_in_linear_time():
    """Many beginnings without an end: a pattern that restarts at each would take minutes."""
    text = "not no it's not less just " * 4000
    assert slop.contrast_rate([text]).value == 0
    assert least_seconds(lambda: slop.contrast_rate([text])) < 5


@given(
    st.floats(0, 100, allow_subnormal=False),
    st.floats(0, 100, allow_subnormal=False),
    st.floats(0, 1),
)
def test_cut_is_the_share_of_the_distance_from_base_to_human(base, human, share):
    if abs(base - human) < 1e-3:
        return
    assert slop.cut(base, base, human) == 0
    assert slop.cut(base, human, human) == 1
    tuned = base + share * (human - base)
    assert slop.cut(base, tuned, human) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(("base", "human"), [(3, 3), (0, 0), (3, 3 + 1e-12), (float("nan"), 1)])
def test_cut_needs_a_difference_between_base_and_human(base, human):
    with pytest.raises(ValueError, match="nothing to cut"):
        slop.cut(base, 1, human)


# Repeated phrases


@pytest.mark.parametrize("sizes", [(3, 4, 5, 6, 7, 8), (2, 4, 5), (1, 3), (2,)])
def test_most_repeated_matches_a_search_of_all_runs(sizes):
    for seed in SEEDS:
        chosen = random.Random(seed)
        texts = [random_text(chosen, 25) for _ in range(4)]
        texts.append(texts[0][: chosen.randint(0, 60)])
        having: dict[str, set[int]] = {}
        for i, text in enumerate(texts):
            for run in re.split(r"[^\w ]", normalise(text).lower()):
                run_words = run.split()
                for size in sizes:
                    for at in range(len(run_words) - size + 1):
                        having.setdefault(" ".join(run_words[at : at + size]), set()).add(i)
        shared = {phrase: len(places) for phrase, places in having.items() if len(places) > 1}
        maximal = {
            phrase: count
            for phrase, count in shared.items()
            if not any(
                other != phrase and f" {phrase} " in f" {other} " and count == shared[other]
                for other in shared
            )
        }
        wanted = sorted(maximal.items(), key=lambda p: (-p[1], -len(p[0].split()), p[0].split()))
        found = slop.most_repeated(texts, sizes, top=10**6)
        assert found == [Repeated(*each) for each in wanted]
        assert slop.most_repeated(texts, sizes, top=3) == found[:3]


@given(some_texts, st.randoms(use_true_random=False))
def test_most_repeated_ignores_order(texts, rng):
    mixed = list(texts)
    rng.shuffle(mixed)
    assert slop.most_repeated(mixed) == slop.most_repeated(texts)


def test_most_repeated_of_copies_is_the_text():
    assert slop.most_repeated(["One two three four."] * 3) == [Repeated("one two three four", 3)]
    assert slop.most_repeated(["One two three four."]) == []
    with pytest.raises(ValueError, match="sizes"):
        slop.most_repeated(["a"], ())
    with pytest.raises(ValueError, match="sizes"):
        slop.most_repeated(["a"], (0, 2))


# Real text


def test_model_text_has_higher_rates_than_human_text(data):
    def model(name: str) -> list[str]:
        (run,) = json.loads((data / "human_ai" / name).read_text()).values()
        return [row["output"] for row in run["samples"]][:150]

    stories = json.loads((data / "human_ai" / "fdg_writing_gpt-3.5-turbo.json").read_text())
    theirs = slop.read_phrases(data / "slop" / "slopscore_slop_list.json")
    for phrases in (slop.read_phrases(), theirs):
        human = slop.rate(stories["original"], phrases)
        for texts in (
            model("slopscore_gemma-3-27b-it.json"),
            model("slopscore_mistral-nemo.json"),
            stories["sampled"],
        ):
            assert slop.rate(texts, phrases).low > 2 * human.high
    contrast = slop.contrast_rate(model("slopscore_gemma-3-27b-it.json"))
    assert contrast.low > slop.contrast_rate(stories["original"]).high


@pytest.mark.parametrize(
    "name",
    [
        "slopscore_slop_list.json",
        "slopscore_slop_list_bigrams.json",
        "slopscore_slop_list_trigrams.json",
        "slopforensics_slop_list.json",
        "slopforensics_slop_list_trigrams.json",
    ],
)
def test_third_party_lists_are_read(data, name):
    given = json.loads((data / "slop" / name).read_text())
    assert 0.9 * len(given) < len(slop.read_phrases(data / "slop" / name)) <= len(given)


def test_answers_to_one_prompt_are_one_unit():
    """The same answer eight times has the interval of one."""
    texts = [f"It is a testament to {'many ' * n}things, not one, but two." for n in range(9)]
    groups = [f"prompt {number}" for number in range(9) for _ in range(8)]
    eight = [text for text in texts for _ in range(8)]
    phrases = Phrases.of(["a testament to"])
    for one, of_eight in (
        (slop.rate(texts, phrases), slop.rate(eight, phrases, groups)),
        (slop.contrast_rate(texts), slop.contrast_rate(eight, groups)),
    ):
        wanted = pytest.approx((one.value, one.low, one.high))
        assert (of_eight.value, of_eight.low, of_eight.high) == wanted


def test_a_rate_without_any_phrase_can_be_above_0():
    """Up to the rate at which no phrase is found with a probability of 2.5 %."""
    texts = ["one two three four"] * 250
    for found in (slop.rate(texts, slop.Phrases.of(["tapestry"])), slop.contrast_rate(texts)):
        assert (found.value, found.low) == (0, 0)
        assert math.exp(-found.high) == pytest.approx(0.025)
