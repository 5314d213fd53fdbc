"""Pairs of a model's and a person's answer to the same prompt, cut to the same length."""

import json
from dataclasses import dataclass
from pathlib import Path

from dftserve.evaluate.generate.grid import samples_by_level
from dftserve.evaluate.reference import samples as human_samples
from dftserve.evaluate.text.windows import WORDS, Windows


@dataclass(frozen=True)
class Pair:
    """Two texts for one prompt."""

    prompt: str
    system: str
    human: str


def pairs(folder: Path, human: Path, diversity: float = 0.0, words: int = WORDS) -> list[Pair]:
    """Answers of an evaluation at one diversity, each with a person's answer to the same prompt.

    No text is used twice, since a judge would recognise it: a prompt gives as many pairs as there
    are texts on the side that has fewer. Texts shorter than `words`, and answers that ended in
    their thinking, are left out.

    Args:
        folder: the OUT of `dftserve evaluate`.
        human: a file or folder of people's answers: .jsonl with `prompt` and `response`.

    Raises:
        ValueError: no evaluation in `folder`, a diversity that it does not have, or no pair.
    """
    levels = samples_by_level(folder)
    at = [level.samples for level in levels if level.diversity == diversity]
    if not at:
        grid = ", ".join(json.dumps(level.diversity) for level in levels)
        raise ValueError(f"diversity: got {diversity:g}; accepted: one of {grid}.")
    people = _by_prompt(Windows.of(human_samples(human), words).whole())
    model = _by_prompt(Windows.of(at[0], words).whole())
    matched = [
        Pair(prompt, text, theirs)
        for prompt, texts in model.items()
        for text, theirs in zip(texts, people.get(prompt, ()), strict=False)
    ]
    if not matched:
        raise ValueError(
            f"{human}: no answer of {words} words or more to a prompt of {folder}; accepted: lines "
            "with `prompt`, as it was asked, and `response`."
        )
    return matched


def _by_prompt(windows: Windows) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for prompt, text in zip(windows.prompts, windows.texts, strict=True):
        texts.setdefault(prompt, []).append(text)
    return texts
