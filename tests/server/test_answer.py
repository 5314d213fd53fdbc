"""The field on every endpoint, and its reports: header, body, stream, metrics, capabilities."""

import json
import math

import pytest

from dftserve import json_schema, spec
from tests.client import chat_body, get, metric, post, sync_client
from tests.vllm_app import body_schema, routes_with_fields

BOTH = pytest.mark.parametrize("engine", ["v1", "v2"], indirect=True)
STATISTICS = {
    "tokens",
    "mean_entropy_before",
    "mean_entropy_after",
    "mean_temperature",
    "tokens_changed",
}
SHORT = {"max_tokens": 8}


@BOTH
def test_chat_through_the_openai_client(engine):
    answer = sync_client(engine).chat.completions.create(
        **chat_body(max_tokens=12, n=2), extra_body={"diversity": 0.5}
    )
    reported = answer.model_extra["diversity"]
    assert reported["law"] == "gated"
    assert reported["level"] == 0.5
    assert len(reported["choices"]) == 2
    assert all(set(choice) == STATISTICS for choice in reported["choices"])
    assert sum(choice["tokens"] for choice in reported["choices"]) == answer.usage.completion_tokens


@BOTH
@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("choices", [1, 2])
def test_a_streams_last_chunk_has_the_diversity_object(engine, usage, choices):
    stream = sync_client(engine).chat.completions.create(
        **chat_body(max_tokens=8, n=choices),
        stream=True,
        stream_options={"include_usage": usage},
        extra_body={"diversity": 0.5},
    )
    chunks = list(stream)
    carrying = [chunk for chunk in chunks if "diversity" in (chunk.model_extra or {})]
    assert carrying == chunks[-1:]
    assert bool(chunks[-1].usage) == usage
    reported = chunks[-1].model_extra["diversity"]["choices"]
    assert len(reported) == choices
    assert all(set(choice) == STATISTICS for choice in reported)


@BOTH
def test_completions_with_several_prompts_report_each_choice(engine):
    answer = sync_client(engine).completions.create(
        model="demo", prompt=["Once", "There"], n=2, **SHORT, extra_body={"diversity": 0.3}
    )
    reported = answer.model_extra["diversity"]["choices"]
    assert len(reported) == len(answer.choices) == 4
    assert sum(choice["tokens"] for choice in reported) == answer.usage.completion_tokens


@BOTH
def test_responses_and_their_streams_report_each_token(engine):
    client = sync_client(engine)
    request = {"model": "demo", "input": "Tell me a story.", "max_output_tokens": 16}
    answer = client.responses.create(**request, extra_body={"diversity": 0.5})
    assert answer.model_extra["diversity"]["choices"][0]["tokens"] == answer.usage.output_tokens
    events = list(client.responses.create(**request, stream=True, extra_body={"diversity": 0.5}))
    final = events[-1].response
    assert final.model_extra["diversity"]["choices"][0]["tokens"] == final.usage.output_tokens


@BOTH
def test_a_batch_reports_each_conversation(engine):
    body = chat_body(diversity=0.5, **SHORT)
    body["messages"] = [body["messages"], body["messages"]]
    content = post(engine, "/v1/chat/completions/batch", body).json()
    assert [set(choice) for choice in content["diversity"]["choices"]] == [STATISTICS, STATISTICS]


@BOTH
@pytest.mark.parametrize("value", [0.5, "0.5", '{"level": 0.5}'])
@pytest.mark.parametrize("stream", [False, True])
def test_messages_accept_the_field_in_vllm_xargs(engine, value, stream):
    body = chat_body(vllm_xargs={"diversity": value}, stream=stream, **SHORT)
    answer = post(engine, "/v1/messages", body)
    lines = [
        line.removeprefix("data: ") for line in answer.text.splitlines() if "diversity" in line
    ]
    assert len(lines) == 1
    assert json.loads(lines[0])["diversity"]["choices"][0]["tokens"] > 0


@BOTH
def test_the_header_echoes_what_is_in_force(engine):
    body = chat_body(diversity={"law": "budget", "target_entropy": 1.5}, **SHORT)
    for stream in (False, True):
        answer = post(engine, "/v1/chat/completions", body | {"stream": stream})
        echoed = json.loads(answer.headers["x-dftserve-diversity"])
        assert echoed == {"law": "budget", "target_entropy": 1.5, "max_temperature": 4.0}


@BOTH
@pytest.mark.parametrize("off", [{}, {"diversity": None}])
def test_an_answer_without_the_field_has_no_header_and_no_object(engine, off):
    answer = post(engine, "/v1/chat/completions", chat_body(**SHORT, **off))
    assert "x-dftserve-diversity" not in answer.headers
    assert "diversity" not in answer.json()


@BOTH
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"diversity": 0}, None),
        ({"diversity": 0.5, "temperature": 0}, "temperature 0 stays greedy"),
    ],
)
def test_an_answer_reports_that_the_field_is_off(engine, fields, reason):
    found = post(engine, "/v1/chat/completions", chat_body(**SHORT, **fields)).json()["diversity"]
    assert found["level"] == 0
    assert found.get("reason") == reason
    assert found["choices"] == [None]


@BOTH
def test_temperature_zero_stays_greedy(engine):
    greedy = chat_body(max_tokens=24, temperature=0)
    plain = post(engine, "/v1/chat/completions", greedy).json()
    with_field = post(engine, "/v1/chat/completions", greedy | {"diversity": 1}).json()
    assert with_field["choices"][0]["message"] == plain["choices"][0]["message"]


@BOTH
def test_cuts_of_the_model_are_dropped_and_reported_and_those_of_the_client_kept(engine):
    def dropped(**fields):
        body = chat_body(diversity=0.5, **SHORT, **fields)
        return post(engine, "/v1/chat/completions", body).json()["diversity"].get("dropped")

    assert dropped() == {"top_p": 0.9, "top_k": 50}
    assert dropped(top_p=0.8) == {"top_k": 50}
    assert dropped(top_p=0.8, top_k=3) is None


@BOTH
def test_min_p_of_the_client_becomes_the_guard(engine):
    body = chat_body(diversity=0.5, min_p=0.2, **SHORT)
    reported = post(engine, "/v1/chat/completions", body).json()["diversity"]
    assert reported["min_p"] == 0.2
    refused = post(engine, "/v1/chat/completions", body | {"diversity": {"level": 1, "min_p": 0.1}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "min_p"


@BOTH
def test_top_k_of_the_client_applies_after_the_field(engine):
    body = {"model": "demo", "prompt": "Once", "max_tokens": 1, "logprobs": 4096, "top_k": 2}
    top = post(engine, "/v1/completions", body | {"diversity": 1}).json()
    logprobs = top["choices"][0]["logprobs"]["top_logprobs"][0].values()
    assert sum(value > -9998 for value in logprobs) <= 2


@BOTH
def test_the_same_seed_gives_the_same_text(engine):
    body = chat_body(diversity=0.9, seed=5, max_tokens=24, logprobs=True)
    first, second = (post(engine, "/v1/chat/completions", body).json() for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]


def test_structured_output_stays_valid(v1):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(8):
        body = chat_body(diversity=1, response_format=form, max_tokens=120, seed=seed)
        choice = post(v1, "/v1/chat/completions", body).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert set(json.loads(choice["message"]["content"])) == {"name", "old"}


@BOTH
def test_human_is_the_budget_law_at_the_checkpoint_s_target(engine):
    entropy = spec.CheckpointInfo.read(engine.model_folder).target_entropy
    answer = post(engine, "/v1/chat/completions", chat_body(diversity="human", **SHORT)).json()
    effective = {"law": "budget", "target_entropy": entropy, "max_temperature": 4.0}
    assert effective.items() <= answer["diversity"].items()
    assert get(engine, "/v1/dft/capabilities").json()["human"] == effective


@BOTH
def test_capabilities_need_the_key(engine):
    assert get(engine, "/v1/dft/capabilities", key=None).status_code == 401
    capabilities = get(engine, "/v1/dft/capabilities").json()
    assert capabilities["active"] is True
    assert capabilities["runner"] == ("V2" if engine.is_v2 else "V1")
    assert set(capabilities["laws"]) == set(spec.LAWS)


@BOTH
def test_metrics_count_the_tokens(engine):
    before = metric(engine, "dft:tokens_total")
    answer = post(engine, "/v1/chat/completions", chat_body(diversity=0.5, **SHORT)).json()
    tokens = answer["diversity"]["choices"][0]["tokens"]
    assert metric(engine, "dft:tokens_total") == before + tokens
    assert metric(engine, "dft:requests_total") > 0


def test_the_disabled_plug_in_ignores_the_field(v1_stock):
    answer = post(v1_stock, "/v1/chat/completions", chat_body(diversity=7, **SHORT))
    assert answer.status_code == 200
    assert "diversity" not in answer.json()
    assert get(v1_stock, "/v1/dft/capabilities").status_code == 404


TRACE_COLUMNS = {"entropy_before", "entropy_after", "temperature", "changed"}


@BOTH
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("law", [{}, {"law": "words"}])
def test_a_trace_has_the_statistics_of_each_token(engine, stream, law):
    """The reported means are those of the trace, and each token's temperature is the law's."""
    diversity = {"level": 0.9, "trace": True, **law}
    body = chat_body(max_tokens=24, n=2, diversity=diversity, stream=stream)
    reported = _diversity_object(post(engine, "/v1/chat/completions", body), stream)
    assert reported["trace"] is True
    for choice in reported["choices"]:
        assert set(choice) == STATISTICS | {"trace"}
        trace = choice["trace"]
        assert set(trace) == TRACE_COLUMNS
        assert {len(column) for column in trace.values()} == {choice["tokens"]}
        for column, mean in (
            ("entropy_before", "mean_entropy_before"),
            ("entropy_after", "mean_entropy_after"),
            ("temperature", "mean_temperature"),
            ("changed", "tokens_changed"),
        ):
            value = sum(trace[column]) / choice["tokens"]
            assert value == pytest.approx(choice[mean], abs=1e-4)
        if not law:
            by_law = [_gated(entropy, level=0.9) for entropy in trace["entropy_before"]]
            pairs = list(zip(trace["temperature"], by_law, strict=True))
            # It is lower, which is rare, if a stop token would otherwise become the likeliest.
            assert all(1 <= value <= heated + 1e-3 for value, heated in pairs)
            assert sum(value >= heated - 1e-3 for value, heated in pairs) > len(pairs) / 2


def _gated(entropy: float, level: float) -> float:
    """The temperature of docs/maths.md at T = 1."""
    return min(math.exp(2 * level * (entropy / (entropy + 1)) ** 2), 4)


def _diversity_object(answer, stream: bool) -> dict:
    """The `diversity` object of an answer."""
    if not stream:
        return answer.json()["diversity"]
    (line,) = [line for line in answer.text.splitlines() if '"mean_entropy_after"' in line]
    return json.loads(line.removeprefix("data: "))["diversity"]


@BOTH
def test_a_trace_does_not_change_the_text(engine):
    body = chat_body(max_tokens=24, seed=5)
    texts = [
        post(engine, "/v1/chat/completions", body | {"diversity": diversity}).json()["choices"]
        for diversity in (0.9, {"level": 0.9, "trace": True})
    ]
    assert texts[0] == texts[1]


@BOTH
def test_traces_of_a_text_with_a_stop_string_and_of_a_style(engine):
    fields = {"max_tokens": 48, "stop": ["e"], "diversity": {"level": 1, "trace": True}}
    content = post(engine, "/v1/chat/completions", chat_body(**fields)).json()
    trace = content["diversity"]["choices"][0]["trace"]
    assert len(trace["changed"]) == content["usage"]["completion_tokens"] > 0
    fields = {**SHORT, "style": "habits", "diversity": {"level": 0, "trace": True}}
    content = post(engine, "/v1/chat/completions", chat_body(**fields)).json()
    assert len(content["diversity"]["choices"][0]["trace"]["changed"]) > 0


@BOTH
def test_without_an_effect_there_is_no_trace(engine):
    body = chat_body(**SHORT, diversity={"level": 0, "trace": True})
    assert post(engine, "/v1/chat/completions", body).json()["diversity"]["choices"] == [None]
    refused = post(engine, "/v1/chat/completions", chat_body(diversity={"level": 1, "trace": 1}))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "diversity.trace"


def test_the_openapi_document_has_the_fields_and_is_otherwise_stock(v1, v1_stock):
    """Also the second time, as FastAPI caches the document."""
    ours, again, stock = (get(each, "/openapi.json").json() for each in (v1, v1, v1_stock))
    assert ours == again
    del ours["paths"]["/v1/dft/capabilities"]
    for route in routes_with_fields():
        properties = body_schema(ours, route)["properties"]
        assert properties.pop("diversity") == json_schema.diversity()
        assert properties.pop("style") == json_schema.style()
    assert ours == stock
