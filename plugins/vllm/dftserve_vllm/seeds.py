"""Requests with a seed on a CPU: the V1 runner would end the engine where it takes a draw back.

A prompt that is computed in parts has a token sampled after each part, and all but the last are
thrown away. vLLM then moves the request's random generator back by that draw, through its offset,
which the generators of a GPU have. Those of a CPU have none, and the RuntimeError ends the engine
with all of its requests. Here such a generator gets its state of before the draw, and the offset
is left alone; so a seed means the same text however its prompt was divided.
"""

from collections.abc import Callable
from typing import Any

from dftserve_vllm.log import logged_once

CONSEQUENCE = "a seed on a CPU is left to vLLM"


def takes_back(sample: Callable[..., Any]) -> Callable[..., Any]:
    """Around GPUModelRunner._sample."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = []
        with logged_once(CONSEQUENCE):
            before = [(each, each.get_state()) for each in _thrown_away(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    return wrapped


def leaves_offsets(bookkeeping: Callable[..., Any]) -> Callable[..., Any]:
    """Around GPUModelRunner._bookkeeping_sync, which finds no generator whose offset to move."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden: dict[int, Any] = {}
        with logged_once(CONSEQUENCE):
            hidden = _thrown_away(self)
        for row in hidden:
            del self.input_batch.generators[row]
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            if hidden:
                self.input_batch.generators.update(hidden)

    return wrapped


def _thrown_away(runner: Any) -> dict[int, Any]:
    """The generators on a CPU of rows whose token does not count, by row."""
    generators = runner.input_batch.generators
    if not generators or runner.device.type != "cpu":
        return {}
    is_discarded = runner.discard_request_mask.np
    return {row: each for row, each in generators.items() if is_discarded[row]}
