"""The trainer and the server compute the same log-probabilities from a tuned checkpoint."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dftserve.lm import LanguageModel
from dftserve.stories.grammar import PROMPTS
from dftserve.targets.encoding import encode_text
from dftserve.targets.served import ServedTeacher
from dftserve.targets.teacher import Teacher
from dftserve.train.divergences import SFT, TargetRows
from dftserve.train.head import head_loss
from tests.client import post
from tests.conftest import KEY

TEXT = "Once upon a time, in the little town of Ravenham, there lived a painter's daughter."
TOLERANCE = 2e-4
"""Nats per token, both in float32: they sum over hidden units in other orders. In bfloat16, with 8
bits of mantissa and logits up to some 20, rounding alone would leave .1."""


@pytest.mark.parametrize("engine", ["v1", "v2"], indirect=True)
def test_the_trainers_log_probabilities_are_the_servers(engine, record_values):
    tokenizer = AutoTokenizer.from_pretrained(engine.model_folder)
    model = AutoModelForCausalLM.from_pretrained(engine.model_folder)
    worst = 0.0
    for prompt in PROMPTS:
        tokens = tokenizer(f"<|user|>{prompt}<|end|><|assistant|>{TEXT}")["input_ids"]
        theirs_N = server_log_p(engine, tokens)
        ours_N = trainer_log_p(model, tokens)
        worst = max(worst, float(np.abs(ours_N - theirs_N).max()))
    record_values(worst_nats=worst, texts=len(PROMPTS))
    assert worst < TOLERANCE


def server_log_p(engine, tokens: list[int]) -> np.ndarray:
    """ln p of every token but the first, from the server's own scoring of a prompt."""
    body = {"model": "demo", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    answer = post(engine, "/v1/completions", body).json()
    entries = answer["choices"][0]["prompt_logprobs"]
    return np.array(
        [entry[str(token)]["logprob"] for token, entry in zip(tokens[1:], entries[1:], strict=True)]
    )


@torch.no_grad()
def trainer_log_p(model, tokens: list[int]) -> np.ndarray:
    """The same from the loss of the trainer's head, −ln p, one position at a time."""
    language_model = LanguageModel(model, "the checkpoint")
    hidden_ND = language_model.states(input_ids=torch.tensor([tokens])).hidden_BND[0, :-1]
    target = TargetRows.none(np.array(tokens[1:]))
    head = language_model.head
    return -np.array(
        [
            float(head_loss(head, hidden_ND[n : n + 1], target[n : n + 1], SFT()).loss)
            for n in range(len(hidden_ND))
        ]
    )


@pytest.mark.parametrize("engine", ["v1", "v2"], indirect=True)
def test_a_served_teachers_targets_equal_the_local_models(engine, monkeypatch):
    """Top k, mass of the tail and the text's own token, from prompt logprobs."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    tokenizer = AutoTokenizer.from_pretrained(engine.model_folder)
    document = encode_text(tokenizer, TEXT)
    size = len(tokenizer)
    served = ServedTeacher(engine.url, "demo", vocabulary=size, key_variable="TEACHER_KEY")
    local = Teacher.load(str(engine.model_folder), vocabulary=size)
    (theirs,) = served.targets([document], k=6, draws=0, seeds=[0])
    (ours,) = local.targets([document], k=6, draws=0, seeds=[0])
    for name in ("top_logprobs_TK", "token_logprob_T"):
        worst = np.abs(getattr(theirs, name) - getattr(ours, name)).max()
        assert worst < TOLERANCE, name
    tails = np.exp(theirs.tail_logprob_T) - np.exp(ours.tail_logprob_T)
    assert np.abs(tails).max() < 6 * TOLERANCE
