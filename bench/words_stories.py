"""The law `words` on the stories' grammar, where the validity of a text is decidable.

    OMP_NUM_THREADS=1 python bench/words_stories.py

The grammar's model is sampled with stock, `gated`, min-p with a temperature and `words`, on the
prompts of bench/first_law.py that were not used to choose constants; gains are of diversity at
equal validity.

This can show whether `words` keeps texts of a known form valid, but not the benefit that the law is
designed for. The tokenizer was trained on these stories, so most of their words are one token (the
share is measured), and few tokens are inside a word, where the law would cool; and errors here are
wrong choices of words, where `words` heats, not wrong spellings.
"""

import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click
import torch
from first_law import (
    LEVELS,
    RESULT,
    TEMPERATURES,
    Interval,
    Measurements,
    Setting,
    Writer,
    by_transform,
    gated,
    lead_interval,
    min_p_last,
    stock,
    writers,
)
from transformers import PreTrainedTokenizer
from transformers.utils import logging

from dftserve.sampling import LawConstants
from dftserve.sampling.token_classes import OTHER, OUTSIDE_WORD, START, TokenClasses
from dftserve.stories import grammar

from provenance import machine, versions

MIN_P = 0.2
"""The best value on the development prompts of bench/first_law.py."""
LAW = "words"


@click.command()
@click.option("--sequences", default=1000, show_default=True, help="Per setting.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=RESULT.with_name("words_stories.json"),
    help="The JSON file.",
)
def main(sequences: int, out: Path) -> None:
    """Compare the law `words` with others on the stories' model."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    (writer,) = writers(["well-trained"])
    measured = Measurements([writer], {"confirm": sequences})
    results = {
        family: measured.all(writer, "confirm", settings)
        for family, settings in families(writer).items()
    }
    leads = {
        f"{LAW} over {other}": lead_interval(results[LAW], results[other])
        for other in results
        if other not in (LAW, "stock")
    }
    document = {
        "bench": "words_stories",
        "versions": versions("transformers", "numpy"),
        "machine": machine(),
        "sequences_per_setting": sequences,
        "tokens_by_class": shares(tokens_by_class(writer.tokenizer)),
        "settings": [
            {"family": family, "setting": setting.label}
            | {name: Interval.of(values_B) for name, values_B in values.items()}
            for family, settings in families(writer).items()
            for setting, values in zip(settings, results[family], strict=True)
        ],
        "lead_in_diversity_at_equal_validity": leads,
    }
    for name, gain in leads.items():
        print(f"{name:40}{gain or 'no validity in common'}")
    text = json.dumps(document, default=asdict, ensure_ascii=False, allow_nan=False)
    out.write_text(text + "\n", encoding="utf-8")
    print(text)


def families(writer: Writer) -> dict[str, list[Setting]]:
    """The families, with six settings each, stock with one."""
    classes = TokenClasses.from_tokenizer(writer.tokenizer)
    return {
        "stock": [stock()],
        "min-p, vLLM's order": [min_p_last(MIN_P, temperature) for temperature in TEMPERATURES],
        "gated": [gated(LawConstants(), level) for level in LEVELS],
        LAW: [words(classes, level) for level in LEVELS],
    }


def words(classes: TokenClasses, level: float) -> Setting:
    diversity = {"law": LAW, "level": level}
    return Setting(LAW, f"words, level {level:g}", by_transform(diversity, token_classes=classes))


def tokens_by_class(tokenizer: PreTrainedTokenizer, stories: int = 300) -> Counter[str]:
    """How many tokens of stories start a word, continue one, or do neither."""
    classes, rng = TokenClasses.from_tokenizer(tokenizer), random.Random(0)
    after = [classes.classes_after(state) for state in range(3)]
    ends_in = classes.states()
    counts: Counter[str] = Counter()
    for _ in range(stories):
        state = OUTSIDE_WORD
        for token in tokenizer.encode(grammar.generate(rng).text, add_special_tokens=False):
            counts[{OTHER: "other", START: "start"}.get(int(after[state][token]), "inside")] += 1
            state = int(ends_in[token])
    return counts


def shares(counts: Counter[str]) -> dict[str, float]:
    return {name: round(count / counts.total(), 4) for name, count in counts.items()}


if __name__ == "__main__":
    main()
