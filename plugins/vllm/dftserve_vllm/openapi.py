"""Adds the fields to the server's OpenAPI document, which client generators and /docs use."""

from collections.abc import Callable
from typing import Any

from dftserve import json_schema
from dftserve_vllm.extra_args import DIVERSITY, STYLE
from dftserve_vllm.hooks import PROTOCOLS

DOCUMENTED = (*PROTOCOLS, "BatchChatCompletionRequest")
"""The request bodies that take the fields: the hooked ones, and the batch body, which vLLM splits
into hooked ones."""


def with_fields(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Wraps FastAPI's `app.openapi`: adds the fields to the requests that take them."""

    def documented() -> dict[str, Any]:
        # FastAPI caches its document and returns the same object each time.
        document = openapi()
        schemas = document.get("components", {}).get("schemas", {})
        for name in schemas.keys() & set(DOCUMENTED):
            properties = schemas[name].setdefault("properties", {})
            properties |= {DIVERSITY: json_schema.diversity(), STYLE: json_schema.style()}
        return document

    return documented
