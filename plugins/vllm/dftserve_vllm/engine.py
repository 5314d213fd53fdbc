"""What this process knows of its engine, and whether the field can be honoured on it.

The request field refuses at once what the engine would silently ignore: this module holds the
configuration that `hooks` records when vLLM builds its request processor.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 31), (0, 32))
"""vLLM's minor versions that the tests run on."""

_config: "VllmConfig | None" = None


def record(vllm_config: "VllmConfig") -> None:
    global _config
    _config = vllm_config


def vllm_version() -> str:
    from vllm import __version__

    return __version__


def unsupported() -> str | None:
    """Why nothing is changed on this vLLM, or None."""
    version = vllm_version()
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is not None and (int(match[1]), int(match[2])) in SUPPORTED:
        return None
    supported = ", ".join(".".join(map(str, minor)) for minor in SUPPORTED)
    return f"vLLM {version} is not supported (supported: {supported}); install one of these"


def refusal() -> str | None:
    """Why this engine cannot honour the field, with what to do about it, or None."""
    if (reason := unsupported()) is not None:
        return reason
    if _config is not None and _config.speculative_config is not None and runner() == "V1":
        return (
            "vLLM's V1 model runner skips custom logits processors under speculative decoding; "
            "use the V2 runner (VLLM_USE_V2_MODEL_RUNNER=1) or drop --speculative-config"
        )
    return None


def runner() -> str | None:
    """V1 or V2; None before the engine is configured."""
    if _config is None:
        return None
    return "V2" if _config.use_v2_model_runner else "V1"


def speculative_method() -> str | None:
    if _config is None or _config.speculative_config is None:
        return None
    return str(_config.speculative_config.method)


def operator_defaults() -> frozenset[str]:
    """Sampling parameters that `--override-generation-config` sets: explicit, never dropped."""
    if _config is None:
        return frozenset()
    override: dict[str, Any] = _config.model_config.override_generation_config or {}
    return frozenset(override)
