"""The server samples from the distribution of a request's style: over HTTP, against fp64.

Each step of a short answer is checked: phrase factors by the automaton's state after the answer so
far, the tilt by the last token and by the KL spent on earlier tokens, then the law of `diversity`
if the request has one.
"""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.stories.grammar import generate
from dftserve.styles import profile as profiles
from tests.conftest import long
from tests.reference import reference
from tests.served_distribution import (
    NEAR_THRESHOLD,
    NOTHING_CUT,
    SampledAnswer,
    log_guard,
    stop_ids,
    vocabulary_of,
    worst_difference,
)
from tests.style_reference import style_reference, style_rows

TOKENS = 4


@pytest.mark.parametrize(
    ("engine", "count"),
    [("v1", 6), ("v2", 6), long("v1", 100), long("v2", 100)],
    indirect=["engine"],
)
def test_a_style_is_sampled_alone_and_before_a_law(engine, count, styles_folder, record_values):
    source, vocabulary = random.Random(11), vocabulary_of(engine)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    profile = profiles.read(styles_folder / "habits")
    stops = stop_ids(engine)
    checked, worst, held_back = 0, 0.0, 0.0
    for number in range(count):
        text = generate(source).text
        prompt = tokenizer.encode(text[: source.randrange(20, len(text) // 2)]).ids
        style = {"name": "habits", "strength": source.uniform(0.2, 1.0), "max_kl": 0.05}
        level = source.uniform(0.1, 1.0) if number % 2 else None
        temperature = source.uniform(0.5, 1.5)
        body = {"prompt": prompt, "style": style, "temperature": temperature, "seed": number}
        body |= {} if level is None else {"diversity": level}
        answer = SampledAnswer(engine, body | {"max_tokens": TOKENS})
        state, spent = 0, 0.0
        for step, token in enumerate(answer.tokens):
            last = answer.before(step)[-1]
            factor_V, delta_V = style_rows(profile, state, last, vocabulary)
            expected = style_reference(
                answer.logits_V(step),
                factor_V,
                delta_V,
                temperature=temperature,
                log_guard=log_guard(level or 0.0),
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
            case = number, step, level
            found = worst_difference(answer.log_p_V(step), expected_V, case, least=-20)
            worst = max(worst, found)
            checked += 1
        reported = answer.response.json()["style"]
        assert reported["name"] == "habits"
        assert reported["choices"][0]["tokens"] == len(answer.tokens)
    assert checked >= 2 * count
    assert held_back > 0
    record_values(checked=checked, worst_logprob=worst)
