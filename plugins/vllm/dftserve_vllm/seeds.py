"""Requests with a seed on a CPU: works around an error that ends the engine on the V1 runner.

When a prompt is prefilled in chunks, a token is sampled after each chunk, and all but the last are
discarded. vLLM then rewinds the request's random generator by that draw, through its offset, which
GPU generators have. CPU generators have none, and the RuntimeError ends the engine with all of its
requests. Here, such a generator gets back its state from before the draw, and the offset is not
touched; so a seed gives the same text however its prompt was divided.
"""

from collections.abc import Callable
from typing import Any

from dftserve_vllm.log import logged_once

CONSEQUENCE = "a seed on a CPU is left to vLLM"


def restore_generators(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps GPUModelRunner._sample."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = []
        with logged_once(CONSEQUENCE):
            before = [(each, each.get_state()) for each in _discarded(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    return wrapped


def hide_generators(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps GPUModelRunner._bookkeeping_sync, hiding the generators that it would rewind."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden: dict[int, Any] = {}
        with logged_once(CONSEQUENCE):
            hidden = _discarded(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            if hidden:
                self.input_batch.generators.update(hidden)

    return wrapped


def _discarded(runner: Any) -> dict[int, Any]:
    """By row, the CPU generators of rows whose sampled token is discarded."""
    generators = runner.input_batch.generators
    if not generators or runner.device.type != "cpu":
        return {}
    is_discarded = runner.discard_request_mask.np
    return {row: each for row, each in generators.items() if is_discarded[row]}
