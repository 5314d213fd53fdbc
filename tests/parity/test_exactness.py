"""The server samples from the law: its distribution over HTTP against a reference in fp64.

Reference logits come from the same engine and prefix, with the field off, at temperature 1: the law
is invariant to a constant shift, so log-probabilities serve as logits.
"""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.sampling import TokenClasses
from dftserve.sampling.draws import draw_key
from dftserve.stories.grammar import generate
from tests.client import gather, post
from tests.conftest import long
from tests.reference import cut_reference, draw_reference, reference, words_reference

LOG_PROBABILITY = 2e-4
NATS = 1e-3
NEAR_THRESHOLD = 1e-4
"""Cases with a token so near the guard's threshold are not compared: fp32 may decide otherwise."""

COUNTS = [("v1", 60), ("v2", 30), long("v1", 200), long("v2", 200)]
COUNTS += [long("v1_smollm2", 200), long("v2_smollm2", 200)]


@pytest.mark.parametrize(("engine", "count"), COUNTS, indirect=["engine"])
def test_the_sampled_distribution_is_the_law(engine, count, figure):
    source = random.Random(7)
    vocabulary = _vocabulary(engine)
    checked, redrawn, worst_logprob, worst_nats = 0, 0, 0.0, 0.0
    while checked < count:
        cases = [_random_case(source) for _ in range(min(16, count - checked))]
        logits = _log_ps(engine, [_plain(case) for case in cases], vocabulary)
        active = _log_p_figures(engine, [_with_field(case) for case in cases], vocabulary)
        for case, logits_V, (sampled_V, answer) in zip(cases, logits, active, strict=True):
            expected = reference(
                logits_V,
                temperature=case["temperature"],
                stop_ids=_stops(engine, case),
                **case["diversity"],
            )
            if expected.margin < NEAR_THRESHOLD:
                redrawn += 1
                continue
            checked += 1
            assert (np.isinf(sampled_V) == np.isinf(expected.log_p_V)).all(), case
            likely_V = expected.log_p_V > -25
            error = np.abs(sampled_V[likely_V] - expected.log_p_V[likely_V]).max()
            nats = abs(answer["mean_entropy_after"] - expected.entropy_after)
            nats = max(nats, abs(answer["mean_entropy_before"] - expected.entropy_before))
            assert error <= LOG_PROBABILITY, (error, case)
            assert nats <= NATS, (nats, case)
            assert answer["mean_temperature"] == pytest.approx(expected.temperature, rel=1e-4)
            worst_logprob, worst_nats = max(worst_logprob, error), max(worst_nats, nats)
    figure(draws=count, redrawn=redrawn, worst_logprob=worst_logprob, worst_nats=worst_nats)


WORDS = [("v1", 16), long("v2", 16), long("v1_smollm2", 200), long("v2_smollm2", 200)]


@pytest.mark.parametrize(("engine", "count"), WORDS, indirect=["engine"])
def test_the_law_words_goes_by_the_last_token(engine, count, figure):
    """Of three steps, the first depends on the prompt's end, the third on what was sampled."""
    source, vocabulary = random.Random(8), _vocabulary(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    classes = TokenClasses.from_tokenizer(tokenizer)
    seen, checked, worst = set(), 0, 0.0
    while checked < count:
        text = generate(source).text
        prompt = tokenizer.encode(text[: source.randrange(20, len(text) - 1)]).ids
        diversity = {"law": "words", "level": source.uniform(0.1, 1.0)}
        temperature = source.uniform(0.5, 1.5)
        body = {"prompt": prompt, "diversity": diversity, "temperature": temperature, "seed": 1}
        answer = _answers(engine, [body | {"max_tokens": 3, "ignore_eos": True}], vocabulary)[0]
        tokens = _sampled_tokens(answer.json()["choices"][0])
        for step in (0, 2):
            before = [*prompt, *tokens[:step]]
            plain = _plain({"prompt": before, "shaping": {"ignore_eos": True}})
            logits_V = _log_ps(engine, [plain], vocabulary)[0]
            state = int(classes.states()[before[-1]])
            class_V = np.zeros(vocabulary, np.uint8)
            class_V[: len(classes.packed_V)] = classes.classes_after(state)
            law = words_reference(
                logits_V, class_V, temperature=temperature, level=diversity["level"]
            )
            if law.margin < NEAR_THRESHOLD:
                continue
            sampled_V = _log_p(answer, vocabulary, step)
            assert (np.isinf(sampled_V) == np.isinf(law.log_p_V)).all()
            likely_V = law.log_p_V > -25
            worst = max(worst, np.abs(sampled_V[likely_V] - law.log_p_V[likely_V]).max())
            assert worst <= LOG_PROBABILITY
            seen |= {(state, int(c)) for c in class_V[likely_V]}
            checked += 1
    assert {c for _, c in seen} == {0, 1, 2}
    assert len({state for state, _ in seen}) > 1
    figure(checked=checked, worst_logprob=worst)


@pytest.mark.parametrize(("engine", "count"), [("v1", 24), ("v2", 24)], indirect=["engine"])
def test_laws_that_only_cut_tokens_are_exact(engine, count, figure):
    """Checks the first and the last of up to three steps; `xtc` draws by seed and position."""
    source, vocabulary = random.Random(9), _vocabulary(engine)
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
        answer = _answers(engine, [body | {"max_tokens": 3}], vocabulary)[0]
        tokens = _sampled_tokens(answer.json()["choices"][0])
        for step in {0, len(tokens) - 1}:
            before = [*prompt, *tokens[:step]]
            logits_V = _log_ps(engine, [_plain({"prompt": before, "shaping": {}})], vocabulary)[0]
            position = len(before) - 1 if engine.is_v2 else step
            draw = draw_reference(draw_key("seed", seed), position)
            expected = cut_reference(
                logits_V,
                temperature=temperature,
                stop_ids=_stops(engine, {"shaping": {}}),
                draw=draw,
                **diversity,
            )
            if expected.margin < NEAR_THRESHOLD:
                continue
            sampled_V = _log_p(answer, vocabulary, step)
            assert (np.isinf(sampled_V) == np.isinf(expected.log_p_V)).all(), (diversity, step)
            likely_V = expected.log_p_V > -25
            worst = max(worst, np.abs(sampled_V[likely_V] - expected.log_p_V[likely_V]).max())
            assert worst <= LOG_PROBABILITY
            checked[diversity["law"]] += 1
            if diversity["law"] == "xtc":
                excludes.add(bool(np.isinf(expected.log_p_V[logits_V.argmax()])))
    assert set(checked) == {"guard", "top_n_sigma", "xtc"}
    assert excludes == {False, True}
    figure(checked=dict(checked), worst_logprob=worst)


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


def _plain(case: dict) -> dict:
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return {"prompt": case["prompt"], **case["shaping"], **neutral}


def _with_field(case: dict) -> dict:
    fields = {"diversity": case["diversity"], "temperature": case["temperature"]}
    return {"prompt": case["prompt"], **case["shaping"], **fields}


def _log_p_figures(
    engine, bodies: list[dict], vocabulary: int
) -> list[tuple[np.ndarray, dict | None]]:
    answers = _answers(engine, bodies, vocabulary)
    return [(_log_p(answer, vocabulary), _figures(answer)) for answer in answers]


def _answers(engine, bodies: list[dict], vocabulary: int) -> list:
    common = {
        "model": "demo",
        "max_tokens": 1,
        "logprobs": vocabulary,
        "return_tokens_as_token_ids": True,
    }
    return gather(engine, [("/v1/completions", common | body) for body in bodies])


def _log_ps(engine, bodies: list[dict], vocabulary: int) -> list[np.ndarray]:
    return [log_p_V for log_p_V, _ in _log_p_figures(engine, bodies, vocabulary)]


def _log_p(answer, vocabulary: int, step: int = 0) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    top = answer.json()["choices"][0]["logprobs"]["top_logprobs"][step]
    log_p_V = np.full(vocabulary, np.nan)
    for token, value in top.items():
        log_p_V[int(token.removeprefix("token_id:"))] = value if value > -9998 else -np.inf
    assert not np.isnan(log_p_V).any(), "the server did not list every token"
    return log_p_V


def _sampled_tokens(choice: dict) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def _figures(answer) -> dict | None:
    return answer.json().get("diversity", {"choices": [None]})["choices"][0]


def _vocabulary(engine) -> int:
    return json.loads((engine.model_folder / "config.json").read_text())["vocab_size"]


def _stops(engine, case: dict) -> frozenset[int]:
    end = json.loads((engine.model_folder / "config.json").read_text())["eos_token_id"]
    return frozenset([end, *case["shaping"].get("stop_token_ids", [])])


def test_the_reported_distribution_sums_to_1(v1):
    """The tests above need the whole distribution."""
    body = {"model": "demo", "prompt": "Once", "max_tokens": 1, "logprobs": _vocabulary(v1)}
    body |= {"return_tokens_as_token_ids": True, "top_p": 1.0, "top_k": 0}
    log_p_V = _log_p(post(v1, "/v1/completions", body), _vocabulary(v1))
    assert np.exp(log_p_V).sum() == pytest.approx(1.0, abs=1e-4)
