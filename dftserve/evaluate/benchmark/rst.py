"""Extract the prose of a reStructuredText document: its paragraphs, as a reader sees them."""

import re

_LAST = re.compile(r"^(?:references|copyright|footnotes|acknowledge?ments?|change ?log)\b", re.I)
_TITLE = re.compile(r"^([=\-~^\"'`#*+.:_])\1{2,}\s*$", re.MULTILINE)
_NO_PARAGRAPH = re.compile(
    r"\s|\.\. |[*+\-•] |\(?(?:\d+|#|[a-z])[.)] |\||\+[-=]|:[\w -]+:\s|>>> |=+ +="
)
"""Beginnings of blocks that are not paragraphs: indented lines (code, quotes), directives, comments
and footnotes, lists, tables, fields, interactive sessions."""
_LEAST_WORDS = 8
"""Shorter paragraphs are captions and leftovers."""
_INLINE = (
    (re.compile(r"\s*\[(?:#?[\w-]*|\*)\]_"), ""),
    (re.compile(r":pep:`(\d+)`"), r"PEP \1"),
    (re.compile(r"(?::[\w:+.-]+:)?`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),
    (re.compile(r"``(.+?)``", re.DOTALL), r"\1"),
    (re.compile(r"(?::[\w:+.-]+:)?`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}(?=\S)([^*]+?)(?<=\S)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\b([A-Za-z][\w-]*[A-Za-z0-9])_(?!\w)"), r"\1"),
    (re.compile(r"\s+::$"), ""),
    (re.compile(r"::$"), ":"),
)
"""Inline markup and its replacement: references to footnotes are removed; roles, links, literals
and emphasis are replaced by their text."""


def prose(document: str) -> str:
    """The paragraphs, separated by empty lines. The header block, titles, code, lists, tables,
    directives, footnotes, and everything from the references on are left out."""
    kept = []
    for block in re.split(r"\n\s*\n", document.replace("\r\n", "\n"))[1:]:
        block = block.strip("\n")
        if _TITLE.search(block):
            if _LAST.match(_TITLE.sub("", block).strip()):
                break
        elif not _NO_PARAGRAPH.match(block) and len(block.split()) >= _LEAST_WORDS:
            kept.append(_plain(block))
    return "\n\n".join(kept)


def _plain(block: str) -> str:
    for pattern, replacement in _INLINE:
        block = pattern.sub(replacement, block)
    return block
