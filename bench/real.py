"""A real model's stories under the usual settings and under the field: variety and errors.

    DFTSERVE_DATA=path/to/data python bench/real.py [--model FOLDER] [--repeats 3] [--prompts 150]
        [--settings NAME ...] [--answers build/real] [--output bench/results/real.json]

One engine of stock vLLM with the plug-in answers the story prompts of data/slop, each setting once
a repeat, in an order that turns. The answers are kept, so that a run goes on where it was stopped
and new settings join old ones. Then, for each setting, beside people's own stories:
    errors      marks of a grammar checker per 100 words, without names; unknown: words in lower
                case that no dictionary has
    self-BLEU, distinct-3, AI phrases, style distance, Style Diversity Score
                as `dftserve evaluate` has them, of windows of 120 words
    speed       output tokens per second over those of stock at temperature 1 in the same repeat
A value is the mean over the repeats; the ends of its interval are the means of the repeats' ends,
which are 95 % intervals over prompts. The last line is one JSON document.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import click

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.generate.answers import AnswerStore, read
from dftserve.evaluate.metrics import errors, slop
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.sds import score
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.metrics.suite import Instruments, measure
from dftserve.evaluate.reference import Anchors
from dftserve.evaluate.text.windows import Sample, Windows

from provenance import machine, versions

BENCH = Path(__file__).parent
STOCK = "stock, temperature 1"
SETTINGS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "stock, temperature .7": {"temperature": 0.7},
    "temperature .2, top-p .9 (the model's card)": {"temperature": 0.2, "top_p": 0.9},
    "top-p .95": {"top_p": 0.95},
    "min-p .1, temperature 1.5": {"min_p": 0.1, "temperature": 1.5},
    "min-p .05, temperature 1.5": {"min_p": 0.05, "temperature": 1.5},
    "min-p .02, temperature 1.3": {"min_p": 0.02, "temperature": 1.3},
    "`diversity` .5": {"diversity": 0.5},
    "`diversity` 1": {"diversity": 1},
    "`words` .5": {"diversity": {"law": "words", "level": 0.5}},
    "`words` 1": {"diversity": {"law": "words", "level": 1}},
}
"""Sampling parameters of vLLM by name, and `diversity`."""
MEASURED = ("self_bleu", "distinct_3", "slop", "mmd_style")
PEOPLE = "people"
TOKENS = 200
SLOTS = 64


@dataclass(frozen=True)
class Answer:
    setting: str
    repeat: int
    prompt: int
    text: str
    tokens: int


@dataclass(frozen=True)
class Round:
    """All answers of a setting, asked for at once."""

    setting: str
    repeat: int
    tokens: int
    seconds: float


@click.command()
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--repeats", default=3, type=click.IntRange(1))
@click.option("--prompts", default=150, type=click.IntRange(32, 150))
@click.option("--settings", multiple=True, help="Some of them; none: all.")
@click.option("--answers", default=Path("build/real"), type=click.Path(path_type=Path))
@click.option("--output", default=BENCH / "results" / "real.json", type=click.Path(path_type=Path))
def main(
    model: Path, repeats: int, prompts: int, settings: tuple[str, ...], answers: Path, output: Path
) -> None:
    data = os.environ.get(tasks.DATA)
    if not data:
        raise click.UsageError(f"{tasks.DATA} is not set; give the folder of the texts.")
    if unknown := set(settings) - set(SETTINGS):
        raise click.UsageError(f"--settings: got {unknown}; accepted: {', '.join(SETTINGS)}.")
    start = time.perf_counter()
    asked = story_prompts(Path(data))[:prompts]
    chosen = {name: SETTINGS[name] for name in settings or SETTINGS}
    with (
        AnswerStore(answers / "answers.jsonl", Answer) as kept,
        AnswerStore(answers / "rounds.jsonl", Round) as rounds,
    ):
        generate(model, asked, chosen, repeats, kept, rounds)
    found = read(answers / "answers.jsonl", Answer)
    people = reference.build(tasks.load("story").human)
    document: dict[str, Any] = {
        "what": "stories of a real model by sampling settings; 95 % intervals",
        "model": model.name,
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "prompts": prompts,
        "repeats": repeats,
        "max_tokens": TOKENS,
        "settings": chosen,
        "rows": rows(found, chosen, asked, repeats, people),
        "speed": speed(read(answers / "rounds.jsonl", Round), chosen),
        "bench_seconds": round(time.perf_counter() - start, 1),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def story_prompts(data: Path) -> list[str]:
    """Prompts for stories; those for essays come behind them in the file."""
    return json.loads((data / "slop" / "slopscore_prompts.json").read_text())[:150]


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def generate(
    model: Path,
    prompts: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    repeats: int,
    answers: AnswerStore[Answer],
    rounds: AnswerStore[Round],
) -> None:
    """Ask for what the stores lack."""
    known = {(row.setting, row.repeat, row.prompt) for row in answers.rows}
    names = list(settings)
    missing = [
        (name, repeat)
        for repeat in range(repeats)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]
        if any((name, repeat, place) not in known for place in range(len(prompts)))
    ]
    if not missing:
        return
    llm = engine(model, seed=len(known))
    for number, (name, repeat) in enumerate(missing):
        places = [i for i in range(len(prompts)) if (name, repeat, i) not in known]
        start = time.perf_counter()
        texts = ask(llm, [prompts[place] for place in places], settings[name])
        seconds = time.perf_counter() - start
        for place, (text, tokens) in zip(places, texts, strict=True):
            answers.append(Answer(name, repeat, place, text, tokens))
        tokens = sum(tokens for _, tokens in texts)
        if len(places) == len(prompts):
            rounds.append(Round(name, repeat, tokens, round(seconds, 2)))
        speed = tokens / seconds
        print(f"{number + 1}/{len(missing)} {name}, repeat {repeat}: {speed:.0f} tokens/s")


def engine(model: Path, seed: int) -> Any:
    from vllm import LLM

    return LLM(
        str(model),
        max_model_len=1024,
        max_num_seqs=SLOTS,
        kv_cache_memory_bytes=2 << 30,
        enforce_eager=True,
        generation_config="vllm",
        seed=seed,
    )


def ask(llm: Any, prompts: Sequence[str], setting: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Each prompt's answer and its number of tokens."""
    from vllm import SamplingParams

    sampling = {name: value for name, value in setting.items() if name != "diversity"}
    extra = {"diversity": setting["diversity"]} if "diversity" in setting else None
    parameters = SamplingParams(max_tokens=TOKENS, extra_args=extra, **sampling)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = [request.outputs[0] for request in llm.chat(chats, parameters, use_tqdm=False)]
    return [(output.text, len(output.token_ids)) for output in outputs]


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────


def rows(
    answers: Sequence[Answer],
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    repeats: int,
    people: Anchors,
) -> dict[str, dict[str, Any]]:
    instruments = Instruments(
        StyleSpace.fit(people.splits["reference"]), slop.read_phrases(slop.OURS), embed=None
    )
    checker = errors.linter()
    found = {
        PEOPLE: mean_of([measured(people.test, people.test.texts, people, instruments, checker)])
    }
    for name in settings:
        each = []
        for repeat in range(repeats):
            said = {a.prompt: a.text for a in answers if (a.setting, a.repeat) == (name, repeat)}
            texts = [said[place] for place in range(len(prompts))]
            windows = Windows.of(map(Sample, texts, prompts), people.words)
            each.append(measured(windows, texts, people, instruments, checker))
        found[name] = mean_of(each)
    return found


def measured(
    windows: Windows, texts: Sequence[str], people: Anchors, instruments: Instruments, checker: Any
) -> dict[str, Estimate]:
    """Of one repeat: windows are compared with as many of people's, whole answers are checked."""
    whole, others = windows.whole(), people.splits["calibration"]
    count = min(len(whole), len(others))
    checked = [errors.check(text, checker) for text in texts]
    suite = measure(whole.pick(range(count)), others.pick(range(count)), instruments)
    return {
        "errors": errors.error_rate(checked),
        "unknown": errors.unknown_rate(checked),
        **{name: suite[name] for name in MEASURED},
        "sds": score(windows, people.sds_reference).sds,
    }


def mean_of(repeats: Sequence[Mapping[str, Estimate]]) -> dict[str, Any]:
    return {
        name: {
            "value": round(fmean(each[name].value for each in repeats), 4),
            "low": round(fmean(bound(each[name].low) for each in repeats), 4),
            "high": round(fmean(bound(each[name].high) for each in repeats), 4),
            "repeats": [round(each[name].value, 4) for each in repeats],
        }
        for name in repeats[0]
    }


def bound(end: float | None) -> float:
    return float("nan") if end is None else end


def speed(rounds: Sequence[Round], settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Tokens per second over stock's, of each repeat that has both."""
    per_second = {(each.setting, each.repeat): each.tokens / each.seconds for each in rounds}
    return {
        name: [
            round(rate / per_second[STOCK, repeat], 3)
            for (setting, repeat), rate in per_second.items()
            if setting == name and (STOCK, repeat) in per_second
        ]
        for name in settings
    }


if __name__ == "__main__":
    main()
