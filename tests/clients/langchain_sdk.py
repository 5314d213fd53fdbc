"""langchain-openai."""

from collections.abc import Callable
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI
from ways import KEY, MODEL, PROMPT, Seen, Way, ask_all, header_in

CLASSES = {
    "ChatOpenAI": lambda **given: ChatOpenAI(**given, max_tokens=8),
    "ChatOpenAI with `use_responses_api`": lambda **given: ChatOpenAI(
        **given, max_tokens=16, use_responses_api=True
    ),
    "OpenAI": lambda **given: OpenAI(**given, max_tokens=8),
}


def way_of(route: str, written: str, **more: Any) -> Way:
    def ask(url: str, value: Any, stream: bool) -> Seen:
        given = {"model": MODEL, "base_url": url, "api_key": KEY, "max_retries": 0}
        model = CLASSES[route](**given, extra_body={"diversity": value}, **more)
        return seen_of(model, stream)

    return Way(route, written, ask)


def seen_of(model: Any, stream: bool) -> Seen:
    answers = list(model.stream(PROMPT)) if stream else [model.invoke(PROMPT)]
    carrying = [repr(answer) for answer in answers if "mean_entropy_after" in repr(answer)]
    headers: dict[str, Any] = {}
    for answer in answers:
        headers |= getattr(answer, "response_metadata", {}).get("headers", {})
    return Seen(carrying[-1] if carrying else None, header_in(headers))


def ask_with(arguments: Callable[[Any], dict[str, Any]]) -> Callable[[str, Any, bool], Seen]:
    def ask(url: str, value: Any, stream: bool) -> Seen:
        given = {"model": MODEL, "base_url": url, "api_key": KEY, "max_retries": 0}
        return seen_of(ChatOpenAI(**given, **arguments(value)), stream)

    return ask


if __name__ == "__main__":
    body = "`extra_body`"
    headers = "`extra_body`, with `include_response_headers`"
    ask_all(
        [
            *(way_of(route, body) for route in CLASSES),
            *(way_of(route, headers, include_response_headers=True) for route in list(CLASSES)[:2]),
            Way("ChatOpenAI", "argument", ask_with(lambda value: {"diversity": value})),
            Way(
                "ChatOpenAI",
                "`model_kwargs`",
                ask_with(lambda value: {"model_kwargs": {"diversity": value}}),
            ),
        ]
    )
