"""The tables of bench/results/headline.json: the models, and what was reached of each target."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from cells import TOO_SHORT, interval, left_out, percent, table

PEOPLE, BASE, START = "people", "base", "start"
STOCK = "stock, T 1"
SETTINGS = ("stock, T .85", "`words` .25", "`words` 1")
"""Those that are compared with the targets."""
MEASURED = {
    "SDS": ("sds", 0),
    "style distance": ("style", 3),
    "AI phrases": ("phrases", 1),
    "errors": ("errors", 2),
}
ACCURACY = {"IFEval": "ifeval", "MMLU": "mmlu", "unreadable": "mmlu_unreadable"}
SEED = re.compile(r" \(seed \d+\)")
NEARER = 0.6
"""The target for the distance to people's rate of AI phrases, as a share of the start's."""


def models(document: Mapping[str, Any]) -> str:
    """Variety, errors, accuracy and likelihood of each model and setting."""
    accuracy, perplexity = document["accuracy"], document["perplexity"]
    story, texts = document["stories"], document["texts"]
    columns = [
        "",
        *MEASURED,
        "too short",
        *ACCURACY,
        *(f"perplexity: {name}" for name in perplexity),
    ]
    rows = []
    for name, row in {PEOPLE: story[PEOPLE], **story["rows"]}.items():
        cells = [interval(row[key], digits) for key, digits in MEASURED.values()]
        cells.append(left_out(row))
        for task in ACCURACY.values():
            cells.append(percent(accuracy[task][name]) if name in accuracy[task] else "")
        model, _, setting = name.partition(", ")
        for source in perplexity:
            is_shown = setting == STOCK  # The field does not change how a text is scored.
            cells.append(interval(perplexity[source][model], 1) if is_shown else "")
        rows.append([name, *cells])
    count = story["prompts"] * story["answers_to_each"]
    caption = (
        f"`bench/headline.py`, SmolLM2-135M-Instruct, one seed per row: {count} stories for each "
        f"row of a model, {accuracy['ifeval'][f'{START}, {STOCK}']['count']} prompts of IFEval, "
        f"{accuracy['mmlu'][f'{START}, {STOCK}']['count']} questions of MMLU, of which a share of "
        f"the answers is unreadable. The start was tuned on {texts['start']} answers of one model, "
        f"the models made from it or from the base on {texts['train']} people's stories; "
        f"{texts['measure']} other stories by people are for comparison. 95 % intervals. "
        f"{TOO_SHORT}"
    )
    return table(f"| {' | '.join(columns)} |", rows, caption)


def targets(document: Mapping[str, Any]) -> str:
    """What each tuned model reaches of each target, by setting."""
    made = [name for name in document["compared_with"] if name not in (BASE, START)]
    columns = ["compared with the start, or for models from the base with that", *COLUMNS]
    rows = [["target", *(target for target, _ in COLUMNS.values())]]
    rows += (
        [f"{model}, {setting}", *(cell(document, model, setting) for _, cell in COLUMNS.values())]
        for model in made
        for setting in SETTINGS
        if f"{model}, {setting}" in document["stories"]["rows"]
    )
    return table(f"| {' | '.join(columns)} |", rows)


def seeds(document: Mapping[str, Any]) -> str:
    """Mean and range over seeds, of the methods and settings that have several."""
    rows: dict[str, list[str]] = {}
    for name in document["stories"]["rows"]:
        rows.setdefault(SEED.sub("", name), []).append(name)
    columns = ["mean over seeds (lowest to highest)", "seeds", *MEASURED, *ACCURACY]
    lines = [
        [name, str(len(each)), *_cells_over_seeds(document, each)]
        for name, each in rows.items()
        if len(each) > 1
    ]
    return table(f"| {' | '.join(columns)} |", lines)


def _cells_over_seeds(document: Mapping[str, Any], rows: Sequence[str]) -> Iterator[str]:
    for key, digits in MEASURED.values():
        yield spread([document["stories"]["rows"][row][key]["value"] for row in rows], digits)
    for task in ACCURACY.values():
        shares = document["accuracy"][task]
        asked = [100 * shares[row]["value"] for row in rows if row in shares]
        yield f"{spread(asked, 0)} %" if asked else ""


def spread(values: Sequence[float], digits: int) -> str:
    mean, low, high = sum(values) / len(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def start_row(document: Mapping[str, Any], model: str) -> str:
    """The row of the model that a model is compared with, without the field."""
    return f"{document['compared_with'][model]}, {STOCK}"


def share_of_peoples_sds(document: Mapping[str, Any], model: str, setting: str) -> str:
    story = document["stories"]
    share = story["rows"][f"{model}, {setting}"]["sds"]["value"] / story[PEOPLE]["sds"]["value"]
    return f"{100 * share:.0f} %"


def phrases(document: Mapping[str, Any], model: str, setting: str) -> str:
    """The distance to people's rate, as a share of the distance that its start has."""
    story = document["stories"]
    people = story[PEOPLE]["phrases"]["value"]
    rows = story["rows"]
    own = rows[f"{model}, {setting}"]["phrases"]["value"] - people
    start = rows[start_row(document, model)]["phrases"]["value"] - people
    return f"{abs(own / start):.2f}"


def accuracy(document: Mapping[str, Any], model: str, setting: str, task: str) -> str:
    """The relative change, and the p of no change; empty if the setting was not asked the task."""
    rows = document["accuracy"][task]
    own, start = rows.get(f"{model}, {setting}"), rows[start_row(document, model)]
    if own is None:
        return ""
    return f"{100 * (own['value'] / start['value'] - 1):+.0f} % (p {own['p_to_start']:.2f})"


def likelihood(
    document: Mapping[str, Any], model: str, _setting: str, measure: str, source: str
) -> str:
    """The same for all settings: the field does not change how a text is scored."""
    return interval(document[measure][source][model]["to_start"], 3)


COLUMNS = {
    "SDS, share of people's": ("≥ 90 %", share_of_peoples_sds),
    "AI phrases, distance to people's rate": (f"≤ {NEARER:g} ×", phrases),
    "IFEval": ("≥ −1 %", partial(accuracy, task="ifeval")),
    "MMLU": ("≥ −1 %", partial(accuracy, task="mmlu")),
    **{
        f"{measure}, {source}": ("≤ .91 ×", partial(likelihood, measure=key, source=source))
        for measure, key in (("perplexity", "perplexity"), ("bits per byte", "bits_per_byte"))
        for source in ("stories", "books")
    },
}
"""By column: the target, and the cell of a model with a setting."""
