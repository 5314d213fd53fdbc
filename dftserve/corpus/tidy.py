"""Removes optional parts, such as HTML tags or front matter, from a plain text.

tidied(content, ("front_matter", "comments"))
"""

import html
import re
from collections.abc import Iterable

STRIPS = ("html", "comments", "front_matter", "code")
"""What can be removed: HTML tags, HTML comments, YAML or TOML front matter, fenced code."""

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
_BLANKS = re.compile(r"\n(?:[ \t]*\n){2,}")


def tidied(content: str, strip: Iterable[str]) -> str:
    """The text without what `strip` names."""
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
    return content
