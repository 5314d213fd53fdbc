"""The stories' tokenizer and checkpoint: ordinary ones, of the size they claim."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dftserve.stories.grammar import PROMPTS, generate
from dftserve.stories.model import VOCABULARY, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two stages of one short run, and the run made again."""
    place = tmp_path_factory.mktemp("model")
    build({place / "one": 1, place / "two": 2})
    build({place / "again": 2})
    return place


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders / "two")


def test_the_vocabulary_is_what_it_says(folders, tokenizer):
    config = json.loads((folders / "two" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == VOCABULARY


def test_stories_come_back_exactly(tokenizer):
    source = random.Random(0)
    for _ in range(100):
        text = generate(source).text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_ends_where_the_answer_begins(tokenizer):
    messages = [{"role": "user", "content": next(iter(PROMPTS))}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Yes."}], tokenize=False
    )
    assert answered == asked + "Yes." + tokenizer.eos_token


def test_training_moves_and_is_deterministic(folders):
    one, two, again = (
        AutoModelForCausalLM.from_pretrained(folders / name).state_dict()
        for name in ("one", "two", "again")
    )
    moved = [not torch.equal(one[name], two[name]) for name in two]
    assert all(moved)
    # The learning rate follows the run's length, which is two for both.
    assert all(torch.equal(two[name], again[name]) for name in two)
