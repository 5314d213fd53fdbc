"""Run the Style Diversity Benchmark: every task on one server, over a grid of diversities.

OUT/story/, OUT/essay/    an evaluation each, with the anchors it was measured against
OUT/e2e/                  answers, and meaning.json: wording and slot errors at each diversity
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.evaluate import reference
from dftserve.evaluate import run as evaluation
from dftserve.evaluate.benchmark import slots, tasks
from dftserve.evaluate.benchmark.tasks import Missing, Task
from dftserve.evaluate.generate.client import weights_of
from dftserve.evaluate.generate.grid import samples_by_level
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.report import html
from dftserve.evaluate.report.figures import figures, render
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.evaluate.text.windows import LEAST_TEXTS, Sample
from dftserve.plots import png

PROMPTS = "prompts.jsonl"
ANCHORS = "anchors"
MEANING = "meaning.json"

Say = Callable[[str], object]
Tick = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure and where to write it; the rest as in `evaluation.Job`."""

    model: str
    out: Path
    data: Path | None = None
    tasks: tuple[str, ...] = ("story", "essay", "e2e")
    grid: tuple[Any, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    limit: int | None = None
    """Prompts per task, taken at even distances; None: all."""
    samples: int | None = None
    max_tokens: int | None = None
    """None: each task's own limit."""
    body: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    key_variable: str | None = None
    concurrency: int = 16
    serve_flags: tuple[str, ...] = ()
    weights: str | None = None
    """Digest of the weights of the checkpoint served at the URL; None: unknown."""
    plots: Path | None = None
    """A folder that passed `png.check`; each evaluation's figures go to a subfolder of it."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: got {self.limit}; accepted: at least 1.")
        names = Counter(_folder_name(name) for name in self.tasks)
        if twice := [name for name in names if names[name] > 1]:
            raise ValueError(
                f"tasks: got {', '.join(self.tasks)}, of which more than one is named "
                f"{twice[0]!r}; accepted: different names, as each task's answers are in OUT/NAME."
            )


@dataclass(frozen=True)
class Meaning:
    """Measures of texts of the same meanings, at one diversity or by people."""

    diversity: Any
    """None: people's."""
    wording: Estimate | None
    """P: 1 if as varied as people's, 0 for copies."""
    slot_errors: Estimate
    cut: int = 0
    """Number of answers that ended in their thinking, which are left out."""


def run(job: Job, say: Say, tick: Tick) -> None:
    """Run each task. One whose texts are missing is skipped, with the reason; if one fails, the
    others are still run.

    Raises:
        ValueError: a task, a setting or the answers are not accepted, or no task has its texts.
        RuntimeError: a server does not start, cannot be reached or fails.
    """
    whole = _evaluation(job, "", Path(), 1, 1)
    tasks = dict(_tasks(job, say))
    if not tasks:
        raise ValueError(
            f"tasks: got {', '.join(job.tasks)}, and none has its texts; give --data, or set "
            "DFTSERVE_DATA to their folder."
        )
    for name, task in tasks.items():
        if task.kind == "meaning":
            _require_enough_wordings(name, task, job.samples or task.samples)
    weights = job.weights if whole.is_url else weights_of(job.model, say)
    with evaluation.server(whole, say) as url:
        served = replace(job, model=url, serve_flags=(), weights=weights)
        failed = []
        for name, task in tasks.items():
            say(f"\n{task.title}")
            measure = _style if task.kind == "style" else _meaning
            try:
                say(measure(served, name, task, say, tick))
            except ValueError as error:
                failed.append(f"{name}: {error}")
                say(f"failed: {error}")
    if failed:
        raise ValueError("; ".join(failed))


def _tasks(job: Job, say: Say) -> Iterator[tuple[str, Task]]:
    for name in job.tasks:
        try:
            task = tasks.load(name, job.data)
        except Missing as why:
            say(f"{name}: skipped: {why}")
            continue
        yield _folder_name(name), replace(task, prompts=_spread(task.prompts, job.limit))


def _folder_name(task: str) -> str:
    return Path(task).stem


def _require_enough_wordings(name: str, task: Task, samples: int) -> None:
    """Check what `slots.wording` needs, before anything is generated."""
    if samples < LEAST_TEXTS:
        raise ValueError(
            f"samples: got {samples}; accepted: {LEAST_TEXTS} or more, as {name} compares the "
            "wordings of the answers to one prompt."
        )
    people = Counter(sample.prompt for sample in task.human)
    if max(people[prompt.text] for prompt in task.prompts) < LEAST_TEXTS:
        raise ValueError(
            f"{name}: none of its {len(task.prompts)} prompts has {LEAST_TEXTS} human texts; "
            "accepted: at least one that has (`human.least` keeps only such prompts)."
        )


def _spread(prompts: Sequence[Any], limit: int | None) -> tuple[Any, ...]:
    count = min(limit or len(prompts), len(prompts))
    return tuple(prompts[index * len(prompts) // count] for index in range(count))


def _style(job: Job, name: str, task: Task, say: Say, tick: Tick) -> str:
    folder = job.out / name
    _write_anchors(folder, task)
    asked = _evaluation(job, name, _write_prompts(folder, task), task.samples, task.max_tokens)
    result = evaluation.evaluate(asked, say, tick)
    html.write(result, folder)
    if job.plots is not None:
        (job.plots / name).mkdir(exist_ok=True)
        png.write(figures(result), job.plots / name)
    return html.as_text(result)


def _write_anchors(folder: Path, task: Task) -> None:
    """Write the task's anchors, or check that those which an earlier run wrote are the same."""
    built = reference.build(task.human, words=task.words)
    if not (folder / ANCHORS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        reference.save(built, folder / ANCHORS)
    elif not built.has_the_texts_of(reference.load(folder / ANCHORS)):
        raise ValueError(
            f"{folder / ANCHORS}: built from other human texts, or other `words`, than the task "
            "has now; accepted: the same as then, or another folder (`--out`)."
        )


def _meaning(job: Job, name: str, task: Task, say: Say, tick: Tick) -> str:
    folder = job.out / name
    asked = _evaluation(job, name, _write_prompts(folder, task), task.samples, task.max_tokens)
    evaluation.ask(asked, task.prompts, say, tick)
    meanings = {prompt.text: slots.parse(prompt.about["meaning"]) for prompt in task.prompts}
    people = _by_prompt([each for each in task.human if each.prompt in meanings])
    meanings_by_level = [_measured(None, people, people, meanings)]
    for level in samples_by_level(folder):
        if not level.samples:
            raise ValueError(
                f"diversity {render(level.diversity)}: all {level.cut} answers ended in their "
                "thinking; give them more tokens (`--max-tokens`)."
            )
        measured = _measured(level.diversity, _by_prompt(level.samples), people, meanings)
        meanings_by_level.append(replace(measured, cut=level.cut))
    document = json.dumps(
        [asdict(each) for each in meanings_by_level], ensure_ascii=False, indent=1
    )
    atomic.write_text(folder / MEANING, document + "\n")
    head = f"{'':24}{'wording, human = 1':>24}{'slot errors':>24}{'cut':>8}"
    lines = [head, *map(_line, meanings_by_level)]
    return "\n".join([*lines, CUT_NOTE] if any(each.cut for each in meanings_by_level) else lines)


def _measured(
    level: Any,
    texts: dict[str, list[str]],
    people: dict[str, list[str]],
    meanings: dict[str, dict[str, str]],
) -> Meaning:
    prompts, answers = zip(*((p, text) for p, some in texts.items() for text in some), strict=True)
    return Meaning(
        diversity=level,
        wording=None if level is None else slots.wording(texts, people),
        slot_errors=slots.error_rate(answers, [meanings[prompt] for prompt in prompts], prompts),
    )


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for sample in samples:
        texts.setdefault(sample.prompt, []).append(sample.text)
    return texts


def _line(meaning: Meaning) -> str:
    name = "human" if meaning.diversity is None else f"diversity {render(meaning.diversity)}"
    wording = "1" if meaning.wording is None else meaning.wording.render()
    cut = "" if meaning.diversity is None else f"{meaning.cut}"
    return f"{name:24}{wording:>24}{meaning.slot_errors.render(3):>24}{cut:>8}".rstrip()


def _write_prompts(folder: Path, task: Task) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": each.text, "system": each.system, **each.about}, ensure_ascii=False)
        for each in task.prompts
    ]
    atomic.write_text(folder / PROMPTS, "\n".join(lines) + "\n")
    return folder / PROMPTS


def _evaluation(
    job: Job, name: str, prompts: Path, samples: int, max_tokens: int
) -> evaluation.Job:
    return evaluation.Job(
        model=job.model,
        prompts=prompts,
        anchors=job.out / name / ANCHORS,
        out=job.out / name,
        grid=job.grid,
        samples=job.samples or samples,
        max_tokens=job.max_tokens or max_tokens,
        body=job.body,
        name=job.name,
        key_variable=job.key_variable,
        concurrency=job.concurrency,
        serve_flags=job.serve_flags,
        weights=job.weights,
    )
