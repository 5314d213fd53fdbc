"""The tables of bench/results/laws.json: laws as curves, and each of their settings."""

from collections.abc import Mapping
from typing import Any

from cells import interval, left_out

QUESTIONS = {
    "errors_at_peoples_wording": ("errors at people's self-BLEU", 2),
    "hypervolume": ("errors and self-BLEU", 3),
    "style_hypervolume": ("errors and style distance", 3),
}
MEASURED = {"errors": 2, "unknown": 2, "phrases": 1, "self_bleu": 1, "style": 3, "sds": 0}


def laws(document: Mapping[str, Any]) -> str:
    """From the largest hypervolume."""
    told = document["laws"]
    found = told["laws"]
    head = [cell for name, _ in QUESTIONS.values() for cell in (name, "p")]
    lines = [f"| law | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for law in sorted(found, key=lambda law: -found[law]["hypervolume"]["value"]):
        cells = []
        for question, (_, digits) in QUESTIONS.items():
            answer, beside = (found[law].get(f"{question}{end}") for end in ("", "_to_simplest"))
            cells.append("not reached" if answer is None else interval(answer, digits))
            cells.append("" if beside is None else f"{beside['p']:.3f}")
        lines.append(f"| {law} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`bench/laws.py`: {document['model']}; {document['prompts']} story prompts, "
            f"{document['answers_to_each']} answers to each by each of a law's three settings, at "
            f"most {document['max_tokens']} tokens; 95 % intervals. Errors per 100 words, read "
            "between a law's settings where the self-BLEU is that of people's stories "
            f"({document['people']['self_bleu']['value']:.1f}). The other two are hypervolumes: of "
            f"the errors up to {told['most_errors']:g} and the self-BLEU up to "
            f"{told['most_alike']:g}, or the style distance up to {told['farthest']:g}, the share "
            f"that is worse in both than a setting of the law. p: against {told['simplest']}, "
            "paired by prompt, after Holm over the laws.",
        ]
    )


def settings(document: Mapping[str, Any]) -> str:
    """In the order of the laws, behind people."""
    head = ["errors", "unknown", "AI phrases", "self-BLEU", "style distance", "SDS", "too short"]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name, row in {"people": document["people"], **document["rows"]}.items():
        cells = [interval(row[key], digits) for key, digits in MEASURED.items()]
        lines.append(f"| {name} | {' | '.join([*cells, left_out(row)])} |")
    return "\n".join(lines)
