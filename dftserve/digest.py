"""What a file's bytes are, in one word."""

from pathlib import Path

from blake3 import blake3

from dftserve.bounded_files import chunks, open_file

LARGEST = 1 << 40
"""Bytes of a file of weights or targets; beyond it lie sparse files that nobody wrote."""


def digest_of(path: Path, *, within: Path | None = None, largest: int = LARGEST) -> str:
    """BLAKE3 of a file; of one that belongs to the folder `within`, only where it lies in it.

    Raises:
        ValueError: no regular file, outside of `within`, or more than `largest` bytes.
        OSError: as the system raised it.
    """
    digest = blake3()
    with open_file(path, within=within, largest=largest) as file:
        for chunk in chunks(file, path, largest=largest):
            digest.update(chunk)
    return digest.hexdigest()
