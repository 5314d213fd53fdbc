"""The openai package."""

from typing import Any

import openai
from ways import KEY, MESSAGES, MODEL, PROMPT, Seen, Way, ask_all, header_in

FIELDS = {
    "chat": {"messages": MESSAGES, "max_tokens": 8},
    "completions": {"prompt": PROMPT, "max_tokens": 8},
    "responses": {"input": PROMPT, "max_output_tokens": 16},
}


def way_of(route: str) -> Way:
    def ask(url: str, value: Any, stream: bool) -> Seen:
        body = FIELDS[route] | {"model": MODEL, "stream": stream}
        raw = resource(url, route).with_raw_response.create(**body, extra_body={"diversity": value})
        answer = raw.parse()
        return Seen(diversity_of(list(answer)[-1] if stream else answer), header_in(raw.headers))

    return Way(route, "`extra_body`", ask)


def resource(url: str, route: str) -> Any:
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    return {
        "chat": client.chat.completions,
        "completions": client.completions,
        "responses": client.responses,
    }[route]


def diversity_of(answer: Any) -> Any:
    """The `diversity` object of an answer, a last chunk, or a last event."""
    return (getattr(answer, "response", answer).model_extra or {}).get("diversity")


def as_keyword(url: str, value: Any, stream: bool) -> Seen:
    body = FIELDS["chat"] | {"model": MODEL, "stream": stream}
    return Seen(resource(url, "chat").create(**body, diversity=value))


if __name__ == "__main__":
    ask_all([*map(way_of, FIELDS), Way("chat", "argument", as_keyword)])
