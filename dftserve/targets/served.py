"""A running vLLM server as a source: its top tokens at each position, and the mass of the rest.

    source = ServedTeacher("http://localhost:8000", "org/model", vocabulary=len(tokenizer))

Prompt log-probabilities from /v1/completions contain the top k and the text's own token. The
distribution within the tail is not known: `tail` is "lumped".

Shapes: N tokens of a document, T trained positions, K top entries.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dftserve.openai_client import RETRIES, Server, key_of
from dftserve.targets.document import Document
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets

if TYPE_CHECKING:
    from openai import OpenAI

NO_CHANCE = -9999.0
"""What vLLM writes for −inf, which JSON cannot represent."""
EXCESS = 1e-3
"""How far the top's mass may exceed 1, due to rounding."""


@dataclass(frozen=True)
class Entry:
    """The server's answer for one token at one position."""

    token: int
    logprob: float
    rank: int


class ServedTeacher(Source):
    """A model behind an OpenAI-compatible vLLM, at temperature 1."""

    tail = "lumped"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        vocabulary: int,
        key_variable: str | None = None,
        at_once: int = 4,
        retries: int = RETRIES,
        timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            url: the server, with or without /v1.
            model: its name there; the tokenizer must be the one that made the documents.
            key_variable: the environment variable that holds the API key; None: OPENAI_API_KEY,
                if it is set.
            at_once: concurrent requests.
            retries: further attempts when the server is busy (429), fails (5xx) or is unreachable.

        Raises:
            ValueError: the variable is not set, or a number is out of range.
        """
        key_of(key_variable)
        if at_once < 1 or retries < 0:
            raise ValueError(
                f"got at_once {at_once}, retries {retries}; accepted: 1 or more, 0 or more."
            )
        self.vocabulary = vocabulary
        base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._server = Server(base_url, key_variable, retries, timeout_s)
        self._url, self._model, self._at_once = f"{base_url}/completions", model, at_once

    def describe(self) -> Mapping[str, Any]:
        """Includes the model's name, but not the server or the key, which do not affect targets."""
        return {"kind": "served", "model": self._model, "vocabulary": self.vocabulary}

    def targets(
        self, documents: Sequence[Document], *, k: int, draws: int, seeds: Sequence[int]
    ) -> list[Targets]:
        """Nothing can be drawn from a lumped tail: `draws` and `seeds` have no effect, and
        `tail_ids_TM` has no columns.

        Raises:
            ValueError: the server refused the request, or its answer is not as requested.
            ServerError: unreachable or failing, or it does not accept the key or the model.
        """
        k = min(k, self.vocabulary)
        with self._server.client() as client, ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(lambda document: self._one(client, document, k), documents))

    def _one(self, client: "OpenAI", document: Document, k: int) -> Targets:
        answer = self._ask(client, document.tokens_N.tolist(), k)
        positions = self._positions(answer, len(document.tokens_N))
        return _joined(
            [
                self._target(positions[index], int(document.tokens_N[index]), k)
                for index in document.positions_T.tolist()
            ],
            k,
        )

    def _ask(self, client: "OpenAI", tokens: list[int], k: int) -> Any:
        request = {
            "model": self._model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": k,
        }
        try:
            with self._server.errors():
                return client.post("/completions", body=request, cast_to=object)
        except ValueError as error:
            if "logprobs" not in str(error):
                raise
            raise ValueError(
                f"{error} Start it with --max-logprobs {k} or more, or ask for a smaller k."
            ) from None

    # ── Reading the answer ──

    def _positions(self, answer: Any, tokens: int) -> list[Any]:
        """One mapping of entries per token; null for the first token."""
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            positions = None
        if not isinstance(positions, list):
            raise ValueError(
                f"the server {self._url} answers without prompt_logprobs; accepted: vLLM's "
                "OpenAI server, which gives them. Other servers do not know the field."
            )
        if len(positions) != tokens:
            raise ValueError(
                f"the server {self._url} answers for {len(positions)} tokens of {tokens}; "
                "accepted: one position for each. Does it truncate prompts "
                "(truncate_prompt_tokens)?"
            )
        return positions

    def _target(self, position: Any, label: int, k: int) -> Targets:
        entries = self._entries(position)
        own = next((entry for entry in entries if entry.token == label), None)
        if own is None:
            raise ValueError(
                f"the server {self._url} does not name the text's own token {label} at its "
                "position; accepted: vLLM's prompt_logprobs, which always contain it."
            )
        # The text's own token is included even if its rank is not among the top k.
        top = sorted((e for e in entries if e.rank <= k), key=lambda e: (-e.logprob, e.rank))[:k]
        if len(top) < k:
            raise ValueError(
                f"the server {self._url} names {len(top)} top tokens; asked for {k}. Ask for a "
                "smaller k."
            )
        top_K = np.array([entry.logprob for entry in top])
        mass = float(np.exp(top_K).sum())
        if not mass <= 1 + EXCESS:
            raise ValueError(
                f"the server {self._url} gives top probabilities that sum to {mass:.4g}; accepted: "
                "log-probabilities. Start it with --logprobs-mode raw_logprobs."
            )
        tail = max(0.0, 1.0 - mass)
        return Targets(
            top_ids_TK=np.array([[entry.token for entry in top]], dtype=np.int64),
            top_logprobs_TK=top_K[None].astype(np.float32),
            tail_ids_TM=np.zeros((1, 0), dtype=np.int64),
            tail_logprob_T=np.array([math.log(tail) if tail else -math.inf], dtype=np.float32),
            token_logprob_T=np.array([own.logprob], dtype=np.float32),
            entropy_T=np.array([_entropy([*np.exp(top_K), tail])], dtype=np.float32),
        )

    def _entries(self, position: Any) -> list[Entry]:
        try:
            entries = [
                Entry(int(token), _logprob(entry["logprob"]), int(entry["rank"]))
                for token, entry in position.items()
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"the server {self._url} answers {position!r:.80} for a position; accepted: "
                '{"token id": {"logprob": …, "rank": …}}, as vLLM writes it.'
            ) from None
        highest = max((entry.token for entry in entries), default=0)
        if highest >= self.vocabulary:
            raise ValueError(
                f"the server {self._url} names the token {highest}; the tokenizer has "
                f"{self.vocabulary}: model and tokenizer do not belong together."
            )
        return entries


def _logprob(value: float) -> float:
    return -math.inf if value <= NO_CHANCE else float(value)


def _entropy(probabilities: Sequence[float]) -> float:
    """Entropy in nats with the tail as a single cell: a lower bound of the true entropy."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def _joined(parts: list[Targets], k: int) -> Targets:
    if parts:
        return Targets.concatenate(parts)
    none, none_K = np.zeros(0, np.float32), np.zeros((0, k))
    return Targets(
        top_ids_TK=none_K.astype(np.int64),
        top_logprobs_TK=none_K.astype(np.float32),
        tail_ids_TM=np.zeros((0, 0), np.int64),
        tail_logprob_T=none,
        token_logprob_T=none,
        entropy_T=none,
    )
