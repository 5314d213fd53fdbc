"""What a request's SamplingParams carry for the workers, and how to read it.

`extra_args` crosses the process boundary as JSON-like values:
    diversity      a number, the object form, or (through a proxy) its JSON text
    diversity_id   names the figures that the answer will ask for; absent offline
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dftserve import spec
from dftserve.sampling import ControlRow, control_row

if TYPE_CHECKING:
    from vllm import SamplingParams

DIVERSITY = "diversity"
IDENTITY = "diversity_id"

GREEDY_BELOW = 1e-5
"""vLLM's own border: lower temperatures are greedy there, and greedy stays greedy."""


@dataclass(frozen=True)
class Active:
    """A request whose rows are to be changed."""

    controls: ControlRow
    identity: str | None


def parse_field(value: object, parameter: str = DIVERSITY) -> spec.Diversity:
    """A number, an object, or either as JSON text.

    Raises:
        DiversityError: names the parameter, what came and what is accepted.
    """
    return (
        spec.parse_json(value, parameter)
        if isinstance(value, str)
        else spec.parse(value, parameter)
    )


def is_greedy(params: "SamplingParams") -> bool:
    return params.temperature < GREEDY_BELOW


def active(params: "SamplingParams", *, divided: bool) -> Active | None:
    """What to do for a request, or None where its rows are to stay as they are.

    `divided` tells whether the engine has divided the rows by the temperature already.
    """
    carried: Mapping[str, Any] = params.extra_args or {}
    if carried.get(DIVERSITY) is None or is_greedy(params):
        return None
    diversity = parse_field(carried[DIVERSITY])
    if diversity.is_off:
        return None
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    controls = control_row(
        diversity,
        temperature=params.temperature,
        divided=params.temperature if divided else 1.0,
        stop_ids=frozenset(stops or ()),
    )
    return Active(controls, carried.get(IDENTITY))
