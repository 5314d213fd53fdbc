"""The distribution that a server samples each token from, over HTTP, and the logits behind it.

The logits come from the same engine and prefix, with the field off, at temperature 1: the law is
invariant to a constant shift, so log-probabilities serve as logits.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from httpx import Response

from dftserve.sampling import LawConstants
from tests.client import gather

LOG_PROBABILITY = 2e-4
"""Nats by which a log-probability may differ from the reference in fp64."""
NATS = 1e-3
"""By which a reported entropy may differ from the reference's."""
NEAR_THRESHOLD = 1e-4
"""Cases with a token so near the guard's threshold are not compared: fp32 may decide otherwise."""
NOTHING_CUT = 1e-30
"""A min_p with which the law's guard cuts nothing."""


class SampledAnswer:
    """An answer to a prompt of token ids, and what each of its tokens was drawn from."""

    def __init__(self, engine, body: dict[str, Any]) -> None:
        self._engine, self._prompt = engine, body["prompt"]
        self._vocabulary = vocabulary_of(engine)
        self.response = complete(engine, [body], self._vocabulary)[0]
        self.tokens = sampled_tokens(self.response.json()["choices"][0])

    def before(self, step: int) -> list[int]:
        """The tokens that precede this step's: the prompt's and the answer's."""
        return [*self._prompt, *self.tokens[:step]]

    def logits_V(self, step: int) -> np.ndarray:
        """The engine's, after the same tokens."""
        return served_log_ps(self._engine, [plain(self.before(step))], self._vocabulary)[0]

    def log_p_V(self, step: int) -> np.ndarray:
        """Of the distribution that the token was sampled from."""
        return served_log_p(self.response, self._vocabulary, step)


def worst_difference(
    sampled_V: np.ndarray, expected_V: np.ndarray, case: Any, *, least: float = -25
) -> float:
    """The largest difference in nats of the expected log-probabilities above `least`.

    It must be at most `LOG_PROBABILITY`, and the tokens of probability 0 must be the same.
    """
    assert (np.isinf(sampled_V) == np.isinf(expected_V)).all(), case
    likely_V = expected_V > least
    worst = float(np.abs(sampled_V[likely_V] - expected_V[likely_V]).max())
    assert worst <= LOG_PROBABILITY, (worst, case)
    return worst


def plain(prompt: str | Sequence[int], **shaping: Any) -> dict[str, Any]:
    """A request for the logits after a prompt; `shaping` are parameters that change logits."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return {"prompt": prompt, **shaping, **neutral}


def complete(engine, bodies: Iterable[dict[str, Any]], vocabulary: int) -> list[Response]:
    """Answers of one token, unless a body says otherwise, with the log-probabilities of the
    `vocabulary` most likely tokens at each step."""
    common = {
        "model": "demo",
        "max_tokens": 1,
        "logprobs": vocabulary,
        "return_tokens_as_token_ids": True,
    }
    return gather(engine, [("/v1/completions", common | body) for body in bodies])


def served_log_ps(engine, bodies: Iterable[dict[str, Any]], vocabulary: int) -> list[np.ndarray]:
    """ln p of every token at the first step of each answer."""
    return [served_log_p(answer, vocabulary) for answer in complete(engine, bodies, vocabulary)]


def served_log_p(answer: Response, vocabulary: int, step: int = 0) -> np.ndarray:
    """float64 [V]: ln p of every token at a step of an answer, −inf for probability 0."""
    assert answer.status_code == 200, answer.text
    top = answer.json()["choices"][0]["logprobs"]["top_logprobs"][step]
    log_p_V = np.full(vocabulary, np.nan)
    for token, value in top.items():
        log_p_V[int(token.removeprefix("token_id:"))] = value if value > -9998 else -np.inf
    assert not np.isnan(log_p_V).any(), "the server did not list every token"
    return log_p_V


def sampled_tokens(choice: dict[str, Any]) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


def vocabulary_of(engine) -> int:
    return _config(engine)["vocab_size"]


def stop_ids(engine, more: Iterable[int] = ()) -> frozenset[int]:
    """The model's end token, and those that a request names."""
    return frozenset([_config(engine)["eos_token_id"], *more])


def _config(engine) -> dict[str, Any]:
    return json.loads((engine.model_folder / "config.json").read_text())


def log_guard(level: float) -> float:
    """ln of the guard's share of the most likely token, at a level."""
    constants = LawConstants()
    return constants.log_guard_start + constants.log_guard_step * level
