"""The `--model` option of the benches that run a real model."""

from pathlib import Path

import click

from dftserve.commandline import model_of


def _checked(context: click.Context, parameter: click.Parameter, value: str) -> Path:
    try:
        return Path(model_of(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


model_option = click.option(
    "--model",
    required=True,
    callback=_checked,
    help="A model's folder, its name on the Hugging Face hub, or a GGUF file.",
)
