"""A reference model under several written principles, weighted by how well each explains the text.

    voices = {"dry": "Say it once.", "warm": "Say it kindly."}
    source = Principles(teacher, tokenizer, voices, posterior_power=0.3)

The exact mixture over whole texts, factored token by token:

    q(x_t | h_t) = Σ_k w_k(h_t) p(x_t | h_t, c_k),   w_k(h_t) ∝ w_k (Π_{s<t} p(x_s | h_s, c_k))^β

At β = 1 the product of q over a text is Σ_k w_k Π_t p(x_t | h_t, c_k), by Bayes' rule. Fixed
weights blur the voices instead of mixing whole texts: .72 nats per token worse for clearly distinct
voices, .12 with a reference LM that infers the voice from the text under any principle
(docs/log.md).

Shapes: K principles, N tokens, T trained positions, R of them in one chunk, D hidden, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dftserve import settings
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.targets.chat_template import clock_of
from dftserve.targets.document import Document
from dftserve.targets.source import CHUNK_ELEMENTS, DenseSource, Rows
from dftserve.targets.teacher import Teacher


@dataclass(frozen=True)
class SystemTurn:
    """How a template writes the start of a conversation with a principle and without one."""

    opening: tuple[int, ...]
    """What precedes the first user turn, with the principle as system turn."""
    replaces: tuple[int, ...]
    """What the template writes there without it: a begin token, a default system turn."""
    header: tuple[int, ...]
    """What precedes the content of a system turn."""
    bare: tuple[int, ...]
    """`replaces`, and what follows it before the content of the user's turn."""


@dataclass(frozen=True)
class Opening:
    """The tokens put before a document to apply a principle."""

    system: SystemTurn | None
    """None if the template accepts no system turn."""
    text: tuple[int, ...]
    """As plain text: the principle and a blank line."""
    begin: int | None
    """The begin token, which stays first in a document that starts with it."""

    @property
    def longest(self) -> int:
        """Most tokens that are put before a document."""
        system = self.system
        first = max(1, len(system.header)) if system else 1
        return max(first + len(self.text), len(system.opening) if system else 0)


class Principles(DenseSource):
    """The posterior mixture of a teacher's distributions under each principle.

    In a conversation whose template accepts a system turn, the principle is given as a system turn,
    which replaces a default one; if the conversation has one of its own, it is put at the start of
    that, followed by a blank line. Otherwise, and in a plain text, it is put before the document as
    plain text, followed by a blank line.

    The posterior uses trained tokens only, since a prompt is not written under any principle.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: PreTrainedTokenizerBase,
        principles: Mapping[str, str],
        *,
        weights: Mapping[str, float] | None = None,
        posterior_power: float = 1.0,
    ) -> None:
        """
        Args:
            teacher: the reference model; its temperature and vocabulary apply.
            principles: name → text.
            weights: name → prior weight, above 0, on any scale; None: equal weights.
            posterior_power: β in (0, 1]. With 1 (Bayes) nearly all weight of a long document soon
                goes to one principle; .1 to .5 keep several active.

        Raises:
            ValueError: no principle, an empty one, invalid weights or an invalid power.
        """
        check_principles(principles, "principles")
        if not 0 < posterior_power <= 1:
            raise ValueError(f"posterior_power: got {posterior_power}; accepted: above 0, up to 1.")
        self.vocabulary = teacher.vocabulary
        self._teacher, self._tokenizer = teacher, tokenizer
        self._principles = dict(principles)
        self._prior = prior(self._principles, weights)
        self._power = posterior_power
        self._openings = {
            name: _opening(tokenizer, text) for name, text in self._principles.items()
        }

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "principles",
            "teacher": self._teacher.describe(),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
            "template": template_fingerprint(self._tokenizer),
            "principles": self._principles,
            "weights": self._prior,
            "posterior_power": self._power,
        }

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        by_principle = [self._states(documents, name) for name in self._principles]
        log_prior_K = torch.tensor(list(self._prior.values()), dtype=torch.float64).log()
        return [
            _Mixture(self._teacher, document, states, log_prior_K, self._power)
            for document, *states in zip(documents, *by_principle, strict=True)
        ]

    def _states(self, documents: Sequence[Document], name: str) -> list[Tensor]:
        opened = [_under_principle(document, self._openings[name]) for document in documents]
        return self._teacher.states([tokens for tokens, _ in opened], [at for _, at in opened])


class _Mixture:
    """The rows of one document."""

    def __init__(
        self,
        teacher: Teacher,
        document: Document,
        states: Sequence[Tensor],
        log_prior_K: Tensor,
        power: float,
    ) -> None:
        self._teacher, self._states, self._power = teacher, states, power
        self._device = states[0].device
        self._labels_T = torch.from_numpy(document.labels_T.astype(np.int64)).to(self._device)
        self._known = 0
        # ln w_k + β Σ_{s<t} ln p(x_s | h_s, c_k), computed up to position `_known`.
        shape = len(states), len(self._labels_T) + 1
        self._belief_KT = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._belief_KT[:, 0] = log_prior_K

    def __call__(self, start: int, stop: int) -> Tensor:
        size = max(1, CHUNK_ELEMENTS // self._teacher.vocabulary)
        while self._known < start:
            self._read(self._known, min(self._known + size, start))
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> Tensor:
        """Loops over principles, so that two chunks of rows are in memory instead of K."""
        labels_R = self._labels_T[start:stop]
        shape = stop - start, self._teacher.vocabulary
        mixture_RV = torch.full(shape, -torch.inf, device=self._device)
        log_total_R = self._belief_KT.new_full((stop - start,), -torch.inf)
        for states_TD, belief_T in zip(self._states, self._belief_KT, strict=True):
            logprobs_RV = self._teacher.logprobs(states_TD[start:stop])
            token_R = logprobs_RV.gather(1, labels_R[:, None])[:, 0].double()
            belief_T[start + 1 : stop + 1] = belief_T[start] + (self._power * token_R).cumsum(0)
            # Normalised at each step, in float64: beliefs reach thousands of nats.
            before_R, log_total_R = log_total_R, torch.logaddexp(log_total_R, belief_T[start:stop])
            mixture_RV = torch.logaddexp(
                mixture_RV + (before_R - log_total_R).float()[:, None],
                logprobs_RV + (belief_T[start:stop] - log_total_R).float()[:, None],
            )
        self._known = max(self._known, stop)
        return mixture_RV


# ── Applying a principle to a document ───────────────────────────────────────────────────────────


def _opening(tokenizer: PreTrainedTokenizerBase, principle: str) -> Opening:
    text = tokenizer(f"{principle}\n\n", add_special_tokens=False, truncation=False)["input_ids"]
    begin: Any = tokenizer.bos_token_id
    return Opening(_system_turn(tokenizer, principle), tuple(text), begin)  # type: ignore[arg-type]


def _system_turn(tokenizer: PreTrainedTokenizerBase, principle: str) -> SystemTurn | None:
    """Found by rendering short conversations: those with the principle and without it end in the
    same user turn, and those that differ in one turn's content are equal up to that content."""
    if not tokenizer.chat_template:
        return None
    try:
        bare, other_user = (_templated(tokenizer, user=each) for each in ("x", "y"))
        full = _templated(tokenizer, system=principle, user="x")
        system, other_system = (_templated(tokenizer, system=each, user="x") for each in ("x", "y"))
    except jinja2.TemplateError:  # Raised by templates that refuse a role.
        return None
    if principle.strip() not in tokenizer.decode(full):  # Silently omitted.
        return None
    same = _common_prefix(bare[::-1], full[::-1])
    replaces = bare[: len(bare) - same]
    # The last token before the content may be another one if the content begins with a line end.
    start = max(len(replaces) + 1, _common_prefix(bare, other_user) - 1)
    return SystemTurn(
        opening=tuple(full[: len(full) - same]),
        replaces=tuple(replaces),
        header=tuple(system[: _common_prefix(system, other_system)]),
        bare=tuple(bare[: min(start, _common_prefix(bare, other_user))]),
    )


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    different = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


def _templated(tokenizer: PreTrainedTokenizerBase, **contents: str) -> list[int]:
    turns = [{"role": role, "content": content} for role, content in contents.items()]
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        turns, return_dict=False, strftime_now=clock_of(tokenizer)
    )


def _under_principle(document: Document, opening: Opening) -> tuple[np.ndarray, np.ndarray]:
    """The document's tokens under a principle, and the new positions of its trained tokens."""
    before, dropped = _replaced_beginning(document, opening)
    tokens = np.concatenate([np.array(before, np.int64), document.tokens_N[dropped:]])
    return tokens, document.positions_T + (len(before) - dropped)


def _replaced_beginning(document: Document, opening: Opening) -> tuple[tuple[int, ...], int]:
    """The tokens that a document begins with under a principle, and the number of its own tokens
    that they replace."""
    system = opening.system
    if document.has_prompt and system is not None:
        if _begins(document, system.header) and not _begins(document, system.bare):
            # A system turn of its own.
            return (*system.header, *opening.text), len(system.header)
        if _begins(document, system.replaces):
            return system.opening, len(system.replaces)
    begins = int(document.tokens_N[0]) == opening.begin
    return ((opening.begin, *opening.text) if begins else opening.text), int(begins)  # type: ignore[return-value]


def check_lengths(
    positions: int,
    tokenizer: PreTrainedTokenizerBase,
    principles: Mapping[str, str],
    documents: Sequence[Document],
) -> None:
    """Refuse documents that are too long under a principle.

    Args:
        positions: the tokens that the model can read at once.

    Raises:
        ValueError: names the principle, and the tokens that it leaves for a document.
    """
    for name, text in principles.items():
        opening = _opening(tokenizer, text)
        for document in documents:
            if len(document.tokens_N) + opening.longest <= positions:
                continue
            before, dropped = _replaced_beginning(document, opening)
            longest = len(document.tokens_N) - dropped + len(before)
            if longest > positions:
                raise ValueError(
                    f"principles.{name}: a document has {longest:,} tokens with it, and the "
                    f"teacher reads up to {positions:,} at once; accepted: --max-tokens of at most "
                    f"{positions - len(before)}, or a shorter principle."
                )


def _begins(document: Document, tokens: Sequence[int]) -> bool:
    """Whether the document begins with these tokens, and trains none of them."""
    count = len(tokens)
    begins = document.tokens_N[:count].tolist() == list(tokens)
    return begins and not document.trained_N[:count].any()


# ── User input ───────────────────────────────────────────────────────────────────────────────────


def check_principles(value: object, where: str) -> None:
    """Raise ValueError unless `value` maps one or more names to texts."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"{where}: got {value!r:.80}; accepted: a text for each name, one at least."
        )
    for name, text in value.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}: got the name {name!r}; accepted: a text. Quote it.")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}.{name}: got {text!r:.80}; accepted: a text, not empty.")


def prior(principles: Mapping[str, str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights that sum to 1, in the principles' order."""
    weights = dict.fromkeys(principles, 1.0) if weights is None else weights
    settings.refuse_unknown(weights, principles, "weights")
    for name in principles:
        if name not in weights or not 0 < weights[name] < math.inf:
            raise ValueError(
                f"weights.{name}: got {weights.get(name, 'nothing')}; accepted: a number above 0 "
                "for each principle."
            )
    total = sum(weights.values())
    return {name: weights[name] / total for name in principles}
