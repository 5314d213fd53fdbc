"""Does a running server do what it says? A few short requests, and a report to paste into an issue.

It asks for at most `MOST_TOKENS` tokens, in at most `REQUESTS` requests. The report as JSON has no
text, key or address: versions, states and figures only.
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
"""Of what is to be heated."""
LEVELS = (0.25, 0.5, 1.0)
CHOICES = 4
AT_ONCE = 8
ROUNDS = 2
"""Of each kind, for throughput; one before them, of both kinds, only warms the server up."""
_GREEDY, _STYLED, _TIMED = 3, 1, 2 * (ROUNDS + 1) * AT_ONCE
REQUESTS = _GREEDY + len(LEVELS) + _STYLED + _TIMED
MOST_TOKENS = _GREEDY * GREEDY_TOKENS + (len(LEVELS) * CHOICES + _STYLED + _TIMED) * TOKENS
ABOUT = ("dftserve", "vllm", "runner", "device", "speculative_decoding", "active", "hooks_missing")
"""What of the capabilities a report has."""


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of the server: versions, runner, device."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    address: str = ""
    """The server's; findings may name it to whoever asks, and the JSON does not."""

    def as_json(self) -> str:
        listed = json.loads(as_json([self._without_address(each) for each in self.findings]))
        return json.dumps({**listed, "server": self.about, "figures": self.figures}, indent=2)

    def _without_address(self, finding: Finding) -> Finding:
        """Other addresses too: where a server has moved to."""
        text = re.sub(r"https?://[^\s,;()]+", "ADDRESS", finding.text)
        for part in (urlsplit(self.address).netloc, urlsplit(self.address).hostname):
            if part:
                text = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", "ADDRESS", text, flags=re.I)
        return replace(finding, text=text)


def verify(server: Server, model: str | None = None, api_key: str | None = None) -> Report:
    """Ask a server, and judge what it answers.

    Args:
        model: as the server names it; None: its first.

    Raises:
        ValueError, ServerError: it refuses a request, cannot be reached or fails.
    """
    findings, capabilities = capabilities_of(server.url, api_key)
    if capabilities is None or not capabilities.get("active"):
        return Report(findings, _about(capabilities or {}), address=server.url)
    figures: dict[str, Any] = {}
    model = model or server.models()[0]
    with server.client() as client, server.errors():
        asked = _Asked(client, model, capabilities)
        findings = [*findings, *_checks(asked, figures)]
    return Report(findings, _about(capabilities), figures, address=server.url)


def _about(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    return {name: capabilities.get(name) for name in ABOUT}


@dataclass(frozen=True)
class _Asked:
    client: "OpenAI"
    model: str
    capabilities: Mapping[str, Any]

    @property
    def policy(self) -> Mapping[str, Any]:
        """The operator's, as far as capabilities say: they do not know an API key's entry."""
        return self.capabilities.get("policy") or {}

    @property
    def most(self) -> float:
        """The level that the policy allows."""
        return float(self.policy.get("level", 1))

    def answer(self, diversity: float, *, style: str | None = None, **options: Any) -> Any:
        """Of /v1/chat/completions."""
        body: dict[str, Any] = {"diversity": diversity}
        return self.plain(**(body if style is None else {**body, "style": style}), options=options)

    def plain(self, options: Mapping[str, Any], **fields: Any) -> Any:
        """With these fields of ours only; without them, the server's default holds."""
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={**fields, "ignore_eos": True},
            **{"max_tokens": TOKENS, **options},
        )


class _RefusedError(Exception):
    """What the operator's policy does not allow; the server's words."""


@contextmanager
def _refusals() -> Iterator[None]:
    """
    Raises:
        _RefusedError: in the body, a 400 that names the policy.
    """
    import openai

    try:
        yield
    except openai.BadRequestError as error:
        if "operator's policy" not in error.message:
            raise
        said = error.body if isinstance(error.body, Mapping) else {}
        raise _RefusedError(str(said.get("message", error.message)).rstrip(".")) from None


def _checks(asked: _Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    yield _off(asked)
    yield _styles(asked)
    try:
        with _refusals():
            rises = _rises(asked)
    except _RefusedError as refusal:
        yield warning("effect", f"not looked at: {refusal}.")
        return
    yield _echo(rises, asked.most)
    held = _held(rises) if asked.policy else None
    yield warning("effect", held) if held else _effect(rises, figures, asked.most)
    yield _throughput(asked, figures)


def _rises(asked: _Asked) -> list[Mapping[str, Any] | None]:
    """
    Raises:
        _RefusedError: capabilities say that no level may be asked for.
    """
    if asked.most <= 0:
        raise _RefusedError("the operator's policy caps the level at 0")
    if "gated" not in asked.policy.get("laws", ["gated"]):
        raise _RefusedError("the operator's policy does not allow the law gated")
    return [_rise(asked, level * asked.most) for level in LEVELS]


def _off(asked: _Asked) -> Finding:
    """Twice without the field: on a busy server the same request may round otherwise."""
    options: dict[str, Any] = {"temperature": 0, "max_tokens": GREEDY_TOKENS}
    answers = asked.plain(options), asked.answer(0, **options), asked.plain(options)
    texts = [answer.choices[0].message.content for answer in answers]
    absent, zero, again = texts
    if zero in (absent, again):
        return ok(
            "off is off", f"the same {GREEDY_TOKENS} greedy tokens without it and at level 0."
        )
    if absent != again:
        text = "cannot be told: the server answers one greedy request in two ways; is it busy?"
        return warning("off is off", text)
    return error("off is off", "level 0 changes a greedy answer.")


def _rise(asked: _Asked, level: float) -> Mapping[str, Any] | None:
    """The answer's `diversity` object."""
    completion = asked.answer(level, n=CHOICES, temperature=TEMPERATURE)
    return (completion.model_extra or {}).get("diversity")


def _echo(objects: Sequence[Mapping[str, Any] | None], most: float) -> Finding:
    for level, said in zip(LEVELS, objects, strict=True):
        if said is None:
            text = "an answer has no `diversity`: does a proxy drop the field, or rewrite answers?"
            return error("echo", text)
        if said.get("level") != level * most:
            text = f"level {level * most:g} was asked for, {said.get('level')} is in force."
            return warning("echo", text) if "clamped" in said else error("echo", text)
    return ok("echo", "each answer says the level that was asked for.")


def _held(objects: Sequence[Mapping[str, Any] | None]) -> str | None:
    """Why entropy cannot rise with the level under the operator's policy, which lowers what it may
    without a refusal, and a `max_temperature` that a request leaves out without a word; None where
    it can."""
    levels = [said.get("level") for said in objects if said]
    if levels and levels[0] == levels[-1]:
        return f"not looked at: the operator's policy holds every level at {levels[0]}."
    hottest = [said["max_temperature"] for said in objects if said and "max_temperature" in said]
    if hottest and max(hottest) <= TEMPERATURE:
        return (
            f"not looked at: the operator's policy caps max_temperature at {max(hottest):g}, and "
            f"temperature {TEMPERATURE:g} is not heated."
        )
    return None


def _effect(
    objects: Sequence[Mapping[str, Any] | None], figures: dict[str, Any], most: float
) -> Finding:
    rises: list[float] = []
    for said in objects:
        choices = [each for each in (said or {}).get("choices") or () if each]
        if not choices:
            return warning("effect", "cannot be told: answers have no statistics.")
        risen = [each["mean_entropy_after"] - each["mean_entropy_before"] for each in choices]
        rises.append(round(sum(risen) / len(risen), 4))
    levels = [level * most for level in LEVELS]
    figures["entropy_rise_nats"] = dict(zip(map("{:g}".format, levels), rises, strict=True))
    shown = ", ".join(f"{rise:.3f} at {level:g}" for rise, level in zip(rises, levels, strict=True))
    if rises[0] < rises[-1]:
        return ok("effect", f"entropy rises with the level: by {shown} nats.")
    return error("effect", f"entropy does not rise with the level: by {shown} nats.")


def _styles(asked: _Asked) -> Finding:
    """What is loaded; and one of those that may be asked for is."""
    refused = asked.capabilities.get("styles_refused") or {}
    loaded = asked.capabilities.get("styles") or []
    if why := asked.capabilities.get("styles_unavailable"):
        return warning("styles", f"{why}.")
    if refused:
        return warning("styles", f"{len(loaded)} loaded, {len(refused)} refused: see capabilities.")
    if not loaded:
        return ok("styles", "none loaded.")
    allowed = [name for name in loaded if name in asked.policy.get("styles", loaded)]
    if not allowed:
        return warning("styles", "not asked for: the operator's policy allows none.")
    name = allowed[0]
    try:
        with _refusals():
            answer = asked.answer(0, style=name, temperature=1)
    except _RefusedError as refusal:
        return warning("styles", f"not asked for: {refusal}.")
    said = (answer.model_extra or {}).get("style") or {}
    if said.get("name") != name:
        return error("styles", f"{name} was asked for, and the answer does not say it.")
    return ok("styles", f"loaded: {', '.join(loaded)}; in force when asked for: {name}.")


def _throughput(asked: _Asked, figures: dict[str, Any]) -> Finding:
    """Alternating, so that other traffic burdens both kinds alike."""
    # Level 0 rather than no field, which would mean the server's default.
    kinds = {"idle": 0.0, "active": asked.most}
    best = dict.fromkeys(kinds, 0.0)
    for turn in range(ROUNDS + 1):
        for kind, level in kinds.items():
            rate = _tokens_per_second(asked, level)
            if turn:
                best[kind] = max(best[kind], rate)
    figures["tokens_per_second"] = {kind: round(rate, 1) for kind, rate in best.items()}
    share = best["active"] / best["idle"] if best["idle"] else 0.0
    return ok(
        "throughput",
        f"{best['idle']:.0f} tokens/s at level 0, {best['active']:.0f} at {asked.most:g} "
        f"({100 * share:.0f} %), {AT_ONCE} requests at once.",
    )


def _tokens_per_second(asked: _Asked, level: float) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asking = (pool.submit(asked.answer, level, temperature=TEMPERATURE) for _ in range(AT_ONCE))
        answers = [each.result() for each in list(asking)]
    tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    return tokens / (time.perf_counter() - began)
