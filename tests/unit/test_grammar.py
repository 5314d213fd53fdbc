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
def test_what_is_written_is_read_back(seed, prompt):
    story = generate(random.Random(seed), prompt)
    assert parse(story.text) == story
    assert valid(prompt, story.text)
    assert story.text.startswith(story.opening)


@settings(max_examples=100, deadline=None)
@given(seeds, st.data())
def test_an_altered_text_is_refused_or_another_whole_story(seed, data):
    """Dropping, doubling or swapping a word: what parses must be what its own choices write."""
    story = generate(random.Random(seed))
    words = story.text.split(" ")
    place = data.draw(st.integers(0, len(words) - 2))
    altered = data.draw(
        st.sampled_from(
            [
                words[:place] + words[place + 1 :],
                words[: place + 1] + words[place:],
                [*words[:place], words[place + 1], words[place], *words[place + 2 :]],
            ]
        )
    )
    text = " ".join(altered)
    read = parse(text)
    assert read is None or read.text == text
    if len(altered) != len(words):
        assert read is None or read.choices != story.choices


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_a_foreign_word_is_refused(seed):
    source = random.Random(seed)
    words = generate(source).text.split(" ")
    words[source.randrange(len(words))] = "xylographically"
    assert parse(" ".join(words)) is None


@pytest.mark.parametrize("text", ["", " ", "Once upon a time", "\n", "a" * 10_000])
def test_what_is_no_story_is_refused(text):
    assert parse(text) is None


def test_the_number_of_options_is_honest():
    """Every choice is one of its slot's options: no more of them are ever seen than there are."""
    source = random.Random(0)
    seen: dict[str, set[str]] = {}
    for _ in range(3000):
        for slot, choice in generate(source).choices:
            seen.setdefault(slot, set()).add(choice)
    assert all(len(choices) <= options(slot) for slot, choices in seen.items())
    assert all(len(seen[slot]) == options(slot) for slot in seen if options(slot) < 9)


def test_stories_are_many():
    source = random.Random(0)
    assert len({generate(source).text for _ in range(2000)}) == 2000


def test_a_prompt_constrains_the_answer():
    source = random.Random(0)
    for prompt, asked in PROMPTS.items():
        free = [generate(source).text for _ in range(50)]
        assert all(valid(ANY_STORY, text) for text in free)
        if asked:
            assert not all(valid(prompt, text) for text in free)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt"):
        generate(random.Random(0), "Sing me a song.")
