"""The tokenizer and the checkpoint of the stories model."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dftserve.stories.grammar import PROMPTS, generate
from dftserve.stories.model import VOCABULARY, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one short run, and the last one of an equal run."""
    parent = tmp_path_factory.mktemp("model")
    build({parent / "one": 1, parent / "two": 2})
    build({parent / "again": 2})
    return parent


@pytest.fixture(scope="module")
def tokenizer(folders):
    return AutoTokenizer.from_pretrained(folders / "two")


def test_tokenizer_and_configuration_have_the_same_vocabulary_size(folders, tokenizer):
    config = json.loads((folders / "two" / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"] == VOCABULARY


def test_stories_are_decoded_exactly(tokenizer):
    source = random.Random(0)
    for _ in range(100):
        text = generate(source).text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_generation_prompt_ends_where_the_answer_begins(tokenizer):
    messages = [{"role": "user", "content": next(iter(PROMPTS))}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Yes."}], tokenize=False
    )
    assert answered == prompt + "Yes." + tokenizer.eos_token


def test_training_changes_all_weights_and_is_deterministic(folders):
    one, two, again = (
        AutoModelForCausalLM.from_pretrained(folders / name).state_dict()
        for name in ("one", "two", "again")
    )
    changed = [not torch.equal(one[name], two[name]) for name in two]
    assert all(changed)
    # The learning rate depends on the length of the run, which is two for both.
    assert all(torch.equal(two[name], again[name]) for name in two)
