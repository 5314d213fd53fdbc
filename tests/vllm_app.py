"""vLLM's own app, without an engine, and the routes that docs/api.md lists."""

import re
from pathlib import Path
from typing import Any

from fastapi import FastAPI

API = Path(__file__).parent.parent / "docs" / "api.md"


def built(*flags: str) -> FastAPI:
    """vLLM's app, built as by a server with these flags."""
    from vllm.platforms import current_platform  # Every process of vLLM imports this first.

    assert current_platform
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(list(flags))
    return build_app(arguments, ("generate",))


def routes_with_fields() -> list[str]:
    """The routes that accept the fields according to docs/api.md."""
    listed = re.search(r"^On (`/v1/.*?`) and in\s`vllm run-batch`", API.read_text(), re.M | re.S)
    assert listed, "docs/api.md no longer lists the routes that accept the fields"
    return re.findall(r"`(.*?)`", listed[1])


def body_schema(document: dict[str, Any], route: str) -> dict[str, Any]:
    """The schema of the body of a route's POST, in an OpenAPI document."""
    body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].removeprefix("#/components/schemas/")
    return document["components"]["schemas"][name]
