"""How much less do people differ when they write about one topic than about many?

    DFTSERVE_DATA=path/to/data python bench/within_topics.py [--output FILE.json]

Each side of a conversation of Topical-Chat (data/dialogue) is a text of one person about one
article. The measures of the Style Diversity Score are v, the reliable style variance, and ln o, the
log overlap of phrases. Each is computed between all texts and between the texts about one article;
the ratios are `sds.WITHIN_VARIANCE` and `sds.WITHIN_WORDING`. Left out are texts shorter than the
window, articles with fewer than two texts, and the article that nearly half of the texts are about.
Intervals are 95 %, by leaving out a tenth of the articles at a time. The last line is one JSON
document.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from real_answers import data_folder

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.metrics.intervals import Estimate, jackknife
from dftserve.evaluate.metrics.overlap import ngram_overlap
from dftserve.evaluate.metrics.sds import WITHIN_VARIANCE, WITHIN_WORDING
from dftserve.evaluate.metrics.stylometry import features
from dftserve.evaluate.text.tokenize import tokens
from dftserve.evaluate.text.windows import Sample, Windows

from provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "within_topics.json"
WORDS = 100
MOST = 50
"""Maximum texts about one article; one article has hundreds, on arbitrary topics."""


@click.command()
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def main(output: Path) -> None:
    texts = with_partners(Windows.of(sides(data_folder()), WORDS).whole())
    scale = reference.build(tasks.load("story").human).sds_reference.scale
    weight_F = np.sqrt(scale.reliability_F / scale.reliability_F.sum())
    first_TF, second_TF = (scale.z(features(half)) * weight_F for half in texts.halves())
    product_TT = first_TF @ second_TF.T
    own_T = np.diag(product_TT)
    variance_TT = (own_T[:, None] + own_T[None] - product_TT - product_TT.T) / 2
    shared_TT = ngram_overlap([tokens(text) for text in texts.texts])
    topics = list(dict.fromkeys(texts.prompts))
    topic_T = np.array([topics.index(prompt) for prompt in texts.prompts])
    document = {
        "what": "people within topics over people between all texts; 95 % intervals",
        "machine": machine(),
        "versions": versions("numpy", "scipy"),
        "words": WORDS,
        "texts": len(texts),
        "topics": len(topics),
        "variance": rounded(jackknife(len(topics), lambda at: ratio(variance_TT, topic_T, at))),
        "wording": rounded(jackknife(len(topics), lambda at: log_ratio(shared_TT, topic_T, at))),
        "in_force": {"variance": WITHIN_VARIANCE, "wording": WITHIN_WORDING},
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def sides(data: Path) -> Iterator[Sample]:
    """All messages of each person in a conversation, with its article."""
    found = json.loads((data / "dialogue" / "topicalchat_test_freq.json").read_text())
    for conversation in found.values():
        by_person: dict[str, list[str]] = defaultdict(list)
        for turn in conversation["content"]:
            by_person[turn["agent"]].append(turn["message"].strip())
        for messages in by_person.values():
            yield Sample(" ".join(messages), conversation["article_url"])


def with_partners(texts: Windows) -> Windows:
    counts = Counter(texts.prompts)
    return texts.pick(i for i, topic in enumerate(texts.prompts) if 2 <= counts[topic] <= MOST)


def means(
    pairs_TT: NDArray[np.float64], topic_T: NDArray[np.intp], topics: Sequence[int]
) -> tuple[float, float]:
    """The means of a pairwise measure over pairs within topics, each topic weighted by its number
    of texts minus one, and over all pairs."""
    at = np.flatnonzero(np.isin(topic_T, topics))
    groups = [np.flatnonzero(topic_T == topic) for topic in topics]
    within = [mean_of_pairs(pairs_TT[np.ix_(group, group)]) for group in groups]
    degrees = [len(group) - 1 for group in groups]
    return float(np.average(within, weights=degrees)), mean_of_pairs(pairs_TT[np.ix_(at, at)])


def mean_of_pairs(pairs_TT: NDArray[np.float64]) -> float:
    return float(pairs_TT[~np.eye(len(pairs_TT), dtype=bool)].mean())


def ratio(pairs_TT: NDArray[np.float64], topic_T: NDArray, topics: Any) -> float:
    within, between = means(pairs_TT, topic_T, topics)
    return within / between


def log_ratio(pairs_TT: NDArray[np.float64], topic_T: NDArray, topics: Any) -> float:
    within, between = means(pairs_TT, topic_T, topics)
    return math.log(within) / math.log(between)


def rounded(found: Estimate) -> dict[str, float | None]:
    ends = {"value": found.value, "low": found.low, "high": found.high}
    return {name: end if end is None else round(end, 3) for name, end in ends.items()}


if __name__ == "__main__":
    main()
