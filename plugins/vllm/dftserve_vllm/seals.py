"""Unforgeable names for requests whose parameters this process has approved.

A request's name is part of its SamplingParams, and vLLM may return these to a client (the render
routes of --enable-scale-out do). So a name alone proves nothing: it contains a MAC over everything
that was approved, namely the diversity, the style, the number of choices (which may be a group's
size) and the HTTP request, and so its key and its model. A name that is sent in another request is
not valid there.
"""

import hashlib
import hmac
import itertools
import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

from dftserve_vllm.extra_args import DIVERSITY, IDENTITY, STYLE, parse_field, parse_style_field

_SEAL_BYTES = 16
_secret = secrets.token_bytes(32)
_numbers = itertools.count()
_start = secrets.token_hex(4)
"""Part of names, so that the draws of requests without a seed differ after each start."""


def fresh_name() -> str:
    """A name that no other request has, on any API process."""
    return f"{os.getpid():x}-{_start}-{next(_numbers):x}"


def sealed_name(carried: Mapping[str, Any], choices: int, http_request: str | None) -> str:
    """A fresh name, sealed together with what was approved.

    Args:
        carried: the diversity and the style, in any form that the fields accept.
        choices: how many were requested.
        http_request: the name of the HTTP request; None outside a request.
    """
    name = fresh_name()
    return f"{name}-{_seal(name, carried, choices, http_request)}"


def is_sealed(carried: Mapping[str, Any], choices: int, http_request: str | None) -> bool:
    """Whether the extra_args have a name that this process sealed with these values.

    Raises:
        DiversityError: the diversity or the style is not acceptable.
    """
    identity = carried.get(IDENTITY)
    if not isinstance(identity, str):
        return False
    name, _, seal = identity.rpartition("-")
    expected = _seal(name, carried, choices, http_request)
    return hmac.compare_digest(seal.encode(errors="replace"), expected.encode())


def _seal(name: str, carried: Mapping[str, Any], choices: int, http_request: str | None) -> str:
    """The MAC, over the form that the workers will read: JSON in between may turn 1.0 into 1, and
    the reader fills in defaults that the sender left out."""
    diversity_field, style_field = carried.get(DIVERSITY), carried.get(STYLE)
    diversity = None if diversity_field is None else parse_field(diversity_field).as_dict()
    style = None if style_field is None else parse_style_field(style_field).as_dict()
    content = [name, diversity, style, choices, http_request]
    message = json.dumps(content, sort_keys=True).encode()
    return hmac.digest(_secret, message, hashlib.sha256)[:_SEAL_BYTES].hex()
