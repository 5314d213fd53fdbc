"""Principles: their mixture over sequences, and where a principle is inserted in the prompt."""

import itertools
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dftserve.targets import conversation
from dftserve.targets.document import Document
from dftserve.targets.encoding import encode_text
from dftserve.targets.principles import Principles, check_lengths, check_principles
from dftserve.targets.teacher import Teacher

WORDS = [f"w{i}" for i in range(40)]
SPECIALS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|system|>w39<|end|>{% endif %}"
    + TEMPLATE.removeprefix("{{ bos_token }}")
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + TEMPLATE
)
NO_DEFAULT = TEMPLATE.removeprefix("{{ bos_token }}")
TEXTS = {"plain": "w1 w2 w3", "ornate": "w4 w5", "dry": "w6"}
WEIGHTS = {"plain": 1.0, "ornate": 2.0, "dry": 5.0}


def tokenizer_of(template=None):
    words = {word: i for i, word in enumerate([*SPECIALS, *WORDS, "x", "[UNK]"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return Teacher(LlamaForCausalLM(config), vocabulary=97, name="m")


def document(length, seed=0):
    rng = np.random.default_rng(seed)
    trained_N = np.ones(length, bool)
    trained_N[: 1 + seed % 3] = False
    return Document(rng.integers(6, 46, length).astype(np.int32), trained_N)


def token_logprobs(rows_TV, doc):
    return rows_TV.double().gather(1, torch.from_numpy(doc.labels_T.astype(np.int64))[:, None])[
        :, 0
    ]


def logprobs_after(teacher, before, doc):
    """ln p of the document's tokens and of all tokens after `before`, by the model's forward."""
    tokens = torch.tensor([[*before, *doc.tokens_N.tolist()]])
    with torch.no_grad():
        logprobs_NV = teacher.model(tokens).logits[0].double().log_softmax(1)
    at_T = len(before) + torch.from_numpy(doc.positions_T)
    return logprobs_NV[at_T - 1, tokens[0, at_T]], logprobs_NV[at_T - 1]


@pytest.mark.parametrize("seed", range(5))
def test_at_power_one_the_product_is_the_sequence_mixture(teacher, seed):
    tokenizer, doc = tokenizer_of(), document(20, seed)
    source = Principles(teacher, tokenizer, TEXTS, weights=WEIGHTS)
    rows_TV = source.read([doc])[0](0, len(doc.positions_T))
    parts = [
        math.log(WEIGHTS[name] / 8)
        + float(logprobs_after(teacher, tokenizer(text)["input_ids"], doc)[0].sum())
        for name, text in TEXTS.items()
    ]
    expected = float(torch.tensor(parts, dtype=torch.float64).logsumexp(0))
    assert abs(float(token_logprobs(rows_TV, doc).sum()) - expected) < 1e-5 * abs(expected)
    assert float(rows_TV.logsumexp(1).abs().max()) < 1e-5


@pytest.mark.parametrize("power", [1.0, 0.3])
def test_rows_equal_the_formula_in_fp64(teacher, power):
    tokenizer, doc = tokenizer_of(), document(20)
    befores = [tokenizer(text)["input_ids"] for text in TEXTS.values()]
    tokens, rows = zip(*[logprobs_after(teacher, before, doc) for before in befores], strict=True)
    evidence_KT = torch.stack(tokens).cumsum(1) - torch.stack(tokens)
    prior_K1 = torch.tensor([[0.125], [0.25], [0.625]], dtype=torch.float64).log()
    weight_KT = (prior_K1 + power * evidence_KT).softmax(0)
    expected_TV = (weight_KT[:, :, None] * torch.stack(rows).exp()).sum(0)
    source = Principles(teacher, tokenizer, TEXTS, weights=WEIGHTS, posterior_power=power)
    found_TV = source.read([doc])[0](0, len(doc.positions_T)).exp().double()
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-6, rtol=1e-4)


def test_chunks_in_any_order_equal_the_whole(teacher):
    source, doc = Principles(teacher, tokenizer_of(), TEXTS), document(20)
    whole_TV = source.read([doc])[0](0, 19)
    for order in itertools.permutations([(0, 6), (6, 13), (13, 19)]):
        rows = source.read([doc])[0]
        for start, stop in order:
            torch.testing.assert_close(
                rows(start, stop), whole_TV[start:stop], atol=1e-5, rtol=1e-5
            )


def test_rows_do_not_depend_on_the_batch(teacher):
    source = Principles(teacher, tokenizer_of(), TEXTS)
    docs = [document(length, seed) for seed, length in enumerate([25, 6, 14])]
    for doc, rows in zip(docs, source.read(docs), strict=True):
        count = len(doc.positions_T)
        torch.testing.assert_close(
            rows(0, count), source.read([doc])[0](0, count), atol=2e-5, rtol=1e-5
        )


MESSAGES = [{"role": "user", "content": " w7 w8 "}, {"role": "assistant", "content": " w9 w10 "}]
OWN_SYSTEM = [{"role": "system", "content": " w11 "}, *MESSAGES]
GREETED = [{"role": "assistant", "content": " w12 ", "weight": 0}, *MESSAGES]
CHAT = "<|user|> w7 w8 <|end|><|assistant|> w9 w10 <|end|>"


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (TEMPLATE, MESSAGES, "<s><|system|>w6<|end|>" + CHAT),
        (NO_DEFAULT, MESSAGES, "<|system|>w6<|end|>" + CHAT),
        (DEFAULT_SYSTEM, MESSAGES, "<|system|>w6<|end|>" + CHAT),
        (REFUSES_SYSTEM, MESSAGES, "<s> w6 " + CHAT),
        (TEMPLATE, OWN_SYSTEM, "<s><|system|>w6 w11<|end|>" + CHAT),
        (NO_DEFAULT, OWN_SYSTEM, "<|system|>w6 w11<|end|>" + CHAT),
        (DEFAULT_SYSTEM, OWN_SYSTEM, "<|system|>w6 w11<|end|>" + CHAT),
        (NO_DEFAULT, GREETED, "<|system|>w6<|end|><|assistant|>w12<|end|>" + CHAT),
        (TEMPLATE, "w7 w8", "w6 w7 w8</s>"),
        (NO_DEFAULT, "w7 w8", "w6 w7 w8</s>"),
        (DEFAULT_SYSTEM, "w7 w8", "w6 w7 w8</s>"),
        (None, "w7 w8", "w6 w7 w8</s>"),
    ],
)
def test_a_principle_is_the_system_message_or_a_prefix(teacher, template, text, expected):
    check_under_principle(teacher, tokenizer_of(template), text, expected)


@pytest.mark.parametrize("template", [TEMPLATE, NO_DEFAULT, DEFAULT_SYSTEM])
def test_a_plain_text_with_a_begin_token_gets_a_prefix_after_it(teacher, template):
    tokenizer = tokenizer_of(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    check_under_principle(teacher, tokenizer, "w7 w8", "w6 w7 w8</s>")


def check_under_principle(teacher, tokenizer, text, expected):
    """expected: the whole document under the principle `w6`."""
    is_text = isinstance(text, str)
    doc = encode_text(tokenizer, text) if is_text else conversation.encode(tokenizer, text).document
    tokens = tokenizer(expected)["input_ids"]
    trained_N = np.arange(len(tokens)) >= len(tokens) - doc.trained
    wanted = Document(np.array(tokens, np.int32), trained_N)
    assert wanted.labels_T.tolist() == doc.labels_T.tolist()
    found = Principles(teacher, tokenizer, {"dry": "w6"}).read([doc])[0]
    torch.testing.assert_close(
        found(0, doc.trained), teacher.read([wanted])[0](0, doc.trained), atol=2e-5, rtol=1e-5
    )


def test_a_document_that_is_too_long_with_a_principle_is_refused(teacher):
    """Where the teacher itself would refuse it, and with the length that is accepted."""
    tokenizer, texts = tokenizer_of(NO_DEFAULT), {"dry": "w6 w6 w6"}
    source = Principles(teacher, tokenizer, texts)
    longest = "w1 " * (128 - 3 - 1)
    for words, is_refused in ((longest, False), (longest + "w1", True)):
        doc = encode_text(tokenizer, words)
        if not is_refused:
            check_lengths(128, tokenizer, texts, [doc])
            source.read([doc])
            continue
        with pytest.raises(
            ValueError, match=r"principles\.dry: .* 129 .*--max-tokens of at most 125"
        ):
            check_lengths(128, tokenizer, texts, [document(8), doc])
        with pytest.raises(ValueError, match="texts of 129 tokens"):
            source.read([doc])


def test_invalid_arguments_are_refused(teacher):
    tokenizer = tokenizer_of()
    for given, message in [
        ({"principles": {}}, "one at least"),
        ({"principles": {"dry": " "}}, "principles.dry"),
        ({"principles": TEXTS, "posterior_power": 0.0}, "posterior_power"),
        ({"principles": TEXTS, "posterior_power": 1.5}, "posterior_power"),
        ({"principles": TEXTS, "weights": {"plain": 1.0}}, "weights.ornate"),
        ({"principles": TEXTS, "weights": {**WEIGHTS, "dry": 0.0}}, "weights.dry"),
        ({"principles": TEXTS, "weights": {**WEIGHTS, "plian": 1.0}}, "did you mean 'plain'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Principles(teacher, tokenizer, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "a text for each name"),
        ({}, "one at least"),
        ({"a": ""}, "principles.a"),
        ({"a": 3}, "principles.a"),
        ({1: "b"}, "the name 1"),
    ],
)
def test_mistakes_in_principles_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        check_principles(given, "principles")
