"""Checks that a server applied the requested settings, as its answers report them.

    check({"diversity": 0.75}, answer.model_extra or {})

An operator's policy may lower the requested value, and greedy decoding does not sample; the answer
reports this (docs/api.md). Without the check, results could be listed under a diversity that no
text was generated with.
"""

import json
from collections.abc import Mapping
from typing import Any

from dftserve.openai_client import ServerError
from dftserve.spec import HUMAN, Diversity, parse, parse_style

OFF = {"level": 0.0}


def level_of(requested: object) -> Diversity | None:
    """A request's `diversity`, parsed; None for "human", which only the server can resolve.

    Raises:
        DiversityError: no server would accept it.
    """
    return None if requested == HUMAN else parse(requested)


def is_off(requested: object) -> bool:
    """Whether a request's `diversity` leaves every row unchanged; raises as `level_of`."""
    level = level_of(requested)
    return level is not None and level.is_off


def check(requested: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Compare the requested settings with those that an answer reports.

    Args:
        requested: `diversity` and `style` of the request, where present.
        answer: the fields of the answer that are not part of the OpenAI API.

    Raises:
        ServerError: the answer does not report one of them, so there is no plug-in.
        ValueError: other settings are in force.
    """
    for name, value in requested.items():
        expected = _expected_diversity(value) if name == "diversity" else _expected_style(value)
        reported = answer.get(name)
        if reported is None and expected == OFF:
            continue  # Any server provides diversity 0.
        if not isinstance(reported, Mapping):
            raise ServerError(
                f"the server answers without a `{name}` object: the plug-in is not there. "
                "`dftserve doctor --url` says why."
            )
        differ = [key for key in expected if reported.get(key) != expected[key]]
        if differ or reported.get("clamped") or reported.get("reason"):
            raise ValueError(_refusal(name, value, reported, differ))


def _expected_diversity(requested: object) -> dict[str, Any]:
    """The members that the answer's `diversity` object must have."""
    level = level_of(requested)
    if level is None:
        return {"law": "budget"}
    return OFF if level.is_off else level.as_dict()


def _expected_style(requested: object) -> dict[str, Any]:
    return parse_style(requested).as_dict()


def _refusal(name: str, requested: object, reported: Mapping[str, Any], differ: list[str]) -> str:
    shown = {key: reported.get(key) for key in (*differ, "clamped", "reason") if reported.get(key)}
    shown |= {key: reported.get(key) for key in differ}
    return (
        f"{name}: asked for {json.dumps(requested)}, but the server has {json.dumps(shown)} in "
        "force, so texts would be measured under the wrong setting. Ask for no more than the "
        "server's policy allows, or evaluate a server without one (docs/operations.md)."
    )
