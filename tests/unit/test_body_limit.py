"""Large bodies with our fields get a 413 before they are read whole; others are left to vLLM."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from dftserve_vllm import app, body_limit, field_guard, hooks
from fastapi import FastAPI, Request
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

LIMIT = 1 << 20
PIECE = 1 << 16
FIELD = b'{"diversity": 0.5, "prompt": "'
STYLE = b'{"vllm_xargs": {"style" : "human"}, "prompt": "'
PLAIN = b'{"user": "diversity", "prompt": "'
ROUTE = "/v1/completions"


@pytest.fixture
def one_mebibyte(monkeypatch):
    monkeypatch.setenv(body_limit.VARIABLE, "1")
    body_limit.largest.cache_clear()
    yield
    body_limit.largest.cache_clear()


@pytest.fixture
def served(one_mebibyte) -> FastAPI:
    """An app whose routes answer, and report errors, as vLLM's do."""
    fast = FastAPI()
    fast.state.args = SimpleNamespace(log_error_stack=False)

    @fast.post(ROUTE)
    async def route(body: dict) -> dict:
        return {"characters": len(body["prompt"])}

    @fast.post("/v1/audio/transcriptions")
    async def audio(request: Request) -> dict:
        return {"characters": len(await request.body())}

    init_exception_handler(fast)
    return app.extend(fast)


class Pieces:
    """A body with `size` bytes of filler, sent in pieces on demand."""

    def __init__(self, begins: bytes, size: int, ends: bytes = b'"}') -> None:
        filler = [b"x" * PIECE] * (size // PIECE)
        self._pieces = [begins, *filler, ends]
        self.sent = 0
        self.length = sum(map(len, self._pieces))

    async def __aiter__(self):
        for piece in self._pieces:
            self.sent += len(piece)
            yield piece


def post(
    fast, pieces: Pieces, *, declared: bool, path: str = ROUTE, kind: str = "application/json"
):
    headers = {"content-type": kind}
    if declared:
        headers["content-length"] = str(pieces.length)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(fast)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=pieces, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize("begins", [FIELD, STYLE])
@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_with_a_field_is_refused_before_it_is_read_whole(served, begins, declared):
    pieces = Pieces(begins, 16 * LIMIT)
    answer = post(served, pieces, declared=declared)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert error["code"] == 413
    assert "1 MiB" in error["message"]
    assert body_limit.VARIABLE in error["message"]
    # A declared length is refused at the field's name, otherwise where the limit is passed.
    most = len(begins) if declared else LIMIT + PIECE
    assert pieces.sent <= most


@pytest.mark.parametrize("declared", [True, False])
def test_a_field_at_the_end_of_a_large_body_is_refused(served, declared):
    pieces = Pieces(b'{"prompt": "', 2 * LIMIT, b'", "diversity": 0.5}')
    assert post(served, pieces, declared=declared).status_code == 413


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("begins", "size"), [(PLAIN, 3 * LIMIT), (FIELD, LIMIT // 2), (STYLE, LIMIT // 2)]
)
def test_other_bodies_are_left_to_vllm(served, begins, size, declared):
    answer = post(served, Pieces(begins, size), declared=declared)
    assert answer.status_code == 200
    assert answer.json() == {"characters": size}


def test_a_body_that_is_not_json_is_left_to_vllm(served):
    pieces = Pieces(FIELD, 2 * LIMIT)
    path, kind = "/v1/audio/transcriptions", "multipart/form-data; boundary=x"
    assert post(served, pieces, declared=False, path=path, kind=kind).status_code == 200


ENCODINGS = [
    "utf-8-sig",
    *(f"utf-{size}{order}" for size in (16, 32) for order in ("", "-le", "-be")),
]
"""Those that `json.loads` detects: `test_starlette_reads_every_encoding`."""


class Encoded(Pieces):
    """The body in an encoding, cut within characters."""

    def __init__(self, encoding: str, begins: bytes, size: int) -> None:
        super().__init__(begins, size)
        whole = b"".join(self._pieces).decode().encode(encoding)
        self._pieces = [whole[i : i + PIECE - 1] for i in range(0, len(whole), PIECE - 1)]
        self.length = len(whole)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_starlette_reads_every_encoding(served, encoding):
    answer = post(served, Encoded(encoding, FIELD, PIECE), declared=True)
    assert answer.json() == {"characters": PIECE}


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_large_body_with_a_field_is_refused_in_every_encoding(served, encoding, declared):
    assert post(served, Encoded(encoding, FIELD, LIMIT), declared=declared).status_code == 413
    plain = post(served, Encoded(encoding, PLAIN, LIMIT), declared=declared)
    assert plain.json() == {"characters": LIMIT}


@pytest.mark.parametrize(
    "kind", ["Application/JSON", "APPLICATION/JSON; charset=utf-8", "application/vnd.x+Json"]
)
def test_a_content_type_is_case_insensitive(served, kind):
    assert post(served, Pieces(FIELD, PIECE), declared=False, kind=kind).status_code == 200
    assert post(served, Pieces(FIELD, 2 * LIMIT), declared=False, kind=kind).status_code == 413


@pytest.mark.parametrize("name", ["diversity", "style"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_guard_finds_a_field_in_every_encoding(encoding, name):
    escaped = f"\\u{ord(name[0]):04x}{name[1:]}"
    for key, is_field in ((name, True), (escaped, True), ("user", False)):
        assert field_guard._has_field(f'{{"{key}": 1}}'.encode(encoding), name) == is_field


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_large_body_with_a_field_is_refused_even_where_its_hook_failed(
    monkeypatch, one_mebibyte, declared, is_wrapped
):
    lost = hooks.REQUEST_HOOKS[1]
    monkeypatch.setattr(hooks, "_installed", hooks.HOOKS)
    monkeypatch.setattr(hooks, "problems", lambda: {lost.name: "it is not there"})
    fast = FastAPI()
    fast.state.args = SimpleNamespace(log_error_stack=False)

    @fast.post(ROUTE)
    async def route(body: dict) -> dict:
        return {"characters": len(body["prompt"])}

    init_exception_handler(fast)
    if is_wrapped:
        stack = fast.build_middleware_stack()
        fast.middleware_stack = lambda *given: stack(*given)
    app.extend(fast)
    refused = post(fast, Pieces(b'{"prompt": "', 2 * LIMIT, b'", "style": "a"}'), declared=declared)
    assert refused.status_code == 413
    answer = post(fast, Pieces(PLAIN, 2 * LIMIT), declared=declared)
    assert answer.json() == {"characters": 2 * LIMIT}


@pytest.mark.parametrize("cut", range(len('"diversity"  :') + 1))
@pytest.mark.parametrize("whole", [b'xx"diversity"  :0.5,"a":1', b'"style":' + b"1" * 100])
def test_a_name_is_found_however_the_body_is_cut(whole, cut):
    for pieces in ([whole[:cut], whole[cut:]], [whole[i : i + 1] for i in range(len(whole))]):
        names = body_limit.FieldNames()
        for piece in pieces:
            names.look(piece)
        assert names.seen


@pytest.mark.parametrize("blanks", [" " * 33, " " * 5000, "\n\t\r " * 100])
@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_a_name_is_found_however_far_its_colon_is(blanks, piece):
    """JSON allows any number of blanks between them."""
    whole = f'{{"diversity"{blanks}:{blanks}0.5, "prompt": "x"}}'
    assert json.loads(whole)["diversity"] == 0.5
    for text, is_found in ((whole, True), (whole.replace("diversity", "diver sity"), False)):
        names = body_limit.FieldNames()
        for i in range(0, len(text), piece):
            names.look(text[i : i + piece].encode())
        assert names.seen == is_found


@pytest.mark.parametrize("body", [{"user": "style"}, {"styles": 1}, {"prompt": '"diversity": 1'}])
def test_other_names_and_values_are_not_found(body):
    names = body_limit.FieldNames()
    names.look(json.dumps(body).encode())
    assert not names.seen


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "4097", "9" * 5000, "²"])
def test_an_invalid_limit_is_refused(monkeypatch, text):
    monkeypatch.setenv(body_limit.VARIABLE, text)
    body_limit.largest.cache_clear()
    with pytest.raises(ValueError, match="from 1 to 4096") as refusal:
        body_limit.largest()
    assert len(str(refusal.value)) < 200
    body_limit.largest.cache_clear()


@pytest.mark.parametrize("text", [None, ""])
def test_the_limit_is_32_mebibytes_by_default(monkeypatch, text):
    if text is None:
        monkeypatch.delenv(body_limit.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(body_limit.VARIABLE, text)
    body_limit.largest.cache_clear()
    assert body_limit.largest() == 32 << 20
    body_limit.largest.cache_clear()
