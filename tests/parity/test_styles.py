"""The server samples from the distribution of a request's style: over HTTP, against fp64.

Each step of a short answer is checked: phrase factors by the automaton's state after the answer so
far, the tilt by the last token and by the KL spent on earlier tokens, then the law of `diversity`
if the request has one.
"""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.sampling import LawConstants
from dftserve.stories.grammar import generate
from dftserve.styles import profile as profiles
from tests.conftest import long
from tests.parity.test_exactness import (
    LOG_PROBABILITY,
    NEAR_THRESHOLD,
    _answers,
    _log_p,
    _log_ps,
    _plain,
    _sampled_tokens,
    _stops,
    _vocabulary,
)
from tests.reference import reference
from tests.style_reference import style_reference

TOKENS = 4
NOTHING_CUT = 1e-30
"""A min_p with which the law's guard cuts nothing of what the style has left."""


@pytest.mark.parametrize(
    ("engine", "count"),
    [("v1", 6), ("v2", 6), long("v1", 100), long("v2", 100)],
    indirect=["engine"],
)
def test_a_style_is_sampled_alone_and_before_a_law(engine, count, styles_folder, figure):
    source, vocabulary = random.Random(11), _vocabulary(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    profile = profiles.read(styles_folder / "habits")
    stops = _stops(engine, {"shaping": {}})
    checked, worst, held_back = 0, 0.0, 0.0
    for number in range(count):
        text = generate(source).text
        prompt = tokenizer.encode(text[: source.randrange(20, len(text) // 2)]).ids
        style = {"name": "habits", "strength": source.uniform(0.2, 1.0), "max_kl": 0.05}
        level = source.uniform(0.1, 1.0) if number % 2 else None
        temperature = source.uniform(0.5, 1.5)
        body = {"prompt": prompt, "style": style, "temperature": temperature, "seed": number}
        body |= {} if level is None else {"diversity": level}
        answer = _answers(engine, [body | {"max_tokens": TOKENS}], vocabulary)[0]
        tokens = _sampled_tokens(answer.json()["choices"][0])
        state, spent = 0, 0.0
        for step, token in enumerate(tokens):
            before = [*prompt, *tokens[:step]]
            logits_V = _log_ps(engine, [_plain({"prompt": before, "shaping": {}})], vocabulary)[0]
            factor_V, delta_V = _style_rows(profile, state, before[-1], vocabulary)
            expected = style_reference(
                logits_V,
                factor_V,
                delta_V,
                temperature=temperature,
                log_guard=_log_guard(level),
                strength=style["strength"],
                allowance=style["max_kl"] * (step + 1) - spent,
                stop_ids=stops,
            )
            spent += expected.tilt_kl
            held_back += expected.held_back
            state = profile.step(state, token)[0]
            if expected.margin < NEAR_THRESHOLD:
                break  # The KL spent so far is not known any more.
            expected_V = expected.log_p_V
            if level is not None:
                expected_V = reference(
                    np.where(np.isfinite(expected_V), expected_V * temperature, -np.inf),
                    temperature=temperature,
                    level=level,
                    min_p=NOTHING_CUT,
                    stop_ids=stops,
                ).log_p_V
            sampled_V = _log_p(answer, vocabulary, step)
            assert (np.isinf(sampled_V) == np.isinf(expected_V)).all(), (number, step)
            likely_V = expected_V > -20
            worst = max(worst, np.abs(sampled_V[likely_V] - expected_V[likely_V]).max())
            assert worst <= LOG_PROBABILITY, (number, step, level)
            checked += 1
        reported = answer.json()["style"]
        assert reported["name"] == "habits"
        assert reported["choices"][0]["tokens"] == len(tokens)
    assert checked >= 2 * count
    assert held_back > 0
    figure(checked=checked, worst_logprob=worst)


def _style_rows(profile, state: int, last: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    factor_V, delta_V = np.ones(vocabulary), np.zeros(vocabulary)
    for token in range(profile.vocabulary):
        factor_V[token] = np.exp(profile.step(state, token)[1])
        delta_V[token] = profile.delta(last, token)
    return factor_V, delta_V


def _log_guard(level: float | None) -> float:
    constants = LawConstants()
    return constants.log_guard_start + constants.log_guard_step * (level or 0.0)
