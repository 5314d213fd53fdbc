"""bench/headline.py and its models: training and measurement do not overlap, the mean of weights,
and kept likelihoods."""

import importlib

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tiny_model import save_model, save_tokenizer

headline = importlib.import_module("headline")
models = importlib.import_module("headline_models")


def test_stories_with_equal_beginnings_are_in_one_part(data):
    beginnings = {
        part: {" ".join(s.text.split()[:8]).lower() for s in found}
        for part, found in models.stories().items()
    }
    for part, others in (("train", "heldout"), ("train", "measure"), ("heldout", "measure")):
        assert len(beginnings[part]) > 30
        assert beginnings[part].isdisjoint(beginnings[others])


def test_every_story_continues_after_its_prompt(data):
    for part in models.SHARES:
        assert all(text.strip() for _, text in models.human_stories(part))


def test_the_start_is_not_trained_on_the_measured_prompts(data):
    measured = models.prompt_set(models.STORIES, data)
    trained = [prompt for prompt, _ in models.model_answers(data)]
    assert len(trained) == 300 - len(measured.prompts)
    assert set(trained).isdisjoint(measured.prompts)


def test_a_text_is_cut_between_words_and_keeps_its_lines():
    text = "\n\nOne two\n\nthree   four five\n"
    assert models.words_of(text, 0, 3) == "One two\n\nthree"
    assert models.words_of(text, 2, None) == "three   four five"


@pytest.fixture
def tokenizer(tmp_path) -> PreTrainedTokenizerFast:
    save_tokenizer(tmp_path, 64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    return tokenizer


def test_the_answer_is_trained_on_without_its_end(tokenizer):
    (document,) = models.documents(iter([("w10 w11", "w20 w21")]), tokenizer)
    assert document.tokens_N.tolist() == [1, 10, 11, 2, 3, 20, 21]
    assert document.labels_T.tolist() == [20, 21]
    assert document.group == "w10 w11"


def test_likelihoods_are_computed_once_for_the_same_texts(tmp_path, tokenizer, monkeypatch):
    save_model(tmp_path, 64)
    tokenizer.save_pretrained(tmp_path)
    model = headline.Model(tmp_path, tmp_path / "answers", {}, headline.START)
    texts = ["w10 w11 w12", "w20 w21"]
    found = headline.nats_of(model, texts)
    assert [len(nats_T) for nats_T in found] == [3, 2]
    for nats_T, expected_T in zip(found, headline.token_nats(tmp_path, texts), strict=True):
        np.testing.assert_array_equal(nats_T, expected_T)
    other = headline.nats_of(model, texts[:1])
    monkeypatch.delattr(headline, "token_nats")
    for nats_T, again_T in zip(found, headline.nats_of(model, texts), strict=True):
        np.testing.assert_array_equal(nats_T, again_T)
    assert len(other) == 1
