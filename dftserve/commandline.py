"""What the commands share: how a mistake ends, where a key comes from, and how far one is."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from dftserve import __version__

key_option = click.option(
    "--api-key-env",
    "key_variable",
    metavar="NAME",
    help="The variable that holds the server's key. Default: OPENAI_API_KEY where set.",
)

plots_option = click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also the report's figures as PNG files: pip install 'dftserve[plots]'.",
)


@contextlib.contextmanager
def answers_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, moved by how many answers there are, of how many."""
    from tqdm import tqdm

    with tqdm(unit=" answers", disable=None, leave=False) as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tick


def api_key_of(variable: str, *, must: bool = False) -> str | None:
    key = os.environ.get(variable, "").strip()
    if must and not key:
        raise click.UsageError(f"--api-key-env: {variable} is not set; export it first.")
    if not (key.isascii() and key.isprintable()):
        # Sent as it is, it would end up in an error message.
        raise click.UsageError(f"--api-key-env: {variable} holds more than printable ASCII.")
    return key or None


def model_of(given: str) -> str:
    """What a command was given as a model, there: a GGUF file as the folder of its conversion.

    Before the modules that load models are imported, which takes long.

    Raises:
        ValueError: neither a folder nor a name that the hub gives, or as `gguf.resolve`.
    """
    from dftserve.gguf import resolve
    from dftserve.hub import folder_of

    model = resolve(given)
    folder_of(model)
    return model


EXTRAS = {
    "train": (
        *("transformers", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "yaml"),
        *("datasketch", "py3langid", "pyarrow", "scipy", "blake3", "tqdm", "jinja2", "openai"),
        *("gguf", "psutil"),
    ),
    "eval": ("sklearn", "harper"),
    "meaning": ("sentence_transformers",),
    "serve": ("vllm", "dftserve_vllm", "psutil", "rich"),
    "plots": ("matplotlib",),
    "playground": ("starlette", "uvicorn", "httpx"),
}
"""Which extra of dftserve brings a package, by the name that is imported: the first that does."""
FAULT = 70
"""The exit code of a fault of ours (EX_SOFTWARE)."""
CLICKS = (click.ClickException, click.exceptions.Exit, click.Abort)


class Group(click.Group):
    """Commands that end as `usage_errors` says, whatever is raised in them."""

    def invoke(self, ctx: click.Context) -> object:
        with usage_errors():
            return super().invoke(ctx)


class Fault(click.ClickException):
    """What should not happen: the traceback, and what to do with it."""

    exit_code = FAULT

    def show(self, file: IO[Any] | None = None) -> None:
        cause = self.__cause__
        told = traceback.format_exception(cause) if cause else []
        click.echo("".join(told), nl=False, err=file is None, file=file)
        click.echo(
            "Error: this is a fault of dftserve, not of what was asked. Please report the lines "
            f"above, the command, and: dftserve {__version__}, Python {sys.version.split()[0]}.",
            err=file is None,
            file=file,
        )


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What we refuse ends in one line and exit code 2; what is missing or fails, in exit code 1.

    So does what a library raises of what it was given. An error of our own that is none of these
    shows its traceback, says that it is ours, and ends in exit code 70.
    """
    try:
        yield
    except CLICKS:
        raise
    except ValueError as error:
        raise click.UsageError(_said(error)) from None
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "dftserve":
            raise Fault(f"{error}") from error
        raise click.ClickException(_missing(error)) from None
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # click ends quietly.
        raise click.ClickException(_said(error)) from None
    except MemoryError:
        raise click.ClickException(
            "out of memory; ask for less at once (a smaller batch, corpus or model)."
        ) from None
    except Exception as error:
        if (library := _raised_by(error)) is None:
            raise Fault(f"{error}") from error
        raise click.ClickException(
            f"{library} cannot use what it was given: {_said(error)} ({type(error).__name__}). "
            "Check the files and names of this command: one is damaged, or of another kind."
        ) from None


def _said(error: BaseException) -> str:
    return f"{error}".strip() or f"{type(error).__name__}, without a word more; see its own log"


def _missing(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
    advice = f"pip install 'dftserve[{extra}]'" if extra else "install what is missing"
    if isinstance(error, ModuleNotFoundError) and package:
        return f"this command needs the package {package}, which is not installed: {advice}."
    return f"an installed package cannot be loaded ({_said(error)}): {advice}, or a newer one."


def _raised_by(error: BaseException) -> str | None:
    """The library in which an error was raised; None where that is this package."""
    at, module = error.__traceback__, ""
    while at is not None:
        module = str(at.tb_frame.f_globals.get("__name__", ""))
        at = at.tb_next
    library = module.partition(".")[0]
    # Compiled code leaves no frame of its own: its exceptions tell where they are from.
    if library in ("", "dftserve") and type(error).__module__ != "builtins":
        library = type(error).__module__.partition(".")[0]
    return None if library in ("", "dftserve", "builtins") else library
