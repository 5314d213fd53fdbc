"""Can a model be prompted to vary its own answers? The share of answers in the form asked for.

    DFTSERVE_DATA=path/to/data python bench/prompted.py --model MODEL [--dtype auto]

Each prompt of bench/variety.py is asked once within each of two prompts that ask for variety:
    verbalised   five responses with their probabilities, in tags (verbalised sampling,
                 arXiv 2510.01171); followed if two or more responses have a text and a number
    seed         a random string first, from which the model is to choose its answer (string seed of
                 thought, arXiv 2510.21150); followed if both stand in their tags
Only where most answers follow can variety be measured. The last line is one JSON document; the
answers are stored in results/texts/prompted.jsonl.xz.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from model_option import model_option
from real import RESULTS, texts_of
from real_answers import (
    COOL,
    SETTINGS,
    STOCK,
    PromptSet,
    ask,
    data_folder,
    engine,
    open_prompts,
    pack,
)
from words import share

from provenance import machine, versions

SEED = 0
TOKENS = 300
VERBALISED = """Generate 5 responses to the query below, each in a <response> tag of its own. Each \
<response> must include a <text> and a numeric <probability>. Sample the responses at random from \
the full distribution.

{}"""
SEEDED = """First write a random string of letters and digits in a <random_string> tag. Then use \
this string to choose one of the many possible answers to the query below, and write it in an \
<answer> tag.

{}"""
WITH: Mapping[str, str] = {"verbalised": VERBALISED, "seed": SEEDED}
_RESPONSE = re.compile(
    r"<response>\s*<text>(?P<text>.+?)</text>\s*<probability>\s*[\d.]+\s*%?\s*</probability>", re.S
)
_SEEDED = re.compile(
    r"<random_string>\s*\S.*?</random_string>.*<answer>\s*\S.*?(?:</answer>|\Z)", re.S
)


@click.command(help=__doc__)
@model_option
@click.option("--dtype", default="float32", show_default=True)
@click.option("--output", default=RESULTS / "prompted.json", type=click.Path(path_type=Path))
def main(model: Path, dtype: str, output: Path) -> None:
    prompts = open_prompts(data_folder())
    llm = engine(model, dtype, seed=SEED)
    answers = {
        (way, setting): ask(llm, asked_in(way, prompts), setting, SETTINGS[setting])
        for way in WITH
        for setting in (STOCK, COOL)
    }
    document: dict[str, Any] = {
        "what": "the share of answers that have the form which a prompt for variety asks for",
        "machine": machine(),
        "versions": versions("vllm", "transformers"),
        "seed": SEED,
        "model": Path(model).name,
        "prompts": len(prompts),
        "max_tokens": TOKENS,
        "followed": {
            f"{way}, {setting}": share([follows(way, answer.text) for answer in found])
            for (way, setting), found in answers.items()
        },
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    pack(texts_of(output), (asdict(answer) for found in answers.values() for answer in found))
    print(json.dumps(document))


def asked_in(way: str, prompts: Sequence[str]) -> PromptSet:
    return PromptSet(way, [WITH[way].format(prompt) for prompt in prompts], 1, TOKENS, ())


def follows(way: str, text: str) -> bool:
    """Whether an answer has the form that its prompt asks for."""
    if way == "verbalised":
        return len(_RESPONSE.findall(text)) >= 2
    return bool(_SEEDED.search(text))


if __name__ == "__main__":
    main()
