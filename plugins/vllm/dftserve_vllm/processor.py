"""One class for the loaders of both runners.

vLLM's V1 and V2 runners read the same entry-point group but expect different interfaces, and each
requires its own base class. `DiversityProcessor` is a subclass of those that exist, and
constructing it returns the implementation for the runner that constructs it.
"""

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Base

from dftserve_vllm import engine, groups, is_disabled, policy
from dftserve_vllm.extra_args import active_request, is_greedy, requested_fields, too_many_stop_ids
from dftserve_vllm.memory_pools import outside_pools
from dftserve_vllm.styles import Styles

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Base
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState
except ImportError:  # Before vLLM 0.31 there is no such interface.
    _BASES: tuple[type, ...] = (V1Base,)
    _V2_STATE: tuple[type, ...] = ()
else:
    _BASES = (V1Base, V2Base)
    _V2_STATE = (LogitsProcRequestState,)

if TYPE_CHECKING:
    from vllm import SamplingParams

    from dftserve_vllm.worker_state import WorkerState

# The processor of each engine in this process. With both the entry point and --logits-processors,
# vLLM constructs it twice; the second instance must not change the rows again.
_made: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def state_of(vllm_config: Any) -> "WorkerState | None":
    """The state of this engine's processor; None if it has none."""
    processor = _made.get(id(vllm_config))
    return None if processor is None else processor.state


class DiversityProcessor(*_BASES):
    """Constructing it returns a `V1Processor`, a `V2Processor`, or one that does nothing."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        base = _runner_base((*args, *kwargs.values()))
        if is_disabled() or engine.unsupported() or _made.get(id(vllm_config)) is not None:
            return _inert(base)
        if base is V1Base:
            from dftserve_vllm.v1 import V1Processor as Processor
        else:
            from dftserve_vllm.v2 import V2Processor as Processor
        build = partial(Processor, vllm_config, *args, **kwargs)
        processor = outside_pools(_device((*args, *kwargs.values())), build)
        _made[id(vllm_config)] = processor
        return processor

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a wrong `extra_args["diversity"]` or `["style"]`, at temperature 0 too, where they
        would change nothing; the only check under offline `LLM()`.

        Raises:
            ValueError: one of them is not acceptable, or this engine cannot honour it.
        """
        if is_disabled():
            return
        try:
            _check(sampling_params)
        except ValueError:
            from dftserve_vllm import metrics  # Not for the workers, which import this module too.

            # Reached on routes that do not read the field, such as /inference/v1/generate.
            metrics.metrics().count_refusal()
            raise


def _check(sampling_params: "SamplingParams") -> None:
    """Refuse what no worker could honour, on routes that do not read the field too.

    Raises:
        ValueError: see `DiversityProcessor.validate_params`.
    """
    policy.check_carried(sampling_params)
    styles = engine.styles()
    diversity, style = requested_fields(sampling_params, styles)
    if style is not None and (reason := styles.refusal_of(style)) is not None:
        raise ValueError(reason)
    if is_greedy(sampling_params):
        reason = groups.greedy_clash(sampling_params.temperature, diversity)
    else:
        reason = _refusal_of_sampling(sampling_params, styles)
    if reason is not None:
        raise ValueError(reason)
    is_off = diversity.is_off and (style is None or style.is_off)
    if not is_off and (reason := engine.refusal_of(diversity)) is not None:
        raise ValueError(f"diversity: {reason}")


def _refusal_of_sampling(params: "SamplingParams", styles: Styles) -> str | None:
    """Why a request that samples cannot be honoured, or None.

    Raises:
        ValueError: the workers could not read it.
    """
    is_active = active_request(params, temperature_applied=False, styles=styles) is not None
    return too_many_stop_ids(params) if is_active else None


def _runner_base(arguments: tuple[Any, ...]) -> type:
    """The base class of the runner that constructs us: only V2 passes its request state."""
    is_v2 = any(isinstance(one, _V2_STATE) for one in arguments)
    return _BASES[-1] if is_v2 else V1Base


def _device(arguments: tuple[Any, ...]) -> torch.device:
    """The device that the runner passes: V1 by itself, V2 in its request state. The CPU if it is
    missing, which the processor's constructor reports."""
    devices = (getattr(each, "device", each) for each in arguments)
    return next((each for each in devices if isinstance(each, torch.device)), torch.device("cpu"))


def _inert(base: type) -> Any:
    """A processor with the runner's base class that changes nothing."""

    class Inert(base):
        def __init__(self) -> None: ...

        def is_argmax_invariant(self) -> bool:
            return True

        def update_state(self, batch_update: Any) -> None: ...

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return False

        def apply(self, logits: Any, ctx: Any = None) -> Any:
            return logits

    # Also used on unsupported versions, whose base class may have further abstract methods.
    Inert.__abstractmethods__ = frozenset()
    return Inert()
