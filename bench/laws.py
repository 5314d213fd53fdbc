"""Which decode-time law is best? Stories of one model by thirteen laws, at three settings each.

    DFTSERVE_DATA=path/to/data python bench/laws.py --model FOLDER [--folder build/laws]
        [--called TEXT] [--dtype float32]

The model answers 32 story prompts four times with each setting of each law, in one engine of vLLM
with the plug-in. Answers that the folder already contains are reused. The human stories for
comparison are those that bench/headline_models.py does not train on. A law's settings were chosen
before any answer was seen, from little variety to much, so that laws are compared as curves:
    errors at equal wording   errors per 100 words at the self-BLEU of human stories, interpolated
                              between a law's settings
    hypervolumes              the share of the rectangle of errors up to MOST_ERRORS and self-BLEU
                              up to MOST_ALIKE that is worse in both than one of the law's settings;
                              the same for errors and a style distance up to FARTHEST
Each law is compared, on the same prompts, with one temperature on the guard, the simplest law that
cuts first and then heats; p has Holm's correction for the number of laws. Intervals are 95 %. The
answers are stored in results/texts/laws.jsonl.xz. The last line is one JSON document.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import click
from headline_models import stories
from model_option import model_option
from real import PEOPLE, RESULTS, Checks, read_at, rounded, texts_of
from real_answers import (
    STORIES,
    PromptSet,
    answer_missing,
    data_folder,
    pack,
    prompt_set,
    read_answers,
)
from words import with_p

from dftserve.evaluate import reference
from dftserve.evaluate.metrics.intervals import Estimate, difference, from_left_out

from provenance import machine, versions

ANSWERS = 4
"""To each prompt."""
SIMPLEST = "one temperature on the guard"
MOST_ERRORS, MOST_ALIKE, FARTHEST = 3.0, 20.0, 0.3
"""Per 100 words, self-BLEU, and style distance."""

Settings = Mapping[str, Mapping[str, Any]]


def on_the_guard(temperature: float, reach: float = 0) -> Mapping[str, Any]:
    """dynatemp after min-p .02 at temperature 1; with a range of 0, one temperature."""
    ours = {"law": "dynatemp", "dynatemp_range": reach, "min_p": 0.02}
    return {"temperature": temperature, "diversity": ours}


def other(name: str, **settings: float) -> Mapping[str, Any]:
    return {"other_law": {"name": name, **settings}}


LAWS: Mapping[str, Settings] = {
    "temperature": {f"T {t:g}": {"temperature": t} for t in (0.7, 0.85, 1.0)},
    "top-p": {f"top-p {p:g}": {"top_p": p} for p in (0.8, 0.9, 0.95)},
    "min-p, after the temperature": {
        f"min-p {p:g}, T {t:g}": {"min_p": p, "temperature": t}
        for p, t in ((0.1, 1.5), (0.05, 1.5), (0.02, 1.3))
    },
    "top-nσ": {
        f"top-nσ 1, T {t:g}": {
            "temperature": t,
            "diversity": {"law": "top_n_sigma", "n_sigma": 1},
        }
        for t in (1.0, 1.5, 2.0)
    },
    SIMPLEST: {f"guard .02, T {t:g}": on_the_guard(t) for t in (1.0, 1.5, 2.0)},
    "`gated`": {
        f"`gated` {level:g}": {"diversity": {"law": "gated", "level": level}}
        for level in (0.25, 0.5, 1.0)
    },
    "`words`": {
        f"`words` {level:g}": {"diversity": {"law": "words", "level": level}}
        for level in (0.25, 0.5, 1.0)
    },
    "`budget`": {
        f"`budget` {nats:g}": {"diversity": {"law": "budget", "target_entropy": nats}}
        for nats in (1.5, 2.0, 2.5)
    },
    "dynatemp on the guard": {
        f"dynatemp {t:g} ± {r:g}": on_the_guard(t, r) for t, r in ((1, 0.5), (1.5, 1), (2, 1.5))
    },
    "EDT, top-p .95": {
        f"EDT T0 {base:g}": {"top_p": 0.95, **other("edt", base=base, theta=0.1)}
        for base in (0.8, 1.0, 1.2)
    },
    "Mirostat 2": {
        f"Mirostat τ {tau:g}": other("mirostat", tau=tau, temperature=1.0) for tau in (3, 4, 5)
    },
    "top-H": {
        f"top-H .4, T {t:g}": other("top-H", alpha=0.4, temperature=t) for t in (1.0, 1.5, 2.0)
    },
    "p-less": {f"p-less, T {t:g}": other("p-less", temperature=t) for t in (1.0, 1.5, 2.0)},
}
"""The settings of each law, from the least varied to the most."""
SETTINGS: Settings = {name: each for law in LAWS.values() for name, each in law.items()}


@click.command(help=__doc__)
@model_option
@click.option("--folder", default=Path("build/laws"), type=click.Path(path_type=Path))
@click.option("--called", default="", help="The model's name in the table.")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", default=RESULTS / "laws.json", type=click.Path(path_type=Path))
def main(model: Path, folder: Path, called: str, dtype: str, output: Path) -> None:
    asked = prompt_set(STORIES, data_folder())
    asked = PromptSet(STORIES, asked.prompts, ANSWERS, asked.tokens, tuple(SETTINGS))
    answer_missing(model, [(asked, name) for name in SETTINGS], SETTINGS, folder, dtype)
    answers = read_answers(folder)
    checks = Checks(reference.build(stories()["measure"]))
    rows = {
        name: checks.of_answers([a for a in answers if a.setting == name], asked.prompts)
        for name in SETTINGS
    }
    human = checks.of_people(len(asked.prompts))
    document = {
        "what": "stories of one model by decode-time laws; 95 % intervals",
        "model": called or model.name,
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "prompts": len(asked.prompts),
        "answers_to_each": ANSWERS,
        "max_tokens": asked.tokens,
        "settings": SETTINGS,
        PEOPLE: rounded(human),
        "rows": {name: rounded(row) for name, row in rows.items()},
        "laws": compared({law: [rows[name] for name in LAWS[law]] for law in LAWS}, human),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    pack(texts_of(output), map(asdict, answers))
    print(json.dumps(document))


# ── Laws as curves ───────────────────────────────────────────────────────────────────────────────

Curve = Sequence[Mapping[str, Estimate]]


def compared(curves: Mapping[str, Curve], human: Mapping[str, Estimate]) -> dict[str, Any]:
    """The measures of each law's curve, and their differences to the simplest law's, with Holm's
    p."""
    questions: Mapping[str, Callable[[Curve], Estimate | None]] = {
        "errors_at_peoples_wording": lambda curve: read_at(curve, "self_bleu", "errors", human),
        "hypervolume": lambda curve: hypervolume(curve, "self_bleu", MOST_ALIKE),
        "style_hypervolume": lambda curve: hypervolume(curve, "style", FARTHEST),
    }
    found: dict[str, Any] = {law: {} for law in curves}
    for question, value_of in questions.items():
        answers = {law: value_of(curve) for law, curve in curves.items()}
        simplest = answers[SIMPLEST]
        for law, answer in answers.items():
            if answer is None:
                continue
            found[law][question] = rounded({"": answer})[""]
            if simplest is not None and law != SIMPLEST:
                found[law][f"{question}_to_simplest"] = with_p(difference(simplest, answer))
        correct(found, f"{question}_to_simplest")
    return {
        "most_errors": MOST_ERRORS,
        "most_alike": MOST_ALIKE,
        "farthest": FARTHEST,
        "simplest": SIMPLEST,
        "laws": found,
    }


def hypervolume(curve: Curve, key: str, most: float) -> Estimate:
    def share(value_of: Callable[[Estimate], float]) -> float:
        points = sorted(
            (value_of(row["errors"]) / MOST_ERRORS, value_of(row[key]) / most) for row in curve
        )
        covered, lowest = 0.0, 1.0
        for errors, other in points:
            if errors < 1 and other < lowest:
                covered += (1 - errors) * (lowest - other)
                lowest = other
        return covered

    draws = range(len(curve[0]["errors"].left_out))
    left_out = [share(lambda found, draw=draw: found.left_out[draw]) for draw in draws]
    return from_left_out(share(lambda found: found.value), left_out)


def correct(found: Mapping[str, dict[str, Any]], key: str) -> None:
    """Replace each law's p by Holm's corrected p, in place."""
    laws = sorted((law for law in found if key in found[law]), key=lambda law: found[law][key]["p"])
    highest = 0.0
    for rank, law in enumerate(laws):
        highest = max(highest, min(1.0, (len(laws) - rank) * found[law][key]["p"]))
        found[law][key]["p"] = round(highest, 5)


if __name__ == "__main__":
    main()
