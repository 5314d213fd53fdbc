"""The served teacher, with a small HTTP server that answers like vLLM."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest

from dftserve.openai_client import ServerError
from dftserve.targets.document import Document
from dftserve.targets.served import ServedTeacher
from tests import local_server

V = 12
REFUSED = (ValueError, ServerError)


def law(tokens):
    """ln p of the next token: an arbitrary rule, from which the tests compute what they expect."""
    logits_V = np.random.default_rng(sum(tokens) + len(tokens)).normal(0, 2, V)
    logits_V[(sum(tokens) + 1) % V] = -np.inf
    return logits_V - np.log(np.exp(logits_V).sum())


def position(tokens, k):
    """vLLM's entry: the top k by rank, and the token of the text."""
    logprobs_V = law(tokens[:-1])
    order = np.argsort(-logprobs_V, kind="stable").tolist()
    rank_of = {token: rank for rank, token in enumerate(order[:k], 1)}
    rank_of.setdefault(tokens[-1], order.index(tokens[-1]) + 1)
    return {
        str(token): {
            "logprob": max(float(logprobs_V[token]), -9999.0),
            "rank": rank,
            "decoded_token": "?",
        }
        for token, rank in rank_of.items()
    }


def vllm(request):
    tokens, k = request["prompt"], request["prompt_logprobs"]
    positions = [None, *(position(tokens[: i + 1], k) for i in range(1, len(tokens)))]
    return 200, {"choices": [{"text": "a", "prompt_logprobs": positions}]}


@contextmanager
def serving(answer):
    """The address of a server that answers by `answer(request)`, and the received requests."""
    received = []

    def reply(request):
        asked = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        received.append((request.path, asked, request.headers.get("Authorization")))
        status, content = answer(asked)
        body = content if isinstance(content, str) else json.dumps(content)
        local_server.reply(request, status, body.encode(), **{"Content-Type": "application/json"})

    with local_server.serving(reply) as url:
        yield url, received


def document(length, seed=0):
    rng = np.random.default_rng(seed)
    trained_N = rng.random(length) < 0.7
    trained_N[0], trained_N[-1] = False, True
    return Document(rng.integers(0, V, length).astype(np.int32), trained_N)


def request_targets(url, documents, k=3, **kw):
    source = ServedTeacher(url, "m", vocabulary=V, **kw)
    return source.targets(documents, k=k, draws=5, seeds=[0] * len(documents))


@pytest.mark.parametrize("k", [1, 3, V, V + 9])
@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_targets_are_the_top_tokens_and_one_tail(k, suffix):
    documents = [document(length, seed) for seed, length in enumerate([20, 3, 9, 12, 30, 2])]
    with serving(vllm) as (url, received):
        found = request_targets(url + suffix, documents, k=k)
    assert {path for path, _, _ in received} == {"/v1/completions"}
    for doc, targets in zip(documents, found, strict=True):
        assert targets.tail_ids_TM.shape == (len(doc.positions_T), 0)
        for row, index in enumerate(doc.positions_T.tolist()):
            logprobs_V = law(doc.tokens_N[:index].tolist())
            order = np.argsort(-logprobs_V, kind="stable")[:k]
            top = np.exp(logprobs_V[order])
            rest = 1 - top.sum()
            assert targets.top_ids_TK[row].tolist() == order.tolist()
            np.testing.assert_allclose(
                targets.top_logprobs_TK[row], logprobs_V[order], rtol=1e-5, atol=1e-6
            )
            assert math.exp(targets.tail_logprob_T[row]) == pytest.approx(rest, abs=1e-6)
            own = logprobs_V[doc.tokens_N[index]]
            assert math.exp(targets.token_logprob_T[row]) == pytest.approx(math.exp(own), abs=1e-6)
            cells = [p for p in [*top, rest] if p > 1e-12]
            entropy = -sum(p * math.log(p) for p in cells)
            assert targets.entropy_T[row] == pytest.approx(entropy, abs=1e-5)
            whole = -sum(p * math.log(p) for p in np.exp(logprobs_V) if p > 0)
            assert targets.entropy_T[row] <= whole + 1e-5


def test_requests_to_a_busy_server_are_repeated():
    statuses = [429, 503, 500]

    def busy(request):
        return (statuses.pop(), {"error": {"message": "busy"}}) if statuses else vllm(request)

    with serving(busy) as (url, received):
        request_targets(url, [document(5)])
    assert len(received) == 4


def test_a_document_without_trained_tokens_has_no_targets():
    with serving(vllm) as (url, _):
        (found,) = request_targets(url, [Document(np.zeros(3, np.int32), np.zeros(3, bool))])
    assert len(found) == 0


def one_position(entries):
    return 200, {"choices": [{"prompt_logprobs": [None, entries]}]}


TOP = {str(i): {"logprob": -1.5, "rank": i + 1} for i in range(3)}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((503, {"error": {"message": "asleep"}}), r"answers 503 \(asleep\)"),
        ((401, {"error": "Unauthorized"}), "refuses the API key .401: Unauthorized."),
        (
            (404, {"message": "no such model"}),
            "answers 404 .no such model.*whether it serves this model",
        ),
        ((400, {"message": "Requested prompt logprobs of 3, max 1"}), "--max-logprobs 3"),
        ((400, {"error": {"message": "too long"}}), "refuses the request: too long"),
        ((200, "hello"), "did not answer with a completion"),
        ((200, {"choices": [{"text": "a"}]}), "without prompt_logprobs"),
        ((200, {"choices": [{"prompt_logprobs": None}]}), "without prompt_logprobs"),
        ((200, [1]), "without prompt_logprobs"),
        ((200, {"choices": [{"prompt_logprobs": [None]}]}), "1 tokens of 2"),
        (one_position(None), "for a position"),
        (one_position({"0": -1.0}), "for a position"),
        (one_position({str(V): {"logprob": -1.0, "rank": 1}}), f"names the token {V}"),
        (one_position({"5": {"logprob": -1.0, "rank": 1}}), "own token 0"),
        (one_position({"0": {"logprob": -1.0, "rank": 1}}), "names 1 top tokens; asked for 3"),
        (one_position({**TOP, "1": {"logprob": 4.0, "rank": 2}}), "log-probabilities"),
    ],
)
def test_wrong_answers_are_refused_with_the_reason(answer, message):
    doc = Document(np.zeros(2, np.int32), np.array([False, True]))
    with serving(lambda request: answer) as (url, _), pytest.raises(REFUSED, match=message):
        request_targets(url, [doc], retries=1)


def test_an_unreachable_server_is_reported():
    with serving(vllm) as (url, _):
        pass
    with pytest.raises(ServerError, match="is unreachable"):
        request_targets(url, [document(5)], retries=1)


def test_the_key_is_sent_to_the_server_and_appears_nowhere_else(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-123")
    with serving(vllm) as (url, received):
        request_targets(url, [document(5)], key_variable="SOME_KEY")
    assert received[0][2] == "Bearer secret-123"
    source = ServedTeacher(url, "m", vocabulary=V, key_variable="SOME_KEY")
    assert "secret" not in f"{source.describe()}{vars(source)}"
    with (
        serving(lambda request: (401, {"error": "no"})) as (url, _),
        pytest.raises(ServerError, match="refuses the API key") as caught,
    ):
        request_targets(url, [document(5)], key_variable="SOME_KEY")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", "secret\n123")
    with pytest.raises(ValueError, match="SOME_KEY holds no API key") as caught:
        ServedTeacher(url, "m", vocabulary=V, key_variable="SOME_KEY")
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ValueError, match="SOME_KEY holds no API key"):
        ServedTeacher(url, "m", vocabulary=V, key_variable="SOME_KEY")
