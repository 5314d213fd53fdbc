"""Bodies drawn by schemathesis from the server's own OpenAPI document, valid and invalid ones."""

import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.fuzz_bodies import BASES
from tests.vllm_app import body_schema

MOST_FIELDS = 4
"""Maximum drawn fields in a body besides the required ones; with all drawn fields hardly any body
would be accepted."""
CHEAP = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of")
"""Fields that control how much is generated; they are not tested, to keep requests short."""


def drawn(document: dict[str, Any], path: str, count: int) -> list[dict[str, Any]]:
    """Bodies for a route, always the same ones: some fields of a valid or invalid body, added to
    the fields of a short request, or replacing some of these.

    Args:
        document: the server's openapi.json.
    """
    found: list[dict[str, Any]] = []

    @_always_the_same(2 * count)
    @given(_cases(document, path), st.data())
    def draw(case: Any, data: Any) -> None:
        names = data.draw(st.sets(st.integers(0, 99), max_size=MOST_FIELDS))
        is_whole = data.draw(st.booleans())
        if isinstance(case.body, dict):
            given_a_value = {name for name, value in case.body.items() if value is not None}
            fields = sorted(given_a_value - set(CHEAP))
            chosen = {fields[name % len(fields)] for name in names if fields}
            some = {name: case.body[name] for name in sorted(chosen)}
            found.append(some | BASES[path] if is_whole else BASES[path] | some)

    draw()
    return list(filter(_is_json, found))[:count]


def drawn_values(document: dict[str, Any], path: str, name: str, count: int) -> list[Any]:
    """Values for one property of a route's body, valid and invalid, always the same ones."""
    schema = body_schema(document, path)["properties"][name]
    whole = {"type": "object", "properties": {name: schema}, "required": [name]}
    operation = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": whole}}},
        "responses": {"200": {"description": "an answer"}},
    }
    alone = {key: document[key] for key in ("openapi", "info")} | {
        "paths": {path: {"post": operation}}
    }
    found: list[Any] = []

    @_always_the_same(4 * count)
    @given(_cases(alone, path))
    def draw(case: Any) -> None:
        if isinstance(case.body, dict) and name in case.body and _is_json(case.body):
            found.append(case.body[name])

    draw()
    return found[:count]


def _cases(document: dict[str, Any], path: str) -> st.SearchStrategy[Any]:
    operation = schemathesis.openapi.from_dict(document)[path]["POST"]
    return st.one_of(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)


def _always_the_same(most: int) -> settings:
    return settings(
        max_examples=most,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def _is_json(body: dict[str, Any]) -> bool:
    try:
        return bool(json.dumps(body).encode())
    except (TypeError, ValueError):
        return False
