"""Measure accuracy through a server over a grid of diversity, and write a report.

    print(run(Job(url="http://127.0.0.1:8000", out=Path("accuracy.json")), print))

FILE            the report
FILE.parts/     every answer of each task at each level (`parts`); the same job resumes from there
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
from dftserve.settings import accepted_names
from dftserve.spec import parse

TASKS = ("mmlu", "gsm8k", "humaneval")
"""The default tasks: those with right answers and published questions."""
LM_EVAL = {"mmlu", "gsm8k"}
DATA = "DFTSERVE_DATA"
KS = (1, 10, 100)
"""The k of pass@k that are reported, up to the number of samples."""


@dataclass(frozen=True)
class Job:
    """What to measure. `data` is the folder with the files of `FILES`; default:
    $DFTSERVE_DATA/accuracy."""

    url: str
    out: Path
    data: Path | None = None
    grid: tuple[float, ...] = (0.0, 0.5, 1.0)
    tasks: tuple[str, ...] = TASKS
    model: str | None = None
    """Its name on the server; None: the server's first model."""
    key_variable: str | None = None
    """The environment variable that holds the API key; None: OPENAI_API_KEY, if it is set."""
    limit: int | None = None
    """Questions of each task; None: all."""
    samples: int = 1
    """Answers to each question."""
    temperature: float = 1.0
    max_tokens: int | None = None
    """Limit for one answer; None: each task's default."""
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
                raise ValueError(f"tasks: got {task!r}; accepted: {accepted_names(task, FILES)}.")
        for name in ("samples", "limit", "at_once", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}; accepted: at least 1.")
        if not self.temperature > 0:
            accepted = "above 0, since diversity has no effect on greedy decoding"
            raise ValueError(f"temperature: got {self.temperature}; accepted: {accepted}.")


def run(job: Job, say: Callable[[str], object]) -> str:
    """Measure, write the report to `job.out`, and return its tables.

    A task whose files are missing is skipped, with the reason in the report.

    Raises:
        ValueError: no data, no task with its files, a server without the `diversity` field, parts
            of another job, or another run that writes to them.
        RuntimeError: no sandbox for HumanEval, or no lm-eval (found before anything is asked); or
            the server refuses or fails.
    """
    data = _data(job)
    skipped = {task: why for task in job.tasks if (why := _missing(task, data)) is not None}
    tasks = [task for task in job.tasks if task not in skipped]
    if not tasks:
        reasons = "; ".join(f"{task}: {why}" for task, why in skipped.items())
        raise ValueError(
            f"tasks: got {', '.join(job.tasks)}, and none has its files ({reasons}); give --data, "
            f"or set {DATA} to the folder that has `accuracy`. docs/evaluation.md lists the files."
        )
    _check_tools(tasks, unsafe=job.unsafe_no_sandbox)
    confined = _sandbox_text(job, tasks)
    if confined is not None:
        say(f"humaneval: programs run in {confined}")
    names = ("temperature", "at_once", "is_chat", "max_tokens")
    model = client.find(
        job.url, job.model, job.key_variable, **{name: getattr(job, name) for name in names}
    )
    settings = _settings(job, model)
    # Locked until the report is written: lm-eval's answers are saved only when a task has ended,
    # so until then nothing in the folder refuses a job with other settings.
    with parts.locked(parts.folder_of(job.out)) as folder:
        files = {task: _digests(task, data) for task in tasks}
        _claim(folder, settings, files)
        answers = _measured(job, data, files, model, folder, say)
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
    """Fail before anything is asked rather than hours later."""
    if "humaneval" in tasks and not unsafe and (missing := sandbox.available()) is not None:
        raise RuntimeError(missing)
    if LM_EVAL & set(tasks):
        lm_eval.executable()


def _sandbox_text(job: Job, tasks: Sequence[str]) -> str | None:
    """A description of the sandbox that programs run in; None if none are run."""
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
    """Digests of the files with a task's questions."""
    return {name: digest_of(data / name) for name in FILES[task]}


def _claim(folder: Path, settings: Settings, files: Mapping[str, Mapping[str, str]]) -> None:
    """Claim the folder of the parts for this job. If the claim is refused, nothing that existing
    answers depend on has changed."""
    parts.claim(folder, parts.SETTINGS, asdict(settings), "settings", FILES)
    for task, digests in files.items():
        parts.claim(folder, parts.files_name(task), digests, f"questions of {task}", [task])


def _measured(
    job: Job,
    data: Path,
    files: Mapping[str, Mapping[str, str]],
    model: Served,
    folder: Path,
    say: Callable[[str], object],
) -> dict[str, dict[float, tuple[Answered, ...]]]:
    """The answers to each task of `files` at each level; those in the folder are reused."""
    if parts.first_answers(folder, files) is not None:
        say(
            f"{folder} holds answers, which are reused for {model.model}. A server does not report "
            "whether its weights have changed since; remove the folder to ask again."
        )
    asked = {task: _questions(job, task, data, folder) for task in files}
    _check_unchanged(files, data)
    return {
        task: {
            level: _part(job, folder, task, asked[task], model, level, say) for level in job.grid
        }
        for task in files
    }


def _check_unchanged(files: Mapping[str, Mapping[str, str]], data: Path) -> None:
    """Check that the files that were read are still those the digests were taken of."""
    for task, digests in files.items():
        if _digests(task, data) != digests:
            raise ValueError(
                f"{data}: the questions of {task} changed while they were read; run again when "
                "the files are complete."
            )


def _questions(job: Job, task: str, data: Path, folder: Path) -> Sequence[Any]:
    """Read a task's questions, before any task is asked, so that a wrong file costs nothing.
    lm-eval reads its own, from `folder`."""
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
    """The answers to one task at one level: read from their file, or asked for and saved."""
    file = folder / parts.answers_name(task, level)
    if not os.path.lexists(file):
        say(f"{task} at diversity {level_text(level)}")
        if task in LM_EVAL:
            _check_level(model, level)
            answered = lm_eval.measure(task, folder, model, level)
        else:
            answered = _ask_directly(job, task, asked, model, level, file.with_suffix(".jsonl"))
        parts.save(folder, task, level, answered)
    return parts.answers_of(folder, task, level)


def _check_level(model: Served, level: float) -> None:
    """Ask for one token, to check that the server applies the level: lm-eval passes on only the
    text of an answer.

    Raises as `questions.ask`.
    """
    one = Question("level", "Say yes.", "Yes")
    questions.ask([one], replace(model, max_tokens=None), level, samples=1, max_tokens=1)


def compared(task: str, answers: Mapping[float, Sequence[Answered]]) -> list[Comparison]:
    """Compare a task's levels with level 0; refusals separately for each kind of prompt."""
    kinds = {level: by_kind(task, answered) for level, answered in answers.items()}
    return [
        compare(name, {level: kind[name] for level, kind in kinds.items()}) for name in kinds[0.0]
    ]


def by_kind(task: str, answered: Sequence[Answered]) -> dict[str, tuple[Answered, ...]]:
    """The groups of answers that are compared separately: for refusals each kind of prompt that was
    asked, otherwise the whole task."""
    if task != "refusals":
        return {task: tuple(answered)}
    kinds = {
        f"{task}, {kind}": tuple(
            each for each in answered if refusals.kind_of(each.question) == kind
        )
        for kind in refusals.KINDS
    }
    return {name: each for name, each in kinds.items() if each}


def _ask_directly(
    job: Job, task: str, asked: Sequence[Any], model: Served, level: float, saved: Path
) -> tuple[Answered, ...]:
    """The answers to a task that does not run in lm-eval."""
    if task == "humaneval":
        measure = partial(humaneval.measure, unsafe=job.unsafe_no_sandbox)
    else:
        measure = refusals.measure
    try:
        return measure(asked, model, level, samples=job.samples, saved=saved)
    except ValueError as error:
        raise ValueError(f"{error} (`--max-tokens` limits an answer)") from None


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
                intervals.mean_share(
                    [humaneval.pass_at_k(samples, sum(each.right), k) for each in answered]
                )
            ),
        }
        for level, answered in sorted(answers.items())
        for k in KS
        if k <= samples
    ]
