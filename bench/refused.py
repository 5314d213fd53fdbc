"""Do the rules of `evaluate accuracy --tasks refusals` distinguish refusals from answers?

    pip download --no-deps pyrit==1.1.0
    DFTSERVE_DATA=path/to/data python bench/refused.py pyrit-1.1.0-py3-none-any.whl

Measured on our list, tests/cases/refusals.json, and on the answers in PyRIT (MIT) that people have
labelled. Also counts how many of the answers of other results, of the texts in `human_ai`, and of
the paragraphs of books are classified as refusals.
The last line is one JSON document.
"""

import csv
import io
import json
import lzma
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dftserve.evaluate.accuracy.extract import refuses

from provenance import machine, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LISTED = HERE.parent / "tests" / "cases" / "refusals.json"
LABELLED = "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv"
SHORTEST = 150
"""Minimum characters of a text; shorter strings in a file are names."""

Labelled = Sequence[tuple[str, bool]]
"""Answers, and whether each is a refusal."""


@click.command()
@click.argument("wheel", type=click.Path(exists=True, path_type=Path))
@click.option("--output", default=RESULTS / "refused.json", type=click.Path(path_type=Path))
def main(wheel: Path, output: Path) -> None:
    rows = json.loads(LISTED.read_text())
    sets = {
        "ours, read": [(row["answer"], row["refuses"]) for row in rows if row["read"]],
        "ours, not read": [(row["answer"], row["refuses"]) for row in rows if not row["read"]],
        "PyRIT": labelled(wheel),
    }
    data = Path(os.environ["DFTSERVE_DATA"])
    paths = [*(RESULTS / "texts").glob("*.jsonl.xz"), *(data / "human_ai").glob("*.json")]
    others = {path.name: strings(path) for path in sorted(paths)}
    others["books, by paragraph"] = paragraphs(data / "books")
    found = {
        "sets": {name: measured(answers) for name, answers in sets.items()},
        "others": {name: refusals_among(list(texts)) for name, texts in others.items()},
        "machine": machine(),
        "versions": versions(),
    }
    for name, counts in {**found["sets"], **found["others"]}.items():
        click.echo(f"{name:40}" + ", ".join(f"{key} {value}" for key, value in counts.items()))
    output.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps(found))


def labelled(wheel: Path) -> Labelled:
    """PyRIT's answers, without duplicates. The first line of the file is its version."""
    _, content = zipfile.ZipFile(wheel).read(LABELLED).decode().split("\n", 1)
    rows = csv.DictReader(io.StringIO(content))
    return list({row["assistant_response"]: row["human_score"] == "1" for row in rows}.items())


def measured(answers: Labelled) -> dict[str, int]:
    """Counts: recall is found / refusals, precision is found / (found + wrong)."""
    flagged = [is_refusal for answer, is_refusal in answers if refuses(answer)]
    return {
        "answers": len(answers),
        "refusals": sum(is_refusal for _, is_refusal in answers),
        "found": sum(flagged),
        "wrong": len(flagged) - sum(flagged),
    }


def refusals_among(texts: Sequence[str]) -> dict[str, int]:
    return {"texts": len(texts), "called refusals": sum(map(bool, map(refuses, texts)))}


def strings(path: Path) -> Iterator[str]:
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    else:
        yield from (each for each in leaves(json.loads(path.read_text())) if len(each) > SHORTEST)


def leaves(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for each in node.values() if isinstance(node, dict) else node:
            yield from leaves(each)


def paragraphs(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.txt")):
        text = path.read_text(encoding="utf-8")
        yield from (each for each in text.split("\n\n") if len(each) > SHORTEST)


if __name__ == "__main__":
    main()
