"""One class for both runners' loaders.

vLLM's V1 and V2 runners read the same entry-point group but expect different interfaces, and each
insists on its own base class. `DiversityProcessor` is a subclass of whichever exist, and
constructing it gives the implementation for the runner that does.
"""

import weakref
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Base

from dftserve_vllm import engine, is_disabled, policy
from dftserve_vllm.extra_args import active, too_many_stop_ids

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

    from dftserve_vllm.request_stats import RequestStats

# The processor of each engine in this process. Entry point and --logits-processors flag together
# construct it twice; the second must not change the rows again.
_made: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def stats_of(vllm_config: Any) -> "RequestStats | None":
    """What the processor of the engine with this configuration keeps; None where there is none."""
    made = _made.get(id(vllm_config))
    return None if made is None else made.stats


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
        processor = Processor(vllm_config, *args, **kwargs)
        _made[id(vllm_config)] = processor
        return processor

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a wrong `extra_args["diversity"]` or `["style"]`; the only check that offline
        `LLM()` meets.

        Raises:
            ValueError: one is not acceptable, or cannot be honoured by this engine.
        """
        if is_disabled():
            return
        policy.check_carried(sampling_params)
        asked = active(sampling_params, temperature_applied=False, styles=engine.styles())
        if asked is None:
            return
        if (reason := too_many_stop_ids(sampling_params)) is not None:
            raise ValueError(reason)
        if reason := engine.refusal_of(asked.diversity):
            raise ValueError(f"diversity: {reason}")


def _runner_base(given: tuple[Any, ...]) -> type:
    """The base class of the runner that constructs us: V2 hands over its own request state."""
    is_v2 = any(isinstance(one, _V2_STATE) for one in given)
    return _BASES[-1] if is_v2 else V1Base


def _inert(base: type) -> Any:
    """A processor of the runner's own kind that touches nothing."""

    class Inert(base):
        def __init__(self) -> None: ...

        def is_argmax_invariant(self) -> bool:
            return True

        def update_state(self, batch_update: Any) -> None: ...

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return False

        def apply(self, logits: Any, ctx: Any = None) -> Any:
            return logits

    # It stands in on versions that are not supported as well, which may ask for more methods.
    Inert.__abstractmethods__ = frozenset()
    return Inert()
