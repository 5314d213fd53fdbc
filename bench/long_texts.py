"""Does a text get worse as it goes on? Errors and repetition of a real model over 1,000 tokens.

    DFTSERVE_DATA=path/to/data python bench/long_texts.py --model MODEL [--folder build/long_texts]
        [--dtype auto]

Each of the story prompts of bench/real.py is answered once with each setting, in exactly 1,000
tokens (no stop token before). Each text is split into fifths of equally many words:
    errors      marks of a grammar checker per 100 words, without names
    unknown     lowercase words that its dictionary lacks, per 100 words
    repeated    share of the runs of four words that occur earlier in the same text
`change` is the last fifth minus the first, of the same texts. Intervals are 95 %, by leaving out a
tenth of the prompts at a time. The last line is one JSON document; the answers are stored in
results/texts/long_texts.jsonl.xz.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from model_option import model_option
from numpy.typing import NDArray
from real import RESULTS, rounded, texts_of
from real_answers import (
    COOL,
    GATED,
    MIN_P,
    SETTINGS,
    STOCK,
    STORIES,
    WORDS,
    Answer,
    PromptSet,
    answer_missing,
    data_folder,
    pack,
    prompt_set,
    read_answers,
)

from dftserve.evaluate.metrics import errors
from dftserve.evaluate.metrics.intervals import Estimate, jackknife
from dftserve.evaluate.text.tokenize import ngrams, normalise, word_starts, words

from provenance import machine, versions

COMPARED = (STOCK, COOL, MIN_P, GATED, WORDS)
TOKENS, PARTS, RUN = 1000, 5, 4


@click.command(help=__doc__)
@model_option
@click.option("--folder", default=Path("build/long_texts"), type=click.Path(path_type=Path))
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", default=RESULTS / "long_texts.json", type=click.Path(path_type=Path))
def main(model: Path, folder: Path, dtype: str, output: Path) -> None:
    asked = PromptSet(
        "long", prompt_set(STORIES, data_folder()).prompts, 1, TOKENS, settings=COMPARED
    )
    answers = answered(model, asked, folder, dtype)
    linter = errors.linter()
    rows = {
        setting: changes([counts(answer.text, linter) for answer in found])
        for setting, found in answers.items()
    }
    document: dict[str, Any] = {
        "what": "errors and repetition in each fifth of texts of 1,000 tokens; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "model": Path(model).name,
        "prompts": len(asked.prompts),
        "tokens": TOKENS,
        "settings": {name: SETTINGS[name] for name in COMPARED},
        "rows": {
            setting: {part: rounded(estimates) for part, estimates in row.items()}
            for setting, row in rows.items()
        },
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    pack(texts_of(output), (asdict(answer) for found in answers.values() for answer in found))
    print(json.dumps(document))


def answered(model: Path, asked: PromptSet, folder: Path, dtype: str) -> dict[str, list[Answer]]:
    """The answers by setting, in the order of the prompts; those that the folder has are reused."""
    settings = {name: {**SETTINGS[name], "min_tokens": TOKENS} for name in COMPARED}
    answer_missing(model, [(asked, name) for name in COMPARED], settings, folder, dtype)
    found = sorted(read_answers(folder), key=lambda answer: answer.prompt)
    return {name: [row for row in found if row.setting == name] for name in COMPARED}


@dataclass(frozen=True)
class Counts:
    """Counts of one text; K = `PARTS`."""

    words_K: NDArray[np.int64]
    marks_K: NDArray[np.int64]
    unknown_K: NDArray[np.int64]
    runs_K: NDArray[np.int64]
    repeated_K: NDArray[np.int64]


def counts(text: str, linter: Any) -> Counts:
    """The counts of each fifth. The text is checked as a whole, since a part that begins within a
    sentence would have a mark for it."""
    starts_W = np.array(word_starts(text))
    part_W = fifths(len(starts_W))

    def marks_in(found: Sequence[Any]) -> NDArray[np.int64]:
        """The number of marks in each fifth."""
        starts = [mark.span.start for mark in found]
        at = np.maximum(np.searchsorted(starts_W, starts, side="right") - 1, 0)
        return in_fifths(part_W[at])

    found = list(errors.marks(text, linter)) if len(starts_W) else []
    runs = ngrams(words(normalise(text)), RUN)
    # Normalising may change the number of words.
    part_R = fifths(len(runs))
    earliest = {run: len(runs) - 1 - n for n, run in enumerate(reversed(runs))}
    is_repeated_R = np.array([earliest[run] < n for n, run in enumerate(runs)], bool)
    return Counts(
        words_K=in_fifths(part_W),
        marks_K=marks_in(found),
        unknown_K=marks_in([mark for mark in found if errors.is_unknown(mark)]),
        runs_K=in_fifths(part_R),
        repeated_K=in_fifths(part_R[is_repeated_R]),
    )


def fifths(count: int) -> NDArray[np.int64]:
    """The fifth, from 0 on, of each of `count` things in order."""
    return np.arange(count) * PARTS // max(count, 1)


def in_fifths(parts_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many things are in each fifth."""
    return np.bincount(parts_N, minlength=PARTS)


def changes(texts: Sequence[Counts]) -> dict[str, Mapping[str, Estimate]]:
    """By part, `1` to `5` and `change`: each measure."""
    ratios = {
        "errors": (100.0, "marks_K", "words_K"),
        "unknown": (100.0, "unknown_K", "words_K"),
        "repeated": (1.0, "repeated_K", "runs_K"),
    }

    def of(at: NDArray[np.intp], measure: str) -> NDArray[np.float64]:
        scale, above, below = ratios[measure]
        above_K = sum(getattr(texts[n], above) for n in at)
        below_K = sum(getattr(texts[n], below) for n in at)
        return scale * above_K / np.maximum(below_K, 1)

    def estimated(measure: str, part: int) -> Estimate:
        return jackknife(len(texts), lambda at: float(of(at, measure)[part]))

    def changed(measure: str) -> Estimate:
        return jackknife(len(texts), lambda at: float(of(at, measure)[-1] - of(at, measure)[0]))

    found: dict[str, Mapping[str, Estimate]] = {
        str(part + 1): {measure: estimated(measure, part) for measure in ratios}
        for part in range(PARTS)
    }
    return found | {"change": {measure: changed(measure) for measure in ratios}}


if __name__ == "__main__":
    main()
