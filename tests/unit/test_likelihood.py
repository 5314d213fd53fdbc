"""Likelihood against a plain fp64 loop that reads the text again for every token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dftserve.evaluate.metrics.likelihood import bits_of, surprisal_of, token_nats
from dftserve.targets.teacher import Teacher
from tests.training import VOCABULARY, WORDS, save_model, small_model, tokenizer

START = 1
"""The end token: the tests' tokenizer has no begin token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def text(count, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count).tolist())


def reference(network, text, window, stride):
    """−ln p of each token, scored by the first window that contains it."""
    tokens = [START] + [2 + WORDS.index(word) for word in text.split()]
    nats = []
    for position in range(1, len(tokens)):
        moved = max(0, math.ceil((position + 1 - window) / stride))
        with torch.no_grad():
            logits_NV = network(torch.tensor([tokens[moved * stride : position]])).logits[0]
        nats.append(-float(logits_NV[-1].log_softmax(0)[tokens[position]]))
    return nats


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize(("window", "stride"), [(16, 7), (9, 8), (2, 1), (128, 64)])
def test_every_token_is_scored_as_by_the_plain_loop(tmp_path, family, window, stride):
    """Text lengths around the window's, mixed in batches."""
    folder = save_model(tmp_path / family, family, seed=3)
    texts = [text(count, seed=count) for count in (1, 30, 15, 16, 17, 2, 8)]
    nats = token_nats(folder, texts, window=window, stride=stride, batch_size=3)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    expected = [reference(network, each, window, stride) for each in texts]
    for nats_T, expected_T in zip(nats, expected, strict=True):
        np.testing.assert_allclose(nats_T, expected_T, atol=2e-5)
    bits = sum(map(sum, expected)) / math.log(2)
    size = sum(len(each.encode()) for each in texts)
    assert bits_of(texts, nats).value == pytest.approx(bits / size, abs=1e-5)
    flat = np.concatenate(expected)
    surprisal = surprisal_of(nats)
    assert surprisal.mean.value == pytest.approx(flat.mean(), abs=1e-5)
    assert surprisal.sd.value == pytest.approx(flat.std(), abs=1e-5)
    assert surprisal.tokens == len(flat)


def test_a_uniform_model_needs_log2_V_bits_a_token(tmp_path):
    model = small_model("gpt2", tied=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    texts = [text(40), text(7, seed=1), "w1 ünknown w3"]
    nats = token_nats(tmp_path, texts, window=16, stride=5)
    bits = bits_of(texts, nats)
    size = sum(len(each.encode()) for each in texts)
    assert bits.value == pytest.approx(50 * math.log2(VOCABULARY) / size, rel=1e-6)
    surprisal = surprisal_of(nats)
    assert surprisal.mean.value == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert surprisal.sd.value == pytest.approx(0, abs=1e-6)
    assert surprisal.mean.high - surprisal.mean.low < 1e-5


cases = st.lists(st.integers(1, 30), min_size=1, max_size=6)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases, st.integers(31, 128), st.integers(1, 30), st.integers(1, 7), st.randoms())
def test_window_stride_batch_and_order_do_not_matter_for_short_texts(
    model, lengths, window, stride, batch_size, random
):
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    expected = bits_of(texts, token_nats(model, texts, window=128, stride=64, batch_size=1))
    shuffled = list(texts)
    random.shuffle(shuffled)
    nats = token_nats(model, shuffled, window=window, stride=stride, batch_size=batch_size)
    bits = bits_of(shuffled, nats)
    assert bits.value == pytest.approx(expected.value, rel=1e-5)
    if len(texts) > 1:
        assert bits.low == pytest.approx(expected.low, rel=1e-5)
        assert bits.high == pytest.approx(expected.high, rel=1e-5)


def test_the_interval_contains_the_ratio_and_one_text_has_none(model):
    texts = [text(length, seed=length) for length in range(2, 22)]
    nats = token_nats(model, texts, window=64, stride=32)
    bits = bits_of(texts, nats)
    assert bits.low < bits.value < bits.high
    assert bits_of(texts[:1], nats[:1]).low is None


def test_a_smaller_stride_gives_more_context(model):
    """The same token has another score after 15 tokens than after 1."""
    one, other = (
        token_nats(model, [text(40)], window=16, stride=stride, batch_size=4)[0]
        for stride in (1, 15)
    )
    np.testing.assert_allclose(one[:15], other[:15], atol=1e-5)
    assert np.abs(one[15:] - other[15:]).max() > 1e-3


def test_the_begin_token_comes_first_if_there_is_one(tmp_path):
    save_model(tmp_path, seed=5)
    with_begin = tokenizer()
    with_begin.add_special_tokens({"bos_token": "w7"})
    with_begin.save_pretrained(tmp_path)
    nats = token_nats(tmp_path, ["w3 w4"], window=8, stride=4, batch_size=1)[0]
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs_NV = network(torch.tensor([[9, 5, 6]])).logits[0].log_softmax(1)
    expected = [-float(logprobs_NV[0, 5]), -float(logprobs_NV[1, 6])]
    np.testing.assert_allclose(nats, expected, atol=1e-5)


def test_invalid_arguments_are_refused(model, tmp_path):
    given = {"window": 16, "stride": 8}
    with pytest.raises(ValueError, match="texts: got none"):
        token_nats(model, [], **given)
    with pytest.raises(ValueError, match=r"texts\[1\]: got ' ', which has no token"):
        token_nats(model, ["w1", " "], **given)
    for window, stride in ((16, 16), (16, 0), (1, 1)):
        with pytest.raises(ValueError, match=f"got {window} and {stride}"):
            token_nats(model, ["w1"], window=window, stride=stride)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        token_nats(model, ["w1"], **given, batch_size=0)
    with pytest.raises(ValueError, match=r"window: got 256; .* up to 128"):
        token_nats(model, ["w1"], window=256, stride=8)
    with pytest.raises(ValueError, match="no such folder"):
        token_nats(tmp_path / "nothing", ["w1"], **given)
    endless = tokenizer()
    endless.eos_token = None
    small_model().save_pretrained(tmp_path)
    endless.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a begin nor an end token"):
        token_nats(tmp_path, ["w1"], **given)


def test_weights_that_could_run_code_are_refused(model, tmp_path):
    """A pickle is not accepted as weights."""
    tokenizer().save_pretrained(tmp_path)
    network = small_model()
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        token_nats(tmp_path, ["w1"], window=16, stride=8)


class OnAnotherDevice(torch.Tensor):
    """Like a tensor on a GPU: it must be copied to the CPU before it is read."""

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def cpu(self, **_):
        return self.as_subclass(torch.Tensor)


def test_a_model_on_another_device_is_read(model, monkeypatch):
    expected = token_nats(model, [text(30)], window=16, stride=5)[0]
    logprobs = Teacher.logprobs
    monkeypatch.setattr(
        Teacher, "logprobs", lambda *given: logprobs(*given).as_subclass(OnAnotherDevice)
    )
    np.testing.assert_array_equal(token_nats(model, [text(30)], window=16, stride=5)[0], expected)


def test_answers_to_one_prompt_are_one_unit():
    """The same answer eight times adds no information."""
    rng = np.random.default_rng(0)
    texts = [text(count, seed=count) for count in range(5, 17)]
    nats = [rng.exponential(size=count) for count in range(5, 17)]
    prompts = [f"prompt {number}" for number in range(12) for _ in range(8)]
    eight = [each for each in nats for _ in range(8)]
    one, of_eight = surprisal_of(nats), surprisal_of(eight, prompts)
    assert ends(of_eight.mean) == pytest.approx(ends(one.mean))
    assert ends(of_eight.sd) == pytest.approx(ends(one.sd))
    bits = bits_of([each for each in texts for _ in range(8)], eight, prompts)
    assert ends(bits) == pytest.approx(ends(bits_of(texts, nats)))


def ends(estimate):
    return estimate.low, estimate.value, estimate.high
