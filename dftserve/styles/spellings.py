"""The tokenisations of a phrase: after a space, at the start of a line, in quotes, capitalised.

    patterns = spell(tokenizer, ["a testament to"], seen=texts)
    found = compare(automaton, finder, texts, encoded)          recall and precision

A phrase's first token may include the characters before it, such as a space, and its last token
those after it, such as `!\\n`; both depend on the surrounding text. Each phrase is therefore
encoded in a few such contexts, and wherever it occurs in the texts of `seen`. The tokens that
overlap it are one of its tokenisations, unless they also contain a letter or digit outside it. The
recall of these tokenisations is measured on texts that are not in `seen`, against a search for the
words.

The tokenizer must report the offsets of its tokens (`transformers`' fast ones do).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dftserve.evaluate.text.tokenize import spans
from dftserve.styles.automaton import Automaton, Pattern, completions

BEFORE = ("", "so ", "\n", 'so "', "“", "(", "—")
AFTER = ("", " so", ".", ",", '"', "”", "\n", "!\n")
AT_ONCE = 4096
"""Texts tokenised in one call."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens and their character offsets."""

    tokens: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]

    def overlapping(self, start: int, end: int) -> range:
        """The indices of the tokens that overlap text[start:end]."""
        within = [n for n, (a, b) in enumerate(self.offsets) if a < end and b > start]
        return range(within[0], within[-1] + 1) if within else range(0)


class Finder:
    """Finds phrases in a text by their words and punctuation, ignoring case and the form of
    quotes."""

    def __init__(self, phrases: Sequence[str]) -> None:
        self._by_first: defaultdict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
        for number, phrase in enumerate(phrases):
            words = tuple(word for word, _, _ in spans(phrase))
            self._by_first[words[0]].append((words, number))

    def found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(phrase, start, end) of each occurrence, including those inside others."""
        items = spans(text)
        words = tuple(word for word, _, _ in items)
        for at, word in enumerate(words):
            for phrase, number in self._by_first.get(word, ()):
                if words[at : at + len(phrase)] == phrase:
                    yield number, items[at][1], items[at + len(phrase) - 1][2]


def require_offsets(tokenizer: Any) -> None:
    """Refuse a tokenizer with which texts cannot be encoded.

    Raises:
        ValueError: the tokenizer does not report the offsets of its tokens.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, which does not report the offsets of its "
            "tokens; accepted: a model with a tokenizer.json."
        )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """The tokens of each text, without begin and end tokens, and their offsets in it.

    Raises:
        ValueError: as `require_offsets`.
    """
    require_offsets(tokenizer)
    encoded: list[Encoded] = []
    for start in range(0, len(texts), AT_ONCE):
        encoding = tokenizer(
            list(texts[start : start + AT_ONCE]),
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            # The name of a special token in an answer's text was written as ordinary text.
            split_special_tokens=True,
        )
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        encoded += [Encoded(tuple(ids), tuple(map(tuple, offsets))) for ids, offsets in pairs]
    return encoded


def spell(
    tokenizer: Any,
    phrases: Sequence[str],
    *,
    seen: Sequence[str] = (),
    seen_encoded: Sequence[Encoded] | None = None,
) -> list[Pattern]:
    """The patterns of the phrases, sorted by phrase; a pattern's `phrase` is an index of `phrases`.

    Args:
        seen: further texts in which to look for tokenisations.
        seen_encoded: their tokens, if already computed.

    Raises:
        ValueError: as `encode`.
    """
    patterns: dict[tuple[int, tuple[int, ...]], Pattern] = {}

    def add(phrase: int, text: str, encoded: Encoded, start: int, end: int) -> None:
        pattern = _pattern(phrase, text, encoded, start, end)
        if pattern is not None:
            patterns.setdefault((phrase, pattern.tokens), pattern)

    written = [
        (number, f"{before}{form}{after}", len(before), len(before) + len(form))
        for number, phrase in enumerate(phrases)
        for form in _forms(phrase)
        for before, after in _contexts()
    ]
    texts = [text for _, text, _, _ in written]
    for (number, text, start, end), encoded in zip(written, encode(tokenizer, texts), strict=True):
        add(number, text, encoded, start, end)
    finder = Finder(phrases) if phrases else None
    encodings = encode(tokenizer, seen) if seen_encoded is None else seen_encoded
    for text, encoded in zip(seen, encodings, strict=True):
        for number, start, end in finder.found(text) if finder else ():
            add(number, text, encoded, start, end)
    return sorted(patterns.values(), key=lambda pattern: (pattern.phrase, pattern.tokens))


def _forms(phrase: str) -> Iterable[str]:
    capitalised = phrase[:1].upper() + phrase[1:]
    for form in dict.fromkeys((phrase, capitalised)):
        yield form
        if "'" in form:
            yield form.replace("'", "’")


def _contexts() -> list[tuple[str, str]]:
    return [*((before, "") for before in BEFORE), *(("so ", after) for after in AFTER[1:])]


def _pattern(phrase: int, text: str, encoded: Encoded, start: int, end: int) -> Pattern | None:
    """None where one of the tokens also contains a letter or digit outside the phrase."""
    within = encoded.overlapping(start, end)
    if not within:
        return None
    first, last = encoded.offsets[within[0]][0], encoded.offsets[within[-1]][1]
    if any(map(str.isalnum, text[first:start] + text[end:last])):
        return None
    done = tuple(min(encoded.offsets[n][1], end) - start for n in within)
    return Pattern(phrase, tuple(encoded.tokens[n] for n in within), done)


# ── Recall and precision ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Found:
    """How the automaton's matches agree with a search for the words."""

    texts: int
    searched: int
    """Occurrences found by the search."""
    matched: int
    """Completions found by the automaton."""
    both: int
    missed: Mapping[str, int] = field(default_factory=dict)
    """The text of the occurrences that the automaton missed, the most frequent first."""

    @property
    def recall(self) -> float:
        return self.both / self.searched if self.searched else 1.0

    @property
    def precision(self) -> float:
        return self.both / self.matched if self.matched else 1.0


MISSED_SHOWN = 20


def compare(
    automaton: Automaton, finder: Finder, texts: Sequence[str], encoded: Sequence[Encoded]
) -> Found:
    """Compare the automaton with the search. Two matches of a phrase are the same occurrence if
    they end in the same token."""
    searched = matched = both = 0
    missed: defaultdict[str, int] = defaultdict(int)
    for text, tokens in zip(texts, encoded, strict=True):
        by_words = {}
        for phrase, start, end in finder.found(text):
            within = tokens.overlapping(start, end)
            by_words[phrase, within[-1] if within else -1] = text[start:end]
        ended = {(phrase, last) for phrase, _, last in completions(automaton, tokens.tokens)}
        searched, matched = searched + len(by_words), matched + len(ended)
        both += len(by_words.keys() & ended)
        for key in by_words.keys() - ended:
            missed[by_words[key]] += 1
    most_frequent = sorted(missed.items(), key=lambda item: (-item[1], item[0]))[:MISSED_SHOWN]
    return Found(len(texts), searched, matched, both, dict(most_frequent))
