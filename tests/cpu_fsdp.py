"""FSDP2 on CPU processes, for scripts that tests launch.

torch shards on CPUs; accelerate makes FSDP of processes with accelerators only, by the kind that
`PartialState` gives them. Where a run asks for FSDP, they are called GPUs at that one decision; the
device, the backend and all else stay the CPU's.
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
