"""The `dftserve evaluate` command.

Kept thin, like `dftserve.cli`: each command imports its implementation when it is called.
"""

import difflib
from pathlib import Path

import click

from dftserve.bounded_files import parse_json
from dftserve.commandline import (
    answers_bar,
    key_option,
    model_of,
    out_option,
    plots_option,
    usage_errors,
    writable,
)


class _RunByDefault(click.Group):
    """A group in which the name of the command `run` may be omitted."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and not Path(args[0]).exists():
                raise click.UsageError(f"got {args[0]!r}; did you mean {near[0]!r}?", ctx)
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_RunByDefault)
def evaluate() -> None:
    """Measure how varied, how human-like and how accurate a model's answers are.

    `dftserve evaluate MODEL_OR_URL …` is `dftserve evaluate run MODEL_OR_URL …`.
    """


@evaluate.command(
    "run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True}
)
@click.argument("model", metavar="MODEL_OR_URL")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[ANY vLLM FLAG]...")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help=".txt or .jsonl.")
@click.option("--anchors", required=True, type=click.Path(path_type=Path), help="Human anchors.")
@out_option
@click.option("--grid", default="0,.25,.5,.75,1", show_default=True, metavar="DIVERSITIES")
@click.option("--samples", type=int, default=8, show_default=True, help="Answers to each prompt.")
@click.option("--max-tokens", type=int, default=1024, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--body", default="{}", metavar="JSON", help="Extra fields of each request.")
@click.option("--model", "name", help="Name on the server. Default: the first listed.")
@key_option
@click.option("--concurrency", type=int, default=16, show_default=True)
@click.option("--phrases", type=click.Path(path_type=Path), help="List of phrases to count.")
@click.option("--embeddings", metavar="MODEL|installed", help="Also measure meaning.")
@click.option(
    "--accuracy",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Report of `evaluate accuracy` at some of these diversities, to plot against the score.",
)
@plots_option
def evaluate_run(
    flags: tuple[str, ...],
    grid: str,
    body: str,
    accuracy: Path | None,
    plots: Path | None,
    **options,
) -> None:
    """Request answers at each diversity, compare them with human text, and write a report.

    A model (a folder, a .gguf file or a folder with one, or a name on the hub) is served during the
    run; a server at a URL is used as it is. Repeat the command to continue a stopped run.
    """
    with usage_errors():
        from dftserve.evaluate.accuracy import report
        from dftserve.evaluate.report.figures import figures
        from dftserve.evaluate.report.html import REPORT, as_text, write
        from dftserve.evaluate.run import Job, evaluate
        from dftserve.gguf import resolve
        from dftserve.plots import png

        options["model"] = resolve(options["model"])
        job = Job(
            grid=_grid(grid),
            body=_object(body, "--body"),
            serve_flags=flags,
            **options,
        )
        measured = None if accuracy is None else report.read(accuracy)
        if measured is not None:
            measured.check(job.grid, job.temperature)
        if plots is not None:
            png.check(plots)
        with answers_bar() as tick:
            result = evaluate(job, lambda line: click.echo(line, err=True), tick)
        if measured is not None and measured.model != result.model:
            models = f"{measured.model}, the answers are by {result.model}"
            click.echo(f"Warning: --accuracy is about {models}.", err=True)
        write(result, job.out, measured)
        if plots is not None:
            png.write(figures(result, measured), plots)
        click.echo(as_text(result))
        click.echo(f"{job.out / REPORT} is the full report.", err=True)


@evaluate.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def evaluate_compare(a: Path, b: Path, as_json: bool) -> None:
    """Compare two runs over the same prompts in pairs. A and B are their result.json files."""
    with usage_errors():
        from dftserve.evaluate.report.compare import compare

        compared = compare(a, b)
        click.echo(compared.as_json() if as_json else compared.render())


@evaluate.command("accuracy")
@click.argument("url")
@click.option(
    "--out", required=True, type=click.Path(dir_okay=False, path_type=Path), callback=writable
)
@click.option("--data", type=click.Path(path_type=Path), help="Default: DFTSERVE_DATA/accuracy.")
@click.option("--grid", default="0,.5,1", show_default=True, metavar="DIVERSITIES")
@click.option("--tasks", default="mmlu,gsm8k,humaneval", show_default=True)
@click.option("--limit", type=int, help="Questions per task. Default: all.")
@click.option("--samples", type=int, default=1, show_default=True, help="Answers per question.")
@click.option("--max-tokens", type=int, help="Per answer. Default: set by each task.")
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--model", help="Name on the server. Default: the first listed.")
@click.option("--completions", is_flag=True, help="For a base model, without a chat template.")
@key_option
@click.option("--concurrency", "at_once", type=int, default=16, show_default=True)
@click.option("--unsafe-no-sandbox", is_flag=True, help="Run the model's code as your own user.")
def accuracy(grid: str, tasks: str, completions: bool, **options) -> None:
    """Measure accuracy at each diversity, on questions with a known answer.

    MMLU and GSM8K run in lm-eval (`make eval-env` installs it), HumanEval in this project's
    sandbox. `--tasks refusals` checks which of your prompts are refused and which are answered. It
    uses rules for English and no judge: an answer is a refusal if one of its first two sentences
    refuses, even in part. You provide the files with the questions: docs/evaluation.md lists them.
    """
    with usage_errors():
        from dftserve.evaluate.accuracy.run import Job, run

        job = Job(
            grid=_numbers(grid),
            tasks=tuple(tasks.split(",")),
            is_chat=not completions,
            **options,
        )
        click.echo(run(job, lambda line: click.echo(line, err=True)))


@evaluate.command("drift")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--card", type=click.Path(path_type=Path), metavar="CHECKPOINT")
def evaluate_drift(before: Path, after: Path, card: Path | None) -> None:
    """Compare accuracy before and after tuning. BEFORE and AFTER are reports of `evaluate accuracy`
    on the model before and after, over the same questions; the answers are read from FILE.parts/
    next to each report. With --card the table is also added to the model card of CHECKPOINT.
    """
    with usage_errors():
        from dftserve.checkpoint import add_to_card
        from dftserve.evaluate.accuracy.drift import drift

        result = drift(before, after)
        for line in result.alone:
            click.echo(f"{line}; it is left out", err=True)
        click.echo(result.render())
        if card is not None:
            add_to_card(card, "Accuracy before and after tuning", result.explained())


@evaluate.command("benchmark", context_settings={"ignore_unknown_options": True})
@click.argument("model", metavar="MODEL_OR_URL")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[ANY vLLM FLAG]...")
@out_option
@click.option("--data", type=click.Path(path_type=Path), help="Default: DFTSERVE_DATA.")
@click.option("--tasks", default="story,essay,e2e", show_default=True, help="Names or files.")
@click.option("--grid", default="0,.25,.5,.75,1", show_default=True, metavar="DIVERSITIES")
@click.option("--limit", type=int, help="Prompts per task, 8 or more. Default: all.")
@click.option("--samples", type=int, help="Answers to each prompt. Default: set by each task.")
@click.option("--max-tokens", type=int, help="Per answer. Default: set by each task.")
@click.option("--body", default="{}", metavar="JSON", help="Extra fields of each request.")
@click.option("--model", "name", help="Name on the server. Default: the first listed.")
@key_option
@click.option("--concurrency", type=int, default=16, show_default=True)
@plots_option
def benchmark(
    flags: tuple[str, ...],
    grid: str,
    tasks: str,
    body: str,
    plots: Path | None,
    **options,
) -> None:
    """Run the Style Diversity Benchmark: stories, essays, and many wordings of one meaning.

    MODEL_OR_URL is as for `evaluate run`.
    """
    with usage_errors():
        from dftserve.evaluate.benchmark.run import Job, run
        from dftserve.gguf import resolve
        from dftserve.plots import png

        options["model"] = resolve(options["model"])
        job = Job(
            grid=_grid(grid),
            tasks=tuple(tasks.split(",")),
            body=_object(body, "--body"),
            serve_flags=flags,
            plots=plots,
            **options,
        )
        if plots is not None:
            png.check(plots)
        with answers_bar() as tick:
            run(job, click.echo, tick)


@evaluate.command("likelihood")
@click.argument("model")
@click.option("--anchors", required=True, type=click.Path(path_type=Path), help="Human anchors.")
@click.option("--answers", type=click.Path(path_type=Path), help="The OUT of an evaluation.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def likelihood(model: str, anchors: Path, answers: Path | None, as_json: bool) -> None:
    """Compute bits per byte of held-out human text under the causal language model MODEL (a folder,
    a .gguf file, or a name on the hub), and the surprisal of human text and of an evaluation's
    answers."""
    with usage_errors():
        model = model_of(model)
        from transformers.utils import logging

        from dftserve.evaluate.perplexity import likelihood_report

        logging.disable_progress_bar()
        result = likelihood_report(model, anchors, answers)
        click.echo(result.as_json() if as_json else result.render())


@evaluate.command("judge")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--human", required=True, type=click.Path(path_type=Path), help="Human answers.")
@click.option("--url", required=True, help="Server of the judge.")
@click.option("--judge", "model", required=True, help="Name on that server.")
@key_option
@click.option("--diversity", type=float, default=0.0, show_default=True, help="Level of the grid.")
@click.option("--words", type=int, default=120, show_default=True, help="Words of each text.")
@click.option("--rubric", type=click.Path(path_type=Path), help="Replaces the built-in one.")
@click.option("--max-tokens", type=int, default=1024, show_default=True, help="Per judgment.")
@click.option("--concurrency", type=int, default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def judge(
    out: Path,
    human: Path,
    url: str,
    model: str,
    key_variable: str | None,
    diversity: float,
    words: int,
    rubric: Path | None,
    max_tokens: int,
    concurrency: int,
    as_json: bool,
) -> None:
    """Let a model judge the answers in OUT against human answers to the same prompts (JMQ)."""
    with usage_errors():
        from dftserve.evaluate.preference.judge import RUBRIC, Judge, judged, read_rubric
        from dftserve.evaluate.preference.pairs import pairs
        from dftserve.serve import base_url

        judge_model = Judge(
            base_url=base_url(url),
            model=model,
            key_variable=key_variable,
            rubric=read_rubric(rubric) if rubric else RUBRIC,
            max_tokens=max_tokens,
            at_once=concurrency,
        )
        result = judged(pairs(out, human, diversity, words), judge_model, out / "judged.jsonl")
        click.echo(result.as_json() if as_json else result.render())


@evaluate.group("blind")
def blind() -> None:
    """A blind test by people: which text did a person write?"""


@blind.command("page")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--human", required=True, type=click.Path(path_type=Path), help="Human answers.")
@click.option(
    "--html", required=True, type=click.Path(dir_okay=False, path_type=Path), callback=writable
)
@click.option("--diversity", type=float, default=0.0, show_default=True, help="Level of the grid.")
@click.option("--words", type=int, default=120, show_default=True, help="Words of each text.")
@click.option("--question", default="person", show_default=True, help="person or preference.")
@click.option("--title", default="Two texts", show_default=True)
@click.option("--seed", type=int, required=True, help="One that nobody can guess: $RANDOM.")
def blind_page(
    out: Path,
    human: Path,
    html: Path,
    diversity: float,
    words: int,
    question: str,
    title: str,
    seed: int,
) -> None:
    """Write the test of the answers in OUT as one HTML file, and its key next to it."""
    with usage_errors():
        from dftserve.evaluate.preference.human_test import KEY, page
        from dftserve.evaluate.preference.pairs import pairs

        trials = pairs(out, human, diversity, words)
        page(trials, html, seed=seed, title=title, question=question)
        click.echo(f"{html}: {len(trials)} trials. Keep {html}{KEY} to yourself.")


@blind.command("verdict")
@click.argument("key", type=click.Path(path_type=Path))
@click.argument("answers", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--margin", type=float, default=0.10, show_default=True, help="Margin of parity.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def blind_verdict(key: Path, answers: tuple[Path, ...], margin: float, as_json: bool) -> None:
    """Join exported ANSWERS with the page's KEY, and test for parity."""
    with usage_errors():
        from dftserve.evaluate.preference.human_test import verdict

        result = verdict(answers, key, margin=margin)
        click.echo(result.as_json() if as_json else result.render())


@evaluate.group("anchors")
def evaluate_anchors() -> None:
    """Human text to measure against."""


@evaluate_anchors.command("build")
@click.argument("corpus", type=click.Path(path_type=Path))
@out_option
@click.option("--words", type=int, default=120, show_default=True, help="Words of each window.")
@click.option("--pieces", type=int, default=1, show_default=True, help="Windows per long work.")
@click.option("--seed", type=int, default=0, show_default=True)
def anchors_build(corpus: Path, out: Path, words: int, pieces: int, seed: int) -> None:
    """Build anchors from human text in CORPUS: .txt, .md, .rst, .jsonl (.gz), .json, .csv,
    .parquet, or a folder of these."""
    with usage_errors():
        from dftserve.evaluate import reference

        texts = reference.samples(corpus, words=words, pieces=pieces)
        works = len({each.source for each in texts})
        click.echo(f"{len(texts)} texts from {works} works.")
        built = reference.build(texts, words=words, seed=seed)
        reference.save(built, out)
        click.echo(reference.render(built))
        for warning in reference.warnings(built, works):
            click.echo(f"Warning: {warning}", err=True)


@evaluate_anchors.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
def anchors_inspect(folder: Path) -> None:
    """Show the contents of the anchors in FOLDER, and the score of human text."""
    with usage_errors():
        from dftserve.evaluate import reference

        click.echo(reference.render(reference.load(folder)))


def _grid(text: str) -> tuple[object, ...]:
    """Parse comma-separated numbers, or a JSON list of values that `diversity` accepts."""
    try:
        if text.lstrip().startswith("["):
            return tuple(parse_json(text, "--grid"))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--grid: got {text!r}; accepted: 0,.5,1 or a JSON list.") from None


def _numbers(text: str) -> tuple[float, ...]:
    grid = _grid(text)
    numbers = tuple(level for level in grid if isinstance(level, float | int))
    if len(numbers) < len(grid):
        raise ValueError(f"--grid: got {text!r}; accepted: numbers from 0 to 1.")
    return numbers


def _object(text: str, option: str) -> dict[str, object]:
    try:
        value = parse_json(text, option)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option}: got {text!r:.80}; accepted: a JSON object.")
    return value
