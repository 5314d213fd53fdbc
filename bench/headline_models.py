"""Models for bench/headline.py: a start with collapsed variety, and the results of tuning it.

    DFTSERVE_DATA=path/to/data python bench/headline_models.py --model FOLDER
        [--folder build/headline] [--only NAME ...] [--seed 0] [--texts N]

The start is `--model` after two epochs of plain fine-tuning on the answers of one model,
gemma-3-27b-it, to the story and essay prompts that bench/headline.py does not use. Many models lose
their variety in this way.
Each method then tunes the start for one epoch on the same human stories:

    sft             the human tokens alone
    dft             the human tokens and, with equal weight, the next-token distribution of
                    `--model` before the collapse: `teacher`, λ = .5
    dft calibrated  the recipe `calibrated`, with that teacher
    dft students    the same, also with students: `--model` tuned on two thirds of the stories each,
                    which predict the other third (train/cross_fit.py)
    dft n-grams     the recipe `creative` without a teacher, λ = .3
    gem             GEM (arXiv 2408.16673), β = .7
    sft features    sft, with feature matching between the model's continuations and the text's
    half way        the mean of the weights of sft and of the start (WiSE-FT, arXiv 2109.01903)
    half way back   the mean of the weights of sft and of `--model`, which dft uses as well

Two start from `--model` itself instead:

    sft from base       as sft
    half way from base  the mean of the weights of sft from base and of `--model`

λ, β and the learning rate were not searched. The human stories are split by their beginning, as
stories with the same beginning share a prompt: into training, held-out and measuring stories (for
bench/headline.py). Texts are cut off by their file or by WORDS, so the loss excludes the
end-of-text token. An existing model is reused; models with fewer `--texts` have a folder of their
own.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

import click
import numpy as np
import target_stores
from model_option import model_option
from real_answers import STORIES, data_folder, prompt_set
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dftserve.checkpoint import FINAL
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.text.windows import Sample
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import recipe as recipes
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.run import EncodedCorpus
from dftserve.train.config import DivergenceConfig, FeatureMatchingConfig, TrainConfig
from dftserve.train.cross_fit import train_folds
from dftserve.train.interpolate import interpolate
from dftserve.train.run import train

BASE, START, SFT, HALF_WAY_BACK = "base", "start", "sft", "half way back"
SFT_FROM_BASE, HALF_WAY_FROM_BASE = "sft from base", "half way from base"
WORDS = 250
"""Words that are kept of each answer that the start is tuned on."""
LONGEST = 384
SHARES = {"train": 0.5, "heldout": 0.62, "measure": 1.0}
"""Cumulative shares of the beginnings: the upper end of each part."""
PLAIN = "source: {ngram: {order: 1}}"
TEACHER = 'source: {teacher: {model: "${teacher}", dtype: float32}}'


@dataclass(frozen=True)
class Way:
    """A tuning method: a recipe, by its name or as YAML, and how to train on its targets."""

    recipe: str
    divergence: DivergenceConfig
    matching: FeatureMatchingConfig | None = None
    folds: int | None = None
    """Number of students that the recipe loads, if any."""
    start: str = START


WAYS: Mapping[str, Way] = {
    SFT: Way(PLAIN, DivergenceConfig(name="sft")),
    "dft": Way(TEACHER, DivergenceConfig(target_weight=0.5)),
    "dft calibrated": Way("calibrated", DivergenceConfig(target_weight=1.0)),
    "dft students": Way("calibrated", DivergenceConfig(target_weight=1.0), folds=3),
    "dft n-grams": Way("creative", DivergenceConfig(target_weight=0.3)),
    "gem": Way(PLAIN, DivergenceConfig(name="gem", temperature=0.7)),
    "sft features": Way(PLAIN, DivergenceConfig(name="sft"), FeatureMatchingConfig()),
    SFT_FROM_BASE: Way(PLAIN, DivergenceConfig(name="sft"), start=BASE),
}
MEANS: Mapping[str, Sequence[str]] = {
    "half way": (SFT, START),
    HALF_WAY_BACK: (SFT, BASE),
    HALF_WAY_FROM_BASE: (SFT_FROM_BASE, BASE),
}
MODELS = (START, *WAYS, *MEANS)
BEGINNING = 6
"""Words by which stories of one prompt are recognised; a prompt in the data may include the start
of the story."""


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────


@cache
def stories() -> dict[str, list[Sample]]:
    """The human stories of each part."""
    parts: dict[str, list[Sample]] = {name: [] for name in SHARES}
    for sample in tasks.load("story").human:
        position = sha256(beginning(sample.text).encode()).digest()[0] / 256
        parts[next(name for name, end in SHARES.items() if position < end)].append(sample)
    return parts


def beginning(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())[:BEGINNING])


def human_stories(part: str) -> Iterator[tuple[str, str]]:
    """Prompts and their stories, which in the data begin with the prompt, without it."""
    for sample in stories()[part]:
        count = len(sample.prompt.split())
        if count < len(sample.text.split()):
            yield sample.prompt, words_of(sample.text, count, None)


def model_answers(data: Path) -> Iterator[tuple[str, str]]:
    """Prompts that bench/headline.py does not use, and one model's answers to them."""
    asked = prompt_set(STORIES, data).prompts
    file = data / "human_ai" / "slopscore_gemma-3-27b-it.json"
    (found,) = json.loads(file.read_text()).values()
    for sample in sorted(found["samples"], key=lambda sample: sample["prompt_index"]):
        if sample["prompt"] not in asked:
            yield sample["prompt"], words_of(sample["output"], 0, WORDS)


def words_of(text: str, first: int, last: int | None) -> str:
    """The words from `first` to `last`, with the line breaks between them."""
    words = list(re.finditer(r"\S+", text))[first:last]
    return text[words[0].start() : words[-1].end()]


def documents(
    pairs: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    """The pairs in the chat template; only the answer is trained on, without an end token."""
    found = []
    for prompt, answer in pairs:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before = tokenizer(str(asked), add_special_tokens=False)["input_ids"]
        tokens = [*before, *tokenizer(answer, add_special_tokens=False)["input_ids"]][:LONGEST]
        trained_N = np.arange(len(tokens)) >= len(before)
        found.append(Document(np.array(tokens, np.int32), trained_N, group=prompt))
    return found


# ── Models ───────────────────────────────────────────────────────────────────────────────────────


def targets(folder: Path, way: Way, sides: Mapping[str, Sequence[Document]], teacher: Path) -> Path:
    """The store of a method's recipe; an existing one is reused."""
    if (folder / store.MANIFEST).exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    name = way.recipe
    if ":" in way.recipe:
        folder.parent.mkdir(parents=True, exist_ok=True)
        name = str(folder.parent / f"{folder.name}.yaml")
        Path(name).write_text(way.recipe + "\n")
    named = {"teacher": str(teacher)} if "${teacher}" in way.recipe or name == "calibrated" else {}
    if way.folds is not None:
        students = folder.with_name(f"{folder.name}-students")
        material = EncodedCorpus(tokenizer, sides, template=None, written_at=None, corpus={})
        config = settings(teacher, DivergenceConfig(name="sft"), epochs=1, seed=0)
        train_folds(students, material, config, folds=way.folds, say=click.echo)
        named["students"] = str(students)
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


def tune(
    model: Path, output: Path, target_folder: Path, way: Way, *, epochs: int, seed: int
) -> Path:
    """Tune all weights, without LoRA."""
    config = settings(model, way.divergence, epochs=epochs, seed=seed)
    return train(
        replace(
            config,
            targets=str(target_folder),
            output=str(output),
            feature_matching=way.matching,
        )
    )


def settings(model: Path, divergence: DivergenceConfig, *, epochs: int, seed: int) -> TrainConfig:
    """How each model is trained; targets and output are set by what trains it."""
    return TrainConfig(
        model=str(model),
        targets="",
        output="",
        divergence=divergence,
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


def start_of(name: str) -> str:
    """The model that a model was tuned from; of others, the collapsed start."""
    tuned = MEANS[name][0] if name in MEANS else name
    return WAYS[tuned].start if tuned in WAYS else START


def label(name: str, seed: int) -> str:
    """The name of a model's folder. Models not tuned on human stories do not depend on the seed."""
    return name if name in (BASE, START) else f"{name} {seed}".replace(" ", "-")


def place_of(folder: Path, name: str, seed: int) -> Path:
    """The folder of a model, which may not exist yet."""
    run = folder / label(name, seed)
    return run if name in MEANS else run / FINAL


def make(name: str, base: Path, folder: Path, seed: int, texts: int | None = None) -> Path:
    """Make a model, and first those that it is made from; existing ones are reused.

    Args:
        texts: use only the first `texts` texts of each part; None: all.
    """
    if name == BASE:
        return base
    place = place_of(folder, name, seed)
    if place.exists():
        return place
    if name in MEANS:
        tuned, other = (str(make(each, base, folder, seed, texts)) for each in MEANS[name])
        interpolate(tuned, other, share=0.5, out=place)
        return place
    tokenizer = AutoTokenizer.from_pretrained(base)
    if name == START:
        sides = {"train": documents(islice(model_answers(data_folder()), texts), tokenizer)}
        start_targets = targets(folder / "targets-start", WAYS[SFT], sides, base)
        return tune(base, place.parent, start_targets, WAYS[SFT], epochs=2, seed=0)
    way = WAYS[name]
    start = make(way.start, base, folder, seed, texts)
    parts = ("train", "heldout")
    sides = {part: documents(islice(human_stories(part), texts), tokenizer) for part in parts}
    target_folder = folder / f"targets-{name.replace(' ', '-')}"
    way_targets = targets(target_folder, way, sides, base)
    return tune(start, place.parent, way_targets, way, epochs=1, seed=seed)


@click.command(help=__doc__)
@model_option
@click.option("--folder", default=Path("build/headline"), type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(MODELS))
@click.option("--seed", default=0, show_default=True)
@click.option("--texts", type=click.IntRange(1), help="Texts of each part. Default: all.")
def main(model: Path, folder: Path, only: tuple[str, ...], seed: int, texts: int | None) -> None:
    folder = folder if texts is None else folder / f"texts-{texts}"
    for name in only or MODELS:
        click.echo(f"{name}: {make(name, model, folder, seed, texts)}")


if __name__ == "__main__":
    main()
