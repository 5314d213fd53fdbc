"""The server samples with DRY's penalties for prompt and answer: over HTTP, against fp64.

The prompt ends with a repetition, and a few tokens follow it.
"""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from dftserve.sampling.dry import Breakers
from dftserve.stories.grammar import generate
from tests.conftest import long
from tests.dry_reference import dry_reference, penalties_reference
from tests.reference import reference
from tests.served_distribution import (
    LOG_PROBABILITY,
    NEAR_THRESHOLD,
    NOTHING_CUT,
    SampledAnswer,
    log_guard,
    stop_ids,
)

TOKENS = 3


@pytest.mark.parametrize(
    ("engine", "count"), [("v1", 6), ("v2", 6), long("v1", 40), long("v2", 40)], indirect=["engine"]
)
def test_repeats_are_penalised_before_the_law(engine, count, record_values):
    source = random.Random(13)
    tokenizer = Tokenizer.from_file(str(engine.model_folder / "tokenizer.json"))
    breaks_V = Breakers.from_tokenizer(tokenizer).tokens(("\n", "."))
    stops = stop_ids(engine)
    checked, penalised, worst = 0, 0, 0.0
    for number in range(count):
        text = tokenizer.encode(generate(source).text).ids[: source.randrange(20, 60)]
        prompt = [*text, *text[: source.randrange(4, 12)]]
        numbers = {"multiplier": source.uniform(0.5, 3.0), "base": 1.75, "allowed_length": 2}
        dry = {f"dry_{name}": value for name, value in numbers.items()}
        level = source.uniform(0.1, 1.0) if number % 2 else None
        temperature = source.uniform(0.5, 1.5)
        with_breakers = number % 3 == 0
        fields = dry | {"dry_sequence_breakers": ["\n", "."] if with_breakers else []}
        fields |= {} if level is None else {"level": level}
        body = {
            "prompt": prompt,
            "max_tokens": TOKENS,
            "diversity": fields,
            "temperature": temperature,
            "seed": number,
        }
        answer = SampledAnswer(engine, body)
        for step in range(len(answer.tokens)):
            breakers = set(np.flatnonzero(breaks_V).tolist()) if with_breakers else set()
            nats = penalties_reference(answer.before(step), breakers=breakers, **numbers)
            row_V = dry_reference(
                answer.logits_V(step),
                nats,
                temperature=temperature,
                log_guard=-np.inf if level is None else log_guard(level),
                stop_ids=stops,
            )
            expected = reference(
                row_V,
                temperature=temperature,
                level=level or 0.0,
                min_p=NOTHING_CUT if level is None else None,
                stop_ids=stops,
            )
            if expected.margin < NEAR_THRESHOLD:
                continue
            sampled_V = answer.log_p_V(step)
            likely_V = expected.log_p_V > -20
            worst = max(worst, np.abs(sampled_V[likely_V] - expected.log_p_V[likely_V]).max())
            assert worst <= LOG_PROBABILITY, (number, step, level)
            checked += 1
            penalised += bool(nats)
        reported = answer.response.json()["diversity"]
        assert reported["dry_multiplier"] == pytest.approx(numbers["multiplier"])
    assert checked >= 2 * count
    assert penalised > count // 2
    record_values(checked=checked, penalised=penalised, worst_logprob=worst)
