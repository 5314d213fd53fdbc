"""Does a running server do what it says? A few short requests, and a report to paste into an issue.

It asks for under 4,000 tokens in all. The report has no text, key or address: versions, states and
figures only.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dftserve.doctor.findings import Finding, as_json, error, ok, warning
from dftserve.doctor.server import capabilities_of
from dftserve.openai_client import Server

if TYPE_CHECKING:
    from openai import OpenAI

PROMPT = "Tell me about a walk by the sea."
GREEDY_TOKENS = 32
TOKENS = 48
LEVELS = (0.25, 0.5, 1.0)
CHOICES = 4
AT_ONCE = 8
ROUNDS = 2
"""Of each kind, for throughput; the first, of both kinds, only warms the server up."""
ABOUT = ("dftserve", "vllm", "runner", "device", "speculative_decoding", "active", "hooks_missing")
"""What of the capabilities a report has."""


@dataclass(frozen=True)
class Report:
    findings: list[Finding]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Of the server: versions, runner, device."""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        listed = json.loads(as_json(self.findings))
        return json.dumps({**listed, "server": self.about, "figures": self.figures}, indent=2)


def verify(server: Server, model: str | None = None, api_key: str | None = None) -> Report:
    """Ask a server, and judge what it answers.

    Args:
        model: as the server names it; None: its first.

    Raises:
        ValueError, ServerError: it refuses a request, cannot be reached or fails.
    """
    findings, capabilities = capabilities_of(server.url, api_key)
    if capabilities is None or not capabilities.get("active"):
        return Report(findings, _about(capabilities or {}))
    figures: dict[str, Any] = {}
    model = model or server.models()[0]
    with server.client() as client, server.errors():
        asked = _Asked(client, model, capabilities)
        findings = [*findings, *_checks(asked, figures)]
    return Report(findings, _about(capabilities), figures)


def _about(capabilities: Mapping[str, Any]) -> dict[str, Any]:
    return {name: capabilities.get(name) for name in ABOUT}


@dataclass(frozen=True)
class _Asked:
    client: "OpenAI"
    model: str
    capabilities: Mapping[str, Any]

    @property
    def most(self) -> float:
        """The level that the operator's policy allows, as far as capabilities say."""
        policy = self.capabilities.get("policy") or {}
        return float(policy.get("level", 1))

    def answer(self, diversity: float | None, **options: Any) -> Any:
        """Of /v1/chat/completions."""
        body = {} if diversity is None else {"diversity": diversity}
        return self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": PROMPT}],
            extra_body={**body, "ignore_eos": True},
            **{"max_tokens": TOKENS, **options},
        )


def _checks(asked: _Asked, figures: dict[str, Any]) -> Iterator[Finding]:
    yield _off(asked)
    if asked.most <= 0:
        yield warning("effect", "not looked at: the operator's policy caps the level at 0.")
        return
    rises = [_rise(asked, level * asked.most) for level in LEVELS]
    yield _echo(rises, asked.most)
    yield _effect(rises, figures, asked.most)
    yield _styles(asked.capabilities)
    yield _throughput(asked, figures)


def _off(asked: _Asked) -> Finding:
    """Twice without the field: on a busy server the same request may round otherwise."""
    options = {"temperature": 0, "max_tokens": GREEDY_TOKENS}
    texts = [asked.answer(level, **options).choices[0].message.content for level in (None, 0, None)]
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
    completion = asked.answer(level, n=CHOICES, temperature=1)
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


def _styles(capabilities: Mapping[str, Any]) -> Finding:
    refused = capabilities.get("styles_refused") or {}
    loaded = capabilities.get("styles") or []
    if why := capabilities.get("styles_unavailable"):
        return warning("styles", f"{why}.")
    if refused:
        return warning("styles", f"{len(loaded)} loaded, {len(refused)} refused: see capabilities.")
    return ok("styles", ", ".join(loaded) or "none loaded.")


def _throughput(asked: _Asked, figures: dict[str, Any]) -> Finding:
    """Alternating, so that other traffic burdens both kinds alike."""
    kinds: dict[str, float | None] = {"idle": None, "active": asked.most}
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
        f"{best['idle']:.0f} tokens/s without the field, {best['active']:.0f} with it "
        f"({100 * share:.0f} %), {AT_ONCE} requests at once.",
    )


def _tokens_per_second(asked: _Asked, level: float | None) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda _: asked.answer(level, temperature=1), range(AT_ONCE)))
    tokens = sum(answer.usage.completion_tokens for answer in answers if answer.usage)
    return tokens / (time.perf_counter() - began)
