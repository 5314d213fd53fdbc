"""The function that an answer defines, as a module that can be run. Nothing is run here.

Standard library only, as `extract`.
"""

import ast
import html
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dftserve.evaluate.text.thinking import after_thinking

_TOKEN = re.compile(r"(?:<\|[\w▁|-]*\|?>|</s>|<eos>|<end_of_turn>|<｜[^｜\n]*｜>)\s*")
_FENCE = re.compile(
    r"^(?P<indent>[ \t>]*)(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$"
)
_SHOWN_WRONG = re.compile(
    r"\b(?:mistake|incorrect|wrong|buggy|broken|do\s+not|don['’]?t|avoid|fails|bad)\b",
    re.IGNORECASE,
)
_CODE_LINE = re.compile(
    r"(?:from\s+\S+\s+import\b|import\s|def\s|async\s+def\s|class\s|@|[A-Za-z_]\w*\s*(?::[^=\n]+)?=(?!=))"
)
_TRIALS = re.compile(
    r"(?:main|tests?|test_\w*|run_tests|check\w*|demo\w*|print|pprint|input|exit|quit)"
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef
MOST_TRIES = 100
"""Prefixes of a text that are tried."""


def code(answer: str, entry_point: str, prompt: str) -> str | None:
    """The source of a module that defines `entry_point`, from a chat answer or a continuation.

    Args:
        prompt: the beginning of the module as the question had it, up to the function's docstring.
            Its imports and helpers are part of the result.

    Of several blocks the last that defines the function counts, with what it needs from the others.
    Statements that only try the function out (asserts, prints, a main guard) are left out.
    """
    text = _without_tokens(after_thinking(answer).replace("\r\n", "\n").replace("\r", "\n"))
    given = [node for node in _given(prompt) if not _defines(node, entry_point)]
    blocks = _blocks(text)
    trees = [tree for tree in map(_parsed_block, blocks) if tree is not None]
    chosen = _defining(blocks, entry_point)
    if chosen is None and (tree := _bare(text, entry_point)) is not None:
        chosen, trees = tree, [*trees, tree]
    if chosen is not None:
        return _module(given, _with_helpers(chosen, trees, given), entry_point)
    for body in [*reversed(blocks), _Block(text)] if blocks else [_Block(text)]:
        if (tree := _continued(prompt, body.content, entry_point)) is not None:
            return _module([], tree.body, entry_point)
    return None


@dataclass(frozen=True)
class _Block:
    """What stands in a fence, and the line of text before it."""

    content: str
    before: str = ""


def _without_tokens(text: str) -> str:
    """Up to the first token of a chat template that a server let through."""
    match = _TOKEN.search(text)
    text = text if match is None or not text[: match.start()].strip() else text[: match.start()]
    return text.replace("\u00a0", " ").replace("\u200b", "").replace("\ufeff", "")


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks, by CommonMark's rules but at any depth; the last may have no end."""
    blocks: list[_Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    before = ""
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = fence, []
            elif line.strip():
                before = line
        elif fence and not fence["info"].strip() and _closes(fence["marks"], opened["marks"]):
            blocks.append(_Block(_outdented(lines, opened["indent"]), before))
            opened, before = None, ""
        else:
            lines.append(line)
    if opened is not None and any(line.strip() for line in lines):
        blocks.append(_Block(_outdented(lines, opened["indent"]), before))
    return blocks


def _closes(marks: str, opened: str) -> bool:
    return marks[0] == opened[0] and len(marks) >= len(opened)


def _outdented(lines: Sequence[str], indent: str) -> str:
    """Without the blanks, or quotation marks, that the fence itself stands behind."""
    if ">" in indent:
        lines = [re.sub(r"^[ \t]*>[ ]?", "", line) for line in lines]
        indent = ""
    return "\n".join(
        line[len(indent) :] if line.startswith(indent) else line.lstrip(" \t") if indent else line
        for line in lines
    )


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _parsed_block(block: _Block) -> ast.Module | None:
    """A block's code, as it stands or without what is about it: prompts, magics, indentation."""
    source = block.content
    if re.search(r"^>>> ", source, re.MULTILINE) and _parsed(source) is None:
        typed = re.findall(r"^(?:>>>|\.\.\.)(?: (.*)|)$", source, re.MULTILINE)
        source = "\n".join(typed)
    source = re.sub(r"^[!%].*$", "", source, flags=re.MULTILINE)
    for each in (source, textwrap.dedent(source), html.unescape(source)):
        if each.strip() and (tree := _parsed(each)) is not None:
            return None if _returns(tree.body) else tree
    return _longest(source)


def _longest(source: str) -> ast.Module | None:
    """The longest beginning that is Python: what follows may be cut, or prose."""
    lines = source.split("\n")
    for _ in range(MOST_TRIES):
        if not lines:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse("\n".join(lines))
                return tree if tree.body and not _returns(tree.body) else None
            except SyntaxError as error:
                end = min(error.lineno or len(lines), len(lines)) - 1
                # An opened bracket is complained of where it was opened, or at the end.
                lines = lines[: max(end, 0)]
            except (ValueError, RecursionError, MemoryError):
                return None
    return None


def _defining(blocks: Sequence[_Block], name: str) -> ast.Module | None:
    """The last block that defines the function; one that is introduced as wrong counts last."""
    found = [(block, tree) for block in blocks if (tree := _parsed_block(block)) is not None]
    found = [(block, tree) for block, tree in found if _provides(tree, name)]
    meant = [tree for block, tree in found if not _SHOWN_WRONG.search(block.before)]
    several = meant or [tree for _, tree in found]
    return several[-1] if several else None


def _bare(text: str, name: str) -> ast.Module | None:
    """Code without fences, with prose about it: the last stretch that defines the function."""
    lines = text.split("\n")
    found: ast.Module | None = None
    place = tries = 0
    while place < len(lines) and tries < MOST_TRIES:
        outdented = re.match(r"[ \t]*", lines[place])
        indent = outdented[0] if outdented else ""
        if not _CODE_LINE.match(lines[place][len(indent) :]) or (
            indent and name not in lines[place]
        ):
            place += 1
            continue
        tries += 1
        source = _outdented(lines[place:], indent) if indent else "\n".join(lines[place:])
        tree = _longest(re.sub(r"^`+|`+$", "", source))
        if tree is None:
            place += 1
            continue
        if _provides(tree, name):
            found = tree if found is None or indent == "" else found
        place += max(tree.body[-1].end_lineno or 1, 1)
    if found is None and (inline := re.search(rf"`+\s*(def\s+{re.escape(name)}\b[^`\n]*)`+", text)):
        found = _parsed(inline[1])
    return found


def _continued(prompt: str, text: str, name: str) -> ast.Module | None:
    """The prompt with a body behind it, indented as it must be."""
    body = text.strip("\n")
    if not body.strip():
        return None
    dedented = textwrap.indent(textwrap.dedent(body), "    ")
    for each in dict.fromkeys((body, dedented, f"    {body.lstrip()}")):
        if not each.startswith((" ", "\t")):
            continue
        lines = each.split("\n")
        for _ in range(MOST_TRIES):
            if not lines:
                break
            tree = _parsed(prompt + "\n".join(lines) + "\n")
            if tree is not None:
                if _has_body(tree, name):
                    return tree
                break
            lines.pop()
    return None


def _has_body(tree: ast.Module, name: str) -> bool:
    """More than a docstring, and something that it returns or yields."""
    for node in tree.body:
        if isinstance(node, _Function) and node.name == name:
            return _returns(node.body[1:] or node.body) or any(
                isinstance(each, ast.Raise | ast.Pass) for each in node.body
            )
    return False


def _returns(body: Sequence[ast.stmt]) -> bool:
    """Whether a return or yield stands in this body itself, not in a function within."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, _Function | ast.ClassDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def _given(prompt: str) -> list[ast.stmt]:
    tree = _parsed(f"{prompt}\n    pass\n") or _parsed(prompt)
    return tree.body if tree is not None else []


def _provides(tree: ast.Module, name: str) -> bool:
    """Defines it, or a class with a method of that name."""
    return any(_defines(node, name) or _has_method(node, name) for node in tree.body)


def _has_method(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        isinstance(each, _Function) and each.name == name for each in node.body
    )


def _defines(node: ast.stmt, name: str) -> bool:
    return name in _defined(node)


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(node, _Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(each.asname or each.name).split(".")[0] for each in node.names}
    if isinstance(node, ast.If | ast.Try | ast.With):
        if _is_main_guard(node):
            return set()
        parts = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
        parts += [each for handler in getattr(node, "handlers", []) for each in handler.body]
        return set().union(*map(_defined, parts))
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    names = [each for target in targets if isinstance(target, ast.AST) for each in ast.walk(target)]
    return {
        each.id for each in names if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def _used(nodes: Sequence[ast.AST]) -> set[str]:
    names = (each for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name))
    return {each.id for each in names if isinstance(each.ctx, ast.Load)}


def _with_helpers(
    chosen: ast.Module, trees: Sequence[ast.Module], given: Sequence[ast.stmt]
) -> list[ast.stmt]:
    """The chosen code, and before it what it uses and only other blocks, or the prompt, define."""
    others = [
        node
        for tree in trees
        if tree is not chosen and ast.dump(tree) != ast.dump(chosen)
        for node in tree.body
    ]
    known = set().union(*map(_defined, [*chosen.body, *given]))
    wanted, taken = _used(chosen.body) - known, []
    while wanted:
        name = min(wanted)
        known.add(name)
        definitions = [node for node in others if name in _defined(node) and node not in taken]
        if definitions:
            taken.append(definitions[-1])
            wanted |= _used(definitions[-1:])
        wanted -= known
    return [*(node for node in others if node in taken), *chosen.body]


def _module(given: Sequence[ast.stmt], body: Sequence[ast.stmt], name: str) -> str | None:
    """The source of both, `__future__` first, without what only tries the function out."""
    nodes = [*given, *(node for node in body if not _is_trial(node, name))]
    if not any(_defines(node, name) for node in nodes):
        owner = next((node for node in nodes if _has_method(node, name)), None)
        if not isinstance(owner, ast.ClassDef):
            return None
        nodes += ast.parse(f"{name} = {owner.name}().{name}").body
    future = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    rest = [node for node in nodes if node not in future]
    try:
        return ast.unparse(ast.Module([*future, *rest], [])) + "\n"
    except (RecursionError, ValueError):
        return None


def _is_trial(node: ast.stmt, name: str) -> bool:
    if _is_main_guard(node):
        return True
    if _defines(node, name):
        return False
    if isinstance(node, ast.Expr):
        called = node.value.func if isinstance(node.value, ast.Call) else None
        word = getattr(called, "id", None) or getattr(called, "attr", "")
        is_trial = bool(_TRIALS.fullmatch(word)) or word in ("testmod",)
        return is_trial or name in _used([node])
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.While | ast.With | ast.Try):
        calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
        return any(isinstance(each, ast.Name) and each.id in (name, "input") for each in calls)
    return False


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in _used([node.test])
