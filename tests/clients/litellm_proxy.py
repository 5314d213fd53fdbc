"""LiteLLM's proxy, with plain HTTP requests to its four routes.

Its configuration has one model for each case, so that the case is in the URL it requests.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from ways import KEY, MESSAGES, MODEL, PROMPT, RefusedError, Seen, Way, ask_all, cases, header_in

MASTER_KEY = "sk-of-a-proxy-that-lives-for-one-test-and-listens-on-loopback-only"
PATIENCE = 3600

ROUTES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 8},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 8},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 8},
}
IN_THE_BODY: dict[str, Callable[[Any], dict[str, Any]]] = {
    "top level": lambda value: {"diversity": value},
    "`vllm_xargs`": lambda value: {"vllm_xargs": {"diversity": str(value)}},
    "`extra_body`": lambda value: {"extra_body": {"diversity": value}},
}
IN_THE_CONFIGURATION: dict[str, Callable[[Any], dict[str, Any]]] = {
    "the model's `extra_body`": IN_THE_BODY["`extra_body`"],
    "the model's `litellm_params`": IN_THE_BODY["top level"],
}
WITH_SETTINGS = {
    "`drop_params`": {"drop_params": True},
    "`allowed_openai_params`": {"allowed_openai_params": ["diversity"]},
}


def make_ways(ask: Callable[..., Seen]) -> list[Way]:
    listed = []
    with_settings = [f"top level and {name}" for name in WITH_SETTINGS]
    for prefix, more in {"hosted_vllm/": with_settings, "openai/": []}.items():
        for path in ROUTES:
            listed += [
                Way(f"`{prefix}` {path}", written, make_ask(ask, path, written))
                for written in (*IN_THE_BODY, *more, *IN_THE_CONFIGURATION)
            ]
    return listed


def make_ask(ask: Callable[..., Seen], path: str, written: str) -> Callable[[str, Any, bool], Seen]:
    return lambda url, value, stream: ask(url, path, written, value, stream)


def body_fields(written: str, value: Any) -> dict[str, Any]:
    """Fields for the request's body."""
    by_name = {name: make for name, make in IN_THE_BODY.items() if written.startswith(name)}
    return next(iter(by_name.values()))(value) if by_name else {}


def model_settings(written: str, value: Any) -> dict[str, Any]:
    """Settings for the model in the proxy's configuration."""
    if written in IN_THE_CONFIGURATION:
        return IN_THE_CONFIGURATION[written](value)
    return next((given for name, given in WITH_SETTINGS.items() if written.endswith(name)), {})


def configuration(upstream: str, listed: list[Way]) -> dict[str, Any]:
    models = [
        {
            "model_name": case,
            "litellm_params": {
                "model": way.route.split("`")[1] + MODEL,
                "api_base": f"{upstream}/{case}/v1",
                "api_key": KEY,
                **model_settings(way.written, value),
            },
        }
        for case, way, value, _ in cases(listed)
    ]
    return {
        "model_list": models,
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": MASTER_KEY},
    }


@contextlib.contextmanager
def proxy(upstream: str, listed: list[Way], folder: Path) -> Iterator[str]:
    """The URL of a running proxy."""
    config = folder / "proxy.yaml"
    config.write_text(json.dumps(configuration(upstream, listed)))
    command = [Path(sys.executable).with_name("litellm"), "--config", config]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with held_port() as port, (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            wait_until_alive(process, f"http://127.0.0.1:{port}", folder / "proxy.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """As dftserve.serve.held_port, which the clients' environment lacks."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def wait_until_alive(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/liveliness", trust_env=False).status_code == 200:
                return
        time.sleep(0.25)
    raise RuntimeError(f"the proxy did not start:\n{log.read_text()[-3000:]}")


def main() -> None:
    client = httpx.Client(
        trust_env=False, timeout=PATIENCE, headers={"Authorization": f"Bearer {MASTER_KEY}"}
    )

    def ask(url: str, path: str, written: str, value: Any, stream: bool) -> Seen:
        case = url.removesuffix("/v1").rpartition("/")[2]
        body = {"model": case, "stream": stream, **ROUTES[path], **body_fields(written, value)}
        return seen_of(client.post(f"{address}{path}", json=body), stream)

    listed = make_ways(ask)
    with proxy(sys.argv[1], listed, Path(sys.argv[2]).parent) as address:
        ask_all(listed)


def seen_of(answer: httpx.Response, stream: bool) -> Seen:
    if answer.status_code != 200:
        raise RefusedError(
            f"HTTP {answer.status_code}",
            answer.text,
            answer.status_code,
            answer.json().get("error", {}).get("param"),
        )
    header = header_in(answer.headers)
    if stream:
        return Seen("mean_entropy_after" in answer.text or None, header)
    return Seen(answer.json().get("diversity"), header)


if __name__ == "__main__":
    main()
