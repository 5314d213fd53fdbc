"""One class for both runners' loaders.

vLLM's V1 and V2 runners read the same entry-point group but expect different interfaces, and each
insists on its own base class. `DiversityProcessor` is a subclass of whichever exist, and
constructing it gives the implementation that fits the arguments.
"""

import weakref
from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1Base

from dftserve_vllm import engine, is_disabled
from dftserve_vllm.extra_args import active

try:
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2Base
except ImportError:  # Before vLLM 0.31 there is no such interface.
    V2Base = None

if TYPE_CHECKING:
    from vllm import SamplingParams

    from dftserve_vllm.request_stats import RequestStats

_BASES: tuple[type, ...] = (V1Base,) if V2Base is None else (V1Base, V2Base)

# The processor of each engine in this process. Entry point and --logits-processors flag together
# construct it twice; the second must not change the rows again.
_made: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def current_stats() -> "RequestStats | None":
    """The figures of this process's newest engine."""
    stats = [processor.stats for processor in _made.values()]
    return stats[-1] if stats else None


class DiversityProcessor(*_BASES):
    """Constructing it returns a `V1Processor`, a `V2Processor`, or one that does nothing."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        runs_v1 = len(args) + len(kwargs) == 2
        if is_disabled() or engine.unsupported() or _made.get(id(vllm_config)) is not None:
            return _inert(runs_v1, vllm_config, *args, **kwargs)
        if runs_v1:
            from dftserve_vllm.v1 import V1Processor

            processor = V1Processor(vllm_config, *args, **kwargs)
        elif len(args) + len(kwargs) == 1:
            from dftserve_vllm.v2 import V2Processor

            processor = V2Processor(vllm_config, *args, **kwargs)
        else:
            given = len(args) + len(kwargs)
            raise TypeError(
                f"DiversityProcessor: got {given} arguments after vllm_config; accepted: "
                "(device, is_pin_memory) from the V1 runner or (req_states,) from the V2 runner."
            )
        _made[id(vllm_config)] = processor
        return processor

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a wrong `extra_args["diversity"]`; the only check that offline `LLM()` meets.

        Raises:
            ValueError: the diversity is not acceptable, or cannot be honoured by this engine.
        """
        if is_disabled():
            return
        if active(sampling_params, divided=False) is not None and (reason := engine.refusal()):
            raise ValueError(f"diversity: {reason}")


def _inert(runs_v1: bool, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """A processor of the runner's own kind that touches nothing."""
    if runs_v1:

        class InertV1(V1Base):
            def __init__(self, *_: Any) -> None: ...
            def is_argmax_invariant(self) -> bool:
                return True

            def update_state(self, batch_update: Any) -> None: ...
            def apply(self, logits: Any) -> Any:
                return logits

        return InertV1(vllm_config, *args, **kwargs)

    class InertV2(V2Base):  # type: ignore[misc,valid-type]
        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return False

        def apply(self, logits: Any, ctx: Any) -> Any:
            return logits

    return InertV2(vllm_config, *args, **kwargs)
