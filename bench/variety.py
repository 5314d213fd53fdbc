"""What makes eight answers to one open prompt differ? A real model on NoveltyBench's prompts.

    python bench/real_answers.py --model FOLDER --only open      # first: the answers
    python bench/variety.py [--folder build/real]

For each setting's eight answers to a prompt, as the mean over prompts:
    distinct    classes of meaning among the eight: two answers with a sentence encoder's cosine of
                at least .8 are one class (greedy, as in NoveltyBench)
    alike       mean cosine between two of the answers
    openings    share of pairs that begin with the same three words
    self_bleu   self-BLEU between the answers
    errors      marks of a grammar checker per 100 words, without names
Intervals are 95 %, by leaving out a tenth of the prompts at a time; differences to stock at
temperature 1 are on the same prompts. The last line is one JSON document.
"""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from real import RESULTS, against, by_setting, rounded
from real_answers import (
    OPEN,
    SETTINGS,
    STOCK,
    answers_by_prompt,
    data_folder,
    prompt_set,
    read_answers,
)

from dftserve.evaluate.metrics import errors, lexical
from dftserve.evaluate.metrics.intervals import Estimate, jackknife
from dftserve.evaluate.metrics.suite import SAME_MEANING
from dftserve.evaluate.text.embeddings import Embedder, embedder
from dftserve.evaluate.text.tokenize import tokens, words

from provenance import machine, versions

OPENING = 3
"""Words."""


@click.command()
@click.option("--folder", default=Path("build/real"), type=click.Path(path_type=Path))
@click.option("--output", default=RESULTS / "variety.json", type=click.Path(path_type=Path))
def main(folder: Path, output: Path) -> None:
    asked = prompt_set(OPEN, data_folder())
    embed, linter = embedder(), errors.linter()
    rows = {
        name: measured(answers_by_prompt(answers), embed, linter)
        for name, answers in by_setting(read_answers(folder), OPEN).items()
    }
    document: dict[str, Any] = {
        "what": "eight answers of SmolLM2-135M-Instruct to open prompts; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py", "sentence-transformers"),
        "encoder": embed.name,
        "same_meaning": SAME_MEANING,
        "prompts": len(asked.prompts),
        "answers_to_each": asked.answers,
        "max_tokens": asked.tokens,
        "settings": {name: SETTINGS[name] for name in rows},
        "rows": {name: rounded(row) for name, row in rows.items()},
        "to_stock": against(rows, STOCK),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def measured(
    answers_P: Sequence[Sequence[str]], embed: Embedder, linter: Any
) -> dict[str, Estimate]:
    """Measures over P prompts with their answers."""
    # A space stands for an empty answer, so that two empty answers count as the same.
    cosines_P = [_cosines(embed([text or " " for text in texts])) for texts in answers_P]
    checked_P = [[errors.check(text, linter) for text in texts] for texts in answers_P]
    marks_P = np.array([sum(each.marks for each in checked) for checked in checked_P])
    words_P = np.array([sum(each.words for each in checked) for checked in checked_P])
    return {
        "distinct": _mean([len(set(lexical.classes(c_TT, SAME_MEANING))) for c_TT in cosines_P]),
        "alike": _mean([c_TT[np.triu_indices(len(c_TT), 1)].mean() for c_TT in cosines_P]),
        "openings": _mean([same_openings(texts) for texts in answers_P]),
        "self_bleu": _mean([lexical.self_bleu([tokens(t) for t in texts]) for texts in answers_P]),
        "errors": jackknife(len(marks_P), lambda at: 100 * marks_P[at].sum() / words_P[at].sum()),
    }


def same_openings(texts: Sequence[str]) -> float:
    """The share of pairs of texts that begin with the same words."""
    openings = [tuple(words(text)[:OPENING]) for text in texts]
    return float(np.mean([a == b for a, b in combinations(openings, 2)]))


def _cosines(rows_TF: NDArray[np.float32]) -> NDArray[np.float64]:
    similarity_TT = (rows_TF @ rows_TF.T).astype(np.float64)
    similarity_TT = np.clip((similarity_TT + similarity_TT.T) / 2, -1.0, 1.0)
    np.fill_diagonal(similarity_TT, 1.0)
    return similarity_TT


def _mean(values: Sequence[float]) -> Estimate:
    values_P = np.asarray(values, float)
    return jackknife(len(values_P), lambda at: float(values_P[at].mean()))


if __name__ == "__main__":
    main()
