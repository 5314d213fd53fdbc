"""Ask a server questions at one level of diversity, and save the answers as they arrive.

answers = ask(questions, Served(url, model), 0.5, samples=4, max_tokens=256, saved=path)
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dftserve.evaluate.generate.answers import AnswerStore
from dftserve.evaluate.generate.client import Served
from dftserve.evaluate.generate.in_force import check
from dftserve.openai_client import ask_all

if TYPE_CHECKING:
    from openai import AsyncOpenAI


@dataclass(frozen=True)
class Question:
    """A question and its unique name."""

    name: str
    message: str
    """The user message for a chat model."""
    text: str
    """The text that a base model continues."""


@dataclass(frozen=True)
class Completions:
    """A line of the file of answers: the answers to one question."""

    problem: str
    """The question's name."""
    said: tuple[str | None, ...]
    """The answers as the server gave them; None: `message.content` was null."""


def ask(
    questions: Sequence[Question],
    served: Served,
    diversity: float,
    *,
    samples: int,
    max_tokens: int,
    stop: Sequence[str] = (),
    saved: Path | None = None,
) -> list[list[str | None]]:
    """Answers [question][sample], as the server gave them.

    Args:
        max_tokens: limit for one answer, if `served` sets none.
        stop: strings that end a base model's continuation.
        saved: a .jsonl to which answers are added as they arrive; questions that it has answers to
            are not asked again.

    Raises:
        ValueError: the server refuses the request, or applies another diversity.
        ServerError: the server cannot be reached, or fails.
    """
    asked = {"diversity": diversity}
    request: dict[str, Any] = {
        "model": served.model,
        "n": samples,
        "temperature": served.temperature,
        "max_tokens": served.max_tokens or max_tokens,
        "extra_body": asked,
    }

    async def chat(client: "AsyncOpenAI", question: Question) -> tuple[str | None, ...]:
        message: Any = {"role": "user", "content": question.message}
        with served.server.errors():
            completion = await client.chat.completions.create(messages=[message], **request)
        check(asked, completion.model_extra or {})
        choices = served.server.choices(completion)
        return tuple(choice.message.content for choice in choices)

    async def complete(client: "AsyncOpenAI", question: Question) -> tuple[str, ...]:
        ends = {"stop": list(stop)} if stop else {}
        with served.server.errors():
            completion = await client.completions.create(prompt=question.text, **ends, **request)
        check(asked, completion.model_extra or {})
        return tuple(choice.text for choice in served.server.choices(completion))

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(AnswerStore(saved, Completions)) if saved else None
        known = {row.problem: row.said for row in store.rows} if store else {}

        async def once(client: "AsyncOpenAI", question: Question) -> None:
            texts = await (chat if served.is_chat else complete)(client, question)
            if store:
                store.append(Completions(question.name, texts))
            known[question.name] = texts

        missing = {each.name: each for each in questions if each.name not in known}
        if missing:
            ask_all(served.server, missing.values(), once, served.at_once)
    return [list(known[question.name]) for question in questions]


# ── Rows of a file of questions ──────────────────────────────────────────────────────────────────


def has_text(row: Mapping[str, Any], *names: str) -> bool:
    """Whether each of these fields is a text with characters other than white space."""
    return all(isinstance(row.get(name), str) and row[name].strip() for name in names)
