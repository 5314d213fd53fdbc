"""What is taken out of a plain text, or joined in it, before it is learnt.

tidied(content, join_lines=True, strip=("front_matter", "comments"))
"""

import html
import itertools
import re
from collections.abc import Iterable, Sequence

STRIPS = ("html", "comments", "front_matter", "code")
"""What can be taken out: HTML's tags, comments, the YAML or TOML at the head, fenced code."""
NARROWEST, WIDEST = 40, 120
"""Characters of a line at which text is wrapped by hand or by an editor."""
SLACK = 6
"""Characters by which a line may be shorter than it had to be."""

_FRONT = re.compile(r"\A(---|\+\+\+)[ \t]*\n.*?\n\1[ \t]*(?:\n|\Z)", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->[ \t]*\n?", re.DOTALL)
_FENCE = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[^\n]*\n.*?^[ \t]*\1[`~]*[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE
)
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"</?(?:p|div|br|li|ul|ol|h[1-6]|tr|table|section|article|blockquote|pre)\b[^<>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_STRUCTURE = re.compile(r"\s|[-*+#>|=~`:]|\.\.|\d+[.)]\s|[^\w\s]+$")
"""What begins a line that is no prose: an indentation, an item, a heading, a table, a rule."""
_PARAGRAPH = re.compile(r"(\n[ \t]*\n\s*)")
_BLANKS = re.compile(r"\n(?:[ \t]*\n){2,}")


def tidied(content: str, *, join_lines: bool, strip: Iterable[str]) -> str:
    """The text without what `strip` names, and with wrapped lines joined."""
    wanted, before = set(strip), content
    if "front_matter" in wanted:
        content = _FRONT.sub("", content)
    if "comments" in wanted:
        content = _COMMENT.sub("", content)
    if "code" in wanted:
        content = _FENCE.sub("", content)
    if "html" in wanted:
        content = _HIDDEN.sub("", content)
        content = html.unescape(_TAG.sub("", _BLOCK.sub("\n", content)))
    if content != before:
        content = _BLANKS.sub("\n\n", content).strip("\n")
    return joined(content) if join_lines else content


def joined(content: str) -> str:
    """Hard-wrapped lines of prose joined: those that are as long as the next word allows.

    Verse, lists, tables, headings, code and whatever is indented stay as they are.
    """
    parts = _PARAGRAPH.split(content)
    fenced, found = False, []
    width = _width(parts[::2])
    for part in parts:
        marks = len(re.findall(r"^[ \t]*(?:```|~~~)", part, re.MULTILINE))
        if width and not fenced and not marks and _is_wrapped(part.split("\n"), width):
            part = " ".join(line.strip() for line in part.split("\n"))
        fenced ^= marks % 2 == 1
        found.append(part)
    return "".join(found)


def _width(paragraphs: Sequence[str]) -> int:
    """Characters at which a text is wrapped; 0 where it is not."""
    inner = [len(line) for each in paragraphs for line in each.split("\n")[:-1] if line.strip()]
    if len(inner) < 3:
        return 0
    width = sorted(inner)[int(0.95 * (len(inner) - 1))]
    return width if NARROWEST <= width <= WIDEST else 0


def _is_wrapped(lines: Sequence[str], width: int) -> bool:
    if len(lines) < 2 or any(not line.strip() or _STRUCTURE.match(line) for line in lines):
        return False
    return all(
        len(line) <= width + SLACK and len(line) + 1 + len(after.split()[0]) > width - SLACK
        for line, after in itertools.pairwise(lines)
    )
