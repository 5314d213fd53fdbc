"""Decode-time laws that neither vLLM nor the plug-in implements, on one row, and a processor of
vLLM's V1 runner that applies the one a request names
(`extra_args={"other_law": {"name": NAME, …}}`).

    edt       T = T0 · .8^(θ / H), H in nats of the row at temperature 1 (arXiv 2403.14541)
    mirostat  version 2, as in llama.cpp: tokens with a surprise above μ are cut, and after each
              token μ −= .1 · (its surprise − τ), in bits; μ starts at 2 τ (arXiv 2007.14966)
    top-H     the likeliest tokens until their entropy exceeds α times the whole entropy,
              transformers' `TopHLogitsWarper` (arXiv 2509.02510)
    p-less    tokens at least as likely as the agreement of two draws: p ≥ Σ p² (arXiv 2509.23234)

The last three cut after a temperature, as published. Their output is sampled at temperature 1.
`bench/laws.py` compares them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TopHLogitsWarper
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

EDT_BASE = 0.8
"""N of the paper."""
LEARNING_RATE = 0.1
"""The learning rate of Mirostat's μ."""

Law = Callable[[list[int], Tensor], Tensor]
"""Takes the tokens so far and a row of logits, and returns the logits to sample from."""


def edt(*, base: float, theta: float) -> Law:
    """`base`: T0. The temperature is at least 0.01; for a row without entropy it would be 0."""

    def law(_: list[int], logits_V: Tensor) -> Tensor:
        log_p_V = logits_V.log_softmax(-1)
        entropy = float(-torch.where(log_p_V.isfinite(), log_p_V.exp() * log_p_V, 0).sum())
        return logits_V / max(base * EDT_BASE ** (theta / max(entropy, 1e-6)), 0.01)

    return law


def mirostat(*, tau: float, temperature: float) -> Law:
    """The law with the state of one text.

    Raises:
        RuntimeError: the engine does not have the last token yet (asynchronous scheduling).
    """
    mu, kept_V = 2 * tau, torch.zeros(0)

    def law(output_ids: list[int], logits_V: Tensor) -> Tensor:
        nonlocal mu, kept_V
        if output_ids:
            if output_ids[-1] < 0:
                raise RuntimeError("mirostat needs the last token; the engine has none yet.")
            surprise = -float(kept_V.log_softmax(-1)[output_ids[-1]]) / math.log(2)
            mu -= LEARNING_RATE * (surprise - tau)
        kept_V = logits_V / temperature
        bits_V = -kept_V.log_softmax(-1) / math.log(2)
        kept_V = kept_V.masked_fill(bits_V > max(mu, float(bits_V.min())), -math.inf)
        return kept_V

    return law


def top_h(*, alpha: float, temperature: float) -> Law:
    cut = TopHLogitsWarper(alpha)
    none = torch.empty(1, 0, dtype=torch.long)
    return lambda _, logits_V: cut(none, logits_V[None] / temperature)[0]


def p_less(*, temperature: float) -> Law:
    def law(_: list[int], logits_V: Tensor) -> Tensor:
        hot_V = logits_V / temperature
        p_V = hot_V.softmax(-1)
        # Keeps the likeliest token where rounding would cut all of several equal ones.
        return hot_V.masked_fill(p_V < min(p_V.square().sum(), p_V.max()), -math.inf)

    return law


LAWS: Mapping[str, Callable[..., Law]] = {
    "edt": edt,
    "mirostat": mirostat,
    "top-H": top_h,
    "p-less": p_less,
}


class OtherLaws(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., Tensor] | None:
        chosen: Any = (params.extra_args or {}).get("other_law")
        if chosen is None:
            return None
        settings = {name: value for name, value in chosen.items() if name != "name"}
        law = LAWS[chosen["name"]](**settings)
        return lambda output_ids, logits_V: law(output_ids, logits_V.float()).to(logits_V.dtype)
