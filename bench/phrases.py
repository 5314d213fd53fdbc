"""Does a style bring phrases to people's rates, and at what price? On a known chain and a model.

    DFTSERVE_STYLES=FOLDER dftserve serve MODEL --max-model-len 1024   # the folder of profiles
    DFTSERVE_DATA=path/to/data python bench/phrases.py --profile FOLDER/NAME --model MODEL \\
        [--server URL] [--folder build/phrases] [--prompts 48]

The chain writes "a b c" ten times as often as people; its rates are exact, computed with the plain
torch stage that the kernels are tested against. The model answers story prompts that the profile
was not built from, with each sampling method and the same seeds:
    stock        at the temperature at which the profile was built
    phrases      the profile's phrases alone (`max_kl` 0)
    style        its phrases and its tilt
    bad_words    the most over-used phrases banned: as many as reduce their rate in the texts that
                 built the profile to people's, or as many as vLLM accepts in one request
    logit_bias   -λ on the word of each phrase that is rarest in people's stories
    dry          DRY at its usual multiplier, which uses only the text itself
For each, as a ratio to stock, with a bootstrap over prompts (95 %; one interval in twenty misses):
    phrases      target phrases per 1,000 words
    orphans      beginnings of phrases, of at least two words, with another continuation
    firsts       first words of phrases with another continuation
and, measured as in bench/real.py, the differences in errors, SDS and style distance.

With --server, missing answers are requested, one block of prompts at a time and for all methods at
once. The same command resumes where it was stopped; only complete blocks are measured. The last
line is one JSON document.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from model_option import model_option
from numpy.typing import NDArray
from real import RESULTS, Checks, rounded, texts_of
from real_answers import Answer, data_folder, pack

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.generate import grid
from dftserve.evaluate.generate.grid import RequestGrid
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.metrics.intervals import Estimate, difference, over_units
from dftserve.evaluate.text.tokenize import normalise, words
from dftserve.openai_client import Server
from dftserve.sampling import (
    Controls,
    Slots,
    Step,
    StyleControls,
    StyleTables,
    Texts,
    control_row,
)
from dftserve.sampling.style import PlainStyleStage
from dftserve.serve import base_url
from dftserve.spec import Diversity
from dftserve.styles import profile as profiles
from dftserve.styles.profile import Phrase, Stored
from dftserve.styles.spellings import Finder
from dftserve.targets.document import load_tokenizer
from tests.chain import Chain

from provenance import machine, versions

BUILT_ON = 32
"""The first prompts of the file, whose answers built the profile; later ones are for the test."""
BLOCK = 8
SAMPLES = 2
MAX_TOKENS = 200
STOCK = "stock"
MOST_BAD_WORDS = 128
"""Maximum tokenisations of `bad_words` in one request; vLLM answers 400 to more."""
UNFITTED = ("errors", "unknown", "phrases", "self_bleu", "style", "sds")


@click.command()
@click.option("--profile", required=True, type=click.Path(exists=True, path_type=Path))
@model_option
@click.option("--server", help="URL of a server to request missing answers from.")
@click.option("--folder", default=Path("build/phrases"), type=click.Path(path_type=Path))
@click.option("--prompts", "count", default=48, type=click.IntRange(min=BLOCK))
@click.option(
    "--fit", type=click.Path(exists=True, path_type=Path), help="A fit's fit.json, to include."
)
@click.option("--output", default=RESULTS / "phrases.json", type=click.Path(path_type=Path))
def main(
    profile: Path,
    model: Path,
    server: str | None,
    folder: Path,
    count: int,
    fit: Path | None,
    output: Path,
) -> None:
    stored = profiles.load(profile)
    asked = test_prompts(data_folder(), count)
    ways = ways_of(stored, load_tokenizer(str(model)))
    if server is not None:
        ask(server, ways, asked, folder, stored)
    answers = whole_blocks(folder, ways)
    if missing := [name for name in ways if not answers[name] and (folder / STOCK).exists()]:
        sys.exit(f"{folder}: no complete block of {', '.join(missing)}; request it with --server.")
    document = {
        "what": "over-used phrases, beside their rate in human text, on a chain and on a model",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "chain": on_the_chain(),
        "model": measured(stored, answers, asked) if answers[STOCK] else None,
        "fit": None if fit is None else json.loads(fit.read_text()),
    }
    if answers[STOCK]:
        pack(texts_of(output), (asdict(one) for each in answers.values() for one in each))
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


# ── The known chain ──────────────────────────────────────────────────────────────────────────────


def on_the_chain() -> list[dict[str, Any]]:
    """Exact rates per 1,000 tokens and nats per token of each method."""
    chain = Chain()
    a, b, c = chain.A, chain.B, chain.C
    ways: dict[str, Callable[[], NDArray]] = {
        "as is": lambda: chain.p_UUV,
        "style, strength 1": lambda: restyled(chain, 1.0),
        "style, strength .5": lambda: restyled(chain, 0.5),
        "the last token banned": lambda: scaled(chain.p_UUV, (a, b, c), 0.0),
        "the last token x .1": lambda: scaled(chain.p_UUV, (a, b, c), 0.1),
        "the first token x .1": lambda: scaled(chain.p_UUV, (slice(None), slice(None), a), 0.1),
    }
    rows = []
    for name, way in ways.items():
        q_UUV = way()
        phrase, orphan, innocent = chain.rates(q_UUV)
        rows.append(
            {
                "way": name,
                "phrase": round(phrase, 3),
                "people": chain.HUMAN,
                "orphan": round(orphan, 3),
                "innocent": round(innocent, 3),
                "kl": round(divergence(chain, q_UUV), 5),
            }
        )
    return rows


def restyled(chain: Chain, strength: float) -> NDArray[np.float64]:
    """The chain after the style stage: each pair of tokens is one row."""
    profile = chain.profile(chain.rates(chain.p_UUV)[0])
    texts = np.array([[u1, u2] for u1 in range(chain.V) for u2 in range(chain.V)], np.int32)
    rows = len(texts)
    style = StyleControls(profile=0, strength=strength, max_kl=100.0)
    row = control_row(
        Diversity(level=0.0, min_p=1e-9),
        temperature=1.0,
        logits_divisor=1.0,
        stop_ids=frozenset(),
        style=style,
    )
    at_R = torch.ones(rows, dtype=torch.int64)
    step = Step(
        Controls.stack([row] * rows),
        torch.arange(rows),
        at_R,
        torch.zeros(rows, dtype=torch.int32),
        texts=Texts(
            torch.from_numpy(texts),
            torch.zeros(rows, dtype=torch.int32),
            at_R,
            torch.from_numpy(texts[:, 1].copy()),
        ),
    )
    logits_RV = torch.tensor(np.log(chain.p_UUV)).reshape(-1, chain.V).float()
    PlainStyleStage(StyleTables.of([profile]))(logits_RV, step, Slots(rows, 1, "cpu"))
    return logits_RV.double().softmax(dim=1).reshape(chain.p_UUV.shape).numpy()


def scaled(p_UUV: NDArray, where: Any, by: float) -> NDArray[np.float64]:
    q_UUV = p_UUV.copy()
    q_UUV[where] *= by
    return q_UUV / q_UUV.sum(axis=2, keepdims=True)


def divergence(chain: Chain, q_UUV: NDArray) -> float:
    """KL(q‖p), in nats per token of q's own text."""
    ratio_UUV = np.log(np.where(q_UUV > 0, q_UUV / chain.p_UUV, 1.0))
    return float(np.einsum("ij,ijk->", chain.stationary(q_UUV), q_UUV * ratio_UUV))


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def test_prompts(data: Path, count: int) -> tuple[Prompt, ...]:
    stories = json.loads((data / "slop" / "slopscore_prompts.json").read_text())[:150]
    count -= count % BLOCK
    return tuple(Prompt(text) for text in stories[BUILT_ON : BUILT_ON + count])


def ways_of(stored: Stored, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """What each method adds to a request."""
    name, phrases = stored.profile.name, stored.profile.phrases
    return {
        STOCK: {},
        "phrases": {"style": {"name": name, "strength": 1, "max_kl": 0}},
        "style": {"style": {"name": name, "strength": 1}},
        "bad_words": {"bad_words": banned(phrases)},
        "logit_bias": {"logit_bias": biases(phrases, tokenizer)},
        # DRY needs a law; this guard cuts nothing.
        "dry": {"diversity": {"law": "guard", "min_p": 1e-9, "dry_multiplier": 0.8}},
    }


def banned(phrases: Sequence[Phrase]) -> list[str]:
    """The most frequent phrases, until the rest is as frequent as in people's texts; at most as
    many as vLLM accepts, which makes up to two tokenisations of each."""
    left = sum(phrase.model_rate for phrase in phrases)
    wanted = sum(phrase.human_rate for phrase in phrases)
    chosen = []
    for phrase in sorted(phrases, key=lambda p: -p.model_rate)[: MOST_BAD_WORDS // 2]:
        if left <= wanted:
            break
        left -= phrase.model_rate
        chosen.append(phrase.text)
    return chosen


def biases(phrases: Sequence[Phrase], tokenizer: Any) -> dict[str, float]:
    """By token id: -λ on the rarest word of each phrase, with and without a space before it."""
    counts = Counter(w for s in tasks.load("story").human for w in words(normalise(s.text)))
    found: dict[str, float] = {}
    for phrase in phrases:
        rarest = min(phrase.text.split(), key=lambda word: counts[word.lower()])
        for text in (rarest, f" {rarest}"):
            token = str(tokenizer.encode(text, add_special_tokens=False)[0])
            found[token] = min(found.get(token, 0.0), -phrase.log_ratio)
    return found


def ask(
    server: str,
    ways: Mapping[str, Mapping[str, Any]],
    asked: Sequence[Prompt],
    folder: Path,
    stored: Stored,
) -> None:
    client = Server(base_url(server))
    model = client.models()[0]

    def answered(block: int, name: str) -> None:
        wanted = RequestGrid(
            model=model,
            prompts=tuple(asked[block * BLOCK : (block + 1) * BLOCK]),
            grid=(ways[name].get("diversity", 0),),
            samples=SAMPLES,
            max_tokens=MAX_TOKENS,
            temperature=stored.settings["temperature"],
            seed=1000 + block,
            body={key: value for key, value in ways[name].items() if key != "diversity"},
        )
        at = folder / name / f"block-{block}"
        grid.generate(wanted, at, server=client, concurrency=32, tick=lambda done, total: None)
        print(f"block {block}, {name}: {grid.count_answers(at)} answers", flush=True)

    # All methods of a block at once: this keeps the server busy, and other load on the machine
    # affects all of them.
    with ThreadPoolExecutor(len(ways)) as pool:
        for block in range(len(asked) // BLOCK):
            list(pool.map(partial(answered, block), ways))


@dataclass(frozen=True)
class Given:
    """An answer of the test; `prompt` is an index of the test prompts."""

    way: str
    prompt: int
    number: int
    text: str
    tokens: int
    kl: float | None


def whole_blocks(folder: Path, ways: Mapping[str, Any]) -> dict[str, list[Given]]:
    """The answers of the blocks that are complete for every method."""
    given: dict[str, list[Given]] = {name: [] for name in ways}
    block = 0
    while True:
        found = {name: folder / name / f"block-{block}" for name in ways}
        if any(grid.count_answers(at) < BLOCK * SAMPLES for at in found.values()):
            return given
        for name, at in found.items():
            given[name] += [
                Given(
                    name,
                    block * BLOCK + answer.place,
                    answer.sample,
                    answer.final_text,
                    answer.tokens,
                    (answer.figures or {}).get("mean_kl"),
                )
                for answer in grid.read(at / grid.ANSWERS, grid.Answer)
            ]
        block += 1


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────


def measured(
    stored: Stored, answers: Mapping[str, Sequence[Given]], asked: Sequence[Prompt]
) -> dict[str, Any]:
    phrases = stored.profile.phrases
    count = 1 + max(answer.prompt for answer in answers[STOCK])
    counter = PhraseCounter([phrase.text for phrase in phrases])
    counts = {name: counter.by_prompt(given, count) for name, given in answers.items()}
    checks = Checks(reference.build(tasks.load("story").human))
    texts = [prompt.text for prompt in asked]
    quality = {
        name: checks.of_answers(
            [Answer("", name, a.prompt, a.number, a.text, a.tokens) for a in given], texts
        )
        for name, given in answers.items()
    }
    human = sum(phrase.human_rate for phrase in phrases)
    return {
        "prompts": count,
        "answers_to_each": SAMPLES,
        "max_tokens": MAX_TOKENS,
        "temperature": stored.settings["temperature"],
        "words": {name: int(rows_P4[:, 0].sum()) for name, rows_P4 in counts.items()},
        "target_phrases": len(phrases),
        "rates_when_built": {
            "model": round(sum(phrase.model_rate for phrase in phrases), 3),
            "people": round(human, 3),
            "aimed_at": round(sum(p.model_rate * math.exp(-p.log_ratio) for p in phrases), 3),
        },
        "rows": {
            name: {
                **rounded(rates(rows_P4)),
                **rounded({key: quality[name][key] for key in UNFITTED if key != "phrases"}),
                "mean_kl": mean_kl(answers[name]),
            }
            for name, rows_P4 in counts.items()
        },
        "to_people": {name: rounded(to_people(c, human)) for name, c in counts.items()},
        "to_stock": {
            name: {
                **rounded(ratios(counts[STOCK], counts[name])),
                **rounded(
                    {
                        key: difference(quality[STOCK][key], quality[name][key])
                        for key in UNFITTED
                        if key != "phrases"
                    }
                ),
            }
            for name in answers
            if name != STOCK
        },
        "false_alarms": "each interval misses one time in twenty; they are not corrected for how "
        "many there are",
    }


class PhraseCounter:
    """Counts words, phrases, orphans and first words by prompt."""

    COLUMNS = ("target", "orphans", "firsts")

    def __init__(self, phrases: Sequence[str]) -> None:
        self._finder = Finder(phrases)
        split = [tuple(words(normalise(phrase))) for phrase in phrases]
        self._whole = set(split)
        self._begun = {phrase[:-1] for phrase in split if len(phrase) > 2}
        self._firsts = {phrase[:1] for phrase in split}
        self._longest = max(map(len, split))

    def by_prompt(self, answers: Sequence[Given], count: int) -> NDArray[np.float64]:
        """[P, 4]: words, and the columns."""
        rows_P4 = np.zeros((count, 4))
        for answer in answers:
            rows_P4[answer.prompt] += self.in_text(answer.text)
        return rows_P4

    def in_text(self, text: str) -> NDArray[np.float64]:
        text_words = words(normalise(text))
        orphans = firsts = 0
        for at in range(len(text_words)):
            ahead = [tuple(text_words[at : at + n]) for n in range(1, self._longest + 1)]
            if any(run in self._whole for run in ahead):
                continue
            orphans += any(run in self._begun for run in ahead)
            firsts += ahead[0] in self._firsts
        targets = sum(1 for _ in self._finder.found(text))
        return np.array([len(text_words), targets, orphans, firsts], float)


def rates(rows_P4: NDArray) -> dict[str, Estimate]:
    """Per 1,000 words."""

    def rate(column: int) -> Estimate:
        return over_units(rows_P4, lambda w_P, n: 1000 * (w_P @ n[:, column]) / (w_P @ n[:, 0]))

    return {name: rate(1 + n) for n, name in enumerate(PhraseCounter.COLUMNS)}


def to_people(rows_P4: NDArray, human: float) -> dict[str, Estimate]:
    """The rate of target phrases over people's."""
    return {
        "target": over_units(rows_P4, lambda w, n: 1000 * (w @ n[:, 1]) / (w @ n[:, 0]) / human)
    }


def ratios(base_P4: NDArray, rows_P4: NDArray) -> dict[str, Estimate]:
    """Ratios of the rates to the base's, with the same resampled prompts for both."""
    both_P8 = np.hstack([base_P4, rows_P4])

    def ratio(column: int) -> Estimate:
        def over(w_P: NDArray, n_P8: NDArray) -> float:
            base, ours = w_P @ n_P8[:, column], w_P @ n_P8[:, 4 + column]
            scale = (w_P @ n_P8[:, 0]) / (w_P @ n_P8[:, 4])
            return float(ours / base * scale) if base else math.nan

        return over_units(both_P8, over)

    return {f"{name}_ratio": ratio(1 + n) for n, name in enumerate(PhraseCounter.COLUMNS)}


def mean_kl(answers: Sequence[Given]) -> float | None:
    """Nats per token, over all tokens."""
    known = [(a.kl, a.tokens) for a in answers if a.kl is not None and a.tokens]
    if not known:
        return None
    return round(sum(kl * n for kl, n in known) / sum(n for _, n in known), 5)


if __name__ == "__main__":
    main()
