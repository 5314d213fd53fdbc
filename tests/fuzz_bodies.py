"""Random bodies for the routes that have the field, and the checks of their answers."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from tests.client import chat_body

MAX_ANSWER_BYTES = 4096
CANARY = "canary-5a1e"
"""Part of every text in a wrong field; must never appear in a log."""
MAX_STOP_IDS = 64
BASES = {
    "/v1/chat/completions": chat_body(max_tokens=2),
    "/v1/completions": {"model": "demo", "prompt": "Once", "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "Once", "max_output_tokens": 2},
}
VALID = (
    "0",
    "0.5",
    "1",
    "1e-3",
    "null",
    '{"level": 0.25}',
    '{"level": 0.25, "min_p": 0.1, "max_temperature": null}',
    '{"law": "budget", "target_entropy": 1.5}',
    '{"law": "dynatemp", "dynatemp_range": 0.5}',
    '{"law": "top_n_sigma", "n_sigma": 1}',
    '{"law": "xtc", "xtc_probability": 0.5}',
)
WRONG = [("", False)] * 3
"""Three of five fields are wrong; their values are drawn later."""
TEXTS = (
    CANARY,
    f"{CANARY}\n2027-01-01 ERROR forged",
    f"\x1b[31m{CANARY}\x1b[0m\r\x00",
    f"{CANARY}\ud800",
    f"\udfff{CANARY}{{}}%s%(name)s",
    f"{CANARY}\u202e\u2028",
    f'{{"level": "{CANARY}"}}',
    f"0.5 {CANARY}",
)
HUGE_BYTES = 5_000_000


@dataclass(frozen=True)
class Asked:
    """A request, and whether its field is valid; a request without the field is."""

    path: str
    body: bytes
    is_valid: bool


def _text(source: random.Random) -> str:
    return json.dumps(source.choice(TEXTS))


def _number(source: random.Random) -> str:
    small = ["-0.1", "1.0001", "-0.0001", "NaN"]
    huge = ["1e308", "1e999", "-1e999", "Infinity", "-Infinity", "9" * 400, "-" + "9" * 4000]
    return source.choice(small + huge)


def _object(source: random.Random) -> str:
    names = ("level", "law", "min_p", "max_temperature", "target_entropy", "dynatemp_exponent")
    name = json.dumps(source.choice([*names, *TEXTS]))
    value = source.choice([_text, _number, _deep, lambda _: "{}", lambda _: "true"])(source)
    return f'{{"law": "gated", "level": 0.5, {name}: {value}, {_text(source)}: 1}}'


def _deep(source: random.Random) -> str:
    depth = source.choice([3, 50, 400])
    return "[" * depth + _text(source) + "]" * depth


def _list(source: random.Random) -> str:
    return f"[{', '.join([_text(source)] * source.choice([1, 40, 3000]))}]"


def _huge(source: random.Random) -> str:
    text = (CANARY + "\\u0000\\n") * (HUGE_BYTES // len(CANARY))
    return source.choice([f'"{text}"', f'{{"{text}": 1}}', f'{{"law": "{text}"}}'])


def _wrong(source: random.Random) -> str:
    families: list[Callable[[random.Random], str]] = [_text, _number, _object, _deep, _list]
    return source.choice([*families, lambda _: "true", lambda _: "{}"])(source)


def _place(source: random.Random, path: str, value: str, is_valid: bool) -> tuple[str, str]:
    """The name and the JSON of the parameter for the value: `diversity`, or vllm_xargs."""
    # In vllm_xargs vLLM turns true into 1.0 before our code runs, and the text "null" is not null.
    is_special = value in ("true", "null")
    if path == "/v1/responses" or is_special or source.random() < 0.75:
        return "diversity", value
    return "vllm_xargs", f'{{"diversity": {json.dumps(value) if is_valid else value}}}'


def asked(source: random.Random, number: int) -> Asked:
    """A request for one of three routes; `number`, its index in the run, decides if it is huge."""
    path = source.choice(list(BASES))
    base = BASES[path] | {"stream": source.choice([False, True])}
    if path != "/v1/responses" and source.random() < 0.3:
        base["n"] = source.choice([1, 2, 2, 0, -1, 10**9, "2", None])
    stops = source.choice([0, 0, 0, 3, MAX_STOP_IDS, MAX_STOP_IDS + 1, 500])
    if path != "/v1/responses" and stops:
        base["stop_token_ids"] = list(range(100, 100 + stops))
    if source.random() < 0.1:
        base["temperature"] = source.choice([-1, "hot", 1e9, float("nan")])
    value, is_valid = source.choice([(None, True), (source.choice(VALID), True), *WRONG])
    if not is_valid:
        value = _huge(source) if number % 60 == 0 else _wrong(source)
    if value is None:
        return Asked(path, json.dumps(base).encode(), True)
    name, text = _place(source, path, value, is_valid)
    is_off = value in ("0", "null")
    too_many = "stop_token_ids" in base and stops > MAX_STOP_IDS and not is_off
    body = f'{json.dumps(base)[:-1]}, "{name}": {text}}}'
    return Asked(path, body.encode(), is_valid and not too_many)


def complaint(asked: Asked, stock: httpx.Response, ours: httpx.Response) -> str | None:
    """What is wrong with our answer, given stock's to the same body; None if nothing is."""
    if ours.status_code >= 500 > stock.status_code:
        return "a server error that stock does not have"
    # Stock may answer 500 to what we refuse, such as a lone surrogate in vllm_xargs.
    if asked.is_valid or 400 <= stock.status_code < 500:
        return None if ours.status_code == stock.status_code else "another status than stock's"
    return _refusal_complaint(ours)


def _refusal_complaint(ours: httpx.Response) -> str | None:
    if ours.status_code != 400:
        return "a wrong field is not refused"
    if len(ours.content) > MAX_ANSWER_BYTES:
        return "too long an answer"
    parameter = ours.json()["error"]["param"]
    names = ("diversity", "vllm_xargs", "stop_token_ids")
    return None if str(parameter).startswith(names) else "the parameter is not named"
