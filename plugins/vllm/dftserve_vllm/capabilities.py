"""`GET /v1/dft/capabilities`: what this server makes of the field. Behind the API key."""

from typing import Any

import dftserve
from dftserve import spec
from dftserve_vllm import engine, hooks, human, metrics, policy, request_params


def capabilities() -> dict[str, Any]:
    reason = engine.refusal()
    default = request_params.default_diversity()
    of_humans = human.diversity()
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
        "dry": {name: str(bounds) for name, bounds in spec.DRY_BOUNDS.items()},
        "groups_unavailable": engine.refusal_of_groups(),
        "styles": [profile.name for profile in styles.profiles],
        "styles_refused": dict(styles.refused),
        "styles_unavailable": styles.unavailable,
        "default": default and default.as_dict(),
        "default_refused": request_params.default_refusal(),
        spec.HUMAN: of_humans and of_humans.as_dict(),
        "policy": policy.summary(),
        "answers": True,
        "speculative_decoding": engine.speculative_method(),
        **metrics.totals(),
    }
