"""The client: the key that it sends, its retries, and its error messages."""

import asyncio
import json
import threading

import pytest

from dftserve.openai_client import Server, ServerError, ask_all, key_of
from tests.conftest import PATIENCE
from tests.local_server import reply, serving

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


class Fake:
    """A server that answers with these statuses in turn, and then repeats the last."""

    def __init__(
        self, *statuses: int, body: bytes = b'{"error": {"message": "why\\n not"}}'
    ) -> None:
        self.statuses, self.body = list(statuses), body
        self.keys: list[str | None] = []

    def __call__(self, request) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.keys.append(request.headers.get("Authorization"))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        body = completion("yes") if status == 200 else self.body
        reply(request, status, body, **JSON, **{"retry-after-ms": "1"})


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    about = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**about, "choices": [choice]}).encode()


def ask(server: Server) -> str:
    with server.client() as client, server.errors():
        answer = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    return server.choices(answer)[0].message.content


def test_the_key_is_read_from_the_named_variable(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "usual")
    monkeypatch.setenv("OTHER", " other\n")
    fake = Fake(200)
    with serving(fake) as url:
        ask(Server(f"{url}/v1"))
        ask(Server(f"{url}/v1", "OTHER"))
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(Server(f"{url}/v1"))
    assert fake.keys == ["Bearer usual", "Bearer other", "Bearer EMPTY"]


@pytest.mark.parametrize("value", [None, "", " ", "se\ncret", "schlüssel"])
def test_a_named_variable_must_hold_a_key_and_its_value_is_not_shown(monkeypatch, value):
    monkeypatch.delenv("OTHER", raising=False)
    if value is not None:
        monkeypatch.setenv("OTHER", value)
    with pytest.raises(ValueError, match="OTHER holds no API key") as error:
        key_of("OTHER")
    assert not (value and value.strip() and value in str(error.value))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_temporary_failure_is_retried_and_a_permanent_one_is_reported(status):
    fake = Fake(status, status, 200)
    with serving(fake) as url:
        assert ask(Server(f"{url}/v1", retries=2)) == "yes"
        assert len(fake.keys) == 3
        fake.statuses = [status]
        with pytest.raises(ServerError, match=f"{status}.*why not"):
            ask(Server(f"{url}/v1", retries=1))
    assert len(fake.keys) == 5


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (400, b'{"error": {"message": "no"}}', ValueError, "refuses the request: no"),
        (422, b'{"error": {"message": "no"}}', ValueError, "refuses the request: no"),
        (401, b"{}", ServerError, "refuses the API key"),
        (404, b'{"error": {"message": "no m"}}', ServerError, "answers 404 .no m"),
        (404, b"x" * 9999, ServerError, "answers 404 .x{300}.; see"),
    ],
)
def test_a_server_error_is_reported_without_retries(status, body, error, message):
    fake = Fake(status, body=body)
    with serving(fake) as url, pytest.raises(error, match=message):
        ask(Server(f"{url}/v1", name="the judge"))
    assert len(fake.keys) == 1


def test_the_first_error_cancels_the_other_requests():
    """The second request never gets an answer."""
    done = threading.Event()

    def handle(request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if body["model"] == "slow":
            done.wait(PATIENCE)
        reply(request, 400, b"{}", **JSON)

    with serving(handle) as url:
        server = Server(f"{url}/v1")

        async def one(client, model: str) -> None:
            with server.errors():
                await client.chat.completions.create(**{**CHAT, "model": model})

        with pytest.raises(ValueError, match="refuses"):
            ask_all(server, ["slow", "m"], one, 2)
        done.set()


def test_every_item_is_processed_once_with_limited_concurrency():
    running, most, seen = 0, 0, []

    async def one(client, item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        seen.append(item)

    ask_all(Server("http://127.0.0.1:9/v1"), range(20), one, 3)
    assert sorted(seen) == list(range(20))
    assert most == 3


def test_it_works_inside_a_running_event_loop():
    """As in a notebook."""
    seen = []

    async def one(client, item: int) -> None:
        seen.append(item)

    async def cell() -> None:
        ask_all(Server("http://127.0.0.1:9/v1"), [1], one, 1)

    asyncio.run(cell())
    assert seen == [1]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": []}', b"<html>"])
def test_a_server_without_models_is_reported(body):
    def handle(request) -> None:
        reply(request, 200, body, **JSON)

    with serving(handle) as url, pytest.raises(ServerError, match=r"no model|with a completion"):
        Server(f"{url}/v1", retries=0).models()


@pytest.mark.parametrize(
    ("status", "body", "result"),
    [
        (200, b'{"active": true}', {"active": True}),
        (404, b'{"detail": "Not Found"}', None),
        (200, b"[]", None),
        (401, b'{"error": "Unauthorized"}', ServerError),
        (500, b"{}", ServerError),
    ],
)
def test_a_server_without_the_plug_in_is_distinguished_from_an_error(status, body, result):
    """A wrong key does not mean that the plug-in is missing."""
    with serving(lambda request: reply(request, status, body, **JSON)) as url:
        server = Server(f"{url}/v1", retries=0)
        if result is ServerError:
            with pytest.raises(ServerError, match=str(status)):
                server.capabilities()
        else:
            assert server.capabilities() == result
