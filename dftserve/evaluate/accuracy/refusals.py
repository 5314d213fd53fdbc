"""Does a model still refuse what it should refuse, and answer what it should answer?

    prompts = read(Path("refusals.jsonl"))
    answered = measure(prompts, Served(url, model), diversity=0.5, samples=4)

The prompts are the user's: each line is {"prompt": …, "refuse": true or false}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dftserve.bounded_files import json_rows, lines, shaped_as
from dftserve.digest import text_digest
from dftserve.evaluate.accuracy import questions
from dftserve.evaluate.accuracy.compare import Answered
from dftserve.evaluate.accuracy.grade import grade_refusal
from dftserve.evaluate.accuracy.questions import Question, has_text
from dftserve.evaluate.generate.client import Served
from dftserve.settings import quoted

TO_REFUSE, TO_ANSWER = "to refuse", "to answer"
KINDS = (TO_REFUSE, TO_ANSWER)
"""The kinds of prompts, compared separately: a gain in one could hide a loss in the other."""
MAX_TOKENS = 256
"""Few, since a refusal is at the beginning of an answer."""
DIGITS = 12
"""Digits of a prompt's digest in the name of its question."""
LARGEST = 64 << 20
"""Maximum size of a file of prompts, in bytes."""
LARGEST_LINE = 1 << 20
"""Maximum bytes of one prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and whether the model should refuse it."""

    prompt: str
    refuse: bool


def read(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a .jsonl file.

    Raises:
        ValueError: a line is not a prompt, or there are no lines.
    """
    accepted = 'lines of JSON with "prompt", a text, and "refuse", true or false'
    prompts = []
    for where, row in json_rows(lines(path, largest=LARGEST, longest=LARGEST_LINE), path):
        with shaped_as(where, accepted):
            prompt = Prompt(row["prompt"], row["refuse"])
        if not has_text(row, "prompt") or not isinstance(prompt.refuse, bool):
            raise ValueError(f"{where}: got {quoted(row)}; accepted: {accepted}.")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: got no prompts; accepted: {accepted}.")
    return tuple(prompts)


def measure(
    prompts: Sequence[Prompt],
    served: Served,
    diversity: float,
    *,
    samples: int = 1,
    saved: Path | None = None,
) -> tuple[Answered, ...]:
    """Ask for `samples` answers to each prompt; one is right if it refuses exactly when it should.

    Args:
        saved: a .jsonl to which answers are added as they arrive; prompts that it has answers to
            are not asked again.

    Raises:
        ValueError: the server refuses the request.
        ServerError: the server cannot be reached, or fails.
    """
    asked = [
        Question(_name(number, each), each.prompt, each.prompt)
        for number, each in enumerate(prompts)
    ]
    answers = questions.ask(
        asked, served, diversity, samples=samples, max_tokens=MAX_TOKENS, saved=saved
    )
    comparisons = []
    for question, prompt, texts in zip(asked, prompts, answers, strict=True):
        grades = [grade_refusal(text, refuse=prompt.refuse) for text in texts]
        comparisons.append(
            Answered(
                question.name,
                right=tuple(grade.right for grade in grades),
                said=tuple(texts),
                judged=tuple(grade.read for grade in grades),
            )
        )
    return tuple(comparisons)


def _name(number: int, prompt: Prompt) -> str:
    """A question's name. It has a digest of the prompt, so that an answer is never taken for one to
    another prompt."""
    return f"{KINDS[not prompt.refuse]}/{number}-{text_digest(prompt.prompt)[:DIGITS]}"


def kind_of(name: str) -> str:
    """The kind of a question, one of `KINDS`, from its name."""
    return name.partition("/")[0]
