"""The request fields: from the body to SamplingParams, or to a 400 that states what is accepted."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial, wraps
from itertools import chain, islice
from typing import Any, TypeVar

from dftserve import spec
from dftserve_vllm import adapters, audit, engine, groups, human, metrics, policy, request_context
from dftserve_vllm.extra_args import (
    DIVERSITY,
    IDENTITY,
    OFF,
    STYLE,
    clash,
    is_greedy,
    parse_field,
    parse_style_field,
    too_many_stop_ids,
)
from dftserve_vllm.request_context import PromptContext

DEFAULTS = "default_sampling_params"
"""The second argument of vLLM's `to_sampling_params`, positional or by keyword."""
HONOURS = "honours_fields"
"""An attribute of the functions that `honour` returns."""
MOST_UNKNOWN = 4096
"""Maximum number of unknown keys of a request that are compared with ours; clients send dozens."""
CUTTING = ("top_p", "top_k", "min_p")
"""Sampling defaults that a model's generation_config may set, and that would cut our support."""


@lru_cache
def default_diversity() -> spec.Diversity | None:
    """The operator's default; None if there is none or it is off.

    Raises:
        DiversityError: the environment variable has an unacceptable value.
    """
    text = os.environ.get(spec.DEFAULT_VARIABLE, "")
    diversity = spec.parse_default(text) if text else None
    return None if diversity is None or diversity.is_off else diversity


def default_refusal() -> str | None:
    """Why this engine does not apply the operator's default, or for which requests; None if it
    does, or there is no default."""
    default = default_diversity()
    reason = None if default is None else engine.refusal_of(default)
    if default is None or reason is None or not default.group:
        return reason
    alone = replace(default, group=None)
    is_partial = not alone.is_off and engine.refusal_of(alone) is None
    return f"for requests with n > 1: {reason}" if is_partial else reason


def honour(to_sampling_params: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `Request.to_sampling_params`, adding the fields."""

    @wraps(to_sampling_params)
    def wrapped(request: Any, *args: Any, **kwargs: Any) -> Any:
        defaults = (args[1] if len(args) > 1 else kwargs.get(DEFAULTS)) or {}

        def params_with(defaults: dict[str, Any]) -> Any:
            if len(args) > 1:
                return to_sampling_params(request, args[0], defaults, *args[2:], **kwargs)
            return to_sampling_params(request, *args, **{**kwargs, DEFAULTS: defaults})

        with audit.refusals(request):
            return _params_with_fields(request, defaults, params_with)

    setattr(wrapped, HONOURS, True)
    return wrapped


def _params_with_fields(
    request: Any, defaults: dict[str, Any], params_with: Callable[[dict[str, Any]], Any]
) -> Any:
    """The request's SamplingParams, with what the workers have to know of its fields.

    Args:
        defaults: the model's sampling defaults, and the operator's.
        params_with: makes vLLM's SamplingParams of the request with such defaults.

    Raises:
        VLLMValidationError: a 400; the request's fields cannot be honoured.
    """

    def params_for(diversity: spec.Diversity) -> tuple[Any, dict[str, Any]]:
        kept, dropped = _without_cuts(request, defaults, diversity)
        return params_with(kept), dropped

    allowed = _allowed(request)
    style = allowed.style
    diversity = allowed.diversity or _compatible_default(request, style, params_for)
    if diversity is None and style is None and request_context.adapter() is None:
        return _without_our_keys(params_with(defaults))
    context_with = _context_of(allowed, has_diversity=diversity is not None)
    diversity = diversity or OFF
    if not diversity.is_off and (reason := engine.refusal_of(diversity)):
        raise _bad_request(f"{DIVERSITY}: {reason}.", DIVERSITY)
    if (reason := clash(diversity, style)) is not None:
        raise _bad_request(reason, STYLE)
    if diversity.is_off and (style is None or style.is_off):
        params = _without_our_keys(params_with(defaults))
        _record(request, context_with(diversity, params.n))
        return params
    params, dropped = params_for(diversity)
    return _for_workers(request, params, diversity, partial(context_with, dropped=dropped))


def _context_of(allowed: policy.Allowed, *, has_diversity: bool) -> Callable[..., PromptContext]:
    """Makes the request's `PromptContext` from the diversity in force and the number of choices."""
    adapter = request_context.adapter()
    clamped = allowed.clamped if adapter is None else {**allowed.clamped, **adapter.clamped}
    return partial(
        PromptContext,
        style=allowed.style,
        has_diversity=has_diversity,
        clamped=clamped,
        adapter=adapter,
    )


def select_adapter(maybe_get_adapters: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `BaseServing._maybe_get_adapters`, selecting the adapter that a style names.

    It runs before `honour`. On a route that does not call it, no adapter is known, and `honour`
    refuses the name.
    """

    @wraps(maybe_get_adapters)
    def wrapped(serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        of_model = maybe_get_adapters(serving, request, *args, **kwargs)
        current = request_context.current.get()
        if current is None or not _is_honoured(request):
            return of_model
        current.adapters = adapters.served(serving.models)
        if not current.adapters:
            return of_model
        with audit.refusals(request):
            current.adapter = _adapter_of_style(request, of_model)
        if current.adapter is None:
            return of_model
        return serving.models.lora_requests[current.adapter.adapter.model]

    return wrapped


def _adapter_of_style(request: Any, of_model: Any) -> adapters.ChosenAdapter | None:
    """The adapter that the request's style names; None if it names none.

    Args:
        of_model: the adapter that the request's `model` selects; None without one.
    """
    style = _field(request, STYLE, spec.parse_style, parse_style_field)
    if style is None or style.is_off or style.name not in _adapter_names():
        return None
    try:
        return _choose_adapter(request, style, of_model)
    except spec.DiversityError as error:
        raise _bad_request(str(error), error.parameter) from None


def _is_honoured(request: Any) -> bool:
    """Whether `honour` handles the request's sampling parameters. Looks at the class, since a body
    can set any attribute of the object."""
    method = getattr(type(request), "to_sampling_params", None)
    is_batch = hasattr(type(request), "to_chat_completion_request")
    return is_batch or getattr(method, HONOURS, False)


def _choose_adapter(request: Any, style: spec.Style, of_model: Any) -> adapters.ChosenAdapter:
    """The adapter for a style that names one.

    Args:
        of_model: as in `_adapter_of_style`.

    Raises:
        DiversityError: there is none that may be used.
    """
    if of_model is not None:
        accepted = (
            f"a profile, since `model` already selects the adapter {of_model.lora_name!r}, and "
            "vLLM applies one adapter to a request"
        )
        raise spec.DiversityError(f"{STYLE}.name", style.name, accepted)
    if style.max_kl is not None:
        accepted = "none with an adapter, whose divergence only its strength can limit"
        raise spec.DiversityError(f"{STYLE}.max_kl", style.max_kl, accepted)
    limits = policy.limits(request)
    if (cap := limits.max_kl) is not None:
        accepted = (
            f"a profile, since the operator's policy caps max_kl at {cap:g}, and an adapter's "
            "divergence has no bound"
        )
        raise spec.DiversityError(f"{STYLE}.name", style.name, accepted)
    style = style if style.strength is not None else replace(style, strength=1.0)
    allowed = policy.allowed(request, None, style)
    assert allowed.style is not None
    adapter = adapters.nearest(_known_adapters(), allowed.style, limits)
    return adapters.ChosenAdapter(adapter, allowed.style, allowed.clamped)


def _known_adapters() -> tuple[adapters.Adapter, ...]:
    current = request_context.current.get()
    return () if current is None else current.adapters


def _adapter_names() -> list[str]:
    """The names of adapters that a style may use; a profile takes precedence over an adapter of the
    same name."""
    styles = engine.styles()
    return [name for name in adapters.strengths(_known_adapters()) if not styles.has(name)]


def refuse_beam_search(to_beam_search_params: Callable[..., Any]) -> Callable[..., Any]:
    """Beam search never samples, so it cannot honour the field."""

    @wraps(to_beam_search_params)
    def wrapped(request: Any, *args: Any, **kwargs: Any) -> Any:
        with audit.refusals(request):
            refuse(request)
        return to_beam_search_params(request, *args, **kwargs)

    def refuse(request: Any) -> None:
        asked = _requested_diversity(request)
        together = "got it together with use_beam_search, which does not sample; drop one of them"
        _refuse_misspelt(request)
        if asked is not None and not asked.is_off:
            raise _bad_request(f"{DIVERSITY}: {engine.refusal() or together}.", DIVERSITY)
        style = _requested_style(request)
        if request_context.adapter() is not None or (style is not None and not style.is_off):
            raise _bad_request(f"{STYLE}: {together}.", STYLE)

    return wrapped


def _allowed(request: Any) -> policy.Allowed:
    """The body's fields after the operator's policy was applied."""
    _refuse_misspelt(request)
    try:
        return policy.allowed(request, _requested_diversity(request), _requested_style(request))
    except spec.DiversityError as error:
        raise _bad_request(str(error), error.parameter) from None


def _refuse_misspelt(request: Any) -> None:
    """Refuse unknown keys, which vLLM would silently ignore, that look like a misspelt field, if
    the field would have been honoured. In `vllm_xargs`, which is other plug-ins' too, only those
    that look like `diversity`: `Style` may be theirs."""
    slips = chain(
        _slips(request.model_extra, (DIVERSITY, STYLE)),
        _slips(getattr(request, "vllm_xargs", None), (DIVERSITY,)),
    )
    key, name = next(slips, (None, None))
    if name is not None and engine.refusal() is None:
        message = (
            f"{name}: got the key {spec.quoted(key)}, which is not a field of a request; did you "
            f"mean {name!r}?"
        )
        raise _bad_request(message, name)


def _slips(
    values: Mapping[str, object] | None, names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """The keys that are a slip of a name, each with that name."""
    for key, value in islice((values or {}).items(), MOST_UNKNOWN):
        for name in names:
            if value is not None and spec.is_slip_of(key, name):
                yield key, name


def _requested_diversity(request: Any) -> spec.Diversity | None:
    """The requested diversity, from the top level or from vllm_xargs; None if there is none."""
    return _field(request, DIVERSITY, _or_human(spec.parse), _or_human(parse_field))


def _or_human(parse: Callable[[object, str], spec.Diversity]) -> Callable[..., spec.Diversity]:
    """Extends a parser to accept `human`, the entropy of human writing."""

    def parsed(value: object, parameter: str = DIVERSITY) -> spec.Diversity:
        return human.resolved(parameter) if value == spec.HUMAN else parse(value, parameter)

    return parsed


def _requested_style(request: Any) -> spec.Style | None:
    """The requested style, completed with its profile's numbers; refused if it cannot be honoured.
    None also if it names the selected adapter, which leaves nothing to do for the sampler."""
    style = _field(request, STYLE, spec.parse_style, parse_style_field)
    if style is None:
        return None
    styles = engine.styles()
    if (reason := engine.refusal()) is not None:
        raise _bad_request(f"{STYLE}: {reason}.", STYLE)
    others = _adapter_names()
    if style.is_off and style.name in others:
        return style
    if (chosen := request_context.adapter()) is not None and chosen.requested.name == style.name:
        return None
    if (reason := styles.refusal_of(style, others=others)) is not None:
        raise _bad_request(reason, reason.partition(":")[0])
    return styles.completed(style)


Field = TypeVar("Field", spec.Diversity, spec.Style)


def _field(
    request: Any,
    name: str,
    parse: Callable[[object], Field],
    parse_argument: Callable[[object, str], Field],
) -> Field | None:
    top = (request.model_extra or {}).get(name)
    argument = (getattr(request, "vllm_xargs", None) or {}).get(name)
    try:
        first = None if top is None else parse(top)
        second = None if argument is None else parse_argument(argument, f"vllm_xargs.{name}")
    except spec.DiversityError as error:
        raise _bad_request(str(error), error.parameter) from None
    if first is not None and second is not None and first != second:
        message = (
            f"{name}: got {spec.quoted(top)} at top level and {spec.quoted(argument)} in "
            "vllm_xargs; accepted: one of them, or both the same."
        )
        raise _bad_request(message, name)
    return first or second


def _compatible_default(
    request: Any,
    style: spec.Style | None,
    params_for: Callable[[spec.Diversity], tuple[Any, dict[str, Any]]],
) -> spec.Diversity | None:
    """The operator's default, if it is compatible with the request; otherwise None rather than a
    400, since the client did not ask for it."""
    default = policy.of_default(request, _default(request))
    if default is None or clash(default, style) is not None:
        return None
    params, _ = params_for(default)
    conflicts = is_greedy(params) or _refusal(request, params, default) is not None
    return None if conflicts else default


def _default(request: Any) -> spec.Diversity | None:
    """The operator's default, for the requests it is meant for: unconstrained text."""
    diversity = default_diversity()
    if diversity is not None and diversity.group and (getattr(request, "n", None) or 1) == 1:
        diversity = replace(diversity, group=None)  # A group needs several choices.
    if diversity is None or diversity.is_off or engine.refusal_of(diversity) is not None:
        return None
    response_format = getattr(request, "response_format", None)
    structured = getattr(request, "structured_outputs", None) is not None or (
        response_format is not None and getattr(response_format, "type", "text") != "text"
    )
    text_format = getattr(getattr(request, "text", None), "format", None)
    structured = structured or getattr(text_format, "type", "text") != "text"
    tools = (
        bool(getattr(request, "tools", None)) and getattr(request, "tool_choice", None) != "none"
    )
    return None if structured or tools else diversity


def _without_cuts(
    request: Any, defaults: dict[str, Any], diversity: spec.Diversity
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sampling defaults without those that the diversity replaces, and the dropped ones."""
    dropped = {
        name: value
        for name, value in defaults.items()
        if name in CUTTING
        and getattr(request, name, None) is None
        and (name not in engine.operator_defaults() or _cuts_otherwise(diversity, name, value))
    }
    kept = {name: value for name, value in defaults.items() if name not in dropped}
    return kept, dropped


def _cuts_otherwise(diversity: spec.Diversity, name: str, value: Any) -> bool:
    """Whether the diversity itself determines the value of one of the operator's defaults, with a
    different result. The client did not set the default, so it gets no 400 for the conflict."""
    if name != "min_p" or not value:
        return False
    return name not in spec.LAWS[diversity.law] or diversity.min_p not in (None, value)


def _refusal(request: Any, params: Any, diversity: spec.Diversity) -> tuple[str, str] | None:
    """Why the diversity is not compatible with the parameters, and the parameter to name; None if
    it is, or if a greedy request is not affected by it."""
    if (reason := groups.clash(params.n, diversity)) is not None:
        return reason, groups.PARAMETER
    if is_greedy(params):
        whose = "" if getattr(request, "temperature", None) is not None else ", the server's own,"
        reason = groups.greedy_clash(params.temperature, diversity, whose)
        return None if reason is None else (reason, "temperature")
    if (reason := too_many_stop_ids(params)) is not None:
        return reason, "stop_token_ids"
    if params.min_p > 0 and "min_p" not in spec.LAWS[diversity.law]:
        message = (
            f"min_p: got {params.min_p:g} with the law {diversity.law!r}, which has its own cut; "
            "accepted: one of them."
        )
        return message, "min_p"
    if params.min_p > 0 and diversity.min_p not in (None, params.min_p):
        message = (
            f"min_p: got {params.min_p:g} with {DIVERSITY}.min_p {diversity.min_p:g}; "
            "accepted: one of them, or both the same."
        )
        return message, "min_p"
    return None


def _for_workers(
    request: Any,
    params: Any,
    diversity: spec.Diversity,
    context_with: Callable[..., PromptContext],
) -> Any:
    """The parameters, with the diversity and the style added for the workers.

    Args:
        context_with: as `_context_of` returns it.
    """
    if (refusal := _refusal(request, params, diversity)) is not None:
        raise _bad_request(*refusal)
    if is_greedy(params):
        reason = "temperature 0 stays greedy"
        _record(request, context_with(diversity, params.n, dropped={}, reason=reason))
        return _without_our_keys(params)
    if params.min_p > 0:
        # The guard takes it over, at temperature 1 and before any heat: see docs/maths.md.
        diversity = replace(diversity, min_p=float(params.min_p))
        params.min_p = 0.0
    prompt = context_with(diversity, params.n)
    _record(request, prompt)
    if not diversity.is_off:
        metrics.metrics().count_request(diversity.law)
    params = _without_our_keys(params)
    if prompt.style is not None and not prompt.style.is_off:
        metrics.metrics().count_style(prompt.style.name)
    carried = {**prompt.carried(), IDENTITY: prompt.identity}
    params.extra_args = {**(params.extra_args or {}), **carried}
    return params


def _without_our_keys(params: Any) -> Any:
    """Remove our keys: off is off, and a client cannot choose an identity."""
    ours = (DIVERSITY, STYLE, IDENTITY)
    if params.extra_args and any(name in params.extra_args for name in ours):
        kept = {name: value for name, value in params.extra_args.items() if name not in ours}
        params.extra_args = kept or None
    return params


def _record(request: Any, prompt: PromptContext) -> None:
    audit.note(request, prompt)
    if prompt.clamped:
        metrics.metrics().count_clamped()
    if prompt.adapter is not None:
        metrics.metrics().count_style(prompt.adapter.adapter.style)
    current = request_context.current.get()
    if current is None:
        return
    current.prompts.append(prompt)
    options = getattr(request, "stream_options", None)
    current.wants_usage = bool(getattr(options, "include_usage", False))


def _bad_request(message: str, parameter: str) -> Exception:
    """vLLM's exception for a 400. The message already has the value, shortened; passed as `value`,
    vLLM would add all of it."""
    from vllm.exceptions import VLLMValidationError

    metrics.metrics().count_refusal()
    return VLLMValidationError(message, parameter=parameter)
