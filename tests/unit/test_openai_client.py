"""The client: which key is sent, how often it tries, and what a user is told."""

import asyncio
import json
import threading

import pytest

from dftserve.openai_client import Server, ServerError, ask_all, key_of
from tests.local_server import reply, serving

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


class Fake:
    """A server that answers with these statuses in turn, the last one for ever."""

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


def test_the_key_is_the_variables_that_is_named(monkeypatch):
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
def test_a_named_variable_must_hold_a_key_and_is_not_repeated(monkeypatch, value):
    monkeypatch.delenv("OTHER", raising=False)
    if value is not None:
        monkeypatch.setenv("OTHER", value)
    with pytest.raises(ValueError, match="OTHER holds no API key") as told:
        key_of("OTHER")
    assert not (value and value.strip() and value in str(told.value))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_failure_is_tried_again_and_a_lasting_one_is_told(status):
    fake = Fake(status, status, 200)
    with serving(fake) as url:
        assert ask(Server(f"{url}/v1", retries=2)) == "yes"
        assert len(fake.keys) == 3
        fake.statuses = [status]
        with pytest.raises(ServerError, match=f"{status}.*why not"):
            ask(Server(f"{url}/v1", retries=1))
    assert len(fake.keys) == 5


@pytest.mark.parametrize(
    ("status", "body", "error", "told"),
    [
        (400, b'{"error": {"message": "no"}}', ValueError, "refuses the request: no"),
        (422, b'{"error": {"message": "no"}}', ValueError, "refuses the request: no"),
        (401, b"{}", ServerError, "refuses the API key"),
        (404, b'{"error": {"message": "no m"}}', ServerError, "answers 404 .no m"),
        (404, b"x" * 9999, ServerError, "answers 404 .x{300}.; see"),
    ],
)
def test_what_the_server_says_is_told_once(status, body, error, told):
    fake = Fake(status, body=body)
    with serving(fake) as url, pytest.raises(error, match=told):
        ask(Server(f"{url}/v1", name="the judge"))
    assert len(fake.keys) == 1


def test_the_first_error_ends_the_others():
    """The second request never gets an answer."""
    ended = threading.Event()

    def handle(request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if body["model"] == "slow":
            ended.wait(60)
        reply(request, 400, b"{}", **JSON)

    with serving(handle) as url:
        server = Server(f"{url}/v1")

        async def one(client, model: str) -> None:
            with server.errors():
                await client.chat.completions.create(**{**CHAT, "model": model})

        with pytest.raises(ValueError, match="refuses"):
            ask_all(server, ["slow", "m"], one, 2)
        ended.set()


def test_every_item_is_asked_once_and_so_many_at_a_time():
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


def test_it_works_where_a_loop_runs():
    """As in a notebook."""
    seen = []

    async def one(client, item: int) -> None:
        seen.append(item)

    async def cell() -> None:
        ask_all(Server("http://127.0.0.1:9/v1"), [1], one, 1)

    asyncio.run(cell())
    assert seen == [1]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": []}', b"<html>"])
def test_a_server_without_models_is_told(body):
    def handle(request) -> None:
        reply(request, 200, body, **JSON)

    with serving(handle) as url, pytest.raises(ServerError, match=r"no model|with a completion"):
        Server(f"{url}/v1", retries=0).models()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b'{"active": true}', {"active": True}),
        (404, b'{"detail": "Not Found"}', None),
        (200, b"[]", None),
        (401, b'{"error": "Unauthorized"}', ServerError),
        (500, b"{}", ServerError),
    ],
)
def test_a_server_without_the_plug_in_is_told_from_one_that_does_not_say(status, body, said):
    """A wrong key is no missing plug-in."""
    with serving(lambda request: reply(request, status, body, **JSON)) as url:
        server = Server(f"{url}/v1", retries=0)
        if said is ServerError:
            with pytest.raises(ServerError, match=str(status)):
                server.capabilities()
        else:
            assert server.capabilities() == said
