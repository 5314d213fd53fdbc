"""Tables derived from the engine's vocabulary: the token classes of the law `words`, and the
sequence breakers of DRY."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from dftserve.sampling import TokenClasses
from dftserve.sampling.dry import Breakers
from dftserve.spec import DRY_BREAKERS, Dry
from dftserve_vllm.log import logger

T = TypeVar("T")


def token_classes(vllm_config: Any) -> TokenClasses | None:
    """The token classes of the engine with this configuration; None if they cannot be made from its
    tokenizer.

    A worker calls this once, when it starts. The API process refuses requests that would need the
    missing classes: see `refusal`.
    """
    model_config = getattr(vllm_config, "model_config", None)
    if model_config is None:
        return None
    classes = _classes_or_reason(Identity(model_config))
    if isinstance(classes, TokenClasses):
        return classes
    logger.info("diversity: the law 'words' is not available: %s", classes)
    return None


def refusal(vllm_config: Any) -> str | None:
    """Why this engine cannot honour the law `words`, with what to do about it, or None."""
    if hides_last_token(vllm_config):
        return (
            "the law 'words' needs the last token, which vLLM's V1 model runner does not provide "
            "under asynchronous scheduling; use --no-async-scheduling or the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )
    classes = _classes_or_reason(Identity(vllm_config.model_config))
    return classes if isinstance(classes, str) else None


def breakers(vllm_config: Any) -> Breakers | None:
    """Like `token_classes`, for the texts that end a sequence under DRY."""
    model_config = getattr(vllm_config, "model_config", None)
    if model_config is None:
        return None
    result = _breakers_or_reason(Identity(model_config))
    return result if isinstance(result, Breakers) else None


def dry_refusal(vllm_config: Any, dry: Dry) -> str | None:
    """Why this engine cannot honour a request's DRY, with what to do about it, or None."""
    if hides_last_token(vllm_config):
        return (
            "DRY needs the text so far, which vLLM's V1 model runner does not provide under "
            "asynchronous scheduling; use --no-async-scheduling or the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )
    if not dry.sequence_breakers:
        return None
    result = _breakers_or_reason(Identity(vllm_config.model_config))
    if isinstance(result, Breakers):
        return None
    return f"{DRY_BREAKERS} need the tokens' text: {result}; an empty list needs none"


def hides_last_token(vllm_config: Any) -> bool:
    """Whether the engine's runner does not give logits processors the last token."""
    # V1 replaces the placeholders of asynchronous scheduling only for processors given by flag.
    scheduler = getattr(vllm_config, "scheduler_config", None)
    return (
        not vllm_config.use_v2_model_runner
        and getattr(scheduler, "async_scheduling", False)
        and not getattr(vllm_config.model_config, "logits_processors", None)
    )


class Identity:
    """Makes a configuration, which is not hashable, a cache key; there is one for each engine."""

    def __init__(self, model_config: Any) -> None:
        self.model_config = model_config

    def __hash__(self) -> int:
        return id(self.model_config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.model_config is self.model_config


@lru_cache(maxsize=8)
def _classes_or_reason(identity: Identity) -> TokenClasses | str:
    """The classes, or why there are none; cached, since it reads the whole vocabulary."""
    result = _from_tokenizer(TokenClasses.from_tokenizer, identity)
    return (
        f"the law 'words' needs the tokens' text: {result}" if isinstance(result, str) else result
    )


@lru_cache(maxsize=8)
def _breakers_or_reason(identity: Identity) -> Breakers | str:
    return _from_tokenizer(Breakers.from_tokenizer, identity)


def _from_tokenizer(make: Callable[[Any], T], identity: Identity) -> T | str:
    """`make` applied to the engine's tokenizer, or why it failed."""
    try:
        return make(tokenizer(identity.model_config))
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    except Exception as error:  # Raised by the model's own code; the engine must still start.
        logger.warning("diversity: the tokenizer cannot be read", exc_info=True)
        return repr(error)


def tokenizer(model_config: Any) -> Any:
    """The engine's tokenizer.

    Raises:
        ValueError: the engine runs without one.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    cached = cached_tokenizer_from_config(model_config)
    if cached is None:
        raise ValueError(
            "the engine runs without a tokenizer (--skip-tokenizer-init); start it with one"
        )
    return cached
