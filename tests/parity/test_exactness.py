"""The server samples from the law: its distribution over HTTP against a reference in fp64."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.sampling import TokenClasses
from dftserve.sampling.draws import draw_key
from dftserve.stories.grammar import generate
from tests.client import post
from tests.conftest import long
from tests.reference import cut_reference, draw_reference, reference, words_reference
from tests.served_distribution import (
    NATS,
    NEAR_THRESHOLD,
    SampledAnswer,
    complete,
    plain,
    served_log_p,
    served_log_ps,
    stop_ids,
    vocabulary_of,
    worst_difference,
)

COUNTS = [("v1", 60), ("v2", 30), long("v1", 200), long("v2", 200)]
COUNTS += [long("v1_smollm2", 200), long("v2_smollm2", 200)]


@pytest.mark.parametrize(("engine", "count"), COUNTS, indirect=["engine"])
def test_the_sampled_distribution_is_the_law(engine, count, record_values):
    source = random.Random(7)
    vocabulary = vocabulary_of(engine)
    checked, redrawn, worst_logprob, worst_nats = 0, 0, 0.0, 0.0
    while checked < count:
        cases = [_random_case(source) for _ in range(min(16, count - checked))]
        shaped = [plain(case["prompt"], **case["shaping"]) for case in cases]
        logits = served_log_ps(engine, shaped, vocabulary)
        answers = complete(engine, [_with_field(case) for case in cases], vocabulary)
        for case, logits_V, answer in zip(cases, logits, answers, strict=True):
            expected = reference(
                logits_V,
                temperature=case["temperature"],
                stop_ids=stop_ids(engine, case["shaping"].get("stop_token_ids", ())),
                **case["diversity"],
            )
            if expected.margin < NEAR_THRESHOLD:
                redrawn += 1
                continue
            checked += 1
            error = worst_difference(served_log_p(answer, vocabulary), expected.log_p_V, case)
            reported = answer.json()["diversity"]["choices"][0]
            nats = abs(reported["mean_entropy_after"] - expected.entropy_after)
            nats = max(nats, abs(reported["mean_entropy_before"] - expected.entropy_before))
            assert nats <= NATS, (nats, case)
            assert reported["mean_temperature"] == pytest.approx(expected.temperature, rel=1e-4)
            worst_logprob, worst_nats = max(worst_logprob, error), max(worst_nats, nats)
    record_values(draws=count, redrawn=redrawn, worst_logprob=worst_logprob, worst_nats=worst_nats)


WORDS = [("v1", 16), long("v2", 16), long("v1_smollm2", 200), long("v2_smollm2", 200)]


@pytest.mark.parametrize(("engine", "count"), WORDS, indirect=["engine"])
def test_the_law_words_goes_by_the_last_token(engine, count, record_values):
    """Of three steps, the first depends on the prompt's end, the third on what was sampled."""
    source, vocabulary = random.Random(8), vocabulary_of(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    classes = TokenClasses.from_tokenizer(tokenizer)
    seen, checked, worst = set(), 0, 0.0
    while checked < count:
        text = generate(source).text
        prompt = tokenizer.encode(text[: source.randrange(20, len(text) - 1)]).ids
        diversity = {"law": "words", "level": source.uniform(0.1, 1.0)}
        temperature = source.uniform(0.5, 1.5)
        body = {"prompt": prompt, "diversity": diversity, "temperature": temperature, "seed": 1}
        answer = SampledAnswer(engine, body | {"max_tokens": 3, "ignore_eos": True})
        for step in (0, 2):
            state = int(classes.states()[answer.before(step)[-1]])
            class_V = np.zeros(vocabulary, np.uint8)
            class_V[: len(classes.packed_V)] = classes.classes_after(state)
            law = words_reference(
                answer.logits_V(step), class_V, temperature=temperature, level=diversity["level"]
            )
            if law.margin < NEAR_THRESHOLD:
                continue
            case = diversity, step
            worst = max(worst, worst_difference(answer.log_p_V(step), law.log_p_V, case))
            seen |= {(state, int(c)) for c in class_V[law.log_p_V > -25]}
            checked += 1
    assert {c for _, c in seen} == {0, 1, 2}
    assert len({state for state, _ in seen}) > 1
    record_values(checked=checked, worst_logprob=worst)


@pytest.mark.parametrize(("engine", "count"), [("v1", 24), ("v2", 24)], indirect=["engine"])
def test_laws_that_only_cut_tokens_are_exact(engine, count, record_values):
    """Checks the first and the last of up to three steps; `xtc` draws by seed and position."""
    source = random.Random(9)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    checked, worst, excludes = Counter(), 0.0, set()
    for number in itertools.count():
        if sum(checked.values()) >= count:
            break
        text = generate(source).text
        prompt = tokenizer.encode(text[: source.randrange(20, len(text) - 1)]).ids
        diversity, temperature, seed = (
            _cut_diversity(number, source),
            source.uniform(0.5, 1.5),
            number,
        )
        body = {"prompt": prompt, "diversity": diversity, "temperature": temperature, "seed": seed}
        answer = SampledAnswer(engine, body | {"max_tokens": 3})
        for step in {0, len(answer.tokens) - 1}:
            logits_V = answer.logits_V(step)
            position = len(answer.before(step)) - 1 if engine.is_v2 else step
            draw = draw_reference(draw_key("seed", seed), position)
            expected = cut_reference(
                logits_V,
                temperature=temperature,
                stop_ids=stop_ids(engine),
                draw=draw,
                **diversity,
            )
            if expected.margin < NEAR_THRESHOLD:
                continue
            case = diversity, step
            worst = max(worst, worst_difference(answer.log_p_V(step), expected.log_p_V, case))
            checked[diversity["law"]] += 1
            if diversity["law"] == "xtc":
                excludes.add(bool(np.isinf(expected.log_p_V[logits_V.argmax()])))
    assert set(checked) == {"guard", "top_n_sigma", "xtc"}
    assert excludes == {False, True}
    record_values(checked=dict(checked), worst_logprob=worst)


def _cut_diversity(number: int, source: random.Random) -> dict:
    """A diversity object for each law that only cuts, in turn."""
    if number % 3 == 0:
        return {"law": "guard", "min_p": source.choice([0.01, 0.1, 0.3])}
    if number % 3 == 1:
        return {"law": "top_n_sigma", "n_sigma": source.uniform(0.3, 2.0)}
    diversity = {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": source.uniform(0.01, 0.2)}
    return diversity | {"min_p": 0.02} if source.random() < 0.5 else diversity


def _random_case(source: random.Random) -> dict:
    """A prefix of a story, a diversity object, a temperature, and other parameters of logits."""
    words = generate(source).text.split()
    diversity = {"law": "gated", "level": source.uniform(0.01, 1.0)}
    if source.random() < 0.25:
        diversity |= {"law": "dynatemp", "dynatemp_range": source.uniform(0.1, 1.0)}
        diversity |= {"dynatemp_exponent": source.uniform(0.5, 2.0)}
    if source.random() < 0.25:
        diversity |= {"min_p": source.choice([0.01, 0.1, 0.3])}
    shaping = source.choice(
        [
            {},
            {},
            {"structured_outputs": {"choice": ["yes", "no"]}},
            {"structured_outputs": {"regex": "[a-z]{1,8}( [a-z]+)?"}},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
            {"logit_bias": {str(source.randrange(300, 900)): 4.0}},
            {"stop_token_ids": [source.randrange(300, 900)]},
            {"bad_words": ["the"]},
        ]
    )
    return {
        "prompt": " ".join(words[: source.randrange(1, len(words))]),
        "diversity": diversity,
        "temperature": source.uniform(0.3, 1.8),
        "shaping": shaping,
    }


def _with_field(case: dict) -> dict:
    fields = {"diversity": case["diversity"], "temperature": case["temperature"]}
    return {"prompt": case["prompt"], **case["shaping"], **fields}


def test_the_reported_distribution_sums_to_1(v1):
    """The tests above need the whole distribution."""
    body = {"model": "demo", "prompt": "Once", "max_tokens": 1, "logprobs": vocabulary_of(v1)}
    body |= {"return_tokens_as_token_ids": True, "top_p": 1.0, "top_k": 0}
    log_p_V = served_log_p(post(v1, "/v1/completions", body), vocabulary_of(v1))
    assert np.exp(log_p_V).sum() == pytest.approx(1.0, abs=1e-4)
