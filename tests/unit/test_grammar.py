"""A text is a story exactly if the grammar can write it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.stories.grammar import ANY_STORY, PROMPTS, generate, options, parse, valid

seeds = st.integers(0, 2**32 - 1)
prompts = st.sampled_from(list(PROMPTS))


@settings(max_examples=150, deadline=None)
@given(seeds, prompts)
def test_a_generated_story_is_parsed_back(seed, prompt):
    story = generate(random.Random(seed), prompt)
    assert parse(story.text) == story
    assert valid(prompt, story.text)
    assert story.text.startswith(story.opening)


@settings(max_examples=100, deadline=None)
@given(seeds, st.data())
def test_an_altered_text_is_refused_or_parsed_as_another_story(seed, data):
    """After dropping, doubling or swapping a word; a parsed story has the text it was read from."""
    story = generate(random.Random(seed))
    words = story.text.split(" ")
    index = data.draw(st.integers(0, len(words) - 2))
    altered = data.draw(
        st.sampled_from(
            [
                words[:index] + words[index + 1 :],
                words[: index + 1] + words[index:],
                [*words[:index], words[index + 1], words[index], *words[index + 2 :]],
            ]
        )
    )
    text = " ".join(altered)
    parsed = parse(text)
    assert parsed is None or parsed.text == text
    if len(altered) != len(words):
        assert parsed is None or parsed.choices != story.choices


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_a_foreign_word_is_refused(seed):
    source = random.Random(seed)
    words = generate(source).text.split(" ")
    words[source.randrange(len(words))] = "xylographically"
    assert parse(" ".join(words)) is None


@pytest.mark.parametrize("text", ["", " ", "Once upon a time", "\n", "a" * 10_000])
def test_other_texts_are_refused(text):
    assert parse(text) is None


def test_options_counts_the_choices_of_a_slot():
    """No slot has more distinct choices than options, and a slot of few options has all of them."""
    source = random.Random(0)
    seen: dict[str, set[str]] = {}
    for _ in range(3000):
        for slot, choice in generate(source).choices:
            seen.setdefault(slot, set()).add(choice)
    assert all(len(choices) <= options(slot) for slot, choices in seen.items())
    assert all(len(seen[slot]) == options(slot) for slot in seen if options(slot) < 9)


def test_2000_stories_are_all_different():
    source = random.Random(0)
    assert len({generate(source).text for _ in range(2000)}) == 2000


def test_a_prompt_constrains_the_answer():
    source = random.Random(0)
    for prompt, required in PROMPTS.items():
        free = [generate(source).text for _ in range(50)]
        assert all(valid(ANY_STORY, text) for text in free)
        if required:
            assert not all(valid(prompt, text) for text in free)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        generate(random.Random(0), "Sing me a song.")
