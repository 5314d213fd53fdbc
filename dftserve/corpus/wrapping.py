"""Hard-wrapped prose joined: joined("The river ran\\nbelow the hill.")."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from dftserve.corpus.text import UNSPACED

NARROWEST, WIDEST = 40, 120
"""Characters of a line at which text is wrapped by hand or by an editor."""
SLACK = 6
"""Characters by which a line may be shorter than it had to be."""
MOST_MARKS = 0.12
"""Share of digits and marks of code in a line of prose."""

_STRUCTURE = re.compile(r"\s|[-*+#>|=~`:]|\.\.(?!\.)|\d+[.)]\s|[^\w\s]+$")
"""What begins a line that is no prose: an indentation, an item, a heading, a table, a rule."""
_PARAGRAPH = re.compile(r"(\n[ \t]*\n\s*)")
_FENCED = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
_MARK = re.compile(r"[\d_=(){}\[\]<>;/\\|@#$%^&*+~]")
_COLUMNS = re.compile(r"\t|[^\s.!?:;\"'”’)] {2,}\S|(?:\S[,;]\w.*){2}")
"""What stands between the fields of a record."""
_CODE_END = re.compile(r"[;{}\\=([]$|\)[:;,]?$")
_KEY = re.compile(r"[\w.-]+\s?[:=]|\W*\d|(?:import|from|def|class|return|var|let|const)\s")
"""What begins a record: a name with its value, a number or a time; and what begins a statement."""
_PUNCTUATED = re.compile(r"[^\w\s\-–—]$")
_HYPHENATED = re.compile(r"(?:\w-|\S--|\S—)\Z")
_UNSPACED = re.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uffef]")
_HELD_OPEN = ("and", "or", "to", "und", "oder", "bis")
"""After "pre-" at a line's end: "pre- and post-war"."""


def joined(content: str) -> str:
    """Hard-wrapped prose with its paragraphs in one line each.

    A paragraph is wrapped where the first word of each line had no room on the line before it, at
    the width of the text. So are, by chance, records and verses of like length: paragraphs stay
    that read as these, or as code, and so does the whole text where most of its paragraphs are not
    wrapped, or most of the lines end as verses do. Lists, tables, headings and whatever is indented
    or fenced stay as they are.
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
    return "".join(_in_one(wrapped[at]) if at in wrapped else each for at, each in enumerate(parts))


def _unfenced(parts: Sequence[str]) -> Iterator[int]:
    """The places of paragraphs, of which every second part is one, outside fenced code."""
    fenced = False
    for at in range(0, len(parts), 2):
        marks = len(_FENCED.findall(parts[at]))
        if not fenced and not marks:
            yield at
        fenced ^= marks % 2 == 1


def _is_prose(lines: Sequence[str]) -> bool:
    """Whether several lines may be prose, by what each of them has in it."""
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
    """Characters at which a text is wrapped; 0 where it is not."""
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
        # A word of half a line is none: a record, or a clause in a script without blanks.
        if first * 2 > width or not width - SLACK - first - 1 < len(line) <= width + SLACK:
            return False
    return True


def _is_verse(breaks: Sequence[tuple[str, str]], share: float) -> bool:
    """Whether at so many breaks a clause ends, or a line begins with a capital."""
    ended = sum(bool(_PUNCTUATED.search(line)) for line, _ in breaks)
    capital = sum(after[:1].isupper() for _, after in breaks)
    return max(ended, capital) >= share * len(breaks)


def _in_one(lines: Sequence[str]) -> str:
    lines = [line.strip() for line in lines]
    gaps = (_gap(line, after) for line, after in itertools.pairwise(lines))
    return "".join(itertools.chain(lines[:1], *zip(gaps, lines[1:], strict=True)))


def _gap(line: str, after: str) -> str:
    """What stands between two lines once they are one."""
    if _UNSPACED.match(line[-1]) and _UNSPACED.match(after[0]):
        return ""
    is_parted = _HYPHENATED.search(line) and (after[0].isalpha() or not line.endswith("-"))
    return "" if is_parted and after.split()[0] not in _HELD_OPEN else " "
