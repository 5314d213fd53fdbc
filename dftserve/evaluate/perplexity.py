"""Likelihood of human text, and of an evaluation's answers, under a causal language model."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dftserve.evaluate import reference
from dftserve.evaluate.generate.grid import samples_by_level
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.likelihood import Surprisal, bits_of, surprisal_of, token_nats
from dftserve.evaluate.text.windows import Windows


@dataclass(frozen=True)
class LikelihoodReport:
    """Likelihood of human text and of answers, cut to the length of the anchors' windows."""

    model: str
    bits_per_byte: Estimate
    """Measured on held-out human text."""
    human: Surprisal
    answers: tuple[tuple[Any, Surprisal], ...]
    """(diversity, surprisal of its answers)."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    def render(self) -> str:
        lines = [
            f"{self.model}: {self.bits_per_byte.render(3)} bits per byte of held-out human text",
            f"{'nats a token':20}{'mean':>24}{'spread':>24}",
            _line("human", self.human),
            *(
                _line(f"diversity {json.dumps(level)}", surprisal)
                for level, surprisal in self.answers
            ),
        ]
        return "\n".join(lines)


def likelihood_report(model: str, anchors: Path, evaluation: Path | None) -> LikelihoodReport:
    """Measure the anchors' held-out texts and, if given, an evaluation's answers.

    Raises:
        ValueError: the anchors, the evaluation or the model cannot be used.
    """
    test = reference.load(anchors).test
    sets = [(None, test)]
    for level in samples_by_level(evaluation) if evaluation else []:
        sets.append((level.diversity, Windows.of(level.samples, test.words).whole()))
    nats = iter(token_nats(model, [text for _, windows in sets for text in windows.texts]))
    (_, _, human), *answers = [
        (level, windows.groups, [next(nats) for _ in windows.texts]) for level, windows in sets
    ]
    return LikelihoodReport(
        model,
        bits_of(test.texts, human, test.groups),
        surprisal_of(human, test.groups),
        tuple(
            (level, surprisal_of(nats_of_texts, groups))
            for level, groups, nats_of_texts in answers
            if nats_of_texts
        ),
    )


def _line(name: str, surprisal: Surprisal) -> str:
    return f"{name:20}{surprisal.mean.render():>24}{surprisal.sd.render():>24}"
