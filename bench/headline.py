"""Does Distribution Fine-Tuning add variety without a cost? On a real model with collapsed variety.

    make eval-env
    DFTSERVE_DATA=path/to/data python bench/headline_models.py --model MODEL      # first: models
    DFTSERVE_DATA=path/to/data python bench/headline.py --model MODEL [--folder build/headline]
        [--seed 0 --seed 1] [--dtype auto]
        [--base-answers bench/results/texts/real_answers.jsonl.xz]

Each model of bench/headline_models.py that the folder has, and the base model, answers through vLLM
(bench/real_answers.py) without the field at T 1, and with the law `words` at .25; sft, half way
back and the models made from the base also at T .85. The last two are the settings that
bench/laws.py found best for a tuned model, of ours and of stock vLLM's. Half way back, which makes
few errors at them, also writes stories with `words` at 1. With `--base-answers`, the base model
makes no new ones.
    stories     eight answers to each of 32 prompts that no model was tuned on, measured as in
                bench/real.py, next to stories by people to prompts that none was tuned on
    IFEval      the share of prompts all of whose instructions are followed
    MMLU        the share of 300 questions answered right, and of answers that cannot be read
Each model also scores human text:
    bits per byte, and perplexity per token, of people's stories that none was tuned on and of
    books (books/heldout)
Each model is compared with the collapsed start, and those made from the base model with that,
paired by prompt, question or text, except for SDS, whose differences treat answers as independent.
Intervals are 95 %.
The last line is one JSON document; the answers are stored in results/texts/headline.jsonl.xz.
"""

import json
import lzma
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import click
import headline_models
import numpy as np
from headline_models import (
    BASE,
    HALF_WAY_BACK,
    HALF_WAY_FROM_BASE,
    MODELS,
    SFT,
    SFT_FROM_BASE,
    START,
    stories,
)
from model_option import model_option
from numpy.typing import NDArray
from real import PEOPLE, RESULTS, Checks, by_setting, rounded, texts_of
from real_answers import (
    IFEVAL,
    MMLU,
    SLIGHTLY_COOL,
    STOCK,
    STORIES,
    WORDS,
    WORDS_QUARTER,
    Answer,
    data_folder,
    mmlu,
    pack,
    prompt_set,
    read_answers,
)
from words import letters, share

from dftserve import atomic
from dftserve.evaluate import reference
from dftserve.evaluate.metrics.intervals import (
    Estimate,
    difference,
    jackknife,
    mcnemar,
)
from dftserve.evaluate.metrics.likelihood import token_nats
from dftserve.targets.store import TargetStore

from provenance import machine, versions

ROOT = Path(__file__).parents[1]
ASKED: Mapping[str, Sequence[str]] = {
    STOCK: (STORIES, IFEVAL, MMLU),
    SLIGHTLY_COOL: (STORIES, MMLU),
    WORDS_QUARTER: (STORIES, IFEVAL, MMLU),
    WORDS: (STORIES,),
}
"""Prompt sets by setting; each setting has its own engine."""
ASKED_ONLY_OF = {
    SLIGHTLY_COOL: (SFT, HALF_WAY_BACK, SFT_FROM_BASE, HALF_WAY_FROM_BASE),
    WORDS: (HALF_WAY_BACK,),
}
"""The methods whose models are asked with a setting; of other settings, all."""
BOOK_CHARACTERS = 1500
"""Characters of each book that are scored, from its middle on."""


@click.command(help=__doc__)
@model_option
@click.option(
    "--base-answers",
    type=click.Path(exists=True, path_type=Path),
    help="Existing answers of --model, such as bench/results/texts/real_answers.jsonl.xz; it makes "
    "no others.",
)
@click.option("--folder", default=Path("build/headline"), type=click.Path(path_type=Path))
@click.option("--seed", "seeds", multiple=True, default=(0,), show_default=True, help="Repeatable.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", default=RESULTS / "headline.json", type=click.Path(path_type=Path))
def main(
    model: Path,
    base_answers: Path | None,
    folder: Path,
    seeds: tuple[int, ...],
    dtype: str,
    output: Path,
) -> None:
    models = models_in(folder, model, seeds)
    if base_answers is not None:
        unpack(base_answers, models[BASE].answers)
    for name, each in models.items():
        if name != BASE or base_answers is None:
            answer_missing(each, dtype)
        check_instructions(each.answers)
    given = {name: answers_of(each) for name, each in models.items()}
    questions = mmlu(data_folder())
    answer_letters = {
        f"{name}, {setting}": letters(found, questions)
        for name, answers in given.items()
        for setting, found in by_setting(answers, MMLU).items()
    }
    likelihoods = {
        source: likelihood(models, texts) for source, texts in human_texts(data_folder()).items()
    }
    document = {
        "what": "tuning of a collapsed model on stories by people; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "seeds": seeds,
        "texts": trained_on(folder) | {"measure": len(stories()["measure"])},
        "compared_with": {name: each.start for name, each in models.items()},
        "stories": story_rows(given, models),
        "accuracy": {
            "ifeval": shares(followed(models), models),
            "mmlu": shares(
                {name: [a == b for a, b in pairs] for name, pairs in answer_letters.items()},
                models,
            ),
            "mmlu_unreadable": shares(
                {name: [a is None for a, _ in pairs] for name, pairs in answer_letters.items()},
                models,
            ),
        },
        "bits_per_byte": {source: each["bits_per_byte"] for source, each in likelihoods.items()},
        "perplexity": {source: each["perplexity"] for source, each in likelihoods.items()},
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    made_here = (name for name in given if name != BASE or base_answers is None)
    pack(texts_of(output), answer_rows({name: given[name] for name in made_here}))
    print(json.dumps(document))


@dataclass(frozen=True)
class Model:
    """The folders of a checkpoint and of its answers."""

    place: Path
    answers: Path
    asked: Mapping[str, Sequence[str]]
    """Prompt sets by setting."""
    start: str
    """The name of the model that it is compared with."""

    @classmethod
    def of(cls, method: str, place: Path, answers: Path) -> "Model":
        asked = {
            setting: sets
            for setting, sets in ASKED.items()
            if method in ASKED_ONLY_OF.get(setting, (method,))
        }
        return cls(place, answers, asked, headline_models.start_of(method))


def models_in(folder: Path, base: Path, seeds: Sequence[int]) -> dict[str, Model]:
    """The base model and those of bench/headline_models.py that exist, by the name of their rows.

    Raises:
        click.UsageError: there is no start to compare with.
    """
    answers = folder / "answers"
    found = {BASE: Model.of(BASE, base, answers / BASE)}
    for name, seed in product(MODELS, seeds):
        place = headline_models.place_of(folder, name, seed)
        if place.exists():
            row = name if name == START or seed == 0 else f"{name} (seed {seed})"
            found[row] = Model.of(name, place, answers / headline_models.label(name, seed))
    if START not in found:
        raise click.UsageError(
            f"{headline_models.place_of(folder, START, 0)} does not exist; run "
            "bench/headline_models.py first."
        )
    return found


def trained_on(folder: Path) -> dict[str, int]:
    """The number of texts that the start was tuned on, and that each method was."""
    start, sft = (TargetStore(folder / f"targets-{name}") for name in (START, SFT))
    return {START: start.count("train"), "train": sft.count("train")}


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def unpack(packed_answers: Path, folder: Path) -> None:
    """Put the base model's answers into the folder, if it has none yet."""
    place = folder / "answers.jsonl"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with lzma.open(packed_answers, "rb") as packed:
            atomic.write_text(place, packed.read().decode())


def answer_missing(model: Model, dtype: str) -> None:
    """Make the model's answers that its folder does not have."""
    for setting, names in model.asked.items():
        chosen = [part for name in names for part in ("--only", name)]
        folders = ["--model", model.place, "--folder", model.answers]
        options = [*folders, "--dtype", dtype, "--setting", setting, *chosen]
        script = [sys.executable, ROOT / "bench" / "real_answers.py", *options]
        subprocess.run(list(map(str, script)), check=True)


def answers_of(model: Model) -> list[Answer]:
    """The answers to what the model is asked; the base model's folder may have others."""
    return [
        answer
        for answer in read_answers(model.answers)
        if answer.prompt_set in model.asked.get(answer.setting, ())
    ]


def check_instructions(folder: Path) -> None:
    """Write which instructions the folder's answers follow."""
    python = ROOT / ".venv-eval" / "bin" / "python"
    script = [python, ROOT / "bench" / "ifeval.py", data_folder(), folder]
    subprocess.run(list(map(str, script)), check=True)


def answer_rows(answers: Mapping[str, Sequence[Answer]]) -> Iterator[dict[str, Any]]:
    for name, given in answers.items():
        for answer in given:
            yield {"model": name, **asdict(answer)}


# ── Stories ──────────────────────────────────────────────────────────────────────────────────────


def start_row(row: str, models: Mapping[str, Model]) -> str:
    """The row that a row is compared with: its model's start without the field."""
    name, _, _setting = row.partition(", ")
    return f"{models[name].start}, {STOCK}"


def story_rows(
    answers: Mapping[str, Sequence[Answer]], models: Mapping[str, Model]
) -> dict[str, Any]:
    """Rows as in bench/real.py, and the difference of each to its start without the field."""
    asked = prompt_set(STORIES, data_folder())
    checks = Checks(reference.build(stories()["measure"]))
    rows = {
        f"{name}, {setting}": checks.of_answers(found, asked.prompts)
        for name, given in answers.items()
        for setting, found in by_setting(given, STORIES).items()
    }
    return {
        "prompts": len(asked.prompts),
        "answers_to_each": asked.answers,
        PEOPLE: rounded(checks.of_people(len(asked.prompts))),
        "rows": {name: rounded(row) for name, row in rows.items()},
        "to_start": {
            name: rounded(
                {key: difference(rows[start_row(name, models)][key], row[key]) for key in row}
            )
            for name, row in rows.items()
        },
    }


# ── Accuracy ─────────────────────────────────────────────────────────────────────────────────────


def followed(models: Mapping[str, Model]) -> dict[str, list[bool]]:
    """By model and setting: for each prompt of IFEval, whether all of its instructions were
    followed."""
    found = {}
    for name, model in models.items():
        settings = json.loads((model.answers / "ifeval.json").read_text())["settings"]
        for setting, by_key in settings.items():
            if IFEVAL in model.asked.get(setting, ()):
                found[f"{name}, {setting}"] = [all(by_key[key]) for key in sorted(by_key)]
    return found


def shares(rows: Mapping[str, Sequence[bool]], models: Mapping[str, Model]) -> dict[str, Any]:
    """The share of each row, and the exact p of the hypothesis that it equals its start's without
    the field."""
    return {
        name: {
            **share(found),
            "count": len(found),
            "p_to_start": round(mcnemar(rows[start_row(name, models)], found), 5),
        }
        for name, found in rows.items()
    }


# ── Human text ───────────────────────────────────────────────────────────────────────────────────


def human_texts(data: Path) -> dict[str, list[str]]:
    held_out = sorted((data / "books" / "heldout").glob("*.txt"))
    return {
        "stories": [sample.text for sample in stories()["measure"]],
        "books": [middle_of(path.read_text(encoding="utf-8")) for path in held_out],
    }


def middle_of(text: str) -> str:
    return text[len(text) // 2 :][:BOOK_CHARACTERS]


def nats_of(model: Model, texts: Sequence[str]) -> list[NDArray]:
    """The nats of each text's tokens; kept beside the model's answers."""
    key = sha256("\0".join(texts).encode()).hexdigest()[:12]
    place = model.answers / f"nats-{key}.json"
    if not place.exists():
        scored = [nats_T.tolist() for nats_T in token_nats(model.place, texts)]
        model.answers.mkdir(parents=True, exist_ok=True)
        atomic.write_text(place, json.dumps(scored))
    return [np.array(nats_T) for nats_T in json.loads(place.read_text())]


def likelihood(models: Mapping[str, Model], texts: Sequence[str]) -> dict[str, Any]:
    """Bits per byte and perplexity per token of the texts under each model, and the ratio of each
    to its start's. The models share a tokenizer, so their perplexities can be compared."""
    scored = {name: nats_of(model, texts) for name, model in models.items()}
    nats = {name: np.array([nats_T.sum() for nats_T in each]) for name, each in scored.items()}
    bytes_N = np.array([len(text.encode()) for text in texts])
    tokens_N = np.array([len(nats_T) for nats_T in scored[START]])

    def ratio(nats_N: NDArray, over_N: NDArray) -> Estimate:
        return jackknife(len(texts), lambda at: float(nats_N[at].sum() / over_N[at].sum()))

    def perplexity(nats_N: NDArray) -> Estimate:
        return jackknife(
            len(texts), lambda at: float(np.exp(nats_N[at].sum() / tokens_N[at].sum()))
        )

    def with_ratio(value: Estimate, to_start: Estimate) -> dict[str, Any]:
        return {**rounded({"": value})[""], "to_start": rounded({"": to_start})[""]}

    return {
        "bits_per_byte": {
            name: with_ratio(
                ratio(nats_N, bytes_N * np.log(2)), ratio(nats_N, nats[models[name].start])
            )
            for name, nats_N in nats.items()
        },
        "perplexity": {
            name: with_ratio(perplexity(nats_N), perplexity(nats_N - nats[models[name].start]))
            for name, nats_N in nats.items()
        },
    }


if __name__ == "__main__":
    main()
