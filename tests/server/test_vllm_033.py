"""vLLM 0.33: its Python code over the compiled parts of 0.32's CPU build, as it has no CPU build.

The tests are those of other files, on this engine.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client import chat_body, get, post, sync_client
from tests.conftest import FEW_BLOCKS, Engine, engine_running
from tests.environment import HYBRID, Environment, NoWheelError, build_wheels, make_hybrid
from tests.parity import test_exactness as exactness
from tests.parity import test_off_is_off as off_is_off
from tests.parity import test_targeting as targeting
from tests.server import test_bad_requests as bad_requests

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"v1": 200, "v2": 20}
"""Requests of a test: fewer for V2, whose kernels are interpreted."""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Environment:
    try:
        environment = make_hybrid(ROOT / "build" / "hybrid")
    except NoWheelError as problem:
        pytest.skip(str(problem))
    wheels = build_wheels(tmp_path_factory.mktemp("wheels"))
    environment.install("--reinstall", "--no-deps", *wheels)
    return environment


@pytest.fixture(scope="module", params=COUNTS)
def pair(request, hybrid, model_folder, tmp_path_factory) -> Iterator[tuple[Engine, Engine]]:
    """A server with the plug-in, and one with DFTSERVE_DISABLE=1."""
    path = tmp_path_factory.mktemp(request.param)
    flags = [FEW_BLOCKS] if request.param == "v1" else []
    off = {"DFTSERVE_DISABLE": "1"}
    with (
        hybrid.serves(),
        engine_running(f"{request.param}_033", model_folder, path, *flags) as engine,
        engine_running(f"{request.param}_033_stock", model_folder, path, *flags, env=off) as stock,
    ):
        yield engine, stock


@pytest.fixture
def engine(pair) -> Engine:
    return pair[0]


@pytest.fixture
def count(engine) -> int:
    return COUNTS["v2" if engine.is_v2 else "v1"]


def test_the_engine_has_version_033(engine):
    capabilities = get(engine, "/v1/dft/capabilities").json()
    assert capabilities["vllm"] == HYBRID
    assert capabilities["active"] is True
    assert capabilities["runner"] == ("V2" if engine.is_v2 else "V1")


def test_off_is_off(pair, count, record_values):
    off_is_off.test_seeded_answers_are_stock_byte_for_byte(*pair, count, record_values)


def test_wrong_values(engine, record_values):
    bad_requests.test_wrong_values_are_refused_and_good_requests_live_on(engine, record_values)


def test_the_law(engine, count, record_values):
    exactness.test_the_sampled_distribution_is_the_law(engine, count, record_values)


def test_surprise(engine, count, record_values):
    targeting.test_surprise_equals_the_reported_entropy(engine, 1 + count // 50, record_values)


@pytest.mark.parametrize(
    ("tokens", "status"), [(16, "incomplete"), (480, "completed")], ids=["cut", "to its end"]
)
def test_complete_and_incomplete_responses_end_with_the_statistics(engine, tokens, status):
    if engine.is_v2 and status == "completed":
        pytest.skip("a text to its end takes minutes there")
    client = sync_client(engine)
    request = {"model": "demo", "input": "Tell me a story.", "max_output_tokens": tokens}
    request["extra_body"] = {"diversity": 0.1, "seed": 1}
    answer = client.responses.create(**request)
    assert answer.status == status
    assert tokens_of(answer) == answer.usage.output_tokens
    events = list(client.responses.create(**request, stream=True))
    assert events[-1].type == f"response.{status}"
    assert tokens_of(events[-1].response) == events[-1].response.usage.output_tokens
    carrying = [e for e in events if "diversity" in (getattr(e, "response", e).model_extra or {})]
    assert carrying == events[-1:]


def tokens_of(response) -> int:
    (choice,) = response.model_extra["diversity"]["choices"]
    return choice["tokens"]


def test_several_choices_and_a_stream_with_usage(engine):
    body = chat_body(diversity=0.5, max_tokens=8, n=2)
    content = post(engine, "/v1/chat/completions", body).json()
    tokens = sum(choice["tokens"] for choice in content["diversity"]["choices"])
    assert tokens == content["usage"]["completion_tokens"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(
        sync_client(engine).chat.completions.create(
            **chat_body(max_tokens=8, n=2), **options, extra_body={"diversity": 0.5}
        )
    )
    assert [c for c in chunks if "diversity" in (c.model_extra or {})] == chunks[-1:]
