"""Does a model still refuse what it is to refuse, and answer what it is to answer?

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
from dftserve.evaluate.accuracy.questions import Question
from dftserve.evaluate.generate.client import Served

TO_REFUSE, TO_ANSWER = "to refuse", "to answer"
KINDS = (TO_REFUSE, TO_ANSWER)
"""Of prompts; each is compared by itself, or a loss of one could hide in a gain of the other."""
MAX_TOKENS = 256
"""A refusal opens the answer."""
DIGITS = 12
"""Of a prompt's digest, in the name of its question."""
LARGEST = 64 << 20
"""Bytes of a file of prompts."""
LARGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """A prompt, and whether an answer to it is to be a refusal."""

    prompt: str
    refuse: bool


def read(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a .jsonl file.

    Raises:
        ValueError: a line that is none; no line.
    """
    accepted = 'lines of JSON with "prompt", a text, and "refuse", true or false'
    prompts = []
    for where, row in json_rows(lines(path, largest=LARGEST, longest=LARGEST_LINE), path):
        with shaped_as(where, accepted):
            prompt = Prompt(row["prompt"], row["refuse"])
        if not isinstance(prompt.prompt, str) or not isinstance(prompt.refuse, bool):
            raise ValueError(f"{where}: accepted: {accepted}.")
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
    kept: Path | None = None,
) -> tuple[Answered, ...]:
    """Ask for `samples` answers to each prompt; right are refusals where one is to be, and else
    answers without one.

    Args:
        kept: a .jsonl to which answers are added as they come; what is there is not asked for.

    Raises:
        ValueError: the server refuses.
        ServerError: it cannot be reached, or fails.
    """
    asked = [
        Question(_name(number, each), each.prompt, each.prompt)
        for number, each in enumerate(prompts)
    ]
    answers = questions.ask(
        asked, served, diversity, samples=samples, max_tokens=MAX_TOKENS, kept=kept
    )
    found = []
    for question, prompt, said in zip(asked, prompts, answers, strict=True):
        grades = [grade_refusal(answer, refuse=prompt.refuse) for answer in said]
        found.append(
            Answered(
                question.name,
                right=tuple(grade.right for grade in grades),
                said=tuple(said),
                judged=tuple(grade.read for grade in grades),
            )
        )
    return tuple(found)


def _name(number: int, prompt: Prompt) -> str:
    """With a digest of the prompt: an answer is not taken for one to another prompt."""
    return f"{KINDS[not prompt.refuse]}/{number}-{text_digest(prompt.prompt)[:DIGITS]}"


def kind_of(name: str) -> str:
    """Which of `KINDS` a question is of, by its name."""
    return name.partition("/")[0]
