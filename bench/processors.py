"""The laws of `entropy_laws.py` as processors of vLLM's V1 runner, applied to every row."""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

import entropy_laws


class Naive(LogitsProcessor):
    """The naive law on every row; `is_on` switches it for one engine's turns."""

    law = staticmethod(entropy_laws.naive)
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
    """The law of qr-sampler on every row."""

    law = staticmethod(entropy_laws.peer)
