"""The tables of bench/results/headline.json: the models, and what was reached of each target."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from cells import TOO_SHORT, interval, left_out, percent, table

PEOPLE, BASE, START = "people", "base", "start"
STOCK, SETTING = "stock, T 1", "`words` .25"
MEASURED = {
    "SDS": ("sds", 0),
    "style distance": ("style", 3),
    "AI phrases": ("phrases", 1),
    "errors": ("errors", 2),
}
NEARER = 0.6
"""The target for the distance to people's rate of AI phrases, as a share of the start's."""


def models(document: Mapping[str, Any]) -> str:
    """Variety, errors, accuracy and likelihood of each model and setting."""
    accuracy, perplexity = document["accuracy"], document["perplexity"]
    story, texts = document["stories"], document["texts"]
    tasks = {"IFEval": "ifeval", "MMLU": "mmlu", "unreadable": "mmlu_unreadable"}
    columns = ["", *MEASURED, "too short", *tasks, *(f"perplexity: {name}" for name in perplexity)]
    rows = []
    for name, row in {PEOPLE: story[PEOPLE], **story["rows"]}.items():
        cells = [interval(row[key], digits) for key, digits in MEASURED.values()]
        cells.append(left_out(row))
        for task in tasks.values():
            cells.append(percent(accuracy[task][name]) if name in accuracy[task] else "")
        model, _, setting = name.partition(", ")
        for source in perplexity:
            is_shown = setting == STOCK  # The field does not change how a text is scored.
            cells.append(interval(perplexity[source][model], 1) if is_shown else "")
        rows.append([name, *cells])
    count = story["prompts"] * story["answers_to_each"]
    caption = (
        f"`bench/headline.py`, SmolLM2-135M-Instruct, one seed a row: {count} stories for each row "
        f"of a model, {accuracy['ifeval'][f'{START}, {STOCK}']['count']} prompts of IFEval, "
        f"{accuracy['mmlu'][f'{START}, {STOCK}']['count']} questions of MMLU, of which a share of "
        f"the answers is unreadable. The start was tuned on {texts['start']} answers of one model, "
        f"the models made from it on {texts['train']} people's stories; {texts['measure']} other "
        f"stories by people are for comparison. 95 % intervals. {TOO_SHORT}"
    )
    return table(f"| {' | '.join(columns)} |", rows, caption)


def targets(document: Mapping[str, Any]) -> str:
    """For each model made from the start, with the field, what was reached of each target."""
    made = [name for name in document["bits_per_byte"]["stories"] if name not in (BASE, START)]
    columns = ["compared with the start", "target", *(f"{name}, {SETTING}" for name in made)]
    rows = ([label, target, *(cell(document, m) for m in made)] for label, target, cell in ROWS)
    return table(f"| {' | '.join(columns)} |", rows)


def share_of_peoples_sds(document: Mapping[str, Any], model: str) -> str:
    story = document["stories"]
    share = story["rows"][f"{model}, {SETTING}"]["sds"]["value"] / story[PEOPLE]["sds"]["value"]
    return f"{100 * share:.0f} %"


def phrases(document: Mapping[str, Any], model: str) -> str:
    """The distance to people's rate, as a share of the start's distance."""
    story = document["stories"]
    people = story[PEOPLE]["phrases"]["value"]
    rows = story["rows"]
    own = rows[f"{model}, {SETTING}"]["phrases"]["value"] - people
    start = rows[f"{START}, {STOCK}"]["phrases"]["value"] - people
    return f"{abs(own / start):.2f}"


def accuracy(document: Mapping[str, Any], model: str, task: str) -> str:
    """The relative change, and the p of no change."""
    rows = document["accuracy"][task]
    own, start = rows[f"{model}, {SETTING}"], rows[f"{START}, {STOCK}"]
    return f"{100 * (own['value'] / start['value'] - 1):+.0f} % (p {own['p_to_start']:.2f})"


def likelihood(document: Mapping[str, Any], model: str, measure: str, source: str) -> str:
    return interval(document[measure][source][model]["to_start"], 3)


ROWS = (
    ("SDS, share of people's", "≥ 90 %", share_of_peoples_sds),
    ("AI phrases, distance to people's rate", f"≤ {NEARER:g} ×", phrases),
    ("IFEval", "≥ −1 %", partial(accuracy, task="ifeval")),
    ("MMLU", "≥ −1 %", partial(accuracy, task="mmlu")),
    *(
        (f"{measure}, {source}", "≤ .91 ×", partial(likelihood, measure=key, source=source))
        for measure, key in (("perplexity", "perplexity"), ("bits per byte", "bits_per_byte"))
        for source in ("stories", "books")
    ),
)
"""By row: what is compared, the target, and the cell of a model."""
