"""Reads several corpora listed in a YAML file as one, and texts that are given to be held out.

    corpora:
      - {path: novels}
      - {path: forum.jsonl, weight: 0.25, fields: {prompt: question, response: answer}}
      - {path: exam.jsonl, split: heldout}

Paths are relative to the YAML file. `weight` is the share of a corpus's texts that is used, chosen
by a hash of each. A text is never used twice, since n-gram targets rely on counts from *other*
texts. `fields` is as in `records.Fields`; `split` is `train` or `heldout`; without it the split
that `read` finds is used, or else one is drawn.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from blake3 import blake3

from dftserve import settings
from dftserve.corpus.read import Part, Split, check, in_order, parts
from dftserve.corpus.records import Fields, opening
from dftserve.corpus.text import Text

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus of several."""

    path: str
    weight: float = 1.0
    """Share of its texts that is used, above 0 and at most 1."""
    fields: Fields = field(default_factory=Fields)
    split: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"weight: got {self.weight}; accepted: above 0 and at most 1, the share of its "
                "texts. To give a corpus more weight, give the others less."
            )
        if self.split not in (None, "train", "heldout"):
            raise ValueError(f"split: got {self.split!r}; accepted: train, heldout.")


@dataclass(frozen=True, kw_only=True)
class _Corpora:
    corpora: tuple[Source, ...]


def read_all(path: Path, heldout_from: Path | None = None) -> Iterator[Text]:
    """The texts of a file, a folder, or the corpora that a YAML file lists.

    Args:
        heldout_from: further texts, all of which are held out.

    Raises:
        ValueError: as `read`, or the YAML file does not list corpora, or `heldout_from` has no
            texts.
    """
    if heldout_from is not None:
        # These come first, since the later of two near-copies is dropped.
        texts = in_order(_sources(heldout_from))
        first = next(texts, None)
        if first is None:
            raise ValueError(
                f"{heldout_from}: got no texts to hold out; accepted: one at least. --heldout "
                "draws some of the corpus instead."
            )
        for text in itertools.chain([first], texts):
            yield replace(text, split="heldout", origin=f"held out: {text.origin}")
    yield from in_order(_sources(path))


def check_all(path: Path, heldout_from: Path | None = None) -> None:
    """Raise ValueError for paths that `read_all` could not read, judging by names alone."""
    for each in (path, heldout_from):
        if each is None:
            continue
        if each.suffix.lower() not in SUFFIXES:
            check(each)
            continue
        for source in _sources_in(each):
            check(each.parent / source.path)


def _sources(path: Path) -> list[Part]:
    if path.suffix.lower() not in SUFFIXES:
        return parts(path)
    return [
        Part(cast(Split | None, source.split) or part.split, _sampled(part.texts, source))
        for source in _sources_in(path)
        for part in parts(path.parent / source.path, source.fields)
    ]


def _sampled(texts: Iterator[Text], source: Source) -> Iterator[Text]:
    for text in texts:
        if _draw(text) < source.weight:
            yield replace(text, origin=f"{source.path}/{text.origin}")


def _sources_in(path: Path) -> tuple[Source, ...]:
    sources = settings.load(_Corpora, settings.read_yaml(path), path.name).corpora
    if not sources:
        raise ValueError(f"{path}: got no corpora; accepted: one at least.")
    return sources


def _draw(text: Text) -> float:
    """Uniform in [0, 1); the same for all answers to one prompt."""
    digest = blake3(b"weight\n" + (opening(text) or text.content).encode()).digest(length=8)
    return int.from_bytes(digest, "little") / 2**64
