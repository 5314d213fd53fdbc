"""How a tokenizer writes a phrase: behind a blank, at the start of a line, in quotes, capitalised.

    patterns = spell(tokenizer, ["a testament to"], seen=texts)
    judged = compare(automaton, finder, tokenizer, texts)       recall and precision

A phrase's first token may hold what stands before it, as a blank, and its last one what follows,
as `!\\n`; both depend on the text around. Each phrase is written in a few such surroundings, and as
the texts of `seen` have it, and all tokens that hold a part of it are one of its tokenisations, as
long as what else they hold is no letter or digit. What these miss is measured: on texts that were
not among `seen`, against a search for its words.

A tokenizer must say where its tokens stand (`transformers`' fast ones do).
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
"""Texts that are tokenised in one call."""


@dataclass(frozen=True)
class Encoded:
    """A text's tokens and where each stands in it."""

    tokens: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    def holding(self, start: int, end: int) -> range:
        """The tokens that hold a part of text[start:end]."""
        within = [n for n, (a, b) in enumerate(self.places) if a < end and b > start]
        return range(within[0], within[-1] + 1) if within else range(0)


class Finder:
    """Phrases by their words and marks, found in a text whatever its capitals and quotes."""

    def __init__(self, phrases: Sequence[str]) -> None:
        self._by_first: defaultdict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
        for number, phrase in enumerate(phrases):
            words = tuple(word for word, _, _ in spans(phrase))
            self._by_first[words[0]].append((words, number))

    def found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(phrase, start, end) of each occurrence, also of those inside of others."""
        said = spans(text)
        words = tuple(word for word, _, _ in said)
        for at, word in enumerate(words):
            for phrase, number in self._by_first.get(word, ()):
                if words[at : at + len(phrase)] == phrase:
                    yield number, said[at][1], said[at + len(phrase) - 1][2]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """
    Raises:
        ValueError: the tokenizer does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, which does not say where its tokens "
            "stand in a text; accepted: a model with a tokenizer.json."
        )
    found: list[Encoded] = []
    for start in range(0, len(texts), AT_ONCE):
        made = tokenizer(
            list(texts[start : start + AT_ONCE]),
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            # Such a token in an answer's text was written letter by letter.
            split_special_tokens=True,
        )
        pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
        found += [Encoded(tuple(ids), tuple(map(tuple, places))) for ids, places in pairs]
    return found


def spell(
    tokenizer: Any,
    phrases: Sequence[str],
    *,
    seen: Sequence[str] = (),
    seen_encoded: Sequence[Encoded] | None = None,
) -> list[Pattern]:
    """The patterns of phrases, in their order; a phrase is the number of its place.

    Args:
        seen: texts in which tokenisations are looked for too.
        seen_encoded: their tokens, where they are at hand.

    Raises:
        ValueError: as `encode`.
    """
    made: dict[tuple[int, tuple[int, ...]], Pattern] = {}

    def add(phrase: int, text: str, encoded: Encoded, start: int, end: int) -> None:
        pattern = _pattern(phrase, text, encoded, start, end)
        if pattern is not None:
            made.setdefault((phrase, pattern.tokens), pattern)

    written = [
        (number, f"{before}{form}{after}", len(before), len(before) + len(form))
        for number, phrase in enumerate(phrases)
        for form in _forms(phrase)
        for before, after in _surroundings()
    ]
    texts = [text for _, text, _, _ in written]
    for (number, text, start, end), encoded in zip(written, encode(tokenizer, texts), strict=True):
        add(number, text, encoded, start, end)
    finder = Finder(phrases) if phrases else None
    encodings = encode(tokenizer, seen) if seen_encoded is None else seen_encoded
    for text, encoded in zip(seen, encodings, strict=True):
        for number, start, end in finder.found(text) if finder else ():
            add(number, text, encoded, start, end)
    return sorted(made.values(), key=lambda pattern: (pattern.phrase, pattern.tokens))


def _forms(phrase: str) -> Iterable[str]:
    capitalised = phrase[:1].upper() + phrase[1:]
    for form in dict.fromkeys((phrase, capitalised)):
        yield form
        if "'" in form:
            yield form.replace("'", "’")


def _surroundings() -> list[tuple[str, str]]:
    return [*((before, "") for before in BEFORE), *(("so ", after) for after in AFTER[1:])]


def _pattern(phrase: int, text: str, encoded: Encoded, start: int, end: int) -> Pattern | None:
    """None where a token holds a letter or digit beside the phrase."""
    held = encoded.holding(start, end)
    if not held:
        return None
    first, last = encoded.places[held[0]][0], encoded.places[held[-1]][1]
    if any(map(str.isalnum, text[first:start] + text[end:last])):
        return None
    done = tuple(min(encoded.places[n][1], end) - start for n in held)
    return Pattern(phrase, tuple(encoded.tokens[n] for n in held), done)


# ── What is missed ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Found:
    """What the automaton finds of what a search for the words finds."""

    texts: int
    searched: int
    """Occurrences by the search."""
    matched: int
    """Completions by the automaton."""
    both: int
    missed: Mapping[str, int] = field(default_factory=dict)
    """How the missed ones were written, the most frequent first."""

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
    """The automaton beside the search: an occurrence is one where it ends in the same token."""
    searched = matched = both = 0
    missed: defaultdict[str, int] = defaultdict(int)
    for text, tokens in zip(texts, encoded, strict=True):
        by_words = {}
        for phrase, start, end in finder.found(text):
            held = tokens.holding(start, end)
            by_words[phrase, held[-1] if held else -1] = text[start:end]
        ended = {(phrase, last) for phrase, _, last in completions(automaton, tokens.tokens)}
        searched, matched = searched + len(by_words), matched + len(ended)
        both += len(by_words.keys() & ended)
        for key in by_words.keys() - ended:
            missed[by_words[key]] += 1
    often = sorted(missed.items(), key=lambda item: (-item[1], item[0]))[:MISSED_SHOWN]
    return Found(len(texts), searched, matched, both, dict(often))
