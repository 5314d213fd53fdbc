"""The part of each text that is measured: its first L words, with one L for all texts.

Most measures depend on the length of a text, so texts are only ever compared at one length.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dftserve.evaluate.text.tokenize import (
    normalise,
    window,
    without_echo,
    word_starts,
    words,
)

WORDS = 120
"""Default length of a window."""
LEAST_WORDS = 80
"""The halves of shorter windows have too few function words for meaningful shares."""
LEAST_TEXTS = 8
"""Minimum texts of a prompt, or of a set: variety cannot be measured on fewer."""


@dataclass(frozen=True)
class Sample:
    """A text as a person or a model wrote it, and its prompt."""

    text: str
    prompt: str = ""
    source: str = ""
    """The work that it is a piece of; pieces of one work are never in different splits."""
    group: str = ""
    """The texts that answer the same request have the same group; "": that of the prompt. Prompts
    with the same words and different system prompts are different requests."""


@dataclass(frozen=True)
class Windows:
    """Windows of L words.

    texts: normalised; empty where the text was shorter than L words.
    prompts, sources, groups: of each text; empty where it has none.
    """

    words: int
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    sources: tuple[str, ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, samples: Iterable[Sample], length: int = WORDS) -> "Windows":
        """Remove echoes of the prompts, and cut each text to its first `length` words.

        Raises:
            ValueError: a length below `LEAST_WORDS`.
        """
        if length < LEAST_WORDS:
            raise ValueError(f"words: got {length}; accepted: {LEAST_WORDS} or more.")
        samples = [_encodable(sample) for sample in samples]
        cut = [_cut(without_echo(normalise(s.text), s.prompt), length) for s in samples]
        return cls(
            words=length,
            texts=tuple(cut),
            prompts=tuple(sample.prompt for sample in samples),
            sources=tuple(sample.source for sample in samples),
            groups=tuple(sample.group or sample.prompt for sample in samples),
        )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def short(self) -> int:
        """How many texts were too short."""
        return sum(not text for text in self.texts)

    def pick(self, indices: Iterable[int]) -> "Windows":
        indices = list(indices)
        return replace(
            self,
            texts=tuple(self.texts[i] for i in indices),
            prompts=tuple(self.prompts[i] for i in indices),
            sources=tuple(self.sources[i] for i in indices),
            groups=tuple(self.groups[i] for i in indices),
        )

    def whole(self) -> "Windows":
        """Without the texts that were too short."""
        return self.pick(i for i, text in enumerate(self.texts) if text)

    def indices_by_prompt(self) -> dict[str, list[int]]:
        """Indices of each group's texts, for the groups with at least `LEAST_TEXTS` of them."""
        counts = Counter(self.groups)
        indices: dict[str, list[int]] = {}
        for index, group in enumerate(self.groups):
            if group and counts[group] >= LEAST_TEXTS:
                indices.setdefault(group, []).append(index)
        return indices

    def halves(self) -> tuple[list[str], list[str]]:
        middle = self.words // 2
        first = [window(text, 0, middle) for text in self.texts]
        second = [window(text, middle, 2 * middle) for text in self.texts]
        return first, second


def pieces(sample: Sample, length: int, most: int) -> list[Sample]:
    """Up to `most` pieces of a long work, of `length` words each, evenly spaced.

    A piece is a part of the text as it was written, so that it can be compared with whole texts. A
    work of less than twice the length is returned whole.
    """
    starts = word_starts(sample.text)
    count = min(most, len(starts) // length)
    if count < 2:
        return [sample]
    step = len(starts) // count
    ends = [*starts, len(sample.text)]
    source = sample.source or sample.text[:200]
    return [
        replace(sample, text=sample.text[starts[at] : ends[at + length]].rstrip(), source=source)
        for at in range(0, count * step, step)
    ]


def _encodable(sample: Sample) -> Sample:
    """Replace lone surrogates, such as half of an emoji that was cut, by question marks."""
    text, prompt = (each.encode(errors="replace").decode() for each in (sample.text, sample.prompt))
    return replace(sample, text=text, prompt=prompt)


def _cut(text: str, length: int) -> str:
    return window(text, 0, length) if len(words(text)) >= length else ""
