"""A real language model behind the server: every endpoint, and 500 seeds at once on a CPU."""

import asyncio
import json
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from dftserve.demo.run import serve_flags
from dftserve.serve import Server, running
from tests.conftest import PATIENCE

pytestmark = pytest.mark.long
PROMPT = [{"role": "user", "content": "Describe a stranger who comes to town."}]
FIELD = {"diversity": 0.5}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(smollm2_folder, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("smollm2") / "server.log"
    environment = {"OMP_NUM_THREADS": "1"}
    with running(
        str(smollm2_folder), *serve_flags(), env=environment, log=log, timeout=PATIENCE
    ) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="EMPTY", timeout=PATIENCE, max_retries=0)


def test_chat_with_four_choices_reports_each(client, server):
    answer = client.chat.completions.create(
        model=server.model, messages=PROMPT, max_tokens=24, n=4, seed=1, extra_body=FIELD
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 4
    reported = answer.model_extra["diversity"]
    assert (reported["level"], len(reported["choices"])) == (0.5, 4)
    assert all(each["mean_temperature"] >= 1 for each in reported["choices"])


def test_a_stream_has_the_text_of_an_answer(client, server):
    request = {"model": server.model, "messages": PROMPT, "max_tokens": 24, "seed": 3}
    whole = client.chat.completions.create(**request, extra_body=FIELD)
    chunks = list(client.chat.completions.create(**request, stream=True, extra_body=FIELD))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [c for c in chunks if "diversity" in (c.model_extra or {})]


def test_completions_report_diversity(client, server):
    answer = client.completions.create(
        model=server.model, prompt="Once upon a time", max_tokens=16, extra_body=FIELD
    )
    assert answer.choices[0].text.strip()
    assert answer.model_extra["diversity"]["choices"][0]["tokens"] == answer.usage.completion_tokens


def test_responses_report_diversity(client, server):
    answer = client.responses.create(
        model=server.model, input="Say something.", max_output_tokens=16, extra_body=FIELD
    )
    assert answer.output_text.strip()
    assert answer.model_extra["diversity"]["level"] == 0.5


def test_a_json_schema_holds_at_every_level(client, server):
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    for level in (0.0, 1.0):
        answer = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "Invent a person: name and age, as JSON."}],
            response_format=response_format,
            max_tokens=80,
            seed=5,
            extra_body={"diversity": level},
        )
        person = json.loads(answer.choices[0].message.content)
        assert sorted(person) == ["age", "name"]


def test_500_seeds_at_once_leave_the_engine_alive(server, record_values):
    """Some tens of them end stock vLLM 0.32 if the prompts do not all fit into one step."""

    async def ask_all() -> list[tuple[int, str]]:
        async with AsyncOpenAI(base_url=server.url, api_key="EMPTY", timeout=PATIENCE) as client:

            async def ask(seed: int) -> tuple[int, str]:
                answer = await client.chat.completions.create(
                    model=server.model, messages=PROMPT, max_tokens=4, seed=seed % 100
                )
                return seed % 100, answer.choices[0].message.content

            return await asyncio.gather(*(ask(seed) for seed in range(500)))

    answers = asyncio.run(ask_all())
    by_seed: dict[int, list[str]] = {}
    for seed, text in answers:
        by_seed.setdefault(seed, []).append(text)
    record_values(
        requests=len(answers), seeds=len(by_seed), texts=len({text for _, text in answers})
    )
    assert len(answers) == 500
    # However prompts were split into steps: each seed's five requests had different neighbours.
    assert all(len(set(texts)) == 1 for texts in by_seed.values())
    again = OpenAI(base_url=server.url, api_key="EMPTY").models.list()
    assert again.data
