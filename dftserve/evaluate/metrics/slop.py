"""Phrases that mark a text as a model's: how often they come, and which ones a set repeats.

    rate(texts, read_phrases())            per 1,000 words
    cut(base.value, tuned.value, human.value)

Texts are normalised ones. A rate says nothing about quality, and few such phrases do not make a
text human: it is shown beside the human rate.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dftserve.bounded_files import parse_json, read_text
from dftserve.evaluate.metrics.intervals import Estimate, over_units, summed
from dftserve.evaluate.text.tokenize import ngrams, normalise, tokens, words

OURS = Path(__file__).parents[1] / "text" / "phrases.txt"
LARGEST = 64 << 20
"""Bytes of a file of phrases."""
PER = 1000
"""Rates are per so many words."""
SAME_RATE = 1e-9
"""Base and human rates, per 1,000 words, that differ by no more leave nothing to cut."""

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
"""The "not this, but that" figure, as patterns on normalised lower-case text. They see the surface:
a plain denial with a `but` is counted too, in human text as well."""
_CONTRAST = re.compile("|".join(CONTRASTS.values()))


@dataclass(frozen=True)
class Phrases:
    """Phrases as tokens, by their first token, the longest first."""

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

    def found(self, text: str) -> Iterator[str]:
        """The phrases in a text, in order: the longest at each place, none inside another. A mark
        ends a phrase, unless it is the phrase's own."""
        said = tokens(text)
        at = 0
        while at < len(said):
            phrase = next(
                (p for p in self.by_first.get(said[at], ()) if p == tuple(said[at : at + len(p)])),
                None,
            )
            if phrase:
                yield " ".join(phrase)
            at += len(phrase or ".")


@dataclass(frozen=True)
class Repeated:
    """A phrase and the number of different texts with it."""

    phrase: str
    texts: int


def read_phrases(path: Path = OURS) -> Phrases:
    """A file of phrases, by default our own: a phrase a line with `#` comments, or, where the name
    ends with .json, a list whose items are "a phrase", ["a phrase"] or ["a phrase", a number].

    Phrases are matched as they stand: a list of n-grams whose common words were taken out finds
    little.

    Raises:
        ValueError: another shape, no phrase, or not UTF-8.
    """
    try:
        return Phrases.of(read_lines(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_lines(path: Path = OURS) -> list[str]:
    """The phrases of a file as they stand there.

    Raises:
        ValueError: another shape, or not UTF-8.
    """
    content = read_text(path, largest=LARGEST)
    return _from_json(path, content) if path.suffix == ".json" else _from_lines(content)


def rate(texts: Sequence[str], phrases: Phrases, groups: Sequence[str] = ()) -> Estimate:
    """Phrases found per 1,000 words of all texts; resampled by text, or by group
    (`intervals.summed`).

    Raises:
        ValueError: no words at all, or not a group for each text.
    """
    return _per_words(texts, [sum(1 for _ in phrases.found(text)) for text in texts], groups)


def contrast_rate(texts: Sequence[str], groups: Sequence[str] = ()) -> Estimate:
    """`CONTRASTS` per 1,000 words of all texts, none inside another; resampled, and raises, as
    `rate`."""
    return _per_words(texts, [len(_CONTRAST.findall(text.lower())) for text in texts], groups)


def cut(base: float, tuned: float, human: float) -> float:
    """The share of the way from the base model's rate to the human one that a tuned model went:
    (base − tuned)/(base − human). 1: as often as humans; above: less often; below 0: more often
    than before.

    Raises:
        ValueError: the base model's rate is the human one already.
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
    """The runs of words, without a mark inside, that the most texts have, in at least two; the
    longer first where as many do. A run inside a longer one that as many texts have is left out.

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
            # Only the next shorter size: what lies between them has as many texts as both.
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


def _per_words(texts: Sequence[str], found: Sequence[int], groups: Sequence[str]) -> Estimate:
    units_T2 = np.array(
        [(count, len(words(text))) for count, text in zip(found, texts, strict=True)],
        float,
    ).reshape(-1, 2)
    if not units_T2[:, 1].any():
        raise ValueError("texts: got no words; accepted: at least one.")
    return over_units(summed(units_T2, groups), _ratio)


def _ratio(weights_T: np.ndarray, units_T2: np.ndarray) -> float:
    found, counted = weights_T @ units_T2
    return PER * found / counted if counted else float("nan")


def _runs(text: str) -> list[list[str]]:
    """The words between two marks."""
    return [list(run) for is_word, run in groupby(tokens(text), _is_word) if is_word]


def _shared(
    runs_T: Sequence[list[list[str]]], size: int, shorter: Mapping[tuple[str, ...], int]
) -> dict[tuple[str, ...], int]:
    """The n-grams that at least two texts have. One whose beginning is not `shorter`, shared, is
    not counted: it cannot be."""
    begins = len(next(iter(shorter), ()))
    counts: Counter[tuple[str, ...]] = Counter()
    for runs in runs_T:
        grams = {gram for run in runs for gram in ngrams(run, size)}
        counts.update(gram for gram in grams if not begins or gram[:begins] in shorter)
    return {gram: count for gram, count in counts.items() if count > 1}


def _is_word(token: str) -> bool:
    return token[0].isalnum()
