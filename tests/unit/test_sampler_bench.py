"""bench/sampler.py: what a captured graph reads stays as long as the graph."""

import contextlib
import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def sampler(monkeypatch):
    """The bench, with a CUDA that captures nothing."""
    nothing = contextlib.nullcontext()
    replays = []
    fake = SimpleNamespace(
        Stream=lambda: None,
        stream=lambda stream: nothing,
        synchronize=lambda: None,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: replays.append(1)),
        graph=lambda graph: nothing,
    )
    module = importlib.import_module("sampler")
    monkeypatch.setattr(module.torch, "cuda", fake)
    module.replays = replays
    return module


def test_a_captured_graph_keeps_the_buffers_of_its_way(sampler):
    logits_RV = torch.randn(2, 300)

    class Buffered:
        def __init__(self):
            self.buffer = torch.empty(2, 300)

        def __call__(self, logits_RV):
            self.buffer.copy_(logits_RV)

    way = Buffered()
    buffer = weakref.ref(way.buffer)
    captured = sampler._captured(way, logits_RV, logits_RV)
    del way
    gc.collect()
    assert buffer() is not None
    captured(logits_RV)
    assert sampler.replays == [1]
    with pytest.raises(AssertionError):
        captured(logits_RV.clone())
    del captured
    gc.collect()
    assert buffer() is None


def test_the_ways_hold_the_backend_that_they_use(sampler):
    """Ours are closures: the transform with its buffers lives in them."""
    for name in ("ours", "half", "tenth"):
        way = sampler.WAYS[name](4, torch.device("cpu"))
        way(torch.randn(4, 300))
        held = [cell.cell_contents for cell in way.__closure__]
        assert any(type(each).__name__ == "NumbaBackend" for each in held), name
