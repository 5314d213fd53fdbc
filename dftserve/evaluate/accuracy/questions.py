"""Questions to a server at one level of diversity, and its answers, kept as they come.

answers = ask(questions, Served(url, model), 0.5, samples=4, max_tokens=256, kept=path)
"""

import contextlib
from collections.abc import Sequence
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
    """What is asked, by a name of its own."""

    name: str
    message: str
    """The user's, to a model of chats."""
    text: str
    """What a base model continues."""


@dataclass(frozen=True)
class Completions:
    """A line of the file of answers: what was said to one question."""

    problem: str
    """Its name."""
    said: tuple[str | None, ...]
    """As the server gave them; None: `message.content` was null."""


def ask(
    questions: Sequence[Question],
    served: Served,
    diversity: float,
    *,
    samples: int,
    max_tokens: int,
    stop: Sequence[str] = (),
    kept: Path | None = None,
) -> list[list[str | None]]:
    """Answers [question][sample], as the server gave them.

    Args:
        max_tokens: of an answer, where `served` says nothing.
        stop: where a base model's continuation ends.
        kept: a .jsonl to which answers are added as they come; what is there is not asked for.

    Raises:
        ValueError: the server refuses, or has another diversity in force.
        ServerError: it cannot be reached, or fails.
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
            said = await client.chat.completions.create(messages=[message], **request)
        check(asked, said.model_extra or {})
        choices = served.server.choices(said)
        return tuple(choice.message.content for choice in choices)

    async def continued(client: "AsyncOpenAI", question: Question) -> tuple[str, ...]:
        ends = {"stop": list(stop)} if stop else {}
        with served.server.errors():
            said = await client.completions.create(prompt=question.text, **ends, **request)
        check(asked, said.model_extra or {})
        return tuple(choice.text for choice in served.server.choices(said))

    with contextlib.ExitStack() as stack:
        store = stack.enter_context(AnswerStore(kept, Completions)) if kept else None
        known = {row.problem: row.said for row in store.rows} if store else {}

        async def once(client: "AsyncOpenAI", question: Question) -> None:
            said = await (chat if served.is_chat else continued)(client, question)
            if store:
                store.append(Completions(question.name, said))
            known[question.name] = said

        missing = {each.name: each for each in questions if each.name not in known}
        if missing:
            ask_all(served.server, missing.values(), once, served.at_once)
    return [list(known[question.name]) for question in questions]
