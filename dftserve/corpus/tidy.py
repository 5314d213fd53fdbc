"""Removes optional parts, such as HTML tags or front matter, from a plain text.

tidied(content, ("front_matter", "comments"))

Every step takes time proportional to the text's length, whatever is left open in it.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

Bounds = tuple[re.Pattern[str], re.Pattern[str]]
"""What a span begins with, and what it ends with."""

STRIPS = ("html", "comments", "front_matter", "code")
"""What can be removed: HTML tags, HTML comments, YAML or TOML front matter, fenced code."""

_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n.*?\n\1[ \t]*(?:\n|\Z)", re.DOTALL)
_COMMENT = re.compile("<!--"), re.compile(r"-->[ \t]*\n?")
_SCRIPT = re.compile(r"<(?ai:script)\b"), re.compile(r"</(?ai:script)\s*>")
_STYLE = re.compile(r"<(?ai:style)\b"), re.compile(r"</(?ai:style)\s*>")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})")
_FENCE_END = re.compile(r"[ \t]*(`{3,}+|~{3,}+)[`~]*+[ \t]*+")
_BLOCK = re.compile(
    r"</?(?:p|div|br|li|ul|ol|h[1-6]|tr|table|section|article|blockquote|pre)\b[^<>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BLANKS = re.compile(r"\n(?:[ \t]*\n){2,}")


def tidied(content: str, strip: Iterable[str]) -> str:
    """The text without what `strip` names."""
    wanted, before = set(strip), content
    if "front_matter" in wanted:
        content = _FRONT.sub("", content)
    if "comments" in wanted:
        content = _without_spans(content, (_COMMENT,))
    if "code" in wanted:
        content = _without_fences(content)
    if "html" in wanted:
        content = _without_spans(content, (_SCRIPT, _STYLE))
        content = html.unescape(_TAG.sub("", _BLOCK.sub("\n", content)))
    if content != before:
        content = _BLANKS.sub("\n\n", content).strip("\n")
    return content


def _without_spans(content: str, bounds: Sequence[Bounds]) -> str:
    """The text without its spans; one that is not closed is left."""
    kept, at = [], 0
    open_spans = [found for each in bounds if (found := _Span.first(each, content, 0))]
    while open_spans:
        span = min(open_spans, key=lambda each: each.start)
        closed = span.bounds[1].search(content, span.stop)
        if closed is None:
            open_spans.remove(span)  # Nor is any later span of this kind closed.
            continue
        kept.append(content[at : span.start])
        at = closed.end()
        after = (
            each if each.start >= at else _Span.first(each.bounds, content, at)
            for each in open_spans
        )
        open_spans = [each for each in after if each is not None]
    return "".join([*kept, content[at:]])


@dataclass(frozen=True)
class _Span:
    """The beginning of a span, in characters."""

    bounds: Bounds
    start: int
    stop: int

    @classmethod
    def first(cls, bounds: Bounds, content: str, at: int) -> "_Span | None":
        match = bounds[0].search(content, at)
        return cls(bounds, *match.span()) if match else None


def _without_fences(content: str) -> str:
    """The text without fenced code. A fence is closed by the next one of its length or longer; if
    there is none, by the next one of the longest that follow. One that is not closed is left."""
    lines = content.split("\n")
    begins = [_marks(_FENCE.match(line)) for line in lines]
    ends = [_marks(_FENCE_END.fullmatch(line)) for line in lines]
    longest = {mark: _longest_after(mark, ends) for mark in "`~"}
    kept, number = [], 0
    while number < len(lines):
        fence = begins[number]
        wanted = min(len(fence), longest[fence[0]][number]) if fence else 0
        if not wanted:
            kept.append(number)
            number += 1
            continue
        number += 1
        while not ends[number].startswith(fence[0] * wanted):
            number += 1
        number += 1
    return _lines(lines, kept)


def _marks(match: re.Match[str] | None) -> str:
    return match[1] if match else ""


def _longest_after(mark: str, fences: Sequence[str]) -> list[int]:
    """For each line, the length of the longest fence of these marks in the lines after it; 0 if
    there is none."""
    lengths = [len(each) if each.startswith(mark) else 0 for each in fences]
    return [*accumulate(reversed(lengths[1:]), max, initial=0)][::-1]


def _lines(lines: Sequence[str], kept: Sequence[int]) -> str:
    """The kept lines, each with the line end that it had."""
    last = len(lines) - 1
    return "".join(lines[number] + ("\n" if number < last else "") for number in kept)
