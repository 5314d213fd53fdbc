"""Does the Style Diversity Score detect what it should, and do the usual measures?

    DFTSERVE_DATA=path/to/data OMP_NUM_THREADS=1 python bench/sds_validation.py [--output FILE.json]

On the benchmark's human stories, in three disjoint splits, and on stories by models:
    systems     the score with its parts, the distance to other human texts, and the usual measures
                of diversity, all on the same number of texts; those rate random text above people
    splits      held-out human text for other random splits; it must score at least `HELD_OUT`
    copies      a growing part of held-out human text replaced by copies of one text
    sizes       the score of few texts compared with that of the whole set
    null        the permutation p of the MMD between two sets by people, tested for uniformity by
                Kolmogorov–Smirnov; a correct implementation fails with the probability `KS_ALARM`
    checks      what is required, what was found, and whether it holds

The last line is one JSON document. The exit code is 1 if a check fails.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import numpy as np
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.metrics import lexical
from dftserve.evaluate.metrics.intervals import Estimate, difference
from dftserve.evaluate.metrics.sds import Score, SDSReference, score
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.metrics.two_sample import c2st, mmd_test, token_distances
from dftserve.evaluate.reference import Anchors
from dftserve.evaluate.text.tokenize import tokens, words
from dftserve.evaluate.text.windows import Sample, Windows

from provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "sds_validation.json"
CONTINUED = {
    "GPT-3.5": "gpt-3.5-turbo",
    "davinci": "davinci",
    "GPT-2 XL": "gpt2-xl",
    "GPT-Neo 2.7B": "gpt-neo-2.7B",
    "GPT-J 6B": "gpt-j-6B",
}
PROMPTED = {
    "gemma-3-27b-it": "gemma-3-27b-it",
    "gemma-3-27b-it antislop": "gemma-3-27b-it-antislop",
    "Mistral Nemo": "mistral-nemo",
}
STORIES = 150
"""Number of story prompts, which are the first ones of the prompted sets."""
HUMAN = "people, held out"
SOUPS = ("words shuffled", "random words", "words drawn by frequency")
HELD_OUT, BELOW_HUMAN, STEADY = 85, 10, 5
"""Points."""
COPIED = (0.25, 0.5, 0.75, 1.0)
SIZES = (16, 24, 32, 48)
DRAWN = 150
"""Number of subsamples of each size."""
SPLITS = 10
NULL_SPLITS, NULL_SIDE, NULL_PERMUTATIONS = 200, 60, 199
PERMUTATIONS = 1999
KS_ALARM = 0.001


@click.command()
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def main(output: Path) -> None:
    start = time.perf_counter()
    data = os.environ.get(tasks.DATA)
    try:
        story = tasks.load("story")
    except tasks.Missing as error:
        raise click.UsageError(str(error)) from None
    human = reference.build(story.human)
    sets = systems(Path(data or "")) | {HUMAN: human.test} | soups(human.test)
    document: dict[str, Any] = {
        "what": "Style Diversity Score of text by people and models, and of soup; 95 % intervals",
        "machine": machine(),
        "versions": versions("numpy", "scipy"),
        "words": human.words,
        "human_texts": {name: len(split) for name, split in human.splits.items()},
        "systems": compared(sets, human),
        "copies": {str(share): as_row(copies(human, share)) for share in COPIED},
        "splits": [
            reference.build(story.human, seed=seed).human.sds.value for seed in range(SPLITS)
        ],
        "order": order(story.human, human),
        "sizes": {
            name: sizes(sets[name], human.sds_reference)
            for name in (HUMAN, "GPT-3.5", "gemma-3-27b-it")
        },
        "null": null(human),
    }
    document["checks"] = checks(document)
    document["bench_seconds"] = round(time.perf_counter() - start, 1)
    print(table(document))
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    sys.exit(not all(check["holds"] for check in document["checks"]))


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────


def systems(data: Path) -> dict[str, Windows]:
    folder = data / "human_ai"
    continued = {
        name: [other for _, other in tasks.continuations(folder / f"fdg_writing_{file}.json")]
        for name, file in CONTINUED.items()
    }
    prompted = {name: stories(folder / f"slopscore_{file}.json") for name, file in PROMPTED.items()}
    return {name: Windows.of(samples) for name, samples in (continued | prompted).items()}


def stories(path: Path) -> list[Sample]:
    (run,) = json.loads(path.read_text(encoding="utf-8")).values()
    return [
        Sample(each["output"], each["prompt"])
        for each in run["samples"]
        if each["prompt_index"] < STORIES
    ]


def soups(human: Windows) -> dict[str, Windows]:
    """The same number of random texts: each text's words shuffled, uniformly drawn words, and words
    drawn by their frequency in human text."""
    draw = random.Random(0)
    split = [text.split() for text in human.texts]
    every = [word for text in split for word in text]
    known = sorted({word for text in human.texts for word in words(text)})
    drawn = {
        "words shuffled": [draw.sample(text, len(text)) for text in split],
        "random words": [draw.choices(known, k=human.words) for _ in split],
        "words drawn by frequency": [draw.choices(every, k=2 * human.words) for _ in split],
    }
    return {
        name: Windows.of((Sample(" ".join(text)) for text in texts), human.words)
        for name, texts in drawn.items()
    }


def copies(human: Anchors, share: float) -> Score:
    test = human.test
    count = round(share * len(test))
    return score(
        replace(test, texts=(test.texts[0],) * count + test.texts[count:]), human.sds_reference
    )


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────


def compared(sets: Mapping[str, Windows], human: Anchors) -> dict[str, Any]:
    """Scores of whole sets. Everything else is on the same number of texts from each set, against
    as many human texts of the calibration split, which is not one of the sets."""
    frame = StyleSpace.fit(human.splits["reference"])
    whole = {name: each.whole() for name, each in sets.items()}
    others = human.splits["calibration"]
    count = min(len(others), *(len(each) for each in whole.values()))
    others = others.pick(range(count))
    return {
        name: as_row(score(sets[name], human.sds_reference))
        | {"compared_texts": count}
        | distances(drawn(each, count), others, frame)
        | usual(drawn(each, count), frame)
        for name, each in whole.items()
    }


def drawn(texts: Windows, count: int, seed: int = 0) -> Windows:
    return texts.pick(np.random.default_rng(seed).choice(len(texts), count, replace=False))


def distances(texts: Windows, others: Windows, frame: StyleSpace) -> dict[str, Any]:
    style_TF, other_TF = frame.features(texts), frame.features(others)
    mmd = mmd_test(style_TF, other_TF, frame.sigma, permutations=PERMUTATIONS)
    l2, _ = token_distances(*([tokens(t) for t in side.texts] for side in (texts, others)))
    return {
        "mmd": round(mmd.value, 4),
        "mmd_p": mmd.p,
        "c2st": interval(c2st(style_TF, other_TF), 3),
        "token_l2": round(l2, 4),
    }


def usual(texts: Windows, frame: StyleSpace) -> dict[str, float]:
    tokens_T = [tokens(text) for text in texts.texts]
    squared_TT = squareform(pdist(frame.features(texts), "sqeuclidean"))
    return {
        "distinct_3": round(lexical.distinct_n(tokens_T, 3), 4),
        "self_bleu": round(lexical.self_bleu(tokens_T), 2),
        "compression": round(lexical.compression_ratio(texts.texts), 3),
        "self_repetition": round(lexical.self_repetition(tokens_T), 3),
        "vendi_style": round(lexical.vendi(np.exp(-squared_TT / (2 * frame.sigma**2))), 1),
    }


def order(samples: Sequence[Sample], human: Anchors) -> dict[str, float]:
    """How much the score changes if the scored texts, or the reference's texts, are reversed."""
    turned = human.test.pick(range(len(human.test))[::-1])
    rebuilt = reference.build(tuple(samples)[::-1])
    value = human.human.sds.value
    return {
        "scored": abs(score(turned, human.sds_reference).sds.value - value),
        "built": abs(rebuilt.human.sds.value - value),
    }


def sizes(texts: Windows, sds_reference: SDSReference) -> dict[str, Any]:
    """Mean and standard deviation over subsamples of each size.

    `uncapped` is the mean of 100·q·V·P. The score's caps cut off random deviations above them but
    not below, so that near a cap few texts score lower on average than many.
    """
    whole = texts.whole()
    found: dict[str, Any] = {"whole": spread([score(whole, sds_reference)])}
    for size in SIZES:
        found[str(size)] = spread(
            [score(drawn(whole, size, seed), sds_reference) for seed in range(DRAWN)]
        )
    return found


def spread(scores: Sequence[Score]) -> dict[str, float]:
    values = [each.sds.value for each in scores]
    products = [
        100 * each.coherence.value * each.variety.value * each.wording.value for each in scores
    ]
    return {
        "mean": round(float(np.mean(values)), 1),
        "sd": round(float(np.std(values)), 1),
        "uncapped": round(float(np.mean(products)), 1),
    }


def null(human: Anchors) -> dict[str, float]:
    """The p of two sets by people, over repeated draws. A permutation p is discrete; a uniform draw
    within its step makes it continuous."""
    frame = StyleSpace.fit(human.splits["reference"])
    style_TF = np.concatenate([frame.features(split) for split in human.splits.values()])
    draw = np.random.default_rng(0)
    found = []
    for seed in range(NULL_SPLITS):
        x_NF, y_NF = np.split(draw.permutation(style_TF)[: 2 * NULL_SIDE], 2)
        p = mmd_test(x_NF, y_NF, frame.sigma, permutations=NULL_PERMUTATIONS, seed=seed).p
        found.append(p - draw.uniform() / (1 + NULL_PERMUTATIONS))
    return {
        "splits": NULL_SPLITS,
        "below_05": round(float(np.mean(np.array(found) <= 0.05)), 3),
        "ks_p": round(float(stats.kstest(found, "uniform").pvalue), 4),
        "false_alarm": KS_ALARM,
    }


# ── What is required ─────────────────────────────────────────────────────────────────────────────


def checks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = document["systems"]
    held_out = rows[HUMAN]["sds"]
    below = partial(below_human, rows)
    falling = [held_out["value"], *(each["sds"]["value"] for each in document["copies"].values())]
    listed: list[tuple[str, Any, Callable[[Any], bool]]] = [
        (f"held-out human text scores {HELD_OUT} or more on every split",
         round(min(document["splits"]), 1), lambda low: low >= HELD_OUT),
        ("copies of 25, 50, 75 and 100 % fall strictly, to 0",
         falling, lambda values: strictly_falling(values) and values[-1] == 0),
        ("shuffled and random words score 0",
         [rows[name]["sds"]["value"] for name in SOUPS], lambda values: max(values) == 0),
        *(
            (f"{name} is {BELOW_HUMAN} points or more under held-out human text",
             below(name), lambda points: points["low"] >= BELOW_HUMAN)
            for name in ("gemma-3-27b-it", "Mistral Nemo")
        ),
        ("the order of the texts changes nothing",
         max(document["order"].values()), lambda moved: moved < 1e-6),
        (f"mean scores over {SIZES[0]} to {SIZES[-1]} texts are within {STEADY} of each other",
         widest(document["sizes"]), lambda points: points <= STEADY),
        (f"without the score's caps they are within {STEADY} of the whole set's",
         farthest(document["sizes"], "uncapped"), lambda points: points <= STEADY),
        ("the MMD's p is uniform between sets by people",
         document["null"]["ks_p"], lambda p: p >= KS_ALARM),
        ("the MMD tells GPT-3.5 and gemma from people at p < .001",
         [rows[name]["mmd_p"] for name in ("GPT-3.5", "gemma-3-27b-it")],
         lambda values: max(values) < 0.001),
        ("distinct-3, self-BLEU and compression rate shuffled words above people",
         [[rows[name][key] for name in (HUMAN, "words shuffled")]
          for key in ("distinct_3", "self_bleu", "compression")],
         lambda pairs: pairs[0][1] > pairs[0][0]
         and all(soup < human for human, soup in pairs[1:])),
    ]  # fmt: skip
    return [
        {"what": what, "found": found, "holds": bool(holds(found))} for what, found, holds in listed
    ]


def below_human(rows: Mapping[str, Any], name: str) -> dict[str, Any]:
    system, people = (Estimate(**rows[each]["sds"]) for each in (name, HUMAN))
    return interval(difference(system, people), 1)


def strictly_falling(values: Sequence[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(values))


def widest(found: Mapping[str, Any]) -> float:
    """The largest difference between a set's mean scores over its subsamples of two sizes."""
    means = [[each[str(size)]["mean"] for size in SIZES] for each in found.values()]
    return round(max(max(each) - min(each) for each in means), 1)


def farthest(found: Mapping[str, Any], key: str) -> float:
    """The largest distance of a subsample's mean from the whole set's score."""
    moved = (
        abs(each[str(size)][key] - each["whole"][key]) for each in found.values() for size in SIZES
    )
    return round(max(moved), 1)


# ── Output ───────────────────────────────────────────────────────────────────────────────────────


def as_row(found: Score) -> dict[str, Any]:
    return {
        "sds": interval(found.sds, 1),
        "V": interval(found.variety),
        "P": interval(found.wording),
        "q": interval(found.coherence),
        "texts": found.texts,
        "short": found.short,
    }


def interval(found: Estimate, digits: int = 2) -> dict[str, float | None]:
    ends = {"value": found.value, "low": found.low, "high": found.high}
    return {name: end if end is None else round(end, digits) for name, end in ends.items()}


def table(document: Mapping[str, Any]) -> str:
    lines = [
        f"{'':<26} {'SDS':>20} {'V':>5} {'P':>5} {'q':>5} {'MMD':>5} {'p':>6} {'C2ST':>5} "
        f"{'L2':>6} {'dist-3':>6} {'sBLEU':>5} {'gzip':>5} {'rep':>5} {'Vendi':>5}"
    ]
    for name, row in document["systems"].items():
        sds = Estimate(**row["sds"])
        lines.append(
            f"{name:<26} {sds.render(1):>20} "
            + " ".join(f"{row[part]['value']:>5.2f}" for part in "VPq")
            + f" {row['mmd']:>5.3f} {row['mmd_p']:>6.4f} {row['c2st']['value']:>5.3f} "
            f"{row['token_l2']:>6.4f} {row['distinct_3']:>6.3f} {row['self_bleu']:>5.1f} "
            f"{row['compression']:>5.2f} {row['self_repetition']:>5.2f} {row['vendi_style']:>5.1f}"
        )
    for share, row in document["copies"].items():
        lines.append(
            f"{float(share):.0%} copies".ljust(26) + f" {Estimate(**row['sds']).render(1)}"
        )
    for name, row in document["sizes"].items():
        means = ", ".join(f"{n}: {row[str(n)]['mean']} ± {row[str(n)]['sd']}" for n in SIZES)
        free = ", ".join(str(row[str(n)]["uncapped"]) for n in SIZES)
        lines.append(
            f"{name:<26} whole {row['whole']['mean']}; mean ± SD of {means}; no caps {free}"
        )
    splits = ", ".join(f"{value:.0f}" for value in document["splits"])
    lines.append(f"held-out human text on {len(document['splits'])} splits: {splits}")
    for check in document["checks"]:
        lines.append(f"{'yes' if check['holds'] else 'NO':>3}  {check['what']}: {check['found']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
