"""The tables of bench/results/laws.json: laws as curves, and each of their settings."""

from collections.abc import Mapping
from typing import Any

from cells import interval, left_out, table

QUESTIONS = {
    "errors_at_peoples_wording": ("errors at people's self-BLEU", 2),
    "hypervolume": ("errors and self-BLEU", 3),
    "style_hypervolume": ("errors and style distance", 3),
}
MEASURED = {"errors": 2, "unknown": 2, "phrases": 1, "self_bleu": 1, "style": 3, "sds": 0}


def laws(document: Mapping[str, Any]) -> str:
    """One row per law, the largest hypervolume first."""
    compared = document["laws"]
    found = compared["laws"]
    head = [cell for name, _ in QUESTIONS.values() for cell in (name, "p")]
    rows = []
    for law in sorted(found, key=lambda law: -found[law]["hypervolume"]["value"]):
        cells = []
        for question, (_, digits) in QUESTIONS.items():
            answer, difference = (
                found[law].get(f"{question}{end}") for end in ("", "_to_simplest")
            )
            cells.append("not reached" if answer is None else interval(answer, digits))
            cells.append("" if difference is None else f"{difference['p']:.3f}")
        rows.append([law, *cells])
    caption = (
        f"`bench/laws.py`: {document['model']}; {document['prompts']} story prompts, "
        f"{document['answers_to_each']} answers to each with each of a law's three settings, "
        f"at most {document['max_tokens']} tokens; 95 % intervals. Errors are per 100 words, "
        "interpolated between a law's settings at the self-BLEU of people's stories "
        f"({document['people']['self_bleu']['value']:.1f}). The other two are hypervolumes: "
        f"the share of the rectangle of errors up to {compared['most_errors']:g} and self-BLEU "
        f"up to {compared['most_alike']:g}, or style distance up to "
        f"{compared['farthest']:g}, that is worse in both than a setting of the law. p: "
        f"against {compared['simplest']}, paired by prompt, with Holm's correction over laws."
    )
    return table(f"| law | {' | '.join(head)} |", rows, caption)


def settings(document: Mapping[str, Any]) -> str:
    """People first, then the settings in the order of the laws."""
    rows = []
    for name, row in {"people": document["people"], **document["rows"]}.items():
        cells = [interval(row[key], digits) for key, digits in MEASURED.items()]
        rows.append([name, *cells, left_out(row)])
    head = "| | errors | unknown | AI phrases | self-BLEU | style distance | SDS | too short |"
    return table(head, rows)
