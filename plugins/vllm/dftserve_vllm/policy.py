"""The operator's policy on this server: which caps apply to a request, and their effect.

`request_params` decides every request's parameters, and calls `allowed` and `of_default` for it.
Parameters that reach an engine by a route without the field (audio, tokens in and out, offline) are
checked by `check_carried`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from starlette.datastructures import Headers

from dftserve import policy as policies
from dftserve import spec
from dftserve.policy import VARIABLE, Limits, Policy
from dftserve_vllm import engine, request_context, seals
from dftserve_vllm.extra_args import DIVERSITY, STYLE, parse_field, parse_style_field

WHOSE = "which is what the operator's policy allows here"


@dataclass(frozen=True)
class Allowed:
    """A request's diversity and style after the policy was applied."""

    diversity: spec.Diversity | None
    style: spec.Style | None
    clamped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By field: the requested numbers that were lowered."""


@lru_cache
def policy() -> Policy | None:
    """The policy of `DFTSERVE_POLICY`, read once per process; None if there is none.

    Raises:
        ValueError: the file is not acceptable; the message gives the position in it.
    """
    path = os.environ.get(VARIABLE, "")
    return policies.read(path) if path else None


def allowed(request: Any, diversity: spec.Diversity | None, style: spec.Style | None) -> Allowed:
    """Apply the policy to what a request asks for itself.

    Raises:
        DiversityError: it exceeds a cap under `on_excess: reject`, or its law or style is not
            allowed.
    """
    if policy() is None or (diversity is None and style is None):
        return Allowed(diversity, style)
    limits = _limits(request)
    clamped: dict[str, Mapping[str, float]] = {}
    if diversity is not None:
        diversity = _within(limits, diversity, request, DIVERSITY, clamped)
    if style is not None:
        style = _within(limits, style, request, STYLE, clamped)
    return Allowed(diversity, style, clamped)


def of_default(request: Any, diversity: spec.Diversity | None) -> spec.Diversity | None:
    """The operator's default for a request: lowered to the caps rather than refused, since the
    client did not ask for it; None if its law is not allowed."""
    if policy() is None or diversity is None:
        return diversity
    limits = _limits(request)
    if not limits.allows_group(diversity, _choices(request)):
        diversity = replace(diversity, group=None)
    lowered = limits.lowered(diversity)
    return None if limits.refusal_of(diversity) or lowered.is_off else lowered


def check_carried(params: Any) -> None:
    """Check SamplingParams that `request_params` did not create for this HTTP request, or that were
    changed since. No answer would report a lowered value, so any excess is refused.

    Raises:
        DiversityError: they carry more than is allowed.
    """
    carried: Mapping[str, Any] = params.extra_args or {}
    diversity_field, style_field = carried.get(DIVERSITY), carried.get(STYLE)
    if policy() is None or (diversity_field is None and style_field is None):
        return
    if seals.is_sealed(carried, params.n, request_context.http_request_name()):
        return
    limits = _limits(None)
    if diversity_field is not None:
        _refuse_excess(limits, parse_field(diversity_field), DIVERSITY, params.n)
    if style_field is not None:
        style = engine.styles().completed(parse_style_field(style_field))
        _refuse_excess(limits, style, STYLE, params.n)


def summary() -> dict[str, Any] | None:
    """For the capabilities: the limits of a request whose API key has no entry."""
    in_force = policy()
    if in_force is None:
        return None
    return {
        "on_excess": in_force.on_excess,
        **in_force.limits([engine.served_model_name()], None).as_dict(),
    }


def key_digest() -> str | None:
    """The SHA-256 of the HTTP request's API key, in hexadecimal digits; None without one.

    The key is read from where vLLM's own check reads it.
    """
    current = request_context.current.get()
    if current is None:
        return None
    scheme, _, key = Headers(raw=list(current.headers)).get("authorization", "").partition(" ")
    return hashlib.sha256(key.encode()).hexdigest() if scheme.lower() == "bearer" else None


def limits(request: Any) -> Limits:
    """The limits that apply to a request; unlimited without a policy."""
    return Limits() if policy() is None else _limits(request)


def _limits(request: Any) -> Limits:
    in_force = policy()
    assert in_force is not None
    model = getattr(request, "model", None) or ""
    names = [model, engine.served_model_name()]
    if (chosen := request_context.adapter()) is not None:
        # The same caps apply as when a client requests the adapter by name.
        names.insert(0, chosen.adapter.model)
    return in_force.limits(names, key_digest())


def _within(
    limits: Limits,
    requested: policies.Field,
    request: Any,
    name: str,
    clamped: dict[str, Mapping[str, float]],
) -> policies.Field:
    """Apply the limits. Excess in keys that the request does not name is lowered even under
    `on_excess: reject`."""
    in_force = policy()
    assert in_force is not None
    parameter, named_keys = _given_keys(request, name)
    _refuse_what_cannot_be_lowered(limits, requested, parameter, _choices(request))
    excess = {key: cap for key, cap in limits.excess(requested).items() if key in named_keys}
    if excess and in_force.on_excess == policies.REJECT:
        key, cap = next(iter(excess.items()))
        raise _error(f"{parameter}.{key}", policies.numbers(requested)[key], f"at most {cap:g}")
    if excess:
        clamped[name] = {key: policies.numbers(requested)[key] for key in excess}
    return limits.lowered(requested)


def _refuse_excess(
    limits: Limits, requested: spec.Diversity | spec.Style, name: str, choices: int
) -> None:
    _refuse_what_cannot_be_lowered(limits, requested, name, choices)
    for key, cap in limits.excess(requested).items():
        raise _error(f"{name}.{key}", policies.numbers(requested)[key], f"at most {cap:g}")


def _refuse_what_cannot_be_lowered(
    limits: Limits, requested: spec.Diversity | spec.Style, parameter: str, choices: int
) -> None:
    """Refuses a law, a style or a group size that is not allowed."""
    if (refused := limits.refusal_of(requested)) is not None:
        key, value, accepted = refused
        raise _error(f"{parameter}.{key}", value, accepted)
    if isinstance(requested, spec.Diversity) and not limits.allows_group(requested, choices):
        size, most = policies.size_of_group(requested, choices), limits.group_size
        accepted = f"groups of at most {most:g}" if most != 1 else "no group"
        raise _error(f"{parameter}.{spec.GROUP}", f"a group of {size}", accepted)


def _choices(request: Any) -> int:
    """How many choices a request asks for; without a field `n`, a body can set it to anything."""
    count = getattr(request, "n", None)
    return count if isinstance(count, int) else 1


def _error(parameter: str, value: object, accepted: str) -> spec.DiversityError:
    return spec.DiversityError(parameter, value, f"{accepted}, {WHOSE}")


def _given_keys(request: Any, name: str) -> tuple[str, set[str]]:
    """The parameter in which a request has the field, and the keys that have a value there."""
    top = (request.model_extra or {}).get(name)
    argument = (getattr(request, "vllm_xargs", None) or {}).get(name)
    parameter = name if top is not None else f"vllm_xargs.{name}"
    return parameter, _keys(top) | _keys(argument)


def _keys(value: object) -> set[str]:
    """The keys set by a valid field value: a number, an object, JSON text of either, or a name."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, Mapping):
        return {key for key, each in value.items() if each is not None}
    if value == spec.HUMAN:
        return {"target_entropy"}
    return set() if value is None else {"level"}
