"""A checkpoint: an ordinary Hugging Face folder that says what it is and whether it is whole.

final/
  config.json, model.safetensors, tokenizer…   what every loader reads
  dft.json         what it promises: recipe, entropies, suggested diversity (`spec.Promise`)
  run.json         how it was made: resolved settings, argv, versions, git SHA, fingerprints
  README.md        the same for a reader
  checksums.json   BLAKE3 of every other file

A checkpoint may come from anywhere: `verify` opens regular files that lie in its folder and nothing
else (`bounded_files`), and names what is there without a checksum.
"""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dftserve import __version__, atomic
from dftserve.bounded_files import (
    FileError,
    advised,
    decoded,
    entries,
    inner_path,
    kind,
    read_bytes,
    read_json,
)
from dftserve.digest import digest_of, joined_digest, text_digest
from dftserve.spec import CHECKSUMS, Promise

RUN, CARD = "run.json", "README.md"
FINAL, RUN_SETTINGS = "final", "settings.json"
"""Of the folder of a run: its checkpoint, and what the run begins with."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "safetensors")
LARGEST_CHECKSUMS = LARGEST_CARD = 1 << 20
MOST_FILES = 10_000
COPY = "copy the checkpoint anew"
NAMED = 5
"""Files that an error names; the rest are counted."""
HUB_LEAVES = re.compile(r"\.gitattributes|\.cache/huggingface/.+")
"""What the Hugging Face hub and its client put beside the files of a repository; no loader reads
it."""
_BLAKE3 = re.compile(r"[0-9a-f]{64}")
TORCH_WRITERS = ("inline_container", "PytorchStreamWriter", "iostream error")
"""What torch names where it could not write a file."""


class CheckpointError(ValueError):
    """A checkpoint that is not what was written: which file, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a checkpoint was made."""

    settings: Mapping[str, Any]
    argv: tuple[str, ...]
    data: Mapping[str, Any]
    """Fingerprints of the target store and of the model that training started from."""
    versions: Mapping[str, str]
    git: str | None
    """The commit of the folder that the run was started in; None outside of git."""
    steps: int
    figures: Mapping[str, float]
    """As measured on the held-out text, in nats a token."""

    @staticmethod
    def of(
        settings: Mapping[str, Any],
        data: Mapping[str, Any],
        *,
        steps: int,
        figures: Mapping[str, float],
    ) -> "Run":
        return Run(
            settings=settings,
            argv=tuple(sys.argv),
            data=data,
            versions=versions(),
            git=_git_sha(),
            steps=steps,
            figures=figures,
        )


def describe(folder: Path, promise: Promise, run: Run) -> None:
    """Write dft.json, run.json and the model card into a folder of weights."""
    promise.write(folder)
    text = json.dumps(asdict(run), indent=2, ensure_ascii=False)
    (folder / RUN).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(promise, run), encoding="utf-8")


def seal(folder: Path) -> None:
    """Write the checksums of all files below `folder`; the last thing that is written."""
    names = [name for name in entries(folder, most=MOST_FILES) if name != CHECKSUMS]
    text = json.dumps({name: digest_of(folder / name) for name in names}, indent=2)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def add_to_card(folder: Path, heading: str, text: str) -> None:
    """Put a section into the model card, in place of the one that has its heading or else at the
    end, and the card's new checksum into checksums.json. Comments mark where a section begins and
    ends; all else in the card stays as it is.

    What a kill between the two files leaves, `verify` refuses, and the same call makes whole.

    Args:
        text: Markdown, without a line that is such a comment.

    Raises:
        CheckpointError: the checkpoint is not what was written, but for that section, its card has
            no checksum, or one of the two files is a link.
        OSError: as the disk raised it; the checkpoint is then as it was.
    """
    with _as_checkpoint_errors():
        checksums, card = _with_its_card(folder, heading)
    changed = _with_section(card, heading, text)
    if len(changed.encode()) > LARGEST_CARD:
        raise CheckpointError(
            f"{folder / CARD}: got more than {LARGEST_CARD:,} bytes with {heading!r}; accepted: at "
            "most so many; shorten it."
        )
    atomic.write_text(folder / CARD, changed)
    try:
        checksums[CARD] = text_digest(changed)
        atomic.write_text(folder / CHECKSUMS, json.dumps(checksums, indent=2) + "\n")
    except BaseException:
        with suppress(OSError):  # It is the first one that is told.
            atomic.write_text(folder / CARD, card)
        raise


def _with_its_card(folder: Path, heading: str) -> tuple[dict[str, str], str]:
    """The checksums of a checkpoint that is whole, but for a section of its card, and the card."""
    checksums = _checksums(folder)
    if CARD not in checksums:
        raise CheckpointError(f"{folder} has no {CARD} that {CHECKSUMS} lists; {COPY}.")
    for name in (CARD, CHECKSUMS):
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name}: got a link, as in a snapshot of the Hugging Face cache, whose "
                "files others share; accepted: a file of this folder alone; copy the checkpoint "
                "with what its links lead to (cp -rL)."
            )
    found = entries(folder, most=MOST_FILES)
    for name in (CARD, CHECKSUMS):
        found.pop(name + atomic.PARTIAL, None)  # Of a kill; the next write replaces it.
    card = _card_in(folder) if CARD in found else ""
    if _is_whole_around(card, heading):
        checksums[CARD] = text_digest(card)
    _compare_all(folder, checksums, found)
    return checksums, card


def _card_in(folder: Path) -> str:
    """With its own line ends: what is not ours in it stays byte for byte."""
    return decoded(read_bytes(folder / CARD, largest=LARGEST_CARD), str(folder / CARD))


def _with_section(card: str, heading: str, text: str) -> str:
    if (old := _section(heading).search(card)) is not None:
        before, after = card[: old.start()], card[old.end() :]
    else:
        before, after = card + ("\n" if card.endswith("\n") else "\n\n"), ""
    return (
        f"{before}<!-- dftserve: {heading} -->\n\n## {heading}\n\n{text}\n\n"
        f"<!-- dftserve: end, in a card of {_around(before, after)} -->\n{after}"
    )


def _is_whole_around(card: str, heading: str) -> bool:
    """Whether the card is what it was when its section was written, but for that section, which
    ends with a digest of the rest: so a card is recognised whose new checksum was never written,
    because the command was killed between the two."""
    found = _section(heading).search(card)
    return found is not None and found["around"] == _around(
        card[: found.start()], card[found.end() :]
    )


def _section(heading: str) -> re.Pattern[str]:
    """A section from its first comment to its last one, with no other begun between them."""
    begin = rf"^<!-- dftserve: {re.escape(heading)} -->\r?\n"
    end = r"^<!-- dftserve: end, in a card of (?P<around>[0-9a-f]{64}) -->\r?(?:\n|\Z)"
    line = r"(?!<!-- dftserve: ).*\n"
    return re.compile(f"{begin}(?:^{line})*?{end}", re.MULTILINE)


def _around(before: str, after: str) -> str:
    return joined_digest([text_digest(before), text_digest(after)])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What safetensors and torch raise where the disk fails is an OSError here, as Python's own.

    Raises:
        OSError: names the folder and what was said.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not any(name in told for name in TORCH_WRITERS):
            raise
        raise OSError(f"{folder} cannot be written: {told}") from None


@dataclass(frozen=True)
class Verified:
    """A checkpoint that is as it was written."""

    files: int
    beside: tuple[str, ...]
    """What the hub put there."""


def verify(folder: Path) -> Verified:
    """Compare every file with its checksum.

    Raises:
        CheckpointError: no checksums, files that are there and not listed, whatever they are, or
            the first file that is missing, changed, or not a regular file of the folder.
    """
    with _as_checkpoint_errors():
        return _compare_all(folder, _checksums(folder), entries(folder, most=MOST_FILES))


@contextmanager
def _as_checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise CheckpointError(advised(error, COPY)) from None


def _compare_all(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, os.stat_result]
) -> Verified:
    beside = _beside(folder, expected, found)
    for name, digest in expected.items():
        _compare(folder, name, digest, found)
    return Verified(len(expected), beside)


def _instead(folder: Path) -> str:
    """What to do about a folder that is no checkpoint."""
    if (folder / FINAL / CHECKSUMS).exists():
        return f"it is a run; give its checkpoint, {folder / FINAL}"
    if (folder / RUN_SETTINGS).exists():
        return f"it is a run that has not ended; run the same train again, which makes {FINAL}"
    return "dftserve did not write it, or not to the end; give the `final` folder of a run"


def _checksums(folder: Path) -> dict[str, str]:
    """Digests by name. Raises CheckpointError where they are not what `seal` writes."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give a checkpoint's.")
    path = folder / CHECKSUMS
    try:
        given = read_json(path, within=folder, largest=LARGEST_CHECKSUMS)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CHECKSUMS}: {_instead(folder)}.") from None
    if not isinstance(given, dict) or not all(
        isinstance(digest, str) and _BLAKE3.fullmatch(digest) for digest in given.values()
    ):
        raise CheckpointError(f"{path} is not what dftserve wrote; {COPY}.")
    return {inner_path(name, str(path)): digest for name, digest in given.items()}


def _beside(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, os.stat_result]
) -> tuple[str, ...]:
    """What the hub put beside the files; all else without a checksum is a CheckpointError."""
    extra = [name for name in found if name not in expected and name != CHECKSUMS]
    unlisted = [name for name in extra if not _is_the_hubs(name, found[name])]
    if unlisted:
        named = ", ".join(f"{name!r} ({kind(found[name].st_mode)})" for name in unlisted[:NAMED])
        more = f" and {len(unlisted) - NAMED} more" if len(unlisted) > NAMED else ""
        raise CheckpointError(
            f"{folder} holds what {CHECKSUMS} does not list: {named}{more}; accepted: the files "
            "that were written; move the others out."
        )
    return tuple(extra)


def _is_the_hubs(name: str, found: os.stat_result) -> bool:
    """In a snapshot of its cache they are links, as all files are."""
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)
    return plain and HUB_LEAVES.fullmatch(name) is not None


def _compare(folder: Path, name: str, digest: str, found: Container[str]) -> None:
    if name not in found:
        raise CheckpointError(f"{folder / name}, named in {CHECKSUMS}, is missing; {COPY}.")
    if digest_of(folder / name, within=folder) != digest:
        raise CheckpointError(
            f"{folder / name} is not the file that was written, by {CHECKSUMS}; {COPY}."
        )


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "dftserve": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_sha() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None if asked.returncode == 0 else None


FORMATS = re.compile(r"[\\`*\[\]<>~|&]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown may format with; not `_` within a word."""


def _unformatted(text: str) -> str:
    """As Markdown that is shown as the text itself, on one line."""
    return FORMATS.sub(r"\\\g<0>", " ".join(text.split()))


def _figure_name(name: str) -> str:
    """`human_nll/my_store` → `human nll/my_store`: behind the slash is a store's name."""
    figure, slash, store = name.partition("/")
    return figure.replace("_", " ") + slash + _unformatted(store)


def _objective(settings: Mapping[str, Any]) -> str:
    name = settings.get("divergence", {}).get("name", "a divergence")
    matching = settings.get("feature_matching")
    if not matching:
        return name
    return f"{name} and feature matching (weight {matching['weight']:g})"


def _card(promise: Promise, run: Run) -> str:
    base = run.data.get("model", "a causal LM")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [distribution-fine-tuning, dftserve]",
        "---",
        "",
        f"# Tuned from {_unformatted(base)}",
        "",
        "Distribution Fine-Tuning: the model was tuned toward a distribution over next tokens, by "
        f"{_objective(run.settings)}, for {run.steps} steps.",
        "",
        f"- Target: {_unformatted(promise.recipe)}",
        *(f"- {_figure_name(name)}: {value:.4f}" for name, value in run.figures.items()),
    ]
    if promise.diversity is not None:
        lines.append(f"- Suggested diversity: `{json.dumps(promise.diversity.as_dict())}`")
    lines += [
        "",
        "Entropies and likelihoods are in nats a token, on held-out text.",
        "",
        "    dftserve serve PATH --default-diversity checkpoint",
        "",
        f"Made with dftserve {run.versions.get('dftserve')} by",
        "",
        f"    {shlex.join([Path(run.argv[0]).name, *run.argv[1:]])}",
        "",
        "run.json has all settings.",
    ]
    return "\n".join(lines) + "\n"
