"""Whether a server did what it was asked: what its answers say is in force, beside the request.

    check({"diversity": 0.75}, answer.model_extra or {})

An operator's policy may lower what is asked for, and greedy decoding samples nothing; the answer
says so (docs/api.md). A figure would otherwise stand under a diversity that no text was made with.
"""

import json
from collections.abc import Mapping
from typing import Any

from dftserve.openai_client import ServerError
from dftserve.spec import HUMAN, Diversity, parse, parse_style

OFF = {"level": 0.0}


def level_of(asked: object) -> Diversity | None:
    """A request's `diversity`; None: "human", which the server alone can resolve.

    Raises:
        DiversityError: what no server accepts.
    """
    return None if asked == HUMAN else parse(asked)


def is_off(asked: object) -> bool:
    """Whether a request's `diversity` leaves every row as it comes; raises as `level_of`."""
    level = level_of(asked)
    return level is not None and level.is_off


def check(asked: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """
    Args:
        asked: the members `diversity` and `style` of the request, as far as it has them.
        answer: the members of the answer that are not the OpenAI API's.

    Raises:
        ServerError: the answer says nothing of one of them: there is no plug-in.
        ValueError: something else is in force.
    """
    for name, value in asked.items():
        wanted = _diversity(value) if name == "diversity" else _style(value)
        found = answer.get(name)
        if found is None and wanted == OFF:
            continue  # Diversity 0 is any server's.
        if not isinstance(found, Mapping):
            raise ServerError(
                f"the server answers without a `{name}` object: the plug-in is not there. "
                "`dftserve doctor --url` says why."
            )
        differ = [key for key in wanted if found.get(key) != wanted[key]]
        if differ or found.get("clamped") or found.get("reason"):
            raise ValueError(_refusal(name, value, found, differ))


def _diversity(asked: object) -> dict[str, Any]:
    """What must be in force, of the object in the answer."""
    level = level_of(asked)
    if level is None:
        return {"law": "budget"}
    return OFF if level.is_off else level.as_dict()


def _style(asked: object) -> dict[str, Any]:
    return parse_style(asked).as_dict()


def _refusal(name: str, asked: object, found: Mapping[str, Any], differ: list[str]) -> str:
    shown = {key: found.get(key) for key in (*differ, "clamped", "reason") if found.get(key)}
    shown |= {key: found.get(key) for key in differ}
    return (
        f"{name}: asked for {json.dumps(asked)}, and the server has {json.dumps(shown)} in force: "
        "texts would be measured as what they are not. Ask for no more than the server's policy "
        "allows, or evaluate a server without one (docs/operations.md)."
    )
