"""Answers of a real model for bench/real.py and bench/words.py, stored so that a run can resume.

    DFTSERVE_DATA=path/to/data python bench/real_answers.py --model FOLDER [--only SET ...]
        [--setting NAME ...] [--dtype float32] [--folder build/real]

One engine of stock vLLM with the plug-in answers prompt sets of DFTSERVE_DATA: stories (eight
answers to each of 32 prompts of data/slop), essays (two to each of 60 of the same file, four to
each of the other 90), IFEval and 300 questions of MMLU (one to each), every other prompt of
NoveltyBench, which have many right answers (eight to each), and our own tasks with forms and
languages (five to each). The engine is asked for one set with one setting at a time. Answers that
the folder already contains are reused, an incomplete set is completed, and new settings are added.
The dtype is the checkpoint's, bf16, by default; on a CPU without bf16 instructions float32 is many
times faster.
"""

import json
import lzma
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import click
from model_option import model_option

from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.generate.answers import AnswerStore, read

STOCK = "stock, T 1"
COOL = "stock, T .7"
SLIGHTLY_COOL = "stock, T .85"
GATED = "`gated` 1"
WORDS = "`words` 1"
WORDS_QUARTER = "`words` .25"
MIN_P = "min-p .02, T 1.3"
ONE_TEMPERATURE = "one T 1.5 on the guard .02"
WORD_LAWS = (
    "gate on starts",
    "function words apart",
    "budget on starts",
    "cooler as it goes",
    "adapt",
)
"""Other laws that heat where words are chosen, from word_laws.py."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    STOCK: {},
    WORDS: {"diversity": {"law": "words", "level": 1}},
    GATED: {"diversity": {"law": "gated", "level": 1}},
    MIN_P: {"min_p": 0.02, "temperature": 1.3},
    COOL: {"temperature": 0.7},
    SLIGHTLY_COOL: {"temperature": 0.85},
    "`words` .5": {"diversity": {"law": "words", "level": 0.5}},
    "`gated` .5": {"diversity": {"law": "gated", "level": 0.5}},
    "stock, T .2": {"temperature": 0.2},
    "min-p .05, T 1.5": {"min_p": 0.05, "temperature": 1.5},
    ONE_TEMPERATURE: {
        "temperature": 1.5,
        "diversity": {"law": "dynatemp", "dynatemp_range": 0, "min_p": 0.02},
    },
    "top-p .95": {"top_p": 0.95},
    "top-nσ 1, T 1.5": {"temperature": 1.5, "diversity": {"law": "top_n_sigma", "n_sigma": 1}},
    "T .2, top-p .9 (the model's card)": {"temperature": 0.2, "top_p": 0.9},
    "min-p .1, T 1.5": {"min_p": 0.1, "temperature": 1.5},
    "`words` .75": {"diversity": {"law": "words", "level": 0.75}},
    WORDS_QUARTER: {"diversity": {"law": "words", "level": 0.25}},
    "`gated` .75": {"diversity": {"law": "gated", "level": 0.75}},
    "`gated` .25": {"diversity": {"law": "gated", "level": 0.25}},
    "stock, T .5": {"temperature": 0.5},
    "stock, T 1.1": {"temperature": 1.1},
    "stock, T 1.2": {"temperature": 1.2},
    "stock, T 1.5": {"temperature": 1.5},
    **{name: {"word_law": name} for name in WORD_LAWS},
}
"""vLLM's sampling parameters, `diversity`, and the arguments of word_laws.py; asked for in this
order."""
EXTRA_ARGS = ("diversity", "word_law", "other_law")
SLOTS = 128


@dataclass(frozen=True)
class PromptSet:
    """Prompts and how they are answered."""

    name: str
    prompts: Sequence[str]
    answers: int
    """To each prompt."""
    tokens: int
    settings: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """One answer; `prompt` is an index of its set, `number` counts the answers to that prompt."""

    prompt_set: str
    setting: str
    prompt: int
    number: int
    text: str
    tokens: int


Place = tuple[str, str, int, int]
"""(prompt set, setting, prompt's index in the set, number of its answer)."""
STORIES, ESSAYS, OTHER_ESSAYS, IFEVAL, MMLU = "stories", "essays", "other essays", "ifeval", "mmlu"
OPEN, FORMS = "open", "forms"
"""The other essays were added after the essays had shown how many answers are needed to distinguish
the laws."""
COMPARED = (WORDS, GATED, MIN_P, STOCK)
"""The settings of most sets."""
HALF = ("`words` .5", "`gated` .5")
IN_FORMS = (WORDS, GATED, STOCK, COOL)
IN_TASKS = (*COMPARED, COOL, SLIGHTLY_COOL, WORDS_QUARTER)
"""Settings of the sets whose answers are right or wrong."""
MMLU_QUESTIONS = 300


def prompt_sets(data: Path) -> list[PromptSet]:
    """All sets of prompts, each with its number of answers, its length and its settings."""
    asked = json.loads((data / "slop" / "slopscore_prompts.json").read_text())
    stories, essays = asked[:150], asked[150:]
    lines = (data / "ifeval" / "prompts.jsonl").read_text().splitlines()
    instructions = [json.loads(line)["prompt"] for line in lines]
    return [
        PromptSet(STORIES, stories[:32], 8, 200, tuple(n for n in SETTINGS if n not in WORD_LAWS)),
        PromptSet(ESSAYS, essays[:60], 2, 200, (*COMPARED, *HALF, *WORD_LAWS)),
        PromptSet(OTHER_ESSAYS, essays[60:], 4, 200, (WORDS, GATED, HALF[0], MIN_P)),
        PromptSet(IFEVAL, instructions, 1, 256, IN_TASKS),
        PromptSet(MMLU, [question(row) for row in mmlu(data)], 1, 48, IN_TASKS),
        PromptSet(OPEN, open_prompts(data), 8, 64, (*COMPARED, COOL, HALF[1])),
        PromptSet(
            FORMS, [task for each in form_tasks().values() for task in each], 5, 128, IN_FORMS
        ),
    ]


def prompt_set(name: str, data: Path) -> PromptSet:
    """The set of this name."""
    return next(each for each in prompt_sets(data) if each.name == name)


def form_tasks() -> dict[str, list[str]]:
    """Tasks by the form or language that they ask for."""
    return json.loads((Path(__file__).parent / "form_tasks.json").read_text())


def open_prompts(data: Path) -> list[str]:
    """Prompts with many right answers: every other one of NoveltyBench's curated hundred."""
    lines = (data / "prompts" / "noveltybench_curated.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[::2]]


def mmlu(data: Path) -> list[dict[str, Any]]:
    """Questions of MMLU's test set, evenly spaced in it and so over its subjects."""
    lines = (data / "accuracy" / "mmlu_test.jsonl").read_text().splitlines()
    return [json.loads(lines[n * len(lines) // MMLU_QUESTIONS]) for n in range(MMLU_QUESTIONS)]


def question(row: Mapping[str, Any]) -> str:
    """A question as a chat message, without examples."""
    choices = zip("ABCD", row["choices"], strict=True)
    lines = [row["question"], *(f"{letter}. {choice}" for letter, choice in choices)]
    return "\n".join([*lines, "Answer with the letter of the right choice."])


def read_answers(folder: Path) -> list[Answer]:
    """The answers of a folder."""
    return read(folder / "answers.jsonl", Answer)


def answers_by_prompt(answers: Sequence[Answer]) -> list[list[str]]:
    """The texts for each prompt, in the order of the prompts."""
    count = 1 + max(answer.prompt for answer in answers)
    return [[a.text for a in answers if a.prompt == prompt] for prompt in range(count)]


def data_folder() -> Path:
    """The folder that DFTSERVE_DATA names.

    Raises:
        click.UsageError: DFTSERVE_DATA is not set.
    """
    if not os.environ.get(tasks.DATA):
        raise click.UsageError(f"{tasks.DATA} is not set; give the folder of the texts.")
    return Path(os.environ[tasks.DATA])


@click.command()
@model_option
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([STORIES, ESSAYS, OTHER_ESSAYS, IFEVAL, MMLU, OPEN, FORMS]),
)
@click.option("--setting", "settings", multiple=True, type=click.Choice(list(SETTINGS)))
@click.option("--dtype", default="auto")
@click.option("--folder", default=Path("build/real"), type=click.Path(path_type=Path))
def main(
    model: Path, only: tuple[str, ...], settings: tuple[str, ...], dtype: str, folder: Path
) -> None:
    sets = prompt_sets(data_folder())
    sets = [each for each in sets if not only or each.name in only]
    wanted = [(each, name) for each, name in in_turn(sets) if not settings or name in settings]
    answer_missing(model, wanted, SETTINGS, folder, dtype)


def answer_missing(
    model: Path,
    wanted: Sequence[tuple[PromptSet, str]],
    settings: Mapping[str, Mapping[str, Any]],
    folder: Path,
    dtype: str,
) -> None:
    """Make the answers that the folder lacks, to each set with the setting of that name."""
    with AnswerStore(folder / "answers.jsonl", Answer) as store:
        known = {place_of(row) for row in store.rows}
        missing = [(each, name) for each, name in wanted if not is_whole(each, name, known)]
        llm = engine(model, dtype, seed=len(store.rows)) if missing else None
        for number, (prompts, name) in enumerate(missing):
            start = time.perf_counter()
            answers = ask(llm, prompts, name, settings[name])
            rate = sum(answer.tokens for answer in answers) / (time.perf_counter() - start)
            add(store, answers, known)
            print(
                f"{number + 1}/{len(missing)} {prompts.name}, {name}: {rate:.0f} tokens/s",
                flush=True,
            )


def place_of(answer: Answer) -> Place:
    """By what an answer is recognised when a run resumes."""
    return answer.prompt_set, answer.setting, answer.prompt, answer.number


def add(store: AnswerStore[Answer], answers: Sequence[Answer], known: Set[Place]) -> None:
    """Append the answers that are not known yet: a killed run may have stored part of a set."""
    for answer in answers:
        if place_of(answer) not in known:
            store.append(answer)


def pack(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write answers in the format of results/texts."""
    with lzma.open(file, "wt", encoding="utf-8") as packed:
        for row in rows:
            packed.write(json.dumps(row, ensure_ascii=False) + "\n")


def is_whole(prompts: PromptSet, name: str, known: Set[Place]) -> bool:
    """Whether all of a setting's answers to a set are known."""
    count = sum(place[:2] == (prompts.name, name) for place in known)
    return count == len(prompts.prompts) * prompts.answers


def in_turn(sets: Sequence[PromptSet]) -> Iterator[tuple[PromptSet, str]]:
    """Setting by setting, so that an aborted run has all sets for the first settings."""
    for name in SETTINGS:
        yield from ((each, name) for each in sets if name in each.settings)


def engine(model: Path, dtype: Any, seed: int) -> Any:
    """One engine of vLLM with the plug-in, and with the laws of the other modules."""
    import other_laws
    import word_laws
    from vllm import LLM

    return LLM(
        str(model),
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=SLOTS,
        kv_cache_memory_bytes=4 << 30,
        # Small blocks, so that most of a prompt is prefilled once for all of its answers.
        block_size=32,
        enforce_eager=True,
        logits_processors=[word_laws.WordLaws, other_laws.OtherLaws],
        generation_config="vllm",
        seed=seed,
    )


def ask(llm: Any, prompts: PromptSet, name: str, setting: Mapping[str, Any]) -> list[Answer]:
    """The answers to a prompt set with the setting of this name, requested all at once."""
    from vllm import SamplingParams

    ours = {key: value for key, value in setting.items() if key in EXTRA_ARGS}
    sampling = {key: value for key, value in setting.items() if key not in EXTRA_ARGS}
    parameters = SamplingParams(
        n=prompts.answers,
        max_tokens=prompts.tokens,
        extra_args=ours or None,
        **sampling,
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts.prompts]
    requests = llm.chat(chats, parameters, use_tqdm=False)
    return [
        Answer(prompts.name, name, prompt, number, output.text, len(output.token_ids))
        for prompt, request in enumerate(requests)
        for number, output in enumerate(request.outputs)
    ]


if __name__ == "__main__":
    main()
