"""The `dftserve` command.

    dftserve serve path/to/checkpoint --default-diversity 0.5 --max-model-len 4096
    dftserve doctor --url http://127.0.0.1:8000
    dftserve chat

Each subcommand only calls the module that does the work, and imports it when it runs.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dftserve import __version__
from dftserve.commandline import (
    Group,
    api_key_of,
    html_option,
    key_option,
    model_of,
    out_option,
    usage_errors,
)
from dftserve.evaluate.cli import evaluate
from dftserve.styles.cli import style


@click.group(cls=Group)
@click.version_option(__version__, prog_name="dftserve")
def main() -> None:
    """A diversity field for vLLM, fine-tuning toward a distribution, and their measures.

    MODEL is a folder of safetensors, a .gguf file or a folder with one (converted once, into a
    cache folder), or a name on the Hugging Face hub.
    """


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[ANY vLLM FLAG]...")
@click.option(
    "--default-diversity",
    metavar="NUMBER|OBJECT|checkpoint|human",
    help="For requests without the field; `checkpoint`: what its dft.json suggests; `human`: the "
    "target entropy that it states. Default: off.",
)
@click.option(
    "--policy",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A YAML file of caps: docs/operations.md.",
)
@click.option(
    "--styles",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder of style profiles: docs/styles.md.",
)
@click.option("--dry-run", is_flag=True, help="Print the command without running it.")
def serve(
    model: str,
    flags: tuple[str, ...],
    default_diversity: str | None,
    policy: Path | None,
    styles: Path | None,
    dry_run: bool,
) -> None:
    """Serve MODEL with vLLM, in this terminal.

    MODEL is a folder, a .gguf file or a folder with one (converted to safetensors once, into a
    cache folder, and served under the name you gave), or a name on the Hugging Face hub.

    Prints the vLLM command and runs it. All other flags are passed to vLLM unchanged:
    `vllm serve --help=all` lists them.
    """
    from dftserve.serve import launch

    if model.startswith("-"):
        raise click.UsageError(f"got {model!r} first; accepted: MODEL first, then vLLM's flags.")
    with usage_errors():
        command = launch(
            model, flags, default_diversity=default_diversity, policy=policy, styles=styles
        )
    click.echo(command.shell_line(), err=True)
    if not dry_run:
        os.execvpe(command.argv[0], command.argv, {**os.environ, **command.environment})


@main.command()
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--model", help="The model's name on the server. Default: its first.")
@key_option
@click.option("--temperature", type=float, help="Default: the server's.")
def chat(url: str, model: str | None, key_variable: str | None, temperature: float | None) -> None:
    """Chat with a server and change the diversity as you go.

    Lines may come from a pipe: then the exit code is 1 if one of them failed.
    """
    from dftserve.chat import chat
    from dftserve.openai_client import Server
    from dftserve.serve import base_url

    # Show the server's errors immediately, not after silent retries.
    with usage_errors():
        server = Server(base_url(url), key_variable, retries=0)
    all_done = chat(server, model=model, temperature=temperature)
    if not (all_done or sys.stdin.isatty()):
        raise SystemExit(1)


@main.command()
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True, metavar="NAME")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8100,
    show_default=True,
    help="The local port of the page. 0: any free port.",
)
def playground(url: str, api_key_env: str, port: int) -> None:
    """Open a web page with one prompt and two settings side by side.

    Only this machine can reach the page, and the page never gets the API key. From another machine,
    forward the port: `ssh -L 8100:127.0.0.1:8100 HOST`.
    """
    from dftserve.playground import server
    from dftserve.serve import root_of

    upstream = server.Upstream(f"{root_of(url)}/v1", api_key_of(api_key_env), api_key_env)
    with server.listening(port) as listener:
        click.echo(f"Open http://{server.HOST}:{listener.getsockname()[1]}/ (Ctrl+C ends it)")
        server.run(upstream, listener)


@main.command()
@click.option("--url", help="Also ask the server at this address; it decides the exit code.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="The variable that holds the server's key. Default: OPENAI_API_KEY where set.",
)
@click.option(
    "--wheel",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Only check whether this .whl of vLLM has what the plug-in needs.",
)
@click.option(
    "--vllm",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The same for the vLLM in this folder, an installation or a checkout.",
)
@click.option(
    "--styles",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also check these style profiles. Default: those of DFTSERVE_STYLES.",
)
@click.option("--model", help="The model they must fit: a folder, or a name on the hub.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(
    url: str | None,
    api_key_env: str | None,
    wheel: Path | None,
    vllm: Path | None,
    styles: Path | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Report what is installed, what will run, and what is wrong.

    The exit code is 1 if there is an error; warnings do not count. With --url only the server
    decides it: errors on this machine, which may not be the server's, become warnings.
    """
    from dftserve import doctor
    from dftserve.spec import STYLES_VARIABLE

    elsewhere = [path for path in (wheel, vllm) if path is not None]
    if len(elsewhere) + (url is not None) > 1:
        raise click.UsageError("got several of --url, --wheel and --vllm; accepted: one of them.")
    if elsewhere:
        with usage_errors():
            findings = doctor.judge(elsewhere[0])
    else:
        environment = {
            **os.environ,
            **({STYLES_VARIABLE: str(styles)} if styles is not None else {}),
        }
        if model is not None and not environment.get(STYLES_VARIABLE):
            accepted = f"it with --styles DIR, or if {STYLES_VARIABLE} is set"
            raise click.UsageError(f"--model: got {model!r} and no styles; accepted: {accepted}.")
        findings = doctor.examine(environment, model)
    if url is not None:
        key = api_key_of(api_key_env or "OPENAI_API_KEY", must=api_key_env is not None)
        with usage_errors():
            findings = [*doctor.aside(findings), *doctor.ask(url, key)]
    click.echo(doctor.as_json(findings) if as_json else doctor.as_text(findings))
    raise SystemExit(doctor.exit_code(findings))


@main.command()
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True)
@click.option("--model", help="The model's name on the server. Default: its first.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="The variable that holds the server's key. Default: OPENAI_API_KEY where set.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="For one answer; a slow server needs more, since 8 are asked at once.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document, to paste in an issue.")
def verify(
    url: str, model: str | None, api_key_env: str | None, timeout: float, as_json: bool
) -> None:
    """Send a running server a few short requests, and report whether the field works.

    The exit code is 1 if there is an error. The report contains no text and no key.
    """
    from dftserve import doctor
    from dftserve.openai_client import Server
    from dftserve.serve import base_url

    key = api_key_of(api_key_env or "OPENAI_API_KEY", must=api_key_env is not None)
    click.echo(
        f"Sending at most {doctor.REQUESTS} requests, of {doctor.MOST_TOKENS:,} tokens in all; "
        "this takes minutes if the server runs on a CPU.",
        err=True,
    )
    with usage_errors():
        server = Server(
            base_url(url),
            api_key_env,
            retries=1,
            timeout_s=timeout,
            if_slow="give it longer (--timeout), or ask when it has less to do",
        )
        report = doctor.verify(server, model, key)
    click.echo(report.as_json() if as_json else doctor.as_text(report.findings))
    raise SystemExit(doctor.exit_code(report.findings))


@main.command()
@click.argument("folder", default="build/demo", type=click.Path(file_okay=False, path_type=Path))
def demo(folder: Path) -> None:
    """Sample a small model at three diversities, tune it, sample it again; results go to FOLDER."""
    with usage_errors():
        try:
            from dftserve.demo.run import demo
        except ModuleNotFoundError as error:
            wanted = "pip install 'dftserve[train,eval,demo,serve]'"
            raise RuntimeError(f"the demo needs {error.name}: {wanted}.") from None
        demo(folder)


@main.group()
def target() -> None:
    """Build and inspect target stores: what a model is tuned toward."""


def _corpus_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that select the texts a model learns from."""
    options = (
        click.argument("corpus", type=click.Path(path_type=Path)),
        click.option(
            "--model",
            required=True,
            help="The model that will be tuned: a folder, a .gguf file, or a name on the hub.",
        ),
        click.option(
            "--recipe", required=True, metavar="NAME|FILE", help="A shipped one, or your own."
        ),
        # A finished store may be on a read-only disk, so the commands check their folders.
        click.option(
            "--out",
            required=True,
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
        ),
        click.option(
            "--set",
            "values",
            multiple=True,
            metavar="KEY=VALUE",
            help="For the recipe; corpus.FIELD for its filters.",
        ),
        click.option(
            "--heldout", type=float, default=0.05, show_default=True, help="Share of texts."
        ),
        click.option(
            "--heldout-from",
            type=click.Path(path_type=Path),
            help="Use these texts instead, such as a test set. Copies of them in CORPUS are not "
            "trained on.",
        ),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--max-tokens", type=int, help="Of one document. Default: no limit."),
        click.option(
            "--skip-bad",
            is_flag=True,
            help="Leave out conversations that the chat template refuses.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@target.command("build")
@_corpus_options
@click.option(
    "--engine",
    default="local",
    show_default=True,
    metavar="local|ray|ray://HOST:PORT",
    help="Where it runs: on this machine, or on the workers of a Ray cluster.",
)
@click.option(
    "--processes",
    type=int,
    help="Default: 1; on Ray, one per GPU, or per machine without GPUs.",
)
@click.option("--plan", is_flag=True, help="Only estimate time and space, from the first batches.")
@click.option("--json", "as_json", is_flag=True, help="The plan as one JSON document.")
def target_build(values: tuple[str, ...], plan: bool, as_json: bool, **options) -> None:
    """Build a target store from CORPUS: .txt, .md, .rst, .jsonl (.gz), .json, .csv, .parquet,
    a folder, or a .yaml of several.

    The same command resumes where it was stopped.
    """
    with usage_errors():
        named = _named(values)
        _check_names(options, named)
        options["model"] = model_of(options["model"])
        from dftserve.targets.run import Job, build, estimate

        job = Job(values=named, **options)
        if plan or as_json:
            planned = estimate(job, _said)
            click.echo(planned.as_json() if as_json else planned.as_text())
            return
        try:
            build(job, _said)
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None  # `build` has printed a message.


def _said(line: str) -> None:
    click.echo(line, err=True)


def _check_names(options: Mapping[str, Any], values: Mapping[str, str]) -> None:
    """Check arguments before importing the modules that do the work, which takes long."""
    from dftserve.corpus.sources import check_all
    from dftserve.targets import recipe

    check_all(options["corpus"], options["heldout_from"])
    recipe.load(options["recipe"], values)
    corpus, out = options["corpus"], options["out"]
    if out.exists() and out.samefile(corpus):
        raise ValueError(f"--out: got {out}, the corpus itself; give a folder for the store.")


@target.command("students")
@_corpus_options
@click.option("--folds", type=int, default=3, show_default=True)
@click.option(
    "--train",
    "training",
    multiple=True,
    metavar="KEY=VALUE",
    help="For the trainer, such as epochs=2 or lora.rank=16.",
)
def target_students(values: tuple[str, ...], training: tuple[str, ...], folds: int, **options):
    """Tune a model for each fold of CORPUS on the other folds, for the recipe calibrated.

    Give the same options as to `target build`. The same command resumes where it was stopped.
    """
    with usage_errors():
        named, trained = _named(values), _named(training, "--train")
        _check_names(options, named)
        options["model"] = model_of(options["model"])
        from dftserve.targets.run import Job
        from dftserve.train.cross_fit import cross_fit

        job = Job(values=named, **options)
        click.echo(cross_fit(job, folds=folds, training=trained, say=_said))


@target.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", help="Decodes the examples, as for build. Default: token ids.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@html_option
def target_inspect(folder: Path, model: str | None, as_json: bool, html: Path | None) -> None:
    """Show what the target store FOLDER contains."""
    with usage_errors():
        model = model_of(model) if model is not None else None
        from dftserve.targets.run import inspect

        click.echo(inspect(folder, model=model, html=html, as_json=as_json))


@target.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def target_verify(folder: Path) -> None:
    """Compare every byte of the target store FOLDER with its manifest."""
    from dftserve.targets.run import verify

    with usage_errors():
        click.echo(verify(folder))


@main.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="KEY=VALUE",
    help="As in the YAML; a.b for nested keys.",
)
@click.option("--plan", is_flag=True, help="Only estimate time and memory; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="The plan as one JSON document.")
def train(config: Path | None, values: tuple[str, ...], plan: bool, as_json: bool) -> None:
    """Tune a model toward a target store: CONFIG is a YAML of settings, --set overrides it.

    Needs `model` (a folder, a .gguf file, or a name on the hub), `targets` and `output`. The same
    command resumes where it was stopped. Under torchrun it uses all processes.
    """
    with usage_errors():
        named = _named(values)
        from dftserve.train import config as configs
        from dftserve.train import processes

        with processes.together():
            wanted = configs.load(config, named)
            wanted = replace(wanted, model=model_of(wanted.model))
        if plan or as_json:
            from dftserve.train.plan import plan_of

            if processes.is_first():
                click.echo("Measuring two batches; on a CPU this may take minutes.", err=True)
            planned = plan_of(wanted)
            if processes.is_first():
                click.echo(planned.as_json() if as_json else planned.as_text())
            return
        from dftserve.train.run import train

        final = train(wanted)
        if processes.is_first():
            click.echo(final)


main.add_command(evaluate)
main.add_command(style)


@main.group()
def checkpoint() -> None:
    """Verify checkpoints, interpolate their weights, and scale adapters."""


@checkpoint.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint_verify(folder: Path) -> None:
    """Compare every file of the checkpoint FOLDER with its checksum."""
    from dftserve.checkpoint import verify

    with usage_errors():
        found = verify(folder)
        click.echo(f"{folder}: {found.files} files, all match their checksums.")
        if found.beside:
            click.echo(f"Not checked, added by the hub: {', '.join(found.beside)}.")


@checkpoint.command("interpolate")
@click.argument("tuned")
@click.argument("other")
@click.option("--share", default=0.5, show_default=True, help="Of TUNED, above 0 and below 1.")
@out_option
def checkpoint_interpolate(tuned: str, other: str, share: float, out: Path) -> None:
    """Write a model between TUNED and OTHER to DIR: each weight is SHARE times that of TUNED plus
    1 - SHARE times that of OTHER.

    Both are models of one architecture with the same tokens, such as a tuned model and the one
    that it was tuned from.
    """
    with usage_errors():
        tuned, other = model_of(tuned), model_of(other)
        from transformers.utils import logging

        from dftserve.train.interpolate import interpolate

        logging.disable_progress_bar()  # Of loading and saving weights.
        interpolate(tuned, other, share=share, out=out)
        click.echo(out)


@checkpoint.command("scale")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--strengths", default=".25,.5,.75,1", show_default=True, metavar="NUMBERS")
@out_option
def checkpoint_scale(adapter: Path, strengths: str, out: Path) -> None:
    """Write the LoRA ADAPTER at several strengths to DIR, as separate adapters."""
    from dftserve.adapter_strengths import flags, scale

    with usage_errors():
        folders = scale(adapter, _numbers(strengths), out)
        click.echo(flags(folders))


def _numbers(text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"--strengths: got {text!r:.80}; accepted: such as .25,.5,1.") from None


def _named(values: tuple[str, ...], option: str = "--set") -> dict[str, str]:
    named = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals):
            raise ValueError(f"{option}: got {value!r}; accepted: KEY=VALUE.")
        named[name] = text
    return named


if __name__ == "__main__":
    main(prog_name="dftserve")
