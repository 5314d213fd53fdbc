"""Phrases typical of text by models: how often they occur, and which phrases a set repeats.

    rate(texts, read_phrases())            per 1,000 words
    cut(base.value, tuned.value, human.value)

Texts must be normalised. A rate says nothing about quality, and few such phrases do not make a text
human: it should be compared with the human rate.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dftserve.bounded_files import parse_json, read_text
from dftserve.digest import text_digest
from dftserve.evaluate.metrics.intervals import NONE_SEEN, Estimate, over_units, sum_by_group
from dftserve.evaluate.text.tokenize import ngrams, normalise, tokens, words

OURS = Path(__file__).parents[1] / "text" / "phrases.txt"
LARGEST = 64 << 20
"""Maximum bytes of a file of phrases."""
PER = 1000
"""Rates are per this many words."""
SAME_RATE = 1e-9
"""If base and human rates per 1,000 words differ by no more than this, there is nothing to cut."""

_SPAN = r"[^.!?;:\n]{1,80}?"
_NOT = r"(?:not|[a-z]+n't)"
_IT = r"(?:it|this|that|they|he|she|there)"
_BE = r"(?:'s|'re|\s+(?:is|are|was|were))"
CONTRASTS = {
    "not X, but Y": rf"\b{_NOT}\s{_SPAN},\s+but\s+(?!(?:not|it|he|she|they|we|i|you)\b)",
    "not just X, (but) Y": rf"\b{_NOT}\s+(?:just|only|merely|simply)\s{_SPAN}(?:,|\s—|;)\s",
    "it's not X; it's Y": rf"\b{_IT}(?:{_BE}\s+not|\s+(?:isn't|aren't|wasn't|weren't))\s{_SPAN}"
    rf"(?:[.;,:]|\s—)\s+{_IT}{_BE}\s+(?!not\b)",
    "less X, more Y": r"\bless\s[^.!?;:\n]{1,60}?(?:,|\s—|\sand)\s+(?:and\s+)?more\s",
    "no X, no Y, just Z": rf"\b(?:no|not)\s[^.!?;:\n]{{1,40}}?[,.]\s+(?:no|not)\s{_SPAN}[,.]\s+"
    r"(?:just|only)\s",
}
"""The "not this, but that" figure, as patterns on normalised lower-case text. They match the
surface: a plain denial with a `but` is counted too, in human text as well."""
_CONTRAST = re.compile("|".join(CONTRASTS.values()))


@dataclass(frozen=True)
class Phrases:
    """Phrases as tuples of tokens, by their first token, the longest first."""

    by_first: Mapping[str, tuple[tuple[str, ...], ...]]

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Phrases":
        """Raises ValueError: no phrase, or one without a word."""
        split = {tuple(tokens(normalise(line))): line for line in lines}
        for phrase, line in split.items():
            if not any(map(_is_word, phrase)):
                raise ValueError(f"phrases: got {line!r}; accepted: at least one word in each.")
        if not split:
            raise ValueError("phrases: got none; accepted: at least one.")
        ordered = sorted(split, key=lambda phrase: (phrase[0], -len(phrase), phrase))
        return cls({first: tuple(group) for first, group in groupby(ordered, lambda p: p[0])})

    def __len__(self) -> int:
        return sum(map(len, self.by_first.values()))

    @property
    def digest(self) -> str:
        """Equal for equal phrases, in whatever order a file lists them."""
        return text_digest(json.dumps(list(self.by_first.values())))

    def found(self, text: str) -> Iterator[str]:
        """The phrases in a text, in order: the longest at each position, none inside another.
        Punctuation within a match must be part of the phrase."""
        own = tokens(text)
        at = 0
        while at < len(own):
            phrase = next(
                (p for p in self.by_first.get(own[at], ()) if p == tuple(own[at : at + len(p)])),
                None,
            )
            if phrase:
                yield " ".join(phrase)
            at += len(phrase) if phrase else 1


@dataclass(frozen=True)
class Repeated:
    """A phrase and the number of texts that contain it."""

    phrase: str
    texts: int


def read_phrases(path: Path = OURS) -> Phrases:
    """Read a file of phrases, by default the built-in one: one phrase per line with `#` comments,
    or, if the name ends in .json, a list whose items are "a phrase", ["a phrase"] or ["a phrase", a
    number].

    Phrases are matched literally: a list of n-grams without their stop words finds little.

    Raises:
        ValueError: another shape, no phrase, or not UTF-8.
    """
    try:
        return Phrases.of(read_lines(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_lines(path: Path = OURS) -> list[str]:
    """The phrases of a file, unchanged.

    Raises:
        ValueError: another shape, or not UTF-8.
    """
    content = read_text(path, largest=LARGEST)
    return _from_json(path, content) if path.suffix == ".json" else _from_lines(content)


def rate(texts: Sequence[str], phrases: Phrases, groups: Sequence[str] = ()) -> Estimate:
    """Phrases found per 1,000 words of all texts; resampled by text, or by group
    (`intervals.sum_by_group`). If none is found, the interval is that of a Poisson count of 0.

    Raises:
        ValueError: no words at all, or not one group per text.
    """
    return _per_words(texts, [sum(1 for _ in phrases.found(text)) for text in texts], groups)


def contrast_rate(texts: Sequence[str], groups: Sequence[str] = ()) -> Estimate:
    """`CONTRASTS` per 1,000 words of all texts, none inside another; resampled, and raises, as
    `rate`."""
    return _per_words(texts, [len(_CONTRAST.findall(text.lower())) for text in texts], groups)


def cut(base: float, tuned: float, human: float) -> float:
    """The share of the gap between the base model's and the human rate that a tuned model closed:
    (base − tuned)/(base − human). 1: as often as humans; above: less often; below 0: more often
    than before.

    Raises:
        ValueError: the base model's rate equals the human one.
    """
    if not abs(base - human) > SAME_RATE:
        raise ValueError(
            f"rates: got {base:.4g} of the base model and {human:.4g} of humans; accepted: rates "
            "that differ, or there is nothing to cut."
        )
    return (base - tuned) / (base - human)


def most_repeated(
    texts: Sequence[str], sizes: Sequence[int] = (3, 4, 5, 6, 7, 8), top: int = 20
) -> list[Repeated]:
    """The runs of words, without punctuation inside, that occur in the most texts, at least two; of
    equally frequent ones the longer first. A run inside a longer one that occurs in as many texts
    is left out.

    Raises:
        ValueError: sizes below 1, or none.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: got {sizes}; accepted: at least one, each at least 1.")
    runs_T = [_runs(text) for text in texts]
    shared: dict[tuple[str, ...], int] = {}
    shorter: dict[tuple[str, ...], int] = {}
    for size in sorted(set(sizes)):
        longer = _shared(runs_T, size, shorter)
        for phrase, count in longer.items():
            # The next shorter size is enough: shorter runs were dropped at the sizes between.
            for part in ngrams(list(phrase), len(next(iter(shorter), ()))):
                if shorter.get(part) == count:
                    shared.pop(part, None)
        shared |= longer
        shorter = longer
    ranked = sorted(shared.items(), key=lambda item: (-item[1], -len(item[0]), item[0]))
    return [Repeated(" ".join(phrase), count) for phrase, count in ranked[:top]]


def _from_lines(content: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in content.splitlines())
    return [line for line in lines if line]


def _from_json(path: Path, content: str) -> list[str]:
    items = parse_json(content, str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path}: got {type(items).__name__}; accepted: a list.")
    return [_phrase_of(item, f"{path}[{at}]") for at, item in enumerate(items)]


def _phrase_of(item: object, where: str) -> str:
    match item:
        case (str() as phrase) | [str() as phrase] | [str() as phrase, int() | float()]:
            return phrase
    raise ValueError(
        f'{where}: got {item!r}; accepted: "a phrase", ["a phrase"] or ["a phrase", a number].'
    )


def _per_words(texts: Sequence[str], counts: Sequence[int], groups: Sequence[str]) -> Estimate:
    units_T2 = np.array(
        [(count, len(words(text))) for count, text in zip(counts, texts, strict=True)],
        float,
    ).reshape(-1, 2)
    if not units_T2[:, 1].any():
        raise ValueError("texts: got no words; accepted: at least one.")
    counted, words_here = units_T2.sum(axis=0)
    if not counted and len(units_T2) > 1:
        return Estimate(0.0, 0.0, PER * NONE_SEEN / words_here)
    return over_units(sum_by_group(units_T2, groups), _ratio)


def _ratio(weights_T: np.ndarray, units_T2: np.ndarray) -> float:
    total, counted = weights_T @ units_T2
    return PER * total / counted if counted else float("nan")


def _runs(text: str) -> list[list[str]]:
    """The runs of words between punctuation marks."""
    return [list(run) for is_word, run in groupby(tokens(text), _is_word) if is_word]


def _shared(
    runs_T: Sequence[list[list[str]]], size: int, shorter: Mapping[tuple[str, ...], int]
) -> dict[tuple[str, ...], int]:
    """The n-grams that occur in at least two texts. One whose beginning is not in `shorter` cannot
    be shared and is not counted."""
    begins = len(next(iter(shorter), ()))
    counts: Counter[tuple[str, ...]] = Counter()
    for runs in runs_T:
        grams = {gram for run in runs for gram in ngrams(run, size)}
        counts.update(gram for gram in grams if not begins or gram[:begins] in shorter)
    return {gram: count for gram, count in counts.items() if count > 1}


def _is_word(token: str) -> bool:
    return token[0].isalnum()
