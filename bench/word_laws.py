"""Other laws that heat where words are chosen, as functions on one row, and a processor of vLLM's
V1 runner that applies the one a request names (`extra_args={"word_law": NAME}`).

All cut at min-p .02 and keep each class's probability, as the law `words` does; stop tokens are a
class of their own. They differ in the temperatures:
    gate on starts      starts of words by the law `gated`, on the entropy among them; inside .7
    function words      starts that are a whole function word at 1, other starts at 3; inside .7
    budget on starts    starts at the temperature that adds .5 nats to the entropy among them;
                        inside .7
    cooler as it goes   starts at 3; inside .9, .7, .5 for the second, third and later tokens
    adapt               no classes: the whole step at 1.5 if the likeliest token starts a word,
                        otherwise at .7 (AdapT, arXiv 2309.02772, with starts of words in place of
                        starts of code blocks)
`bench/words.py` compares their answers with those of `words` and `gated`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from real_answers import WORD_LAWS
from torch import Tensor
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from dftserve.sampling.token_classes import INSIDE, START, TokenClasses

LOG_GUARD = math.log(0.02)
COOL = 0.7
HOT = 3.0
RISE = 0.5
"""Nats that `budget on starts` adds."""
FUNCTION_WORDS = frozenset(
    """
    a about after all also although an and any are as at be because been before being both but by
    can could did do does down each for from had has have he her here him his how i if in into is
    it its just me more most my no not of off on once one only or other our out over she should so
    some such than that the their them then there these they this those though through to too
    under until up us very was we were what when where which while who whom whose why will with
    would you your
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Row:
    """The tokens of a row that the guard keeps."""

    logits_K: Tensor
    """ln p up to a constant; K tokens."""
    class_K: Tensor
    is_function_K: Tensor
    inside: int
    """Number of tokens so far of the word that the text ends in; 0 if it ends outside a word."""


@dataclass(frozen=True)
class Vocabulary:
    classes_SV: Tensor
    """uint8: the class of each token after a text in each state."""
    state_V: Tensor
    is_function_V: Tensor
    stop: int


STOP = 3
"""The class of the stop token, in addition to those of `token_classes.py`."""


class WordLaws(AdapterLogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._vocabulary = vocabulary(vllm_config.model_config.tokenizer)

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., Tensor] | None:
        name = (params.extra_args or {}).get("word_law")
        if name is None:
            return None

        def process(output_ids: list[int], logits_V: Tensor) -> Tensor:
            return rewritten(logits_V, output_ids, name, self._vocabulary)

        return process


def vocabulary(folder: str) -> Vocabulary:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classes = TokenClasses.from_tokenizer(tokenizer)
    classes_SV = torch.stack([torch.from_numpy(classes.classes_after(s).copy()) for s in range(3)])
    classes_SV[:, tokenizer.eos_token_id] = STOP
    pieces = [tokenizer.decode([token]).strip().lower() for token in range(len(tokenizer))]
    return Vocabulary(
        classes_SV,
        torch.from_numpy(classes.states()).long(),
        torch.tensor([piece in FUNCTION_WORDS for piece in pieces]),
        tokenizer.eos_token_id,
    )


def rewritten(logits_V: Tensor, output_ids: list[int], name: str, known: Vocabulary) -> Tensor:
    """The row to sample from at temperature 1."""
    state = int(known.state_V[output_ids[-1]]) if output_ids else 0
    width = known.classes_SV.shape[1]
    log_p_V = logits_V.float().log_softmax(-1)
    kept_K = (log_p_V >= log_p_V.max() + LOG_GUARD).nonzero()[:, 0]
    # Logits beyond the tokenizer's own tokens are padding.
    kept_K = kept_K[kept_K < width]
    row = Row(
        log_p_V[kept_K],
        known.classes_SV[state, kept_K],
        known.is_function_V[kept_K],
        inside_word(output_ids, known),
    )
    out_V = torch.full_like(logits_V, -math.inf)
    out_V[kept_K] = LAWS[name](row).to(out_V.dtype)
    return out_V


def inside_word(output_ids: list[int], known: Vocabulary) -> int:
    """Tokens since the last start, that start included, if the text ends inside a word."""
    count, index = 0, len(output_ids)
    while index and int(known.state_V[output_ids[index - 1]]) != 0:
        index -= 1
        count += 1
        before = int(known.state_V[output_ids[index - 1]]) if index else 0
        if int(known.classes_SV[before, output_ids[index]]) == START:
            break
    return count


def by_group(logits_K: Tensor, groups: Mapping[float, Tensor]) -> Tensor:
    """Apply a temperature to each group (bool members), keeping the group's total probability."""
    out_K = logits_K.clone()
    for temperature, member_K in groups.items():
        if member_K.any():
            cool_K = logits_K[member_K] / temperature
            out_K[member_K] = cool_K - cool_K.logsumexp(0) + logits_K[member_K].logsumexp(0)
    return out_K


def entropy(logits_K: Tensor) -> float:
    log_p_K = logits_K.log_softmax(0)
    return float(-(log_p_K.exp() * log_p_K).sum())


def gate_on_starts(row: Row) -> Tensor:
    start_K = row.class_K == START
    hot = 1.0
    if start_K.any():
        wanted = entropy(row.logits_K[start_K])
        hot = math.exp(2.0 * (wanted / (wanted + 1.0)) ** 2)
    return by_group(row.logits_K, {hot: start_K, COOL: row.class_K == INSIDE})


def function_words_apart(row: Row) -> Tensor:
    start_K = row.class_K == START
    groups = {
        1.0: start_K & row.is_function_K,
        HOT: start_K & ~row.is_function_K,
        COOL: row.class_K == INSIDE,
    }
    return by_group(row.logits_K, groups)


def budget_on_starts(row: Row) -> Tensor:
    start_K = row.class_K == START
    hot = 1.0
    if int(start_K.sum()) > 1:
        starts_K = row.logits_K[start_K]
        wanted = min(entropy(starts_K) + RISE, math.log(len(starts_K)) - 1e-3)
        low, high = 1.0, 64.0
        for _ in range(20):
            hot = math.sqrt(low * high)
            low, high = (hot, high) if entropy(starts_K / hot) < wanted else (low, hot)
    return by_group(row.logits_K, {hot: start_K, COOL: row.class_K == INSIDE})


def cooler_as_it_goes(row: Row) -> Tensor:
    cool = (0.9, 0.7, 0.5)[min(max(row.inside, 1), 3) - 1]
    return by_group(row.logits_K, {HOT: row.class_K == START, cool: row.class_K == INSIDE})


def adapt(row: Row) -> Tensor:
    """One temperature, by the class of the likeliest token; the stop keeps its probability."""
    begins = int(row.class_K[row.logits_K.argmax()]) == START
    return by_group(row.logits_K, {1.5 if begins else COOL: row.class_K != STOP})


LAWS: Mapping[str, Callable[[Row], Tensor]] = dict(
    zip(
        WORD_LAWS,
        (gate_on_starts, function_words_apart, budget_on_starts, cooler_as_it_goes, adapt),
        strict=True,
    )
)
