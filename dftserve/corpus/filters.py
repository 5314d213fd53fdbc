"""Decides which texts are kept for training, and removes boilerplate from them.

    reason = verdict(cleaned(text, filters), filters)      # None: the text is kept

Stripped from a text: Project Gutenberg's header and footer, licence paragraphs, cookie and
navigation lines. For any other defect the whole text is dropped, with the reason. A conversation is
kept or dropped, but never changed.

The limits on repetition are Gopher's (arXiv 2112.11446, table A1): at most .20 of the characters in
repeated lines, and at most .15 in repeated 5-grams.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from dftserve.corpus.text import Text, length_in_words
from dftserve.corpus.tidy import STRIPS, tidied
from dftserve.corpus.wrapping import joined
from dftserve.settings import accepted_names

LANGUAGE_CHARACTERS = 20_000
"""Characters at the start of a text from which its language is identified."""
GRAM = 5
"""Words of a run that is compared between texts, or counted as a repetition within one."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which texts are accepted. Shares are of a text's characters, in [0, 1].

    Words are separated by spaces: for a language written without them, set `min_words` to 1, and
    give long texts in parts.
    """

    min_words: int = 20
    max_words: int = 1_000_000
    split_words: int = 1_000
    """A longer plain text is cut at paragraph ends into pieces of at most this many words."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes that py3langid supports; empty: any language."""
    language_min_words: int = 20
    """The language of a shorter text cannot be identified, and is not checked. Of a script without
    spaces, two characters count as a word here."""
    max_damage: float = 0.005
    """Share of replacement characters, control characters and UTF-8 read as Latin-1."""
    max_repeated_lines: float = 0.20
    """Share in lines that occur earlier in the text."""
    max_repeated_grams: float = 0.15
    """Share in runs of five words that occur earlier in the text."""
    strip_boilerplate: bool = True
    """Remove Gutenberg headers and footers, licence paragraphs, cookie and navigation lines."""
    join_lines: bool = True
    """Join the lines of hard-wrapped prose; verse, lists, tables, records and code are
    unchanged."""
    strip: tuple[str, ...] = field(default=(), metadata={"accepted": STRIPS})
    """Remove `html` (tags), `comments` (HTML's), `front_matter`, `code` (fenced)."""
    max_boilerplate: float = 0.5
    """Share of licence paragraphs, cookie and navigation lines above which a text is dropped."""
    duplicate_threshold: float | None = 0.6
    """Jaccard similarity of word 5-grams at or above which the later of two pieces is dropped; 1:
    only if they are equal, None: never. In conversations, answers to the same prompt are compared,
    and none is dropped if the recipe's `references` count them. A copy with 3 % of its words
    changed has a similarity of .75, with 5 % .63, with 10 % .42."""
    family_threshold: float | None = 0.25
    """If at least this share of the smaller text's (or piece's) word 5-grams occurs in the other,
    both texts go to training or both are held out; None: each text by itself. In conversations,
    answers are compared."""
    special_tokens: str = "text"
    """How to read special tokens spelled out in a text (`<|im_end|>` in a document about
    templates): as ordinary `text`, or `keep` them as special tokens; `drop` leaves the text out."""
    answers: str = "all"
    """Which answers of a conversation are trained on: `all`, or the `last`. If the chat template
    marks the text to train on ({% generation %}), `all` means what it marks."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words {self.min_words} and max_words {self.max_words}; "
                "accepted: 0 ≤ min_words ≤ max_words."
            )
        if self.split_words < 1:
            raise ValueError(f"split_words: got {self.split_words}; accepted: 1 or more.")
        if self.language_min_words < 0:
            raise ValueError(f"language_min_words: got {self.language_min_words}; accepted: ≥ 0.")
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(
                    f"{name}: got {value!r}; accepted: {accepted_names(value, known)}."
                )
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; accepted: 0 to 1.")
        for name in self.strip:
            if name not in STRIPS:
                raise ValueError(f"strip: got {name!r}; accepted: {accepted_names(name, STRIPS)}.")
        family = self.family_threshold
        if family is not None and not 0 < family < 1:
            raise ValueError(f"family_threshold: got {family}; accepted: between 0 and 1.")
        threshold = self.duplicate_threshold
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"duplicate_threshold: got {threshold}; accepted: above 0, at most 1.")
        for language in self.languages:
            if language not in _known_languages():
                known = accepted_names(language, _known_languages())
                raise ValueError(f"languages: got {language!r}; accepted: {known}.")


_WORDS = {"special_tokens": ("text", "keep", "drop"), "answers": ("all", "last")}
_SHARES = ("max_damage", "max_repeated_lines", "max_repeated_grams", "max_boilerplate")


def cleaned(text: Text, filters: Filters) -> Text:
    """A plain text with boilerplate stripped and wrapped lines joined, as the filters specify."""
    return unwrapped(stripped(text, filters), filters)


def stripped(text: Text, filters: Filters) -> Text:
    """A plain text without its boilerplate and without what `strip` names."""
    if text.messages is not None:
        return text
    body = text.content
    if filters.strip_boilerplate:
        body = _unframed(body)
        if _boilerplate(body):
            kept = "".join(part for part, is_boilerplate in _parts(body) if not is_boilerplate)
            body = _BLANK_LINES.sub("\n\n", kept).strip("\n")
    return _with(text, tidied(body, filters.strip))


def unwrapped(text: Text, filters: Filters) -> Text:
    """A plain text with its wrapped lines joined."""
    if text.messages is not None or not filters.join_lines:
        return text
    return _with(text, joined(text.content))


def _with(text: Text, content: str) -> Text:
    return text if content == text.content else replace(text, content=content)


def verdict(text: Text, filters: Filters) -> str | None:
    """Why a text, given as it was read, is dropped; None if it is kept."""
    whole = text.content if text.messages is not None else _unframed(text.content)
    if _share(_boilerplate(whole), whole) > filters.max_boilerplate:
        return "boilerplate"
    content = cleaned(text, filters).content
    words = content.split()
    if len(words) < filters.min_words:
        return "too short"
    if len(words) > filters.max_words:
        return "too long"
    if damage(content) > filters.max_damage:
        return "damaged encoding"
    if repeated_lines(content) > filters.max_repeated_lines:
        return "repeated lines"
    if repeated_grams(words) > filters.max_repeated_grams:
        return "repeated phrases"
    if filters.languages and length_in_words(content) >= filters.language_min_words:
        language = language_of(content)
        if language not in filters.languages:
            return f"language {language}"
    return None


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────

_DAMAGE = re.compile(
    "[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]"  # U+FFFD and control characters
    "|[\u00c2\u00c3][\u0080-\u00bf]"  # Ã©: two bytes of UTF-8 read as Latin-1
    "|\u00e2(?:\u20ac.|[\u0080-\u00bf]{2})"  # â€™: three bytes, read as Windows-1252 or Latin-1
)


def damage(content: str) -> float:
    """The share of characters that result from a wrong encoding."""
    return _share(_DAMAGE.findall(content), content)


def repeated_lines(content: str) -> float:
    """The share of characters in lines that occur earlier in the text."""
    lines = [line for line in map(str.strip, content.splitlines()) if line]
    seen: set[str] = set()
    repeated = [line for line in lines if line in seen or seen.add(line)]
    return sum(map(len, repeated)) / max(1, sum(map(len, lines)))


def repeated_grams(words: Sequence[str]) -> float:
    """The share of characters, without spaces, in 5-grams that occur earlier in the text."""
    seen: set[tuple[str, ...]] = set()
    repeated = covered = 0
    for start in range(len(words) - GRAM + 1):
        gram = tuple(words[start : start + GRAM])
        if gram in seen:
            # 5-grams overlap; each word is counted once.
            repeated += sum(map(len, words[max(covered, start) : start + GRAM]))
            covered = start + GRAM
        seen.add(gram)
    return repeated / max(1, sum(map(len, words)))


def language_of(content: str) -> str:
    """The ISO 639-1 code that py3langid predicts from the start of the text."""
    import py3langid

    return py3langid.classify(content[:LANGUAGE_CHARACTERS])[0]


@cache
def _known_languages() -> tuple[str, ...]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return tuple(sorted(LanguageIdentifier.from_model_file(MODEL_FILE).labels))


def _share(parts: Iterable[str], content: str) -> float:
    return sum(map(len, parts)) / max(1, len(content))


# ── Boilerplate ──────────────────────────────────────────────────────────────────────────────────

# `\W*` would match across line ends, and rescan a run of blank lines from each of its lines.
_GUTENBERG_START = re.compile(
    r"^[^\w\n]*START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*$\n?", re.IGNORECASE | re.MULTILINE
)
_GUTENBERG_END = re.compile(
    r"^[^\w\n]*END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK", re.IGNORECASE | re.MULTILINE
)
_LICENCE = re.compile(
    "permission is hereby granted, free of charge"
    "|redistribution and use in source and binary forms"
    "|the software is provided .as is"
    "|under the terms of the gnu "
    "|you may not use this file except in compliance"
    "|project gutenberg(?:-tm)? (?:license|literary archive)",
    re.IGNORECASE,
)
"""Wording from the texts of licences."""
_NOTICE = re.compile(
    "licensed under the (?:apache|mit|mozilla|gnu|creative commons)"
    "|gnu (?:lesser |affero )?general public license"
    "|placed in the public domain"
    "|spdx-license-identifier"
    r"|^[^\w\n]*all rights reserved[^\w\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
"""Notices, which prose may contain too: matched only in short paragraphs."""
_RESERVED, _OWNED = "all rights reserved", ("copyright", "©", "(c)")
"""A line is a rights notice if it contains the former and any of the latter. This is no regular
expression, since `.*` between them would rescan the rest of the line for each mark."""
_SITE_LINE = re.compile(
    "we use cookies|(?:accept|reject) (?:all )?cookies|cookie (?:policy|settings|preferences)"
    "|skip to (?:main )?content|terms of (?:use|service)|privacy policy|subscribe to our newsletter"
    "|share (?:this )?on (?:facebook|twitter|x|linkedin)|back to top|click here to subscribe",
    re.IGNORECASE,
)
_NAVIGATION = re.compile(r"^\s*(?:[^|»›·•\n]{1,30}\s[|»›·•]\s){2,}[^|»›·•\n]{1,30}$")
_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n){2,}")
LICENCE_WORDS, NOTICE_WORDS, LINE_WORDS = 400, 40, 25
"""Longer paragraphs and lines are prose that quotes or discusses licences, cookies or rights."""


def _unframed(content: str) -> str:
    """The text between Project Gutenberg's start and end markers."""
    start = _GUTENBERG_START.search(content)
    body = content[start.end() :] if start else content
    end = _GUTENBERG_END.search(body)
    return body[: end.start()].rstrip() + "\n" if end else body


def _boilerplate(content: str) -> list[str]:
    return [part for part, is_boilerplate in _parts(content) if is_boilerplate]


def _parts(content: str) -> list[tuple[str, bool]]:
    """Paragraphs, lines and separators, in order, each with whether it is boilerplate."""
    parts: list[tuple[str, bool]] = []
    for paragraph in _PARAGRAPHS.split(content):
        if _is_licence(paragraph):
            parts.append((paragraph, True))
        else:
            lines = paragraph.splitlines(keepends=True)
            parts += ((line, _is_boilerplate_line(line)) for line in lines)
    return parts


def _is_licence(paragraph: str) -> bool:
    words = len(paragraph.split())
    if words > NOTICE_WORDS:
        return words <= LICENCE_WORDS and bool(_LICENCE.search(paragraph))
    if _LICENCE.search(paragraph) or _NOTICE.search(paragraph):
        return True
    return any(map(_is_rights_notice, paragraph.split("\n")))


def _is_boilerplate_line(line: str) -> bool:
    """Whether a line is boilerplate by itself, wherever it occurs."""
    if _NAVIGATION.match(line.rstrip("\n")):
        return True
    if len(line.split()) > LINE_WORDS:
        return False
    found = _SITE_LINE.search(line) or _is_rights_notice(line) or "SPDX-License-Identifier" in line
    return bool(found)


def _is_rights_notice(line: str) -> bool:
    """Whether a line is a copyright notice that reserves all rights."""
    lowered = line.lower()
    return _RESERVED in lowered and any(mark in lowered for mark in _OWNED)
