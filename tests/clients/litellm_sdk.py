"""LiteLLM as a library, with both of its prefixes for an OpenAI-compatible server."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Otherwise its import makes a request.

import litellm
from ways import KEY, MESSAGES, MODEL, PROMPT, Seen, Way, ask_all, header_in

WRITTEN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "argument": lambda value: {"diversity": value},
    "`extra_body`": lambda value: {"extra_body": {"diversity": value}},
    "`vllm_xargs`": lambda value: {"vllm_xargs": {"diversity": str(value)}},
    "argument and `drop_params`": lambda value: {"diversity": value, "drop_params": True},
    "argument and `allowed_openai_params`": lambda value: {
        "diversity": value,
        "allowed_openai_params": ["diversity"],
    },
}


def make_ways() -> list[Way]:
    return [
        Way(f"`{prefix}` {route}", written, make_ask(call, prefix, fields))
        for prefix in ("hosted_vllm/", "openai/")
        for route, call in CALLS.items()
        for written, fields in WRITTEN.items()
    ]


def make_ask(
    call: Callable[..., Seen], prefix: str, fields: Callable[[Any], dict[str, Any]]
) -> Callable[[str, Any, bool], Seen]:
    def ask(url: str, value: Any, stream: bool) -> Seen:
        common = {"model": f"{prefix}{MODEL}", "api_base": url, "api_key": KEY, "max_retries": 0}
        return call(**common, stream=stream, **fields(value))

    return ask


def completion(**given: Any) -> Seen:
    return seen_of(litellm.completion(messages=MESSAGES, max_tokens=8, **given), given["stream"])


def text_completion(**given: Any) -> Seen:
    return seen_of(litellm.text_completion(prompt=PROMPT, max_tokens=8, **given), given["stream"])


def responses(**given: Any) -> Seen:
    return seen_of(litellm.responses(input=PROMPT, max_output_tokens=16, **given), given["stream"])


def messages(**given: Any) -> Seen:
    return asyncio.run(_messages(**given))


async def _messages(**given: Any) -> Seen:
    answer = await litellm.anthropic.messages.acreate(messages=MESSAGES, max_tokens=16, **given)
    if not given["stream"]:
        return Seen(answer.get("diversity"), _header(answer))
    events = [event async for event in answer]
    carrying = [event for event in events if "mean_entropy_after" in str(event)]
    return Seen(carrying[-1] if carrying else None, _header(answer))


CALLS = {
    "completion": completion,
    "text_completion": text_completion,
    "responses": responses,
    "anthropic.messages": messages,
}


def seen_of(answer: Any, stream: bool) -> Seen:
    if not stream:
        return Seen(getattr(answer, "diversity", None), _header(answer))
    chunks = list(answer)
    objects = [getattr(getattr(chunk, "response", chunk), "diversity", None) for chunk in chunks]
    return Seen(next(filter(None, objects), None), _header(answer) or _header(chunks[-1]))


def _header(answer: Any) -> str | None:
    hidden = getattr(answer, "_hidden_params", None) or {}
    return header_in(hidden.get("additional_headers"))


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    ask_all(make_ways())
