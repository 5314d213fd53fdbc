"""vLLM's own app, without an engine, and what docs/api.md says of its routes."""

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI

API = Path(__file__).parent.parent / "docs" / "api.md"


def built(*flags: str) -> FastAPI:
    """vLLM's app, as the server with these flags has it."""
    from vllm.platforms import current_platform  # What every process of vLLM does first.

    assert current_platform
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(list(flags))
    return build_app(arguments, ("generate",))


def routes_with_fields() -> list[str]:
    """The routes that docs/api.md says take the fields."""
    told = re.search(r"^On (`/v1/.*?`) and in\s`vllm run-batch`", API.read_text(), re.M | re.S)
    assert told, "docs/api.md no longer says on which routes the fields are"
    return re.findall(r"`(.*?)`", told[1])


def body_schema(document: dict[str, Any], route: str) -> dict[str, Any]:
    """The schema of what a route's POST takes, in an OpenAPI document."""
    body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].removeprefix("#/components/schemas/")
    return document["components"]["schemas"][name]
