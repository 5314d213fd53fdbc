"""Joins the lines of hard-wrapped prose: joined("The river ran\\nbelow the hill.")."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from dftserve.corpus.text import UNSPACED

NARROWEST, WIDEST = 40, 120
"""Range of line widths, in characters, at which text counts as hard-wrapped."""
SLACK = 6
"""Characters by which a line's length may differ from what wrapping at the width would give."""
MOST_MARKS = 0.12
"""Largest share of digits and code punctuation in a line of prose."""

_STRUCTURE = re.compile(r"\s|[-*+#>|=~`:]|\.\.(?!\.)|\d+[.)]\s|[^\w\s]+$")
"""The start of a line that is not prose: indentation, a list item, a heading, a table, a rule."""
_PARAGRAPH = re.compile(r"(\n[ \t]*\n\s*)")
_FENCED = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_MARK = re.compile(r"[\d_=(){}\[\]<>;/\\|@#$%^&*+~]")
_COLUMNS = re.compile(r"\t|[^\s.!?:;\"'”’)] {2,}\S|(?:\S[,;]\w.*){2}")
"""Separators between the fields of a record."""
_CODE_END = re.compile(r"[;{}\\=([]$|\)[:;,]?$")
_KEY = re.compile(r"[\w.-]+\s?[:=]|\W*\d|(?:import|from|def|class|return|var|let|const)\s")
"""The start of a record (a key with its value, a number or a time) or of a code statement."""
_PUNCTUATED = re.compile(r"[^\w\s\-–—]$")
_HYPHENATED = re.compile(r"(?:\w-|\S--|\S—)\Z")
_UNSPACED = re.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uffef]")
_HELD_OPEN = ("and", "or", "to", "und", "oder", "bis")
"""Words after which a hyphen at a line's end is kept with a space: "pre- and post-war"."""


def joined(content: str) -> str:
    """The text with each paragraph of hard-wrapped prose joined into one line.

    A paragraph counts as wrapped if, at the width of the text, the first word of each line would
    not have fitted on the line before. By chance this also holds for records and verses of similar
    length, so paragraphs that look like these, or like code, are left unchanged. The whole text is
    left unchanged if most of its lines are in paragraphs that are not wrapped, or if most lines end
    as verses do. Lists, tables, headings and indented or fenced blocks are never changed.
    """
    parts = _PARAGRAPH.split(content)
    blocks = {at: parts[at].split("\n") for at in _unfenced(parts)}
    blocks = {at: lines for at, lines in blocks.items() if _is_prose(lines)}
    width = _width(blocks.values())
    wrapped = {at: lines for at, lines in blocks.items() if _is_wrapped(lines, width)}
    breaks = [pair for lines in wrapped.values() for pair in itertools.pairwise(lines)]
    all_breaks = sum(len(lines) - 1 for lines in blocks.values())
    if not width or len(breaks) * 2 < all_breaks or _is_verse(breaks, 2 / 3):
        return content
    return "".join(
        _one_line(wrapped[at]) if at in wrapped else each for at, each in enumerate(parts)
    )


def _unfenced(parts: Sequence[str]) -> Iterator[int]:
    """Indices of the paragraphs outside fenced code; every second part is a paragraph."""
    fenced = False
    for at in range(0, len(parts), 2):
        marks = len(_FENCED.findall(parts[at]))
        if not fenced and not marks:
            yield at
        fenced ^= marks % 2 == 1


def _is_prose(lines: Sequence[str]) -> bool:
    """Whether two or more lines may be prose, judged by the content of each."""
    if len(lines) < 2 or any(not line.strip() or _STRUCTURE.match(line) for line in lines):
        return False
    firsts = {line.split()[0] for line in lines}
    if all(map(_KEY.match, lines)) or len(firsts) == 1 < len(lines) - 1:
        return False
    coded = sum(_is_coded(line) for line in lines)
    return coded * 2 < len(lines)


def _is_coded(line: str) -> bool:
    if _CODE_END.search(line) or _COLUMNS.search(line):
        return True
    return len(_MARK.findall(line)) > MOST_MARKS * len(line)


def _width(blocks: Iterable[Sequence[str]]) -> int:
    """The width, in characters, at which a text is wrapped; 0 if it is not wrapped."""
    inner = sorted(len(line) for lines in blocks for line in lines[:-1])
    if len(inner) < 3:
        return 0
    width = inner[int(0.95 * (len(inner) - 1))]
    return width if NARROWEST <= width <= WIDEST else 0


def _is_wrapped(lines: Sequence[str], width: int) -> bool:
    breaks = list(itertools.pairwise(lines))
    if len(breaks) > 2 and _is_verse(breaks, 1):
        return False
    for line, after in breaks:
        first = len(after.split()[0])
        # A "word" of half a line is a record, or a clause in a script without spaces.
        if first * 2 > width or not width - SLACK - first - 1 < len(line) <= width + SLACK:
            return False
    return True


def _is_verse(breaks: Sequence[tuple[str, str]], share: float) -> bool:
    """Whether a clause ends, or the next line starts with a capital, at `share` of the breaks."""
    ended = sum(bool(_PUNCTUATED.search(line)) for line, _ in breaks)
    capital = sum(after[:1].isupper() for _, after in breaks)
    return max(ended, capital) >= share * len(breaks)


def _one_line(lines: Sequence[str]) -> str:
    lines = [line.strip() for line in lines]
    gaps = (_gap(line, after) for line, after in itertools.pairwise(lines))
    return "".join(itertools.chain(lines[:1], *zip(gaps, lines[1:], strict=True)))


def _gap(line: str, after: str) -> str:
    """The separator between two lines when they are joined."""
    if _UNSPACED.match(line[-1]) and _UNSPACED.match(after[0]):
        return ""
    is_parted = _HYPHENATED.search(line) and (after[0].isalpha() or not line.endswith("-"))
    return "" if is_parted and after.split()[0] not in _HELD_OPEN else " "
