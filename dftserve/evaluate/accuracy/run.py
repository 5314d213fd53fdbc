"""Accuracy through a server over a grid of diversity, from a job to a report.

    print(run(Job(url="http://127.0.0.1:8000", out=Path("accuracy.json")), print))

FILE            the report
FILE.parts/     every answer of each task at each level (`parts`); the same job goes on from there
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.digest import digest_of
from dftserve.evaluate.accuracy import humaneval, lm_eval, parts, questions, refusals
from dftserve.evaluate.accuracy.compare import Answered, Comparison, compare, level_text
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.parts import FILES, Settings
from dftserve.evaluate.accuracy.questions import Question
from dftserve.evaluate.generate import client
from dftserve.evaluate.generate.client import Served
from dftserve.evaluate.metrics import intervals
from dftserve.settings import among
from dftserve.spec import parse

TASKS = ("mmlu", "gsm8k", "humaneval")
"""Those with an answer, whose questions are published."""
LM_EVAL = {"mmlu", "gsm8k"}
DATA = "DFTSERVE_DATA"
KS = (1, 10, 100)
"""Of pass@k, where there are as many samples."""


@dataclass(frozen=True)
class Job:
    """What to measure. `data` is the folder with the files of `FILES`; without it, the folder
    `accuracy` in the one that the environment variable DFTSERVE_DATA names."""

    url: str
    out: Path
    data: Path | None = None
    grid: tuple[float, ...] = (0.0, 0.5, 1.0)
    tasks: tuple[str, ...] = TASKS
    model: str | None = None
    """As the server names it; None: its first."""
    key_variable: str | None = None
    """The environment variable that holds the API key; None: OPENAI_API_KEY, where it is set."""
    limit: int | None = None
    """Questions of each task; None: all."""
    samples: int = 1
    """Answers to each question."""
    temperature: float = 1.0
    max_tokens: int | None = None
    """Of an answer; None: what each task says."""
    at_once: int = 16
    is_chat: bool = True
    unsafe_no_sandbox: bool = False

    def __post_init__(self) -> None:
        if 0 not in self.grid or len(set(self.grid)) != len(self.grid):
            raise ValueError(f"grid: got {self.grid}; accepted: different levels, 0 among them.")
        for level in self.grid:
            parse(level, "grid")
        for task in self.tasks:
            if task not in FILES:
                raise ValueError(f"tasks: got {task!r}; accepted: {among(task, FILES)}.")
        for name in ("samples", "limit", "at_once", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}; accepted: at least 1.")
        if not self.temperature > 0:
            accepted = "above 0, for greedy decoding does not sample, and diversity cannot act"
            raise ValueError(f"temperature: got {self.temperature}; accepted: {accepted}.")


def run(job: Job, say: Callable[[str], object]) -> str:
    """Measure, write the report to `job.out`, and give back its tables.

    A task whose files are not there is skipped, with the reason in the report.

    Raises:
        ValueError: no data, a server without the field, or parts of another job.
        RuntimeError: no sandbox for HumanEval, or no lm-eval: nothing was asked then; or the server
            refuses or fails.
    """
    data = _data(job)
    skipped = {task: why for task in job.tasks if (why := _missing(task, data)) is not None}
    tasks = [task for task in job.tasks if task not in skipped]
    _check_tools(tasks, unsafe=job.unsafe_no_sandbox)
    confined = _confined(job, tasks)
    if confined is not None:
        say(f"humaneval: programs run in {confined}")
    names = ("temperature", "at_once", "is_chat", "max_tokens")
    model = client.find(
        job.url, job.model, job.key_variable, **{name: getattr(job, name) for name in names}
    )
    settings = _settings(job, model)
    files = {task: _digests(task, data) for task in tasks}
    folder = _begin(job, settings, files)
    if parts.first_answers(folder, files) is not None:
        say(
            f"{folder} holds answers, which are taken as {model.model}'s: whether its weights have "
            "changed since is not known, as a server does not say. Remove it to ask anew."
        )
    asked = {task: _questions(job, task, data, folder) for task in tasks}
    _check_unchanged(files, data)
    answers = {
        task: {
            level: _part(job, folder, task, asked[task], model, level, say) for level in job.grid
        }
        for task in tasks
    }
    comparisons = [each for task in tasks for each in compared(task, answers[task])]
    report = _report(job, settings, comparisons, answers, skipped)
    report |= {"files": files, "sandbox": confined}
    atomic.write_text(job.out, json.dumps(report, indent=1) + "\n")
    lines = [f"{task}: skipped: {why}" for task, why in skipped.items()]
    return "\n\n".join([*(each.render() for each in comparisons), *lines])


def _data(job: Job) -> Path:
    if job.data is not None:
        data = job.data
    elif DATA in os.environ:
        data = Path(os.environ[DATA]) / "accuracy"
    else:
        names = ", ".join(name for files in FILES.values() for name in files)
        raise ValueError(f"data: got none; accepted: a folder with {names}, or {DATA} set.")
    if not data.is_dir():
        raise ValueError(f"data: got {data}; accepted: a folder that exists.")
    return data


def _missing(task: str, data: Path) -> str | None:
    absent = [name for name in FILES[task] if not (data / name).is_file()]
    return f"no {', no '.join(absent)} in {data}" if absent else None


def _check_tools(tasks: Sequence[str], *, unsafe: bool) -> None:
    """Before anything is asked: what would fail hours later."""
    if "humaneval" in tasks and not unsafe and (missing := sandbox.available()) is not None:
        raise RuntimeError(missing)
    if LM_EVAL & set(tasks):
        lm_eval.executable()


def _confined(job: Job, tasks: Sequence[str]) -> str | None:
    """What programs run in; None where none are run."""
    if "humaneval" not in tasks:
        return None
    return "no sandbox, as asked" if job.unsafe_no_sandbox else sandbox.described()


def _settings(job: Job, model: Served) -> Settings:
    return Settings(
        model=model.model,
        temperature=job.temperature,
        limit=job.limit,
        samples=job.samples,
        max_tokens=job.max_tokens,
        is_chat=job.is_chat,
    )


def _digests(task: str, data: Path) -> dict[str, str]:
    """Of the files with a task's questions."""
    return {name: digest_of(data / name) for name in FILES[task]}


def _begin(job: Job, settings: Settings, files: Mapping[str, Mapping[str, str]]) -> Path:
    """The folder of the parts, of this job alone; one that is refused has changed nothing there
    that an answer depends on."""
    folder = parts.folder_of(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    parts.claim(folder, parts.SETTINGS, asdict(settings), "settings", FILES)
    for task, digests in files.items():
        parts.claim(folder, parts.files_name(task), digests, f"questions of {task}", [task])
    return folder


def _check_unchanged(files: Mapping[str, Mapping[str, str]], data: Path) -> None:
    """What was read is what the digests were taken of."""
    for task, digests in files.items():
        if _digests(task, data) != digests:
            raise ValueError(
                f"{data}: the questions of {task} changed while they were read; run again when "
                "they are whole."
            )


def _questions(job: Job, task: str, data: Path, folder: Path) -> Sequence[Any]:
    """A task's questions, before any task is asked: a wrong file costs nothing. lm-eval reads its
    own, from `folder`."""
    if task in LM_EVAL:
        lm_eval.prepare(task, data, folder, limit=job.limit, samples=job.samples)
        return ()
    read = humaneval.read if task == "humaneval" else refusals.read
    return lm_eval.spread(list(read(data / FILES[task][0])), job.limit)


def _part(
    job: Job,
    folder: Path,
    task: str,
    asked: Sequence[Any],
    model: Served,
    level: float,
    say: Callable[[str], object],
) -> tuple[Answered, ...]:
    """The answers to one task at one level, from the file where they were kept, or asked for."""
    kept = folder / parts.answers_name(task, level)
    if not os.path.lexists(kept):
        say(f"{task} at diversity {level_text(level)}")
        if task in LM_EVAL:
            _check_level(model, level)
            answered = lm_eval.measure(task, folder, model, level)
        else:
            answered = _measured(job, task, asked, model, level, kept.with_suffix(".jsonl"))
        parts.keep(folder, task, level, answered)
    return parts.answers_of(folder, task, level)


def _check_level(model: Served, level: float) -> None:
    """One token at a level, since lm-eval shows no more of an answer than its text.

    Raises as `questions.ask`.
    """
    one = Question("level", "Say yes.", "Yes")
    questions.ask([one], replace(model, max_tokens=None), level, samples=1, max_tokens=1)


def compared(task: str, answers: Mapping[float, Sequence[Answered]]) -> list[Comparison]:
    """A task's levels against level 0; of refusals those of each kind of prompt."""
    kinds = {level: by_kind(task, answered) for level, answered in answers.items()}
    return [
        compare(name, {level: kind[name] for level, kind in kinds.items()}) for name in kinds[0.0]
    ]


def by_kind(task: str, answered: Sequence[Answered]) -> dict[str, tuple[Answered, ...]]:
    """What is compared by itself: a task, but of refusals each kind of prompt that was asked."""
    if task != "refusals":
        return {task: tuple(answered)}
    kinds = {
        f"{task}, {kind}": tuple(
            each for each in answered if refusals.kind_of(each.question) == kind
        )
        for kind in refusals.KINDS
    }
    return {name: each for name, each in kinds.items() if each}


def _measured(
    job: Job, task: str, asked: Sequence[Any], model: Served, level: float, kept: Path
) -> tuple[Answered, ...]:
    """The answers to questions that no lm-eval asks."""
    if task == "humaneval":
        measure = partial(humaneval.measure, unsafe=job.unsafe_no_sandbox)
    else:
        measure = refusals.measure
    try:
        return measure(asked, model, level, samples=job.samples, kept=kept)
    except ValueError as error:
        raise ValueError(f"{error} (`--max-tokens` bounds an answer)") from None


def _report(
    job: Job,
    settings: Settings,
    comparisons: Sequence[Comparison],
    answers: Mapping[str, Mapping[float, Sequence[Answered]]],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "what": "accuracy through the server over a grid of diversity",
        "settings": asdict(settings) | {"grid": sorted(job.grid)},
        "tasks": [comparison.as_json() for comparison in comparisons],
        "pass_at_k": _pass_at_k(answers.get("humaneval", {}), job.samples),
        "skipped": skipped,
    }


def _pass_at_k(answers: Mapping[float, Sequence[Answered]], samples: int) -> list[dict[str, Any]]:
    return [
        {
            "diversity": level,
            "k": k,
            **asdict(
                intervals.mean(
                    [humaneval.pass_at_k(samples, sum(each.right), k) for each in answered]
                )
            ),
        }
        for level, answered in sorted(answers.items())
        for k in KS
        if k <= samples
    ]
