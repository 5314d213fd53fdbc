"""The fields in the server's OpenAPI document, from which clients are made and /docs is shown."""

from collections.abc import Callable
from typing import Any

from dftserve import json_schema
from dftserve_vllm.extra_args import DIVERSITY, STYLE
from dftserve_vllm.hooks import PROTOCOLS

DOCUMENTED = (*PROTOCOLS, "BatchChatCompletionRequest")
"""The bodies that take the fields: those hooked, and the batch body, which vLLM splits into some of
them."""


def with_fields(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """FastAPI's `app.openapi`, whose document has the fields in the requests that take them."""

    def documented() -> dict[str, Any]:
        # FastAPI makes its document once, and gives the same one each time.
        document = openapi()
        schemas = document.get("components", {}).get("schemas", {})
        for name in schemas.keys() & set(DOCUMENTED):
            properties = schemas[name].setdefault("properties", {})
            properties |= {DIVERSITY: json_schema.diversity(), STYLE: json_schema.style()}
        return document

    return documented
