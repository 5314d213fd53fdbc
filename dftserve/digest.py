"""What the bytes of files and texts are, in one word."""

import os
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from dftserve.bounded_files import chunks, open_file

LARGEST = 1 << 40
"""Bytes of a file of weights or targets; beyond it lie sparse files that nobody wrote."""
SAMPLES, SAMPLE_BYTES = 1024, 1 << 13
"""Parts of a large file that `sampled_digest` reads, and the size of each: 8 MiB in all."""
_sampled: dict[tuple[int, int, int, int], str] = {}


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


def sampled_digest(path: Path) -> str:
    """BLAKE3 of a file's size and bytes; of a large one, of parts at equal distances.

    It is computed once a process for a file that has not changed since (inode, size, time of its
    last change). It tells files of weights apart that were trained or cast otherwise, which differ
    nearly everywhere; a change between two parts of a large file is not seen.

    Raises:
        ValueError: no regular file, or more than `LARGEST` bytes.
        OSError: as the system raised it.
    """
    with open_file(path, largest=LARGEST) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        key = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
        if key in _sampled:
            return _sampled[key]
        digest = blake3(str(size).encode())
        step = max(SAMPLE_BYTES, -(-(size - SAMPLE_BYTES) // (SAMPLES - 1)))
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return _sampled.setdefault(key, digest.hexdigest())


def text_digest(text: str) -> str:
    """BLAKE3 of a text in UTF-8."""
    return blake3(text.encode(errors="surrogatepass")).hexdigest()


def joined_digest(digests: Sequence[str]) -> str:
    """BLAKE3 of several, in their order."""
    return blake3(" ".join(digests).encode()).hexdigest()
