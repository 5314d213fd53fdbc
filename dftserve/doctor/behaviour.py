"""Tests a running server with a few short requests; the report can be pasted into an issue.

It generates at most `MOST_TOKENS` tokens, in at most `REQUESTS` requests. The JSON report has no
text, key or address, only versions, states and measurements.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dftserve.doctor.findings import Finding, as_json, error, ok, warning
from dftserve.doctor.server import capabilities_of
from dftserve.openai_client import Server

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "Tell me about a walk by the sea."
GREEDY_TOKENS = 32
TOKENS = 48
TEMPERATURE = 1.0
"""Of the requests whose entropy should rise."""
LEVELS = (0.25, 0.5, 1.0)
CHOICES = 4
AT_ONCE = 8
ROUNDS = 2
"""Throughput measurements of each kind; one more of each before them only warms up the server."""
_GREEDY, _STYLED, _TIMED = 3, 1, 2 * (ROUNDS + 1) * AT_ONCE
REQUESTS = _GREEDY + len(LEVELS) + _STYLED + _TIMED
MOST_TOKENS = _GREEDY * GREEDY_TOKENS + (len(LEVELS) * CHOICES + _STYLED + _TIMED) * TOKENS
ABOUT = ("dftserve", "vllm", "runner", "device", "speculative_decoding", "active", "hooks_missing")
"""The capabilities that a report contains."""


@dataclass(frozen=True)
class Report:
    """What `verify` found out about a server."""

    findings: list[Finding]
    about: Mapping[str, Any] = field(default_factory=dict)
    """The server's versions, runner and device."""
    measurements: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""
    """The server's address; findings may contain it, the JSON does not."""

    def as_json(self) -> str:
        listed = json.loads(as_json([self._without_address(each) for each in self.findings]))
        return json.dumps(
            {**listed, "server": self.about, "measurements": self.measurements}, indent=2
        )

    def _without_address(self, finding: Finding) -> Finding:
        """Removes other addresses too, such as that of a redirect."""
        text = re.sub(r"https?://[^\s,;()]+", "ADDRESS", finding.text)
        for part in (urlsplit(self.address).netloc, urlsplit(self.address).hostname):
            if part:
                text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "ADDRESS", text, flags=re.I)
        return replace(finding, text=text)


def verify(server: Server, model: str | None = None, api_key: str | None = None) -> Report:
    """Send requests to a server, and check its answers.

    Args:
        model: its name on the server; None: the server's first.

    Raises:
        ValueError, ServerError: it refuses a request, cannot be reached or fails.
    """
    findings, capabilities = capabilities_of(server.url, api_key)
    if capabilities is None or not capabilities.get("active"):
        return Report(findings, _about(capabilities or {}), address=server.url)
    measurements: dict[str, Any] = {}
    model = model or server.models()[0]
    with server.client() as client, server.errors():
        requests = _Requests(client, model, capabilities)
        findings = [*findings, *_checks(requests, measurements)]
    return Report(findings, _about(capabilities), measurements, address=server.url)


def _about(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    return {name: capabilities.get(name) for name in ABOUT}


@dataclass(frozen=True)
class _Requests:
    client: "OpenAI"
    model: str
    capabilities: Mapping[str, Any]

    @property
    def policy(self) -> Mapping[str, Any]:
        """The operator's policy by the capabilities, which ignore the entries of API keys."""
        return self.capabilities.get("policy") or {}

    @property
    def most(self) -> float:
        """The highest level that the policy allows."""
        return float(self.policy.get("level", 1))

    def answer(self, diversity: float, *, style: str | None = None, **options: Any) -> Any:
        """An answer of /v1/chat/completions at this diversity."""
        body: dict[str, Any] = {"diversity": diversity}
        return self.plain(**(body if style is None else {**body, "style": style}), options=options)

    def plain(self, options: Mapping[str, Any], **fields: Any) -> Any:
        """An answer with only these of our fields; without any, the server's default applies."""
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={**fields, "ignore_eos": True},
            **{"max_tokens": TOKENS, **options},
        )


class _RefusedError(Exception):
    """The operator's policy does not allow a request; has the server's message."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell a refusal by the operator's policy from other errors.

    Raises:
        _RefusedError: for a 400, raised in the block, that names the policy.
    """
    import openai

    try:
        yield
    except openai.BadRequestError as error:
        if "operator's policy" not in error.message:
            raise
        body = error.body if isinstance(error.body, Mapping) else {}
        raise _RefusedError(str(body.get("message", error.message)).rstrip(".")) from None


def _checks(requests: _Requests, measurements: dict[str, Any]) -> Iterator[Finding]:
    yield _off(requests)
    yield _styles(requests)
    try:
        with _refusals():
            objects = _diversity_objects(requests)
    except _RefusedError as refusal:
        yield warning("effect", f"not checked: {refusal}.")
        return
    yield _echo(objects, requests.most)
    capped = _capped(objects) if requests.policy else None
    yield warning("effect", capped) if capped else _effect(objects, measurements, requests.most)
    yield _throughput(requests, measurements)


def _diversity_objects(requests: _Requests) -> list[Mapping[str, Any] | None]:
    """The answers' `diversity` objects at `LEVELS`.

    Raises:
        _RefusedError: the policy in the capabilities allows no level.
    """
    if requests.most <= 0:
        raise _RefusedError("the operator's policy caps the level at 0")
    if "gated" not in requests.policy.get("laws", ["gated"]):
        raise _RefusedError("the operator's policy does not allow the law gated")
    return [_diversity_object(requests, level * requests.most) for level in LEVELS]


def _off(requests: _Requests) -> Finding:
    """Asks twice without the field: on a busy server, rounding may differ for the same request."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": GREEDY_TOKENS}
    answers = requests.plain(options), requests.answer(0, **options), requests.plain(options)
    texts = [answer.choices[0].message.content for answer in answers]
    absent, zero, again = texts
    if zero in (absent, again):
        return ok(
            "off is off", f"the same {GREEDY_TOKENS} greedy tokens without it and at level 0."
        )
    if absent != again:
        text = "unknown: the server gave two answers to the same greedy request; is it busy?"
        return warning("off is off", text)
    return error("off is off", "level 0 changes a greedy answer.")


def _diversity_object(requests: _Requests, level: float) -> Mapping[str, Any] | None:
    completion = requests.answer(level, n=CHOICES, temperature=TEMPERATURE)
    return (completion.model_extra or {}).get("diversity")


def _echo(objects: Sequence[Mapping[str, Any] | None], most: float) -> Finding:
    for level, found in zip(LEVELS, objects, strict=True):
        if found is None:
            text = "an answer has no `diversity`: does a proxy drop the field, or rewrite answers?"
            return error("echo", text)
        if found.get("level") != level * most:
            text = f"level {level * most:g} was asked for, {found.get('level')} is in force."
            return warning("echo", text) if "clamped" in found else error("echo", text)
    return ok("echo", "each answer has the level that was asked for.")


def _capped(objects: Sequence[Mapping[str, Any] | None]) -> str | None:
    """Why entropy cannot rise with the level under the operator's policy, or None. A policy can
    lower values without a refusal, and a default `max_temperature` without reporting it."""
    levels = [found.get("level") for found in objects if found]
    if levels and levels[0] == levels[-1]:
        return f"not checked: the operator's policy limits every level to {levels[0]}."
    hottest = [
        found["max_temperature"] for found in objects if found and "max_temperature" in found
    ]
    if hottest and max(hottest) <= TEMPERATURE:
        return (
            f"not checked: the operator's policy caps max_temperature at {max(hottest):g}, and "
            f"temperature {TEMPERATURE:g} is not heated."
        )
    return None


def _effect(
    objects: Sequence[Mapping[str, Any] | None], measurements: dict[str, Any], most: float
) -> Finding:
    rises: list[float] = []
    for found in objects:
        choices = [each for each in (found or {}).get("choices") or () if each]
        if not choices:
            return warning("effect", "unknown: answers have no statistics.")
        risen = [each["mean_entropy_after"] - each["mean_entropy_before"] for each in choices]
        rises.append(round(sum(risen) / len(risen), 4))
    levels = [level * most for level in LEVELS]
    measurements["entropy_rise_nats"] = dict(zip(map("{:g}".format, levels), rises, strict=True))
    shown = ", ".join(f"{rise:.3f} at {level:g}" for rise, level in zip(rises, levels, strict=True))
    if rises[0] < rises[-1]:
        return ok("effect", f"entropy rises with the level: by {shown} nats.")
    return error("effect", f"entropy does not rise with the level: by {shown} nats.")


def _styles(requests: _Requests) -> Finding:
    """Which styles are loaded, and whether a request gets the first allowed one."""
    refused = requests.capabilities.get("styles_refused") or {}
    loaded = requests.capabilities.get("styles") or []
    if why := requests.capabilities.get("styles_unavailable"):
        return warning("styles", f"{why}.")
    if refused:
        return warning("styles", f"{len(loaded)} loaded, {len(refused)} refused: see capabilities.")
    if not loaded:
        return ok("styles", "none loaded.")
    allowed = [name for name in loaded if name in requests.policy.get("styles", loaded)]
    if not allowed:
        return warning("styles", "not checked: the operator's policy allows none.")
    name = allowed[0]
    try:
        with _refusals():
            answer = requests.answer(0, style=name, temperature=1)
    except _RefusedError as refusal:
        return warning("styles", f"not checked: {refusal}.")
    in_force = (answer.model_extra or {}).get("style") or {}
    if in_force.get("name") != name:
        return error("styles", f"{name} was asked for, but it is not in the answer.")
    return ok("styles", f"loaded: {', '.join(loaded)}; in force when asked for: {name}.")


def _throughput(requests: _Requests, measurements: dict[str, Any]) -> Finding:
    """Alternates the two kinds, so that other traffic affects both equally."""
    # Level 0 rather than no field, which would mean the server's default.
    kinds = {"idle": 0.0, "active": requests.most}
    best = dict.fromkeys(kinds, 0.0)
    for turn in range(ROUNDS + 1):
        for kind, level in kinds.items():
            rate = _tokens_per_second(requests, level)
            if turn:
                best[kind] = max(best[kind], rate)
    measurements["tokens_per_second"] = {kind: round(rate, 1) for kind, rate in best.items()}
    share = best["active"] / best["idle"] if best["idle"] else 0.0
    return ok(
        "throughput",
        f"{best['idle']:.0f} tokens/s at level 0, {best['active']:.0f} at {requests.most:g} "
        f"({100 * share:.0f} %), {AT_ONCE} requests at once.",
    )


def _tokens_per_second(requests: _Requests, level: float) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [
            pool.submit(requests.answer, level, temperature=TEMPERATURE) for _ in range(AT_ONCE)
        ]
        answers = [each.result() for each in futures]
    tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    return tokens / (time.perf_counter() - began)
