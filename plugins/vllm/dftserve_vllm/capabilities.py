"""`GET /v1/dft/capabilities`: how this server handles the fields. Requires the API key."""

from typing import Any

import dftserve
from dftserve import spec
from dftserve_vllm import adapters, engine, hooks, human, metrics, policy, request_params


def capabilities(models: Any = None) -> dict[str, Any]:
    """What `GET /v1/dft/capabilities` answers, in JSON types.

    Args:
        models: vLLM's `OpenAIServingModels`, with the adapters that this process serves now.
    """
    reason = engine.refusal()
    default = request_params.default_diversity()
    human_diversity = human.diversity()
    styles = engine.styles()
    return {
        "dftserve": dftserve.__version__,
        "vllm": engine.vllm_version(),
        "runner": engine.runner(),
        "device": engine.device(),
        "active": reason is None,
        "reason": reason,
        "hooks_missing": hooks.problems(),
        "laws": {
            law: {name: str(spec.BOUNDS[name]) for name in takes}
            for law, takes in spec.LAWS.items()
        },
        "dry": {
            **{name: str(bounds) for name, bounds in spec.DRY_BOUNDS.items()},
            spec.DRY_BREAKERS: spec.BREAKERS_ACCEPTED,
        },
        "groups_unavailable": engine.refusal_of_groups(),
        "styles": [profile.name for profile in styles.profiles],
        "styles_refused": dict(styles.refused),
        "styles_unavailable": styles.unavailable,
        "adapters": _adapters(models),
        "default": default and default.as_dict(),
        "default_refused": request_params.default_refusal(),
        spec.HUMAN: human_diversity and human_diversity.as_dict(),
        "policy": policy.summary(),
        "answers": True,
        "trace": spec.MOST_TRACED,
        "speculative_decoding": engine.speculative_method(),
        **metrics.totals(),
    }


def _adapters(models: Any) -> dict[str, list[float]]:
    """The strengths of the adapters that a style may name, by style name."""
    if hooks.ADAPTERS.name in hooks.problems():
        return {}
    by_style = adapters.strengths(adapters.served(models))
    return {name: each for name, each in by_style.items() if not engine.styles().has(name)}
