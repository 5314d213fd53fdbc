"""What the commands share: error handling, API keys and progress bars."""

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

from dftserve import __version__, atomic


def writable(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """A callback of options that name an output, whose type is a `click.Path` of a file or of a
    folder: refuses, before any work, what cannot be written."""
    if path is not None:
        is_file = isinstance(param.type, click.Path) and param.type.file_okay
        try:
            atomic.check_writable(path.parent if is_file else path)
        except OSError as error:
            raise click.BadParameter(str(error), ctx, param) from None
    return path


out_option = click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    callback=writable,
    metavar="DIR",
)

html_option = click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable,
    metavar="FILE",
    help="Also write an HTML page.",
)

key_option = click.option(
    "--api-key-env",
    "key_variable",
    metavar="NAME",
    help="The variable that holds the server's key. Default: OPENAI_API_KEY where set.",
)

plots_option = click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    callback=writable,
    metavar="DIR",
    help="Also write the report's plots as PNG files: pip install 'dftserve[plots]'.",
)


@contextlib.contextmanager
def answers_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; yields a function of the answers done and their total."""
    from tqdm import tqdm

    with tqdm(unit=" answers", disable=None, leave=False) as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tick


def api_key_of(variable: str, *, must: bool = False) -> str | None:
    """The API key in an environment variable; None if it is empty or not set.

    Args:
        must: refuse a variable without a key, as the user named it.

    Raises:
        click.UsageError: no key although there must be one, or a value that no HTTP header can
            carry.
    """
    key = os.environ.get(variable, "").strip()
    if must and not key:
        raise click.UsageError(f"--api-key-env: {variable} is not set; export it first.")
    if not (key.isascii() and key.isprintable()):
        # Sent unchanged, it would appear in an error message.
        raise click.UsageError(
            f"--api-key-env: the value of {variable} has non-ASCII or unprintable characters."
        )
    return key or None


def model_of(value: str) -> str:
    """Check a command's model argument; returns the folder of the conversion for a GGUF file.

    Call it before importing the modules that load models, which takes long.

    Raises:
        ValueError: neither a folder nor a name on the hub, or as `gguf.resolve`.
    """
    from dftserve.gguf import resolve
    from dftserve.hub import folder_of

    model = resolve(value)
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
"""The packages, by import name, that each extra of dftserve installs; the first match is used."""
OURS = "dftserve"
TRACEBACK = "DFTSERVE_TRACEBACK"
"""The environment variable that makes every error show its traceback."""
FAULT = 70
"""The exit code of a bug in dftserve (EX_SOFTWARE)."""
CLICKS = (click.ClickException, click.exceptions.Exit, click.Abort)


class Group(click.Group):
    """A group whose commands handle exceptions by `usage_errors`."""

    def invoke(self, ctx: click.Context) -> object:
        with usage_errors():
            return super().invoke(ctx)


class Fault(click.ClickException):
    """A bug in dftserve: shows the traceback, and asks for a report."""

    exit_code = FAULT

    def show(self, file: IO[Any] | None = None) -> None:
        trace = _traceback(self.__cause__) if self.__cause__ else ""
        click.echo(trace, nl=False, err=file is None, file=file)
        click.echo(
            "Error: this is a fault of dftserve, not of the command. Please report the lines "
            f"above, the command, and: dftserve {__version__}, Python {sys.version.split()[0]}.",
            err=file is None,
            file=file,
        )


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Convert exceptions to error messages of one line and exit codes.

    Exit code 2 for what we refuse; 1 for what is missing or fails, and for errors that a library
    raises on its input. Any other error in our code, such as a ValueError of an array operation, is
    a bug: it shows its traceback and ends with exit code 70. With `TRACEBACK` in the environment
    every error shows its traceback.
    """
    try:
        yield
    except CLICKS:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            raise  # click ends without a message.
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
            return click.ClickException(_message(error))
        case ValueError() if _is_raised_by_us(error):
            return click.UsageError(_message(error))
        case _ if _is_out_of_memory(error):
            return click.ClickException(
                "out of memory; ask for less at once (a smaller batch, corpus or model). "
                f"{_message(error):.300}"
            )
        case RuntimeError() if _is_raised_by_us(error) or library is not None:
            return click.ClickException(_message(error))
    if library is None or isinstance(error, ImportError):
        return Fault(f"{error}")
    return click.ClickException(
        f"{library} cannot use what it was given: {_message(error)} ({type(error).__name__}). "
        "Check the files and names of this command: one is damaged, or of another kind; "
        f"{TRACEBACK}=1 shows where."
    )


def _is_raised_by_us(error: Exception) -> bool:
    """Whether a `raise` statement of this package raised it. Compiled code such as numpy or `zip`
    leaves no frame, so the last frame is ours too, but at another instruction."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or _package(at) != OURS:
        return False
    return at.tb_frame.f_code.co_code[at.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises a RuntimeError for this, on a CPU without a specific class."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in ("out of memory", "can't allocate memory"))
    return isinstance(error, MemoryError)


def _traceback(error: BaseException) -> str:
    """The traceback, with those of all causes and contexts, even after `from None`."""
    at: BaseException | None = error
    while at is not None:
        at.__suppress_context__ = False
        at = at.__cause__ or at.__context__
    return "".join(traceback.format_exception(error))


def _message(error: BaseException) -> str:
    return f"{error}".strip() or f"{type(error).__name__}, without a message; see its own log"


def _missing(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if package in names), None)
    advice = f"pip install 'dftserve[{extra}]'" if extra else "install what is missing"
    if isinstance(error, ModuleNotFoundError) and package:
        return f"this command needs the package {package}, which is not installed: {advice}."
    return f"an installed package cannot be loaded ({_message(error)}): {advice}, or a newer one."


def _raised_by(error: BaseException) -> str | None:
    """The library in which an error was raised; None where that is this package."""
    at, library = error.__traceback__, ""
    while at is not None:
        library, at = _package(at), at.tb_next
    # Compiled code leaves no frame, but the exception's class has the library's module.
    if library in ("", OURS) and type(error).__module__ != "builtins":
        library = type(error).__module__.partition(".")[0]
    return None if library in ("", OURS, "builtins") else library


def _package(at: TracebackType) -> str:
    names = at.tb_frame.f_globals
    name = names.get("__name__", "")
    if name == "__main__":  # As with `python -m dftserve.cli`.
        name = getattr(names.get("__spec__"), "name", name)
    return str(name).partition(".")[0]
