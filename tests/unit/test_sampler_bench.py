"""bench/sampler.py: the buffers that a captured graph reads are kept as long as the graph."""

import contextlib
import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def sampler(monkeypatch):
    """The bench with a fake CUDA that captures nothing."""
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


def test_a_captured_graph_keeps_its_buffers(sampler):
    logits_RV = torch.randn(2, 300)

    class Buffered:
        def __init__(self):
            self.buffer = torch.empty(2, 300)

        def __call__(self, logits_RV):
            self.buffer.copy_(logits_RV)

    variant = Buffered()
    buffer = weakref.ref(variant.buffer)
    captured = sampler._captured(variant, logits_RV, logits_RV)
    del variant
    gc.collect()
    assert buffer() is not None
    captured(logits_RV)
    assert sampler.replays == [1]
    with pytest.raises(AssertionError):
        captured(logits_RV.clone())
    del captured
    gc.collect()
    assert buffer() is None


def test_our_variants_keep_their_backend(sampler):
    """They are closures, which hold the transform and its buffers."""
    for name in ("ours", "half", "tenth"):
        variant = sampler.WAYS[name](4, torch.device("cpu"))
        variant(torch.randn(4, 300))
        cells = [cell.cell_contents for cell in variant.__closure__]
        assert any(type(each).__name__ == "NumbaBackend" for each in cells), name
