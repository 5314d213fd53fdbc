"""Accuracy scores depend on the sampler as the law predicts.

A rigged model answers every prompt with one letter and ends: A with probability .38, eleven others
with .05 each, ten unlikely ones, or nothing. The fp64 reference gives the probabilities for each
level, and the measured scores must be binomial around them.
"""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dftserve.evaluate.accuracy import lm_eval
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.run import Job, run
from dftserve.stories.model import CHAT_TEMPLATE, END, PAD, SPECIALS, save
from tests.client import metric
from tests.conftest import KEY, engine_running
from tests.reference import reference

CHANCES = {"A": 0.38, **dict.fromkeys("BCDEFGHIJKL", 0.05), **dict.fromkeys("MNOPQRSTUV", 0.003)}
END_CHANCE = 0.04
STOPS = frozenset([SPECIALS.index(END)])
NEVER = -60.0
"""A logit: 1e-26."""
SAMPLED = 300
"""Answers at each level. The score at level 1 is 4.9 of its standard deviations away from where a
test with ALARM would still accept it as level 0's."""
ALARM = 1e-7
"""False-alarm probability of one binomial check; no test here makes more than ten."""


@pytest.fixture(scope="module")
def rigged(tmp_path_factory):
    parent = tmp_path_factory.mktemp("rigged")
    folder = parent / "model"
    save(folder, rigged_model(), byte_tokenizer())
    with engine_running("v1_rigged", folder, parent, "--max-model-len=2048") as engine:
        yield engine


def rigged_model() -> LlamaForCausalLM:
    """A bigram model: its one layer adds nothing, so the last token alone gives the logits."""
    width, half = 64, 32
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(END),
        pad_token_id=SPECIALS.index(PAD),
    )
    model = LlamaForCausalLM(config)
    letters = [vocabulary()[letter] for letter in CHANCES]
    after_letter = torch.full((config.vocab_size,), NEVER)
    after_letter[SPECIALS.index(END)] = 0.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, :half] = 1.0
        embedding[letters] = 1.0 - embedding[letters]
        # The norm turns the ones of either half into √2.
        head[:, :half] = torch.tensor(first_logits())[:, None] / (half * math.sqrt(2))
        head[:, half:] = after_letter[:, None] / (half * math.sqrt(2))
    return model


def vocabulary() -> dict[str, int]:
    """The special tokens and the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: number for number, token in enumerate([*SPECIALS, *alphabet])}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[]))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def first_logits() -> np.ndarray:
    logits_V = np.full(len(vocabulary()), NEVER)
    for letter, chance in CHANCES.items():
        logits_V[vocabulary()[letter]] = math.log(chance)
    logits_V[SPECIALS.index(END)] = math.log(END_CHANCE)
    return logits_V


def chance_of(letter: str, level: float) -> float:
    """Probability of the answer by the law; at level 0 by the plain softmax."""
    if level == 0:
        return CHANCES[letter]
    law = reference(first_logits(), temperature=1.0, level=level, stop_ids=STOPS)
    assert law.margin > 0.01, "a token is so near the guard's threshold that rounding decides"
    return math.exp(law.log_p_V[vocabulary()[letter]])


def test_the_expected_chances_equal_a_computation_by_hand():
    """CHANCES is a distribution, and heating A and its eleven rivals leaves A a sixth."""
    assert sum(CHANCES.values()) + END_CHANCE == pytest.approx(1)
    # At level 1 the guard keeps p ≥ .02·.38: A, eleven rivals, the end.
    kept = np.array([0.38] + [0.05] * 11 + [END_CHANCE])
    p = kept / kept.sum()
    # The end is always kept, and counts as a plausible token in the entropy.
    entropy = -(p * np.log(p)).sum()
    heated = p[:-1] ** math.exp(-2 * (entropy / (entropy + 1)) ** 2)
    by_hand = heated[0] / heated.sum() * (1 - p[-1])
    assert chance_of("A", 1.0) == pytest.approx(by_hand, abs=1e-9)
    assert by_hand < 0.2


def check(right: int, answers: int, letter: str, level: float) -> None:
    chance = chance_of(letter, level)
    assert stats.binomtest(right, answers, chance).pvalue > ALARM, (letter, level, right, chance)


def test_humaneval_sees_diversity(rigged, tmp_path, record_values):
    if (missing := sandbox.available()) is not None:
        pytest.skip(missing)
    problem = {
        "prompt": 'A = 1\n\n\ndef f():\n    """Only A is a name that is known."""\n    return ',
        "entry_point": "f",
        "canonical_solution": "A\n",
        # An empty answer raises no error, so the test checks for the name in the body.
        "test": "def check(candidate):\n    assert 'A' in candidate.__code__.co_names\n",
    }
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        for number in range(10):
            file.write(json.dumps(problem | {"task_id": f"T/{number}"}) + "\n")
    report = measured(rigged, tmp_path, "humaneval", samples=SAMPLED // 10)
    assert metric(rigged, "dft:faults_total") == 0, "260 tokens, in rows that vLLM pads to 320"
    right = {
        each["diversity"]: round(each["accuracy"]["value"] * SAMPLED) for each in levels(report)
    }
    for level in (0.0, 1.0):
        check(right[level], SAMPLED, "A", level)
    assert stats.binomtest(right[1.0], SAMPLED, chance_of("A", 0.0)).pvalue < ALARM
    assert levels(report)[1]["difference"]["high"] < 0
    record_values(
        right=right, asked=SAMPLED, expected={level: chance_of("A", level) for level in (0, 1)}
    )


@pytest.mark.long
def test_lm_eval_sees_diversity(rigged, tmp_path, record_values):
    """Half of the answers are A and half B: the score of A falls, and that of B rises."""
    try:
        lm_eval.executable()
    except RuntimeError as error:
        pytest.skip(str(error))
    row = {"subject": "letters", "question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 0}
    write_lines(tmp_path / "mmlu_dev.jsonl", [row] * 5)
    write_lines(tmp_path / "mmlu_test.jsonl", [row | {"answer": n % 2} for n in range(2 * SAMPLED)])
    report = measured(rigged, tmp_path, "mmlu", samples=1)
    right = {}
    for level in (0.0, 1.0):
        results = json.loads((tmp_path / "report.json.parts" / f"mmlu-{level:g}.json").read_text())
        assert len(results) == 2 * SAMPLED
        for number, letter in enumerate("AB"):
            right[letter, level] = sum(each["right"][0] for each in results[number::2])
            check(right[letter, level], SAMPLED, letter, level)
    assert stats.binomtest(right["A", 1.0], SAMPLED, chance_of("A", 0.0)).pvalue < ALARM
    low, high = levels(report)
    assert low["accuracy"]["value"] == (right["A", 0.0] + right["B", 0.0]) / (2 * SAMPLED)
    assert high["difference"]["value"] < 0
    assert high["p"] < 0.001
    record_values(
        right={f"{letter} at {level:g}": count for (letter, level), count in right.items()},
        expected={
            f"{each} at {level}": chance_of(each, level) for each in "AB" for level in (0, 1)
        },
    )


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def measured(rigged, folder: Path, task: str, samples: int) -> dict:
    out = folder / "report.json"
    job = Job(
        url=rigged.url,
        out=out,
        data=folder,
        grid=(0.0, 1.0),
        tasks=(task,),
        samples=samples,
    )
    assert task in run(job, print)
    return json.loads(out.read_text())


def levels(report: dict) -> list[dict]:
    (task,) = report["tasks"]
    return task["levels"]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
