"""What the commands share: how a mistake ends, where a key comes from, and how far one is."""

import contextlib
import dis
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
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
OURS = "dftserve"
TRACEBACK = "DFTSERVE_TRACEBACK"
"""The environment variable with which every error shows where it was raised."""
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
        told = _traceback(self.__cause__) if self.__cause__ else ""
        click.echo(told, nl=False, err=file is None, file=file)
        click.echo(
            "Error: this is a fault of dftserve, not of what was asked. Please report the lines "
            f"above, the command, and: dftserve {__version__}, Python {sys.version.split()[0]}.",
            err=file is None,
            file=file,
        )


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """What we refuse ends in one line and exit code 2; what is missing or fails, in exit code 1.

    So does what a library raises of what it was given. An error of our own that is none of these,
    such as a ValueError of an operation on arrays, shows its traceback, says that it is ours, and
    ends in exit code 70. With `TRACEBACK` in the environment every end has its traceback.
    """
    try:
        yield
    except CLICKS:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # click ends quietly.
        end = _end_of(error)
        if isinstance(end, Fault):
            raise end from error
        if os.environ.get(TRACEBACK, "") not in ("", "0"):
            click.echo(_traceback(error), nl=False, err=True)
        raise end from None


def _end_of(error: Exception) -> click.ClickException:
    library = _raised_by(error)
    match error:
        case ImportError() if (error.name or "").partition(".")[0] != "dftserve":
            return click.ClickException(_missing(error))
        case OSError():
            return click.ClickException(_said(error))
        case ValueError() if _is_said_by_us(error):
            return click.UsageError(_said(error))
        case _ if _is_out_of_memory(error):
            return click.ClickException(
                "out of memory; ask for less at once (a smaller batch, corpus or model). "
                f"{_said(error):.300}"
            )
        case RuntimeError() if _is_said_by_us(error) or library is not None:
            return click.ClickException(_said(error))
    if library is None or isinstance(error, ImportError):
        return Fault(f"{error}")
    return click.ClickException(
        f"{library} cannot use what it was given: {_said(error)} ({type(error).__name__}). "
        "Check the files and names of this command: one is damaged, or of another kind; "
        f"{TRACEBACK}=1 shows where."
    )


def _is_said_by_us(error: Exception) -> bool:
    """Whether a `raise` of this package made it: numpy, `zip` and the like leave no frame of their
    own, so that the last one is ours, and stands at another instruction."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or _package(at) != OURS:
        return False
    return at.tb_frame.f_code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_out_of_memory(error: Exception) -> bool:
    """Torch says it by a RuntimeError, on a CPU without a class of its own."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ("out of memory", "can't allocate memory"))
    return isinstance(error, MemoryError)


def _traceback(error: BaseException) -> str:
    """With those of the errors that it was made from, `from None` or not."""
    at: BaseException | None = error
    while at is not None:
        at.__suppress_context__ = False
        at = at.__cause__ or at.__context__
    return "".join(traceback.format_exception(error))


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
    at, library = error.__traceback__, ""
    while at is not None:
        library, at = _package(at), at.tb_next
    # Compiled code leaves no frame of its own: its exceptions tell where they are from.
    if library in ("", OURS) and type(error).__module__ != "builtins":
        library = type(error).__module__.partition(".")[0]
    return None if library in ("", OURS, "builtins") else library


def _package(at: TracebackType) -> str:
    names = at.tb_frame.f_globals
    name = names.get("__name__", "")
    if name == "__main__":  # As of `python -m dftserve.cli`.
        name = getattr(names.get("__spec__"), "name", name)
    return str(name).partition(".")[0]
