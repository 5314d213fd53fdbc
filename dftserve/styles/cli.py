"""The `dftserve style` command.

Thin, like `dftserve.cli`: each command imports the modules that do its work when it is called.
"""

from pathlib import Path

import click

from dftserve.commandline import (
    answers_bar,
    html_option,
    key_option,
    model_of,
    out_option,
    plots_option,
    usage_errors,
)


@click.group()
def style() -> None:
    """Style profiles: phrases that a model over-uses, and a tilt toward a corpus."""


@style.command("build")
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option(
    "--model",
    required=True,
    help="A folder, a .gguf file, or a name on the hub. Only the tokenizer is read.",
)
@out_option
@click.option(
    "--answers",
    type=click.Path(path_type=Path),
    help="The model's answers: a .jsonl of `prompt` and `response`, or the OUT of an evaluation. "
    "With --server: the folder in which to store them.",
)
@click.option("--server", metavar="URL", help="Ask this server for the answers.")
@click.option("--prompts", type=click.Path(path_type=Path), help="For --server: .txt or .jsonl.")
@click.option("--served-as", metavar="NAME", help="The model on the server. Default: its first.")
@key_option
@click.option("--name", help="The profile's name. Default: the name of --out.")
@click.option(
    "--phrases",
    type=click.Path(path_type=Path),
    help="A list of known phrases. Default: the built-in list.",
)
@click.option("--samples", type=int, default=8, show_default=True, help="Answers to each prompt.")
@click.option("--max-tokens", type=int, default=400, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--concurrency", type=int, default=16, show_default=True)
@click.option(
    "--strength",
    type=float,
    default=1.0,
    show_default=True,
    help="For requests that give none.",
)
@click.option(
    "--max-kl",
    type=float,
    default=0.05,
    show_default=True,
    help="Nats per token, for requests that give none.",
)
@click.option(
    "--false-discoveries",
    type=float,
    default=0.05,
    show_default=True,
    help="Accepted share of false discoveries among the phrases.",
)
@click.option("--most", type=int, default=2000, show_default=True, help="Maximum phrases.")
def style_build(false_discoveries: float, most: int, **options) -> None:
    """Build a profile from CORPUS, texts by people: .txt, .md, .rst, .jsonl (.gz), .json, .csv,
    .parquet, a folder.

    If it is stopped while asking the server, the same command resumes there.
    """
    with usage_errors():
        from dftserve.styles.build import Job, build
        from dftserve.styles.counts import Choice
        from dftserve.styles.report import as_text, inspect

        options["model"] = model_of(options["model"])
        choice = Choice(false_discoveries=false_discoveries, most=most)
        job = Job(choice=choice, **options)
        with answers_bar() as tick:
            stored = build(job, lambda line: click.echo(line, err=True), tick)
        click.echo(as_text(inspect(stored)))


@style.command("inspect")
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--json", "in_json", is_flag=True, help="One JSON document.")
@html_option
@plots_option
def style_inspect(profile: Path, in_json: bool, html: Path | None, plots: Path | None) -> None:
    """Show the contents of the style profile in the folder PROFILE, and the rounds of its fit."""
    with usage_errors():
        from dftserve import atomic
        from dftserve.plots import png
        from dftserve.styles.profile import load
        from dftserve.styles.report import as_html, as_json, as_text, figures, inspect

        if plots is not None:
            png.check(plots)
        summary = inspect(load(profile))
        if plots is not None:
            png.write(figures(summary), plots)
        if html is not None:
            atomic.write_text(html, as_html(summary))
        click.echo(as_json(summary) if in_json else as_text(summary))


@style.command("fit", context_settings={"ignore_unknown_options": True})
@click.argument("server", metavar="MODEL_OR_URL")
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED, metavar="[ANY vLLM FLAG]...")
@click.option("--profile", required=True, type=click.Path(path_type=Path))
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help=".txt or .jsonl.")
@out_option
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option(
    "--anchors", type=click.Path(path_type=Path), help="To report measures that are not fitted."
)
@click.option("--samples", type=int, default=8, show_default=True, help="Answers to each prompt.")
@click.option("--max-tokens", type=int, default=400, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--served-as", metavar="NAME", help="The model on the server. Default: its first.")
@key_option
@click.option("--concurrency", type=int, default=16, show_default=True)
@plots_option
def style_fit(plots: Path | None, **options) -> None:
    """Correct a profile's phrases from what MODEL_OR_URL writes with it, and freeze the result.

    A model (a folder, a .gguf file or a folder with one, or a name on the hub) is served afresh
    for each round. A server at a URL must be restarted with DFTSERVE_STYLES=OUT/styles for each
    round; then run the same command again to continue.
    """
    with usage_errors():
        from dftserve.gguf import resolve
        from dftserve.plots import png
        from dftserve.styles.fit import REPORT, Job, fit
        from dftserve.styles.report import fit_figures

        options["server"] = resolve(options["server"])
        job = Job(**options)
        if plots is not None:
            png.check(plots)
        with answers_bar() as tick:
            result = fit(job, lambda line: click.echo(line, err=True), tick)
        if plots is not None:
            png.write(fit_figures(result.stored.profile, result.fitted, result.rates), plots)
        place = job.out / result.stored.profile.name
        click.echo(
            f"{place}: the frozen profile, after {len(result.rounds)} rounds ({result.ended})."
        )
        click.echo(f"{job.out / REPORT} has its rounds.", err=True)
