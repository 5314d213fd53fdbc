"""Device memory that vLLM's sleep mode does not discard."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

import torch

T = TypeVar("T")


def outside_pools(device: torch.device, build: Callable[[], T]) -> T:
    """What `build` returns, with its tensors outside of every memory pool that is in use.

    With sleep mode, vLLM takes a model's memory from a pool, whose contents a sleep of level 2
    discards. The V2 runner makes its logits processors while that pool is in use, and nothing would
    write their tables again. torch routes only the current thread's allocations to a pool, so this
    one builds in another thread.

    Raises:
        Exception: what `build` raises.
    """
    if device.type != "cuda":  # Elsewhere the plug-in is not given memory of a pool.
        return build()
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(copy_context().run, _build_on, device, build).result()


def _build_on(device: torch.device, build: Callable[[], T]) -> T:
    # A new thread begins with device 0, and with a stream that the engine's does not wait for.
    with torch.cuda.device(device):
        built = build()
        torch.cuda.synchronize()
    return built
