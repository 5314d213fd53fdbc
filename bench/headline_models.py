"""Models for bench/headline.py: a collapsed start, and what each way of tuning makes of it.

    DFTSERVE_DATA=path/to/data python bench/headline_models.py --model FOLDER
        [--folder build/headline] [--only NAME ...] [--seed 0] [--texts N]

The start is `--model` after two epochs of plain fine-tuning on what one model wrote, gemma-3-27b-it
to the story and essay prompts that bench/headline.py does not ask: many models come to sound alike
so.
Each way then tunes the start for one epoch on stories by people, the same for all:

    sft             the person's tokens alone
    dft             and in equal parts what `--model`, as it was before the collapse, thinks may
                    stand there: `teacher`, λ = .5
    dft calibrated  the recipe `calibrated`, with that teacher
    dft n-grams     the recipe `creative` without a teacher, λ = .3
    gem             GEM (arXiv 2408.16673), β = .7
    sft features    sft, and the model's own continuations beside the text's: feature matching
    half way        the mean of the weights of sft and of the start (WiSE-FT, arXiv 2109.01903)
    half way back   the mean of the weights of sft and of `--model`, which dft has seen too

λ, β and the rate were not searched. People's stories are divided by how they begin, which is their
prompt: those trained on, those held out and those that bench/headline.py measures with. A text
ends where its file or WORDS cuts it, so its end is not learnt. A model that is there already is not
made again; those of fewer `--texts` are in a folder of their own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import target_stores
import torch
from real_answers import STORIES, data_folder, prompt_set
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dftserve import atomic
from dftserve.checkpoint import FINAL
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.text.windows import Sample
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import recipe as recipes
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.train.config import DivergenceConfig, FeatureMatchingConfig, TrainConfig
from dftserve.train.run import train

BASE, START, SFT = "base", "start", "sft"
WORDS = 250
"""Of an answer of the model that the start learns from."""
LONGEST = 384
SHARES = {"train": 0.5, "heldout": 0.62, "measure": 1.0}
"""Of the beginnings, up to where each part reaches."""
PLAIN = "source: {ngram: {order: 1}}"
TEACHER = 'source: {teacher: {model: "${teacher}", dtype: float32}}'


@dataclass(frozen=True)
class Way:
    """A recipe, by its name or written out, and what is made of its targets."""

    recipe: str
    divergence: DivergenceConfig
    matching: FeatureMatchingConfig | None = None


WAYS: Mapping[str, Way] = {
    SFT: Way(PLAIN, DivergenceConfig(name="sft")),
    "dft": Way(TEACHER, DivergenceConfig(target_weight=0.5)),
    "dft calibrated": Way("calibrated", DivergenceConfig(target_weight=1.0)),
    "dft n-grams": Way("creative", DivergenceConfig(target_weight=0.3)),
    "gem": Way(PLAIN, DivergenceConfig(name="gem", temperature=0.7)),
    "sft features": Way(PLAIN, DivergenceConfig(name="sft"), FeatureMatchingConfig()),
}
MEANS: Mapping[str, Sequence[str]] = {"half way": (START, SFT), "half way back": (BASE, SFT)}
MODELS = (START, *WAYS, *MEANS)
BEGINNING = 6
"""Words by which stories to one prompt are told: a prompt of the data may go on into the story."""


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────


@cache
def stories() -> dict[str, list[Sample]]:
    """People's stories by the part that their beginning falls in."""
    parts: dict[str, list[Sample]] = {name: [] for name in SHARES}
    for sample in tasks.load("story").human:
        place = sha256(beginning(sample.text).encode()).digest()[0] / 256
        parts[next(name for name, end in SHARES.items() if place < end)].append(sample)
    return parts


def beginning(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())[:BEGINNING])


def told(part: str) -> Iterator[tuple[str, str]]:
    """Prompts and the stories to them, without the prompt before them."""
    for sample in stories()[part]:
        count = len(sample.prompt.split())
        if count < len(sample.text.split()):
            yield sample.prompt, words_of(sample.text, count, None)


def alike(data: Path) -> Iterator[tuple[str, str]]:
    """Prompts that are not asked, and one model's answers to them."""
    asked = prompt_set(STORIES, data).prompts
    file = data / "human_ai" / "slopscore_gemma-3-27b-it.json"
    (found,) = json.loads(file.read_text()).values()
    for sample in sorted(found["samples"], key=lambda sample: sample["prompt_index"]):
        if sample["prompt"] not in asked:
            yield sample["prompt"], words_of(sample["output"], 0, WORDS)


def words_of(text: str, first: int, last: int | None) -> str:
    """With the lines that they stand on."""
    words = list(re.finditer(r"\S+", text))[first:last]
    return text[words[0].start() : words[-1].end()]


def documents(
    pairs: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    """As the chat template asks and answers; the answer alone is learnt, its end is not."""
    found = []
    for prompt, answer in pairs:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before = tokenizer(str(asked), add_special_tokens=False)["input_ids"]
        tokens = [*before, *tokenizer(answer, add_special_tokens=False)["input_ids"]][:LONGEST]
        learnt_N = np.arange(len(tokens)) >= len(before)
        found.append(Document(np.array(tokens, np.int32), learnt_N, group=prompt))
    return found


# ── Models ───────────────────────────────────────────────────────────────────────────────────────


def targets(
    folder: Path, recipe: str, sides: Mapping[str, Sequence[Document]], teacher: Path
) -> Path:
    """The store of a recipe; one that is there stays."""
    if (folder / store.MANIFEST).exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    name = recipe
    if ":" in recipe:
        folder.parent.mkdir(parents=True, exist_ok=True)
        name = str(folder.parent / f"{folder.name}.yaml")
        Path(name).write_text(recipe + "\n")
    named = {"teacher": str(teacher)} if "${teacher}" in recipe or name == "calibrated" else {}
    chosen = recipes.load(name, named)
    source = recipes.source_of(
        chosen,
        tokenizer=tokenizer,
        documents=sides,
        vocabulary=len(tokenizer),
        known=None,
        say=click.echo,
    )
    target_stores.write(folder, source, sides, tokenizer=tokenizer_fingerprint(tokenizer))
    return folder


def tune(model: Path, output: Path, held: Path, way: Way, *, epochs: int, seed: int) -> Path:
    """All weights, none by LoRA."""
    return train(
        TrainConfig(
            model=str(model),
            targets=str(held),
            output=str(output),
            divergence=way.divergence,
            feature_matching=way.matching,
            epochs=epochs,
            max_length=LONGEST,
            batch_size=4,
            learning_rate=3e-5,
            save_every=100,
            keep=1,
            evaluate_every=10_000,
            log_every=20,
            seed=seed,
        )
    )


def mean_of(folders: Sequence[Path], output: Path) -> Path:
    """A model whose weights are the mean of theirs."""
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in folders
    ]
    states = [each.state_dict() for each in models]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    models[0].load_state_dict(mean)
    with atomic.folder(output) as made:
        models[0].save_pretrained(made)
        AutoTokenizer.from_pretrained(folders[0]).save_pretrained(made)
    return output


def label(name: str, seed: int) -> str:
    """Of a folder; those before any tuning on people's stories know no seed."""
    return name if name in (BASE, START) else f"{name} {seed}".replace(" ", "-")


def place_of(folder: Path, name: str, seed: int) -> Path:
    """Where a model is or will be."""
    run = folder / label(name, seed)
    return run if name in MEANS else run / FINAL


def make(name: str, base: Path, folder: Path, seed: int, texts: int | None = None) -> Path:
    """A model, and before it those that it is made of.

    Args:
        texts: of each part, the first so many; None: all.
    """
    if name == BASE:
        return base
    place = place_of(folder, name, seed)
    if place.exists():
        return place
    if name in MEANS:
        return mean_of([make(each, base, folder, seed, texts) for each in MEANS[name]], place)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if name == START:
        sides = {"train": documents(islice(alike(data_folder()), texts), tokenizer)}
        held = targets(folder / "targets-start", PLAIN, sides, base)
        return tune(base, place.parent, held, WAYS[SFT], epochs=2, seed=0)
    start, way = make(START, base, folder, seed, texts), WAYS[name]
    parts = ("train", "heldout")
    sides = {part: documents(islice(told(part), texts), tokenizer) for part in parts}
    held = targets(folder / f"targets-{name.replace(' ', '-')}", way.recipe, sides, base)
    return tune(start, place.parent, held, way, epochs=1, seed=seed)


@click.command(help=__doc__)
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--folder", default=Path("build/headline"), type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(MODELS))
@click.option("--seed", default=0, show_default=True)
@click.option("--texts", type=click.IntRange(1), help="Of each part; all where none is given.")
def main(model: Path, folder: Path, only: tuple[str, ...], seed: int, texts: int | None) -> None:
    folder = folder if texts is None else folder / f"texts-{texts}"
    for name in only or MODELS:
        click.echo(f"{name}: {make(name, model, folder, seed, texts)}")


if __name__ == "__main__":
    main()
