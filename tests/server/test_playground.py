"""The playground's page in a real browser, with real servers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.browser import BROWSER, DESKTOP, PHONE, assert_accessible, chromium, playground
from tests.client import metric
from tests.conftest import KEY, PATIENCE

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
NO_CHARACTER = "\ufffd"
WAIT_MS = PATIENCE * 1000
expect = playwright.expect
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def address(v1) -> Iterator[str]:
    with playground(v1.url, KEY) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as instance:
        yield instance


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as ready_page:
        yield ready_page


@contextmanager
def opened(browser, address, viewport=DESKTOP, **options):
    """The loaded page, with the lists `sent` (requests) and `script_errors`."""
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.sent, page.script_errors = [], []
    page.on("request", lambda request: page.sent.append(request))
    page.on("pageerror", lambda error: page.script_errors.append(str(error)))
    try:
        page.goto(address)
        expect(page.locator("#server")).to_have_attribute("aria-busy", "false")
        yield page
        assert not page.script_errors
    finally:
        context.close()


def bodies(page) -> list[dict]:
    return [json.loads(each.post_data) for each in page.sent if each.url.endswith("/api/chat")]


def generate(page, **values) -> None:
    """Fill in the fields, generate, and wait for the end."""
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#generate")
    wait_for(page, "Done|Stopped|Some")


def wait_for(page, status: str) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(f"^({status})"))


def slide(page, column: str, level: float) -> None:
    page.fill(f"#diversity-{column}", str(level))


def test_requests_have_the_chosen_settings(page):
    slide(page, "A", 0)
    slide(page, "B", 0.75)
    page.select_option("#law-B", "words")
    page.select_option("#style-A", "habits")
    page.fill("#system", "You are brief.")
    page.fill("#strength-A", "0.4")
    generate(page, max_tokens=4, n=1, temperature=0.9, seed=7, messages="Tell me.")
    first, second = bodies(page)
    assert first["style"] == {"name": "habits", "strength": 0.4}
    assert first["diversity"] == {"level": 0, "trace": True}
    assert "style" not in second
    assert second["diversity"] == {"law": "words", "level": 0.75, "trace": True}
    for body in (first, second):
        assert body["messages"] == [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "Tell me."},
        ]
        assert (body["n"], body["max_tokens"], body["temperature"], body["seed"]) == (1, 4, 0.9, 7)


def test_the_answers_of_both_settings_are_shown_side_by_side(page):
    generate(page, max_tokens=12, n=2)
    for column, statistics in (("A", "off: the model's own sampling"), ("B", "gated 0.5 · ")):
        answers = page.locator(f"[aria-label='Setting {column}'] article")
        assert answers.count() == 2
        for number in range(2):
            assert answers.nth(number).locator(".text").inner_text()
            assert statistics in answers.nth(number).locator(".statistics").inner_text()
    assert re.match(r"Done: \d+ tokens", page.inner_text("#status"))


@pytest.mark.parametrize("view", ["entropy_before", "entropy_after", "temperature", "changed"])
def test_tokens_spell_the_text_and_show_their_statistics(page, view):
    slide(page, "B", 1)
    generate(page, max_tokens=24, n=1, messages="Tell me of a “naïve” owl 🦉.")
    plain = page.text_content("[aria-label='Setting B'] .text")
    page.check(f"[value={view}]")
    tokens = page.locator("[aria-label='Setting B'] .token")
    # vLLM leaves special tokens and replacement characters of incomplete bytes out of the answer.
    text = re.sub(r"<\|\w+\|>", "", "".join(tokens.all_text_contents())).replace(NO_CHARACTER, "")
    assert text.startswith(plain.replace(NO_CHARACTER, ""))
    heat = tokens.evaluate_all(
        "all => all.map(one => Number(one.style.getPropertyValue('--heat')))"
    )
    assert all(0 <= each <= 1 for each in heat)
    assert any(heat)
    assert "Coloured:" in page.inner_text("#scale")
    page.click("[aria-label='Setting B'] article summary")
    page.wait_for_selector("[aria-label='Setting B'] tbody tr")
    assert page.locator("[aria-label='Setting B'] tbody tr").count() == tokens.count()
    page.check("[value=plain]")
    assert page.text_content("[aria-label='Setting B'] .text") == plain


def test_shared_phrases_are_marked(page):
    texts = ["The old owl flew over the hill.", "An OLD owl, flew over: the sea", "Nothing of it"]
    marks = ["old owl flew over the", "OLD owl, flew over: the"]

    def answered(route):
        choices = [
            {"index": index, "delta": {"content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ]
        headers = {"Content-Type": "text/event-stream"}
        route.fulfill(status=200, headers=headers, body=event_stream({"choices": choices}))

    page.route("**/api/chat", answered)
    generate(page, n=3)
    page.check("[value=shared]")
    column = page.locator("[aria-label='Setting A']")
    assert column.locator("mark").all_text_contents() == marks
    assert column.locator(".text").all_text_contents() == texts
    assert "2 in setting A" in page.inner_text("#scale")


def test_a_refusal_is_shown_at_its_field(page):
    page.eval_on_selector("#diversity-B", "one => { one.max = 2 }")
    slide(page, "B", 1.5)
    generate(page, max_tokens=4, n=1)
    message = page.inner_text("#diversity-B-error")
    assert "got 1.5; accepted: a number from 0 to 1" in message
    assert page.get_attribute("#diversity-B", "aria-invalid") == "true"
    assert page.inner_text("[aria-label='Setting A'] .text")
    slide(page, "B", 0.5)
    generate(page)
    assert page.inner_text("#diversity-B-error") == ""


def test_a_request_that_is_too_long_shows_the_servers_message(page):
    generate(page, max_tokens=4000, n=1)
    messages = " ".join(page.locator(".error").all_inner_texts())
    assert "4000" in messages
    assert page.inner_text("#status").startswith("Some answers failed")


@pytest.mark.parametrize(
    ("name", "value"), [("n", "0"), ("n", ""), ("temperature", "9"), ("messages", " ")]
)
def test_an_invalid_field_is_reported_before_any_request(page, name, value):
    page.fill(f"#{name}", value)
    page.click("#generate")
    assert page.inner_text(f"#{name}-error")
    assert page.evaluate("document.activeElement.id") == name
    assert not bodies(page)


def test_stop_ends_the_engines_requests(page, v1):
    def long_texts(route):
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))

    page.route("**/api/chat", long_texts)
    before = metric(v1, "vllm:generation_tokens_total")
    page.fill("#max_tokens", "450")
    page.click("#generate")
    expect(page.locator(".text").first).not_to_be_empty()
    page.evaluate("document.querySelector('#stop').click()")  # Does nothing if it is disabled.
    wait_for(page, "Stopped|Done")
    while metric(v1, "vllm:num_requests_running") or metric(v1, "vllm:num_requests_waiting"):
        time.sleep(0.1)  # Requests that are not stopped end after 450 tokens.
    assert page.inner_text("#status").startswith("Stopped")
    assert metric(v1, "vllm:generation_tokens_total") - before < 4 * 450
    assert "stopped" in page.inner_text("[aria-label='Setting B'] .statistics >> nth=0")
    page.unroute("**/api/chat")
    generate(page, max_tokens=4)
    assert page.inner_text("#status").startswith("Done")


EVENTS = (
    ': a comment\r\n\r\ndata: {"id": 1}\r\n\r\ndata:{"id": 2}\n\n'
    'event: x\ndata: {"id": "ö"}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [(EVENTS, size, [1, 2, "ö", "end"]) for size in (1, 2, 3, 7, 1000)]
    + [
        ('data: {"id": 1}\n\ndata: {"id', 4, [1, "The answer broke off before its end."]),
        ('data: {"i\n\ndata: {"error": {"message": "gone"}}\n\n', 5, ["gone"]),
        ('data: {"error": "Unauthorized"}\n\n', 9, ["Unauthorized"]),
    ],
)
def test_events_are_parsed_for_any_chunk_size(page, text, size, expected):
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    found = page.evaluate(
        """async parts => {
            const { eventsOf } = await import("/static/stream.js");
            const found = [];
            const start = (sink) => { parts.forEach((part) => sink.enqueue(part)); sink.close(); };
            const stream = new ReadableStream({ start });
            try {
                for await (const { id } of eventsOf(stream)) found.push(id);
                found.push("end");
            } catch (error) {
                found.push(error.message);
            }
            return found;
        }""",
        parts,
    )
    assert found == expected


def event_stream(*events: dict) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def test_reasoning_clamped_values_and_tool_calls_are_shown(page):
    """The test model's server never returns these."""

    def answered(route):
        delta = {"reasoning": "Hm, a lamp.", "tool_calls": [{"index": 0}]}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        last = {"index": 0, "delta": {"content": "A lamp."}, "finish_reason": "length"}
        diversity = {"law": "gated", "level": 0.4, "clamped": {"level": 0.9}, "choices": [None]}
        events = ({"choices": [choice]}, {"choices": [last], "diversity": diversity})
        headers = {"Content-Type": "text/event-stream"}
        route.fulfill(status=200, headers=headers, body=event_stream(*events))

    page.route("**/api/chat", answered)
    generate(page, n=1)
    answer = page.locator("[aria-label='Setting B'] article")
    assert answer.locator(".reasoning").inner_text() == "Hm, a lamp."
    assert answer.locator(".text").inner_text() == "A lamp."
    statistics = answer.locator(".statistics").inner_text()
    for part in ("gated 0.4", "from level 0.9", "cut at max tokens", "calls tools"):
        assert part in statistics


def test_an_answer_that_is_not_a_stream_is_shown_as_text(page):
    page.route("**/api/chat", lambda route: route.fulfill(status=200, body="<p>a gateway</p>"))
    generate(page, n=1)
    assert "<p>a gateway</p>" in page.inner_text("[aria-label='Setting A'] [data-error=other]")
    assert page.is_enabled("#generate")


@pytest.mark.parametrize("language", ["curl", "python"])
def test_the_shown_code_runs(page, language):
    page.fill("#messages", "It's a \"quoted\" owl's\nline: $HOME `id` 🦉 \\n")
    page.fill("#max_tokens", "4")
    slide(page, "B", 0.65)
    page.click("[aria-label='Setting B'] .code summary")
    code = page.text_content(f"[aria-label='Setting B'] [data-code={language}]")
    if language == "curl" and shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    command = ["bash", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "0.65" in ran.stdout
    assert "mean_entropy_after" in ran.stdout


def test_the_copy_button_copies_the_code(browser, address):
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.click("[aria-label='Setting A'] .code summary")
        page.click("[aria-label='Setting A'] [data-copy=python]")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.text_content("[aria-label='Setting A'] [data-code=python]")


def test_no_request_leaves_the_host_or_contains_the_key(page, address):
    generate(page, max_tokens=4)
    assert page.sent
    for request in page.sent:
        assert request.url.startswith((address, "data:"))
        assert KEY not in json.dumps(request.all_headers())
    for url in {request.url for request in page.sent if request.url.startswith("http")}:
        assert KEY not in page.request.fetch(url, fail_on_status_code=False).text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_is_accessible(browser, address, scheme, viewport):
    with opened(browser, address, viewport, color_scheme=scheme) as page:
        generate(page, max_tokens=24)
        page.click("[aria-label='Setting B'] article >> nth=0 >> summary")
        page.click("[aria-label='Setting B'] .code summary")
        for view in ("plain", "temperature", "shared"):
            page.check(f"[value={view}]")
            # The checker's script is injected by the browser, so the page's CSP does not apply.
            assert_accessible(page)


def test_the_page_works_by_keyboard_alone(page):
    page.focus("#messages")
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert order[:6] == ["model", "n", "max_tokens", "temperature", "seed", "generate"]
    assert "diversity-A" in order
    page.focus("#diversity-A")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#diversity-A") == "0.05"
    page.fill("#max_tokens", "4")
    page.focus("#n")
    page.keyboard.press("Enter")
    wait_for(page, "Done")
    page.focus("[value=plain]")
    page.keyboard.press("ArrowDown")
    assert page.is_checked("[value=shared]")


def test_a_server_without_the_plug_in_is_reported_and_still_used(browser, v1_stock):
    with playground(v1_stock.url, KEY) as address, opened(browser, address) as page:
        assert "has no diversity field" in page.inner_text("#server")
        assert page.is_disabled("#diversity-A")
        generate(page, max_tokens=4, n=1)
        assert "diversity" not in bodies(page)[0]
        assert "has no diversity field" in page.inner_text("#server")
        assert page.inner_text("[aria-label='Setting A'] .text")


def test_a_wrong_key_and_an_unreachable_server_are_reported(browser, v1):
    with playground(v1.url, "wrong") as address, opened(browser, address) as page:
        assert "refuses the API key of OPENAI_API_KEY" in page.inner_text("#server")
        generate(page, n=1)
        assert "Unauthorized" in page.inner_text("[aria-label='Setting A'] [data-error=other]")
    with playground("http://127.0.0.1:9", KEY) as address, opened(browser, address) as page:
        assert "is it running?" in page.inner_text("#server")
        generate(page)
        assert "is it running?" in page.inner_text("[aria-label='Setting A'] [data-error=other]")


def test_pages_of_other_origins_cannot_use_the_key(address):
    """A page of another origin can send simple requests, and any request to its own domain, which
    may resolve to this server."""
    with httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client:
        plain = client.post("api/chat", content="{}", headers={"Content-Type": "text/plain"})
        assert plain.status_code == 415
        other = client.get("api/server", headers={"Host": "attacker.example"})
        assert other.status_code == 400
        headers = {"Origin": "http://attacker.example", "Access-Control-Request-Method": "POST"}
        preflight = client.options("api/chat", headers=headers)
        assert "access-control-allow-origin" not in preflight.headers
        large = client.post("api/chat", json={"pad": "x" * (1 << 20)})
        assert large.status_code == 413


@pytest.mark.parametrize("name", ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "none.js"])
def test_no_other_file_is_served(address, name):
    """Sent over a socket, as HTTP clients normalise paths."""
    host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET /static/{name} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] == b"404"


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:99999", "ftp://localhost"])
def test_an_invalid_url_is_reported_in_one_line(url):
    command = [sys.executable, "-m", "dftserve.cli", "playground", "--port", "0", "--url", url]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert f"--url: got '{url}'; accepted: http://HOST:PORT" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_used_port_is_reported_in_one_line(address):
    port = address.rstrip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "dftserve.cli", "playground", "--port", port]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert f"port {port} of 127.0.0.1" in ran.stderr
    assert "Traceback" not in ran.stderr
