"""On a GPU the processors take no memory from the pools of vLLM's sleep mode."""

import contextlib
import threading
from dataclasses import dataclass

import pytest
import torch
from dftserve_vllm import v1 as v1_module
from dftserve_vllm import v2 as v2_module
from dftserve_vllm.processor import DiversityProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState

from tests.vllm_config import config

GPU = torch.device("cuda", 1)


@dataclass
class _Built:
    in_pool: bool
    device: torch.device


class _Cuda:
    """torch's rule: memory of a pool goes to the thread that has begun to use the pool."""

    def __init__(self, monkeypatch) -> None:
        self._thread = threading.local()
        self.synchronized: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device", self.on)
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda: self.synchronized.append(self.current())
        )

    @contextlib.contextmanager
    def on(self, device):
        self._thread.device = device
        yield

    @contextlib.contextmanager
    def pool(self):
        self._thread.is_in_pool = True
        yield
        self._thread.is_in_pool = False

    def current(self) -> torch.device:
        return getattr(self._thread, "device", torch.device("cuda", 0))

    def is_in_pool(self) -> bool:
        return getattr(self._thread, "is_in_pool", False)


def _states(device: torch.device) -> LogitsProcRequestState:
    states = object.__new__(LogitsProcRequestState)
    vars(states).update(max_num_reqs=4, device=device)
    return states


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_memory_is_taken_on_the_engines_device_and_from_no_pool(runner, monkeypatch):
    """vLLM makes V2's processors while a pool is in use that a sleep of level 2 discards."""
    cuda = _Cuda(monkeypatch)

    def build(*_: object) -> _Built:
        return _Built(cuda.is_in_pool(), cuda.current())

    module = v1_module if runner == "V1" else v2_module
    monkeypatch.setattr(module, f"{runner}Processor", build)
    with cuda.pool():
        given = (GPU, True) if runner == "V1" else (_states(GPU),)
        built = DiversityProcessor(config(), *given)
    assert built == _Built(in_pool=False, device=GPU)
    assert cuda.synchronized == [GPU]


def test_what_fails_there_is_raised(monkeypatch):
    cuda = _Cuda(monkeypatch)

    def build(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(v2_module, "V2Processor", build)
    with cuda.pool(), pytest.raises(RuntimeError, match="out of memory"):
        DiversityProcessor(config(), _states(GPU))
