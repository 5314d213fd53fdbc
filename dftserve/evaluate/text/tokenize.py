"""Normalises texts and splits them into the words, tokens and sentences that all measures count.

A word is letters and digits with inner apostrophes and hyphens; a token is a word or a punctuation
mark.
"""

import re
import unicodedata
from itertools import pairwise

_QUOTES = {**dict.fromkeys("‘’‚‛`´ʼ", "'"), **dict.fromkeys("“”„‟«»", '"')}
_PLAIN_QUOTES = str.maketrans(_QUOTES)
_HYPHENS = {"‑": "-"}
_PLAIN_IN_WORDS = str.maketrans({**_QUOTES, **_HYPHENS})
_PLAIN = str.maketrans(
    {
        **_QUOTES,
        **_HYPHENS,
        **dict.fromkeys("–—―", " — "),
        "…": "...",
    }
)
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\ufeff"))
_WORD = r"[^\W_]+(?:['-][^\W_]+)*"
_WORDS = re.compile(_WORD)
_UNSEEN = r"[\u0300-\u036f\u00ad\u200b\ufeff]*"
_WRITTEN = rf"(?:[^\W_]{_UNSEEN})+"
_WRITTEN_WORDS = re.compile(rf"{_WRITTEN}(?:['-]{_UNSEEN}{_WRITTEN})*")
"""The words of a text that is not normalised, which may have accents apart from their letters, and
invisible characters."""
_TOKENS = re.compile(rf"{_WORD}|\.\.\.|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+(?=[\"'(\[*]*[^\W\d_a-z])|\n\s*\n")
_DASHES = re.compile(r"(?<![-\w])-{2,3}(?![-\w])|(?<=\w)--+(?=\w)")
_BREAKS = re.compile(r"\n\n+")


def normalise(text: str) -> str:
    """Unify quotes, dashes and spaces, so that typesetting is not mistaken for style.

    NFC; straight quotes; dashes of any length as ` — `; single line breaks as spaces, empty
    lines as one empty line.
    """
    text = unicodedata.normalize("NFC", text.translate(_INVISIBLE)).translate(_PLAIN)
    lines = (" ".join(line.split()) for line in text.replace("''", '"').split("\n"))
    paragraphs = _BREAKS.split("\n".join(lines).strip("\n"))
    return "\n\n".join(" ".join(_DASHES.sub(" — ", part).split()) for part in paragraphs)


def words(text: str) -> list[str]:
    """The words of a normalised text, lower case."""
    return [word.lower() for word in _WORDS.findall(text)]


def tokens(text: str) -> list[str]:
    """The words and marks of a normalised text, lower case."""
    return [token.lower() for token in _TOKENS.findall(text)]


def spans(text: str) -> list[tuple[str, int, int]]:
    """The words and marks of a text as it was written, lower case, each with its start and end.

    Of the steps of `normalise`, only quotes are replaced, so that positions do not change.
    """
    matches = _TOKENS.finditer(text.translate(_PLAIN_QUOTES))
    return [(match.group().lower(), *match.span()) for match in matches]


def word_starts(text: str) -> list[int]:
    """Where each word starts in a text as it was written. `normalise` keeps at least these words
    between any two of the positions."""
    return [match.start() for match in _WRITTEN_WORDS.finditer(text.translate(_PLAIN_IN_WORDS))]


def sentences(text: str) -> list[str]:
    """The sentences of a normalised text: they end with . ! ? before a capital, or at an empty
    line. Abbreviations are not recognised."""
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    pieces = (text[start:end].strip() for start, end in pairwise((0, *ends, len(text))))
    return [piece for piece in pieces if piece]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a normalised text."""
    return [part for part in text.split("\n\n") if part]


def window(text: str, start: int, stop: int) -> str:
    """A normalised text from its word `start` up to its word `stop`, marks included.

    Shorter where the text has fewer words.
    """
    spans = [match.span() for match in _WORDS.finditer(text)]
    if start >= len(spans):
        return ""
    end = spans[stop][0] if stop < len(spans) else len(text)
    return text[spans[start][0] : end].rstrip()


def without_echo(text: str, prompt: str) -> str:
    """A normalised text without the beginning that it shares, word for word, with its prompt.

    A text that repeats the whole prompt, or at least eight of its words, echoes it; a few
    common words are no echo.
    """
    own, asked = list(_WORDS.finditer(text)), words(normalise(prompt))
    shared = 0
    while shared < min(len(own), len(asked)) and own[shared].group().lower() == asked[shared]:
        shared += 1
    if not shared or shared < min(8, len(asked)):
        return text
    return text[own[shared].start() :] if shared < len(own) else ""


def ngrams(items: list[str], size: int) -> list[tuple[str, ...]]:
    """The runs of `size` consecutive items, in order; empty if there are fewer items."""
    return list(zip(*(items[start:] for start in range(size)), strict=False))
