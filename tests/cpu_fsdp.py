"""FSDP2 on CPU processes, for scripts that tests launch.

torch can shard on CPUs, but accelerate enables FSDP only for processes with accelerators, by the
distributed type in `PartialState`. If a run asks for FSDP, that type is replaced by MULTI_GPU for
this decision only; the device, the backend and everything else are still the CPU's.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_sharded(
    self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **given: Any
) -> None:
    known = PartialState._shared_state
    if fsdp_plugin is not None and known.get("distributed_type") == DistributedType.MULTI_CPU:
        known["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, fsdp_plugin=fsdp_plugin, **given)


def shard_on_cpus() -> None:
    AcceleratorState.__init__ = _init_sharded  # type: ignore[method-assign]
