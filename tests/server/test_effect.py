"""The effect that bench/ measures at length, in a small form: a real model's texts vary more than
at a low temperature, with fewer errors than at a high one.
"""

import asyncio
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from openai import AsyncOpenAI
from scipy import stats

from dftserve.evaluate.metrics import errors
from dftserve.evaluate.metrics.lexical import self_bleus
from dftserve.evaluate.text.tokenize import words
from tests.conftest import KEY, PATIENCE, Engine, long

TOPICS = (
    "a lighthouse", "two brothers", "a lost dog", "the last train", "a garden", "a letter",
    "a storm at sea", "an old piano", "a stolen bicycle", "the moon", "a baker", "a locked door",
    "a river", "the first snow", "a broken watch", "a stranger", "a market", "an island",
    "a clock tower", "a school play", "the desert", "a bridge", "a wedding", "an old soldier",
)  # fmt: skip
FALSE_ALARM = 1e-3
"""Of each test: the chance that it passes although the effect is not there."""

Stories = list[list[str]]
"""Two stories for each topic."""


@pytest.fixture(scope="module")
def cool(v1_smollm2) -> Stories:
    return stories(v1_smollm2, temperature=0.5)


@pytest.fixture(scope="module")
def hot(v1_smollm2) -> Stories:
    return stories(v1_smollm2, temperature=1.2)


@pytest.fixture(scope="module", params=["gated", long("words")])
def diverse(v1_smollm2, request) -> Stories:
    field = {"diversity": {"law": request.param, "level": 1}}
    return stories(v1_smollm2, temperature=1.0, extra_body=field)


def stories(engine: Engine, **fields: Any) -> Stories:
    async def ask_all() -> Stories:
        address = f"{engine.url}/v1"
        async with AsyncOpenAI(base_url=address, api_key=KEY, timeout=PATIENCE) as client:

            async def ask(seed: int, topic: str) -> list[str]:
                # One seed for all would give all the same noise, and make them similar.
                prompt = {"role": "user", "content": f"Tell me a short story about {topic}."}
                answer = await client.chat.completions.create(
                    model="demo", messages=[prompt], max_tokens=96, n=2, seed=seed, **fields
                )
                return [choice.message.content for choice in answer.choices]

            return await asyncio.gather(*(ask(seed, topic) for seed, topic in enumerate(TOPICS)))

    return asyncio.run(ask_all())


def is_greater(one: Any, other: Any) -> bool:
    """Whether the first is greater, paired by topic. The square root makes the spread of counts
    independent of their mean."""
    roots = np.sqrt(one), np.sqrt(other)
    return bool(stats.ttest_rel(*roots, alternative="greater").pvalue < FALSE_ALARM)


def marks(found: Stories) -> list[int]:
    checker = errors.linter()
    return [sum(errors.check(text, checker).marks for text in pair) for pair in found]


def similarity_between(found: Stories) -> NDArray[np.float64]:
    """Self-BLEU of stories on different topics."""
    return self_bleus([words(pair[0]) for pair in found])


def similarity_within(found: Stories) -> list[float]:
    """Self-BLEU of the two stories on one topic."""
    return [float(self_bleus([words(text) for text in pair]).mean()) for pair in found]


def test_fewer_errors_than_a_high_temperature(diverse, hot):
    assert is_greater(marks(hot), marks(diverse))


def test_topics_differ_more_than_at_a_low_temperature(diverse, cool):
    assert is_greater(similarity_between(cool), similarity_between(diverse))


def test_answers_to_one_prompt_differ_more_than_at_a_low_temperature(diverse, cool):
    assert is_greater(similarity_within(cool), similarity_within(diverse))
