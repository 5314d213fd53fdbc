"""What a request's SamplingParams carry for the workers, and how to read it.

`extra_args` crosses the process boundary as JSON-like values:
    diversity      a number, the object form, or (through a proxy) its JSON text
    style          a name, the object form, or its JSON text
    diversity_id   identifies the request across preemptions, and the choice that its statistics
                   belong to; absent offline
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from dftserve import spec
from dftserve.sampling import ControlRow, control_row
from dftserve.sampling.draws import draw_key
from dftserve.sampling.group import GroupRow
from dftserve_vllm import groups
from dftserve_vllm.styles import NONE, Styles

if TYPE_CHECKING:
    from vllm import SamplingParams

DIVERSITY = "diversity"
STYLE = "style"
IDENTITY = "diversity_id"

MAX_STOP_IDS = 64
"""Maximum `stop_token_ids` of a request with a field, not counting the model's own: they cost time
in steps that other requests share."""
GREEDY_BELOW = 1e-5
"""vLLM's own threshold: it decodes greedily at lower temperatures, and so greedy stays greedy."""

_NO_NUMBERS = repeat(0)


@dataclass(frozen=True)
class ActiveRequest:
    """A request whose rows are to be changed."""

    diversity: spec.Diversity
    controls: ControlRow
    identity: str | None
    """The request's `diversity_id`."""
    reports_each_step: bool
    """Whether its statistics are sent at every step rather than only with the last: its text may
    end at a stop string, which the engine does not see, or a trace was requested."""
    group: GroupRow | None


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


def parse_style_field(value: object, parameter: str = STYLE) -> spec.Style:
    """A name, an object, or the object as JSON text.

    Raises:
        DiversityError: names the parameter, what came and what is accepted.
    """
    if isinstance(value, str):
        return spec.parse_style_json(value, parameter)
    return spec.parse_style(value, parameter)


def of_choice(params: "SamplingParams", index: int, parent: Any) -> "SamplingParams":
    """The parameters of one of several choices, with its own identity and its index in their group.

    Args:
        parent: vLLM's ParentRequest of the choices.
    """
    carried: dict[str, Any] = params.extra_args or {}
    identity, diversity_field = carried.get(IDENTITY), carried.get(DIVERSITY)
    own: dict[str, Any] = {}
    if identity is not None:
        own[IDENTITY] = f"{identity}.{index}"
    if diversity_field is not None and (diversity := parse_field(diversity_field)).group is True:
        of_request = parent.sampling_params
        own[DIVERSITY] = groups.of_choice(
            diversity, index, of_request.n, of_request.seed, parent.request_id
        )
    if not own:
        return params
    params = copy(params)
    params.extra_args = {**carried, **own}
    return params


def renamed(params: "SamplingParams", identity: str) -> "SamplingParams":
    """A copy with another identity; the original may be shared by several requests."""
    params = copy(params)
    params.extra_args = {**(params.extra_args or {}), IDENTITY: identity}
    return params


def is_greedy(params: "SamplingParams") -> bool:
    """Whether vLLM takes the likeliest token instead of sampling."""
    return params.temperature < GREEDY_BELOW


OFF = spec.Diversity(level=0.0)


def clash(diversity: spec.Diversity, style: spec.Style | None) -> str | None:
    """Why the two cannot be honoured together, or None."""
    if style is None or style.is_off or diversity.law not in spec.WHOLE_ROW_LAWS:
        return None
    accepted = ", ".join(law for law in spec.LAWS if law not in spec.WHOLE_ROW_LAWS)
    return f"{STYLE}: got it with the law {diversity.law!r}; accepted with a style: {accepted}."


def too_many_stop_ids(params: "SamplingParams") -> str | None:
    """Why a request with a field has too many stop token ids, or None.

    Args:
        params: as requested, before vLLM adds the model's own stop tokens.
    """
    if (count := len(params.stop_token_ids or ())) <= MAX_STOP_IDS:
        return None
    return (
        f"stop_token_ids: got {count} with {DIVERSITY} or {STYLE}; accepted: at most "
        f"{MAX_STOP_IDS}, since each is looked up at every step."
    )


def requested_fields(
    params: "SamplingParams", styles: Styles = NONE
) -> tuple[spec.Diversity, spec.Style | None]:
    """The diversity that a request carries, `OFF` without one, and the style, with its profile's
    numbers.

    Raises:
        ValueError: one of them is not acceptable, or cannot be honoured with the other or with n.
    """
    carried: Mapping[str, Any] = params.extra_args or {}
    diversity_field, style_field = carried.get(DIVERSITY), carried.get(STYLE)
    diversity = OFF if diversity_field is None else parse_field(diversity_field)
    style = None if style_field is None else styles.completed(parse_style_field(style_field))
    if (reason := clash(diversity, style) or groups.clash(params.n, diversity)) is not None:
        raise ValueError(reason)
    return diversity, style


def active_request(
    params: "SamplingParams",
    *,
    temperature_applied: bool,
    arrivals: Iterator[int] = _NO_NUMBERS,
    styles: Styles = NONE,
) -> ActiveRequest | None:
    """What to do for a request, or None if its rows stay unchanged.

    Args:
        temperature_applied: the engine has already divided the rows by the temperature.
        arrivals: numbers the requests that have neither a seed nor an identity; the same on all
            tensor-parallel ranks, which take the same requests in the same order.
        styles: the engine's styles.

    Raises:
        ValueError: what the request carries is not acceptable, or cannot be honoured here.
    """
    if is_greedy(params):
        return None
    diversity, style = requested_fields(params, styles)
    if style is not None and style.is_off:
        style = None
    if diversity.is_off and style is None:
        return None
    stops = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
    controls = control_row(
        diversity,
        temperature=params.temperature,
        logits_divisor=params.temperature if temperature_applied else 1.0,
        stop_ids=frozenset(stops or ()),
        draw_key=_draw_key(params, arrivals) if diversity.law == "xtc" else 0,
        style=None if style is None else styles.controls(style),
    )
    return ActiveRequest(
        diversity,
        controls,
        (params.extra_args or {}).get(IDENTITY),
        reports_each_step=bool(params.stop) or diversity.trace,
        group=groups.group_row(diversity, params, temperature_applied=temperature_applied),
    )


def _draw_key(params: "SamplingParams", arrivals: Iterator[int]) -> int:
    """The key of the request's own random draws, which are separate from vLLM's sampling."""
    identity = (params.extra_args or {}).get(IDENTITY)
    if params.seed is not None:
        return draw_key("seed", params.seed)
    if identity is not None:
        return draw_key("identity", identity)
    return draw_key("arrival", next(arrivals))
