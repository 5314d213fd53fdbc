"""A checkpoint: an ordinary Hugging Face folder with a description of itself and checksums.

final/
  config.json, model.safetensors, tokenizer…   files that every loader reads
  dft.json         its properties: recipe, entropies, suggested diversity (`spec.CheckpointInfo`)
  run.json         how it was made: resolved settings, argv, versions, git SHA, fingerprints
  README.md        the model card: the same for human readers
  checksums.json   BLAKE3 of every other file

A checkpoint may come from an untrusted source: `verify` opens only regular files inside its folder
(`bounded_files`), and reports files that have no checksum.
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
from typing import TYPE_CHECKING, Any

from dftserve import __version__, atomic
from dftserve.bounded_files import (
    FileError,
    decoded,
    entries,
    inner_path,
    kind,
    read_bytes,
    read_json,
    with_advice,
)
from dftserve.digest import digest_of, joined_digest, text_digest
from dftserve.spec import CHECKSUMS, FINAL, CheckpointInfo

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RUN, CARD = "run.json", "README.md"
RUN_SETTINGS = "settings.json"
"""In the folder of a run: the settings that it starts with."""
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "safetensors")
LARGEST_CHECKSUMS = LARGEST_CARD = 1 << 20
"""Maximum bytes of each."""
MOST_FILES = 10_000
"""Maximum number of files of a checkpoint."""
COPY = "copy the checkpoint again"
NAMED = 5
"""Number of files that an error lists by name; the rest are counted."""
HUB_LEAVES = re.compile(r"\.gitattributes|\.cache/huggingface/.+")
"""Files that the Hugging Face hub and its client add to a repository's files; no loader reads
them."""
_BLAKE3 = re.compile(r"[0-9a-f]{64}")


class CheckpointError(ValueError):
    """A damaged or changed checkpoint; the message names the file and what to do."""


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
    metrics: Mapping[str, float]
    """Measured on the held-out text, in nats a token."""

    @staticmethod
    def of(
        settings: Mapping[str, Any],
        data: Mapping[str, Any],
        *,
        steps: int,
        metrics: Mapping[str, float],
    ) -> "Run":
        return Run(
            settings=settings,
            argv=tuple(sys.argv),
            data=data,
            versions=versions(),
            git=_git_sha(),
            steps=steps,
            metrics=metrics,
        )


def describe(folder: Path, info: CheckpointInfo, run: Run) -> None:
    """Write dft.json, run.json and the model card of a tuned model into its folder."""
    write_description(folder, info, run, _card(info, run))


def write_description(
    folder: Path, info: CheckpointInfo, run: "DataclassInstance", card: str
) -> None:
    """Write dft.json, run.json and the model card into a folder of weights."""
    info.write(folder)
    text = json.dumps(asdict(run), indent=2, ensure_ascii=False)
    for name, content in ((RUN, text + "\n"), (CARD, card)):
        # A path on the command line may have bytes that are not UTF-8, which Python represents by
        # surrogates. As escapes they are valid JSON.
        (folder / name).write_text(content, encoding="utf-8", errors="backslashreplace")


def seal(folder: Path) -> None:
    """Write the checksums of all files below `folder`; must be called after they are written."""
    names = [name for name in entries(folder, most=MOST_FILES) if name != CHECKSUMS]
    text = json.dumps({name: digest_of(folder / name) for name in names}, indent=2)
    (folder / CHECKSUMS).write_text(text + "\n", encoding="utf-8")


def add_to_card(folder: Path, heading: str, text: str) -> None:
    """Write a section of the model card and the card's new checksum. The section replaces the one
    with the same heading, or is appended. HTML comments mark where a section begins and ends; the
    rest of the card is unchanged.

    If the process is killed between writing the two files, `verify` refuses the checkpoint, and
    the same call repairs it.

    Args:
        text: Markdown, without a line that is such a comment.

    Raises:
        CheckpointError: the checkpoint was changed apart from that section, its card has no
            checksum, or one of the two files is a link.
        OSError: from the disk; the checkpoint is then unchanged.
    """
    with _as_checkpoint_errors():
        checksums, card = _with_its_card(folder, heading)
    changed = _with_section(card, heading, text)
    if len(changed.encode()) > LARGEST_CARD:
        raise CheckpointError(
            f"{folder / CARD}: got more than {LARGEST_CARD:,} bytes with {heading!r}; accepted: at "
            "most that many; shorten it."
        )
    atomic.write_text(folder / CARD, changed)
    try:
        checksums[CARD] = text_digest(changed)
        atomic.write_text(folder / CHECKSUMS, json.dumps(checksums, indent=2) + "\n")
    except BaseException:
        with suppress(OSError):  # The first error is the one to report.
            atomic.write_text(folder / CARD, card)
        raise


def _with_its_card(folder: Path, heading: str) -> tuple[dict[str, str], str]:
    """The checksums and the card of a checkpoint, verified except for one section of the card."""
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
        found.pop(name + atomic.PARTIAL, None)  # Left by a kill; the next write replaces it.
    card = _card_in(folder) if CARD in found else ""
    if _is_whole_around(card, heading):
        checksums[CARD] = text_digest(card)
    _compare_all(folder, checksums, found)
    return checksums, card


def _card_in(folder: Path) -> str:
    """The card with its own line ends, so that the rest of it stays identical byte for byte."""
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
    """Whether the card outside the section is unchanged since that section was written. The section
    ends with a digest of the rest of the card, so that a card is recognised whose new checksum was
    not written because the command was killed between the two writes."""
    found = _section(heading).search(card)
    return found is not None and found["around"] == _around(
        card[: found.start()], card[found.end() :]
    )


def _section(heading: str) -> re.Pattern[str]:
    """Matches a section from its first comment to its last, without another one starting inside."""
    begin = rf"^<!-- dftserve: {re.escape(heading)} -->\r?\n"
    end = r"^<!-- dftserve: end, in a card of (?P<around>[0-9a-f]{64}) -->\r?(?:\n|\Z)"
    line = r"(?!<!-- dftserve: ).*\n"
    return re.compile(f"{begin}(?:^{line})*?{end}", re.MULTILINE)


def _around(before: str, after: str) -> str:
    return joined_digest([text_digest(before), text_digest(after)])


@dataclass(frozen=True)
class Verified:
    """The result of verifying an unchanged checkpoint."""

    files: int
    beside: tuple[str, ...]
    """Additional files from the hub, which have no checksum."""


def verify(folder: Path) -> Verified:
    """Compare every file with its checksum.

    Raises:
        CheckpointError: there are no checksums, there are unlisted files of any kind, or a file is
            missing, changed, or not a regular file of the folder (the first such file is named).
    """
    with _as_checkpoint_errors():
        return _compare_all(folder, _checksums(folder), entries(folder, most=MOST_FILES))


@contextmanager
def _as_checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise CheckpointError(with_advice(error, COPY)) from None


def _compare_all(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, os.stat_result]
) -> Verified:
    added = _added_by_hub(folder, expected, found)
    for name, digest in expected.items():
        _compare(folder, name, digest, found)
    return Verified(len(expected), added)


def _advice(folder: Path) -> str:
    """What to do about a folder that is not a checkpoint."""
    if (folder / FINAL / CHECKSUMS).exists():
        return f"it is a run; give its checkpoint, {folder / FINAL}"
    if (folder / RUN_SETTINGS).exists():
        return f"it is an unfinished run; run the same train again, which makes {FINAL}"
    return "dftserve did not write it, or did not finish; give the `final` folder of a run"


def _checksums(folder: Path) -> dict[str, str]:
    """Digests by file name. Raises CheckpointError if the file is not one that `seal` writes."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; give a checkpoint's.")
    path = folder / CHECKSUMS
    try:
        given = read_json(path, within=folder, largest=LARGEST_CHECKSUMS)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CHECKSUMS}: {_advice(folder)}.") from None
    if not isinstance(given, dict) or not all(
        isinstance(digest, str) and _BLAKE3.fullmatch(digest) for digest in given.values()
    ):
        raise CheckpointError(f"{path} is not what dftserve wrote; {COPY}.")
    return {inner_path(name, str(path)): digest for name, digest in given.items()}


def _added_by_hub(
    folder: Path, expected: Mapping[str, str], found: Mapping[str, os.stat_result]
) -> tuple[str, ...]:
    """Files that the hub added; any other file without a checksum is a CheckpointError."""
    extra = [name for name in found if name not in expected and name != CHECKSUMS]
    unlisted = [name for name in extra if not _is_from_hub(name, found[name])]
    if unlisted:
        named = ", ".join(f"{name!r} ({kind(found[name].st_mode)})" for name in unlisted[:NAMED])
        more = f" and {len(unlisted) - NAMED} more" if len(unlisted) > NAMED else ""
        raise CheckpointError(
            f"{folder} holds files that {CHECKSUMS} does not list: {named}{more}; accepted: the "
            "files that were written; move the others out."
        )
    return tuple(extra)


def _is_from_hub(name: str, found: os.stat_result) -> bool:
    """A file or a link: in a snapshot of the hub's cache, every file is a link."""
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)
    return plain and HUB_LEAVES.fullmatch(name) is not None


def _compare(folder: Path, name: str, digest: str, found: Container[str]) -> None:
    if name not in found:
        raise CheckpointError(f"{folder / name}, named in {CHECKSUMS}, is missing; {COPY}.")
    if digest_of(folder / name, within=folder) != digest:
        raise CheckpointError(
            f"{folder / name} is not the file that was written, according to {CHECKSUMS}; {COPY}."
        )


def versions() -> dict[str, str]:
    """The versions of Python, dftserve and those of `PACKAGES` that are installed, by name."""
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
        git = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None if git.returncode == 0 else None


FORMATS = re.compile(r"[\\`*\[\]<>~|&]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown may interpret as formatting; not `_` within a word."""


def unformatted(text: str) -> str:
    """Escape the text for Markdown and put it on one line."""
    return FORMATS.sub(r"\\\g<0>", " ".join(text.split()))


def _metric_name(name: str) -> str:
    """`human_nll/my_store` → `human nll/my_store`: a store's name follows the slash."""
    metric, slash, store = name.partition("/")
    return metric.replace("_", " ") + slash + unformatted(store)


def _objective(settings: Mapping[str, Any]) -> str:
    name = settings.get("divergence", {}).get("name", "a divergence")
    matching = settings.get("feature_matching")
    if not matching:
        return name
    return f"{name} and feature matching (weight {matching['weight']:g})"


def _card(info: CheckpointInfo, run: Run) -> str:
    base = run.data.get("model", "a causal LM")
    lines = [
        "---",
        "library_name: transformers",
        "tags: [distribution-fine-tuning, dftserve]",
        "---",
        "",
        f"# Tuned from {unformatted(base)}",
        "",
        "Distribution Fine-Tuning: the model was tuned toward a distribution over next tokens, by "
        f"{_objective(run.settings)}, for {run.steps} steps.",
        "",
        f"- Target: {unformatted(info.recipe)}",
        *(f"- {_metric_name(name)}: {value:.4f}" for name, value in run.metrics.items()),
    ]
    if info.diversity is not None:
        lines.append(f"- Suggested diversity: `{json.dumps(info.diversity.as_dict())}`")
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
