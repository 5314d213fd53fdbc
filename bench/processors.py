"""The laws of `others.py` as processors of vLLM's V1 runner, applied to every row."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

import others


class Naive(LogitsProcessor):
    law = staticmethod(others.naive)
    is_on = True

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None: ...

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if self.is_on:
            self.law(logits)
        return logits


class Peer(Naive):
    law = staticmethod(others.peer)
