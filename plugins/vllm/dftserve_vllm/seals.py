"""Names for requests that carry what this process has decided, and cannot be made up.

A request's name travels in its SamplingParams, and vLLM may show these to a client (the render
routes of --enable-scale-out answer with them). So a name proves nothing by itself: it is sealed
together with all that was decided on. That is the diversity and the style beside it, the number of
choices (which may be a group's size), and the HTTP request, and so its key and its model: a name
that is sent back in another request vouches for nothing.
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
"""In names, so that requests without a seed draw otherwise after each start."""


def fresh_name() -> str:
    """A name that no other request has, on any API process."""
    return f"{os.getpid():x}-{_start}-{next(_numbers):x}"


def sealed_name(carried: Mapping[str, Any], choices: int, opened: str | None) -> str:
    """Likewise, sealed with what was decided on.

    Args:
        carried: the diversity and the style, in any form that the fields take.
        choices: how many were asked for.
        opened: names the HTTP request; None outside of one.
    """
    name = fresh_name()
    return f"{name}-{_seal(name, carried, choices, opened)}"


def is_sealed(carried: Mapping[str, Any], choices: int, opened: str | None) -> bool:
    """Whether the extra_args have a name that was sealed here with all of these.

    Raises:
        DiversityError: one of these is not acceptable.
    """
    identity = carried.get(IDENTITY)
    if not isinstance(identity, str):
        return False
    name, _, seal = identity.rpartition("-")
    expected = _seal(name, carried, choices, opened)
    return hmac.compare_digest(seal.encode(errors="replace"), expected.encode())


def _seal(name: str, carried: Mapping[str, Any], choices: int, opened: str | None) -> str:
    """Of what the workers will read: JSON on the way may have made 1 of 1.0, and a default that the
    sender left out is filled in by whoever reads it."""
    asked, named = carried.get(DIVERSITY), carried.get(STYLE)
    diversity = None if asked is None else parse_field(asked).as_dict()
    style = None if named is None else parse_style_field(named).as_dict()
    content = [name, diversity, style, choices, opened]
    message = json.dumps(content, sort_keys=True).encode()
    return hmac.digest(_secret, message, hashlib.sha256)[:_SEAL_BYTES].hex()
