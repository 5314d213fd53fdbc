"""Failed writes of the libraries that save models: each has an error of its own for a full disk."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

OF_TORCH = ("inline_container", "PytorchStreamWriter", "iostream error")
"""Names in the message of a RuntimeError that torch raises when it cannot write a file."""
OF_RUST = re.compile(r"\(os error \d+\)")
"""How Rust names an error of the operating system. tokenizers raises it as a plain Exception."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the errors that safetensors, tokenizers and torch raise for a failed write into an
    OSError.

    Raises:
        OSError: names the folder and contains the original message.
    """
    try:
        yield
    except Exception as error:
        if not _is_failed_write(error):
            raise
        message = " ".join(str(error).split())
        raise OSError(f"{folder} cannot be written: {message}") from None


def _is_failed_write(error: Exception) -> bool:
    if isinstance(error, SafetensorError):
        return True
    if isinstance(error, RuntimeError):
        return any(name in str(error) for name in OF_TORCH)
    return type(error) is Exception and OF_RUST.search(str(error)) is not None
