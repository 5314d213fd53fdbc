"""Is the law `words` better than `gated`, min-p with a temperature, and stock? On a real model.

    python bench/real_answers.py --model FOLDER                          # first: the answers
    .venv-eval/bin/python bench/ifeval.py DATA              # and which follow their instructions
    python bench/words.py [--folder build/real]

The law's temperatures were chosen on stories (docs/log.md). It is tested on other prompts:
    essays      errors and variety, measured as in bench/real.py, for the settings of both laws, and
                the ratio of the errors of `words` to those of another setting at that setting's
                variety; on 60 prompts, and on the 90 others, which alone determine the decision
    IFEval      the share of prompts all of whose instructions are followed, by rule
    MMLU        the share of questions answered right, and of answers that cannot be read
The last two with exact McNemar tests of `words` against the others. Intervals are 95 %. The last
line is one JSON document, which includes the decision which law a plain number in `diversity`
selects.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from real import RESULTS, Checks, by_setting, read_at, rounded
from real_answers import (
    ESSAYS,
    GATED,
    IFEVAL,
    MMLU,
    OTHER_ESSAYS,
    WORDS,
    Answer,
    PromptSet,
    data_folder,
    mmlu,
    prompt_sets,
    read_answers,
)
from scipy import stats

from dftserve.evaluate import reference
from dftserve.evaluate.accuracy import extract
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.metrics.intervals import (
    Estimate,
    difference,
    from_left_out,
    mcnemar,
    standard_error,
    wilson,
)

from provenance import machine, versions

LAWS = {WORDS: ("`words` .5", WORDS), GATED: ("`gated` .5", GATED)}
"""Level 1 of each law, and the settings of its curve, the least varied first."""
FEWER = 0.8
"""Maximum ratio of the errors of `words`, at equal variety, to those of `gated`, to make it the
default."""
ALPHA = 0.05


@click.command()
@click.option("--folder", default=Path("build/real"), type=click.Path(path_type=Path))
@click.option("--output", default=RESULTS / "words.json", type=click.Path(path_type=Path))
def main(folder: Path, output: Path) -> None:
    sets = {each.name: each for each in prompt_sets(data_folder())}
    checks = Checks(reference.build(tasks.load("story").human))
    essays, others = (
        written_essays(checks, by_setting(read_answers(folder), name), sets[name])
        for name in (ESSAYS, OTHER_ESSAYS)
    )
    followed = json.loads((folder / "ifeval.json").read_text())
    instructions = ifeval(followed["settings"])
    document = {
        "what": "the law `words` on prompts that did not choose its temperatures; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "essays": essays,
        "other_essays": others,
        "ifeval": {
            "prompts": len(sets[IFEVAL].prompts) - len(followed["left_out"]),
            "left_out": len(followed["left_out"]),
            "rows": instructions,
        },
        "mmlu": questions(by_setting(read_answers(folder), MMLU), mmlu(data_folder())),
        "default": default(others["against"][WORDS][GATED], instructions),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def written_essays(
    checks: Checks, answers: Mapping[str, Sequence[Answer]], asked: PromptSet
) -> dict[str, Any]:
    rows = {name: checks.of_answers(given, asked.prompts) for name, given in answers.items()}
    return {
        "prompts": len(asked.prompts),
        "answers_to_each": asked.answers,
        "rows": {name: rounded(row) for name, row in rows.items()},
        "against": {
            law: {name: compared(rows, law, name) for name in rows if name not in LAWS[law]}
            for law in LAWS
        },
    }


def compared(
    rows: Mapping[str, Mapping[str, Estimate]], law: str, other: str
) -> dict[str, dict[str, float]]:
    """The differences of a law at level 1 to another setting, and the ratio of their errors at the
    other's variety."""
    found = {
        key: with_p(difference(rows[other][key], rows[law][key]))
        for key in ("errors", "unknown", "self_bleu", "distinct_3")
    }
    curve = [rows[name] for name in LAWS[law] if name in rows]
    equal = read_at(curve, "self_bleu", "errors", rows[other])
    if equal is not None:
        found["errors_ratio_at_equal_variety"] = with_p(
            ratio(equal, rows[other]["errors"]), null=1.0
        )
    return found


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b, with the same tenths left out of both."""
    return from_left_out(
        a.value / b.value, [x / y for x, y in zip(a.left_out, b.left_out, strict=True)]
    )


def with_p(found: Estimate, null: float = 0.0) -> dict[str, float]:
    """The estimate with its p against the null value, by Student's distribution over the tenths
    left out."""
    error, distance = standard_error(found.left_out), abs(found.value - null)
    p = 2 * stats.t.sf(distance / error, len(found.left_out) - 1) if error else float(distance == 0)
    return {**rounded({"": found})[""], "p": round(float(p), 5)}


def ifeval(settings: Mapping[str, Mapping[str, Sequence[bool]]]) -> dict[str, Any]:
    keys = sorted(set.intersection(*(set(prompts) for prompts in settings.values())))
    whole = {name: [all(prompts[key]) for key in keys] for name, prompts in settings.items()}
    return {
        name: {"followed": share(right), **paired(whole, name)} for name, right in whole.items()
    }


def questions(
    answers: Mapping[str, Sequence[Answer]], asked: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """For each setting: right answers, answers that cannot be read, and `words` against it."""
    letter_pairs = {name: letters(given, asked) for name, given in answers.items()}
    right = {
        name: [given == wanted for given, wanted in pairs] for name, pairs in letter_pairs.items()
    }
    return {
        "questions": len(asked),
        "rows": {
            name: {
                "right": share(right[name]),
                "unreadable": share([given is None for given, _ in letter_pairs[name]]),
                **paired(right, name),
            }
            for name in answers
        },
    }


def letters(
    answers: Sequence[Answer], asked: Sequence[Mapping[str, Any]]
) -> list[tuple[str | None, str]]:
    """(the letter that the answer gives, the right letter) for each answer to a question of MMLU;
    None if no letter can be read."""
    return [
        (extract.choice(answer.text, letters="ABCD"), "ABCD"[asked[answer.prompt]["answer"]])
        for answer in answers
    ]


def share(of: Sequence[bool]) -> dict[str, float]:
    return rounded({"": wilson(sum(of), len(of))})[""]


def paired(by_setting: Mapping[str, Sequence[bool]], name: str) -> dict[str, float]:
    """How often only `words` succeeded, how often only the other setting did, and the p."""
    ours, theirs = by_setting[WORDS], by_setting[name]
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "words_wins": sum(a and not b for a, b in pairs),
        "words_losses": sum(b and not a for a, b in pairs),
        "p": round(mcnemar(ours, theirs), 5),
    }


def default(against_gated: Mapping[str, Any], instructions: Mapping[str, Any]) -> dict[str, Any]:
    """The default law: `words` if it has clearly fewer errors at the variety of `gated`, or is more
    varied without more errors, and follows at least as many instructions; otherwise `gated`."""
    errors = against_gated.get("errors_ratio_at_equal_variety")
    fewer = errors is not None and errors["value"] <= FEWER and errors["p"] < ALPHA
    variety, more_errors = against_gated["self_bleu"], against_gated["errors"]
    more_varied = variety["value"] < 0 and variety["p"] < ALPHA and more_errors["value"] <= 0
    followed = {name: instructions[name]["followed"]["value"] for name in (WORDS, GATED)}
    follows = followed[WORDS] >= followed[GATED]
    law = "words" if (fewer or more_varied) and follows else "gated"
    return {"law": law, "fewer_errors": fewer, "more_varied": more_varied, "follows": follows}


if __name__ == "__main__":
    main()
