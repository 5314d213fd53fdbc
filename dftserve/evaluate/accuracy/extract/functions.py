"""Extract the function that an answer defines, as a runnable module. Nothing is run here.

Standard library only, as `extract`.
"""

import ast
import builtins
import html
import re
import symtable
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dftserve.evaluate.text.thinking import after_thinking

_TOKEN = re.compile(r"(?:<\|[\w▁|-]*\|?>|</s>|<eos>|<end_of_turn>|<｜[^｜\n]*｜>)\s*")
_FENCE = re.compile(
    r"^(?P<indent>[ \t>]*)(?:(?:[-*+]|\d+[.)])[ \t]+)?(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)$"
)
_WRONG = re.compile(
    r"\b(?:mistakes?|pitfalls?|incorrect|wrong|buggy|broken|fails|bad|avoid|anti-?pattern)\b|❌|✗"
    r"|\b(?:do\s+not|don['’]?t|never)\s+(?:do|write|use|try|code|implement)\b|\bnot\s+to\s+do\b"
    r"|(?:\bnot|n['’]t)\s+(?:(?:the|a|be)\s+)?(?:correct|right|work)\b",
    re.IGNORECASE,
)
_OLDER = re.compile(
    r"(?P<aside>\b(?:of|to|as|than|from|in|over|on|with|unlike|replaces?)\s+)?"
    r"(?:\b(?:the|your|my|our|an?)\s+)?"
    r"\b(?:original|earlier|previous|old|older|initial|former)\s+"
    r"(?:code|version|attempt|implementation|solution|function|draft|one|approach|answer)\b"
    r"|^\W*(?:before|previously|draft|original|old)\b[^\w\n]*$",
    re.IGNORECASE,
)
_FIXED = re.compile(
    r"\b(?:fix(?:e[sd]|ing)?|corrected|corrects|correction|repaired|improved|revised|updated|avoids|"
    r"avoiding|instead|above|so\s+i|now|what\s+(?:went|was|is))\b",
    re.IGNORECASE,
)
"""A sentence with such words may mention an earlier mistake, but introduces a better version."""
_CODE_LINE = re.compile(
    r"(?:from\s+\S+\s+import\b|import\s|def\s|async\s+def\s|class\s|@|[A-Za-z_]\w*\s*(?::[^=\n]+)?=(?!=))"
)
_TRIALS = re.compile(
    r"(?:main|tests?|test_\w*|run_tests|check\w*|demo\w*|print|pprint|input|exit|quit|testmod)"
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_BUILTINS = frozenset(dir(builtins))
MOST_TRIES = 100
"""Maximum number of prefixes of a text that are tried."""


def code(answer: str, entry_point: str, prompt: str) -> str | None:
    """The source of a module that defines `entry_point`, from a chat answer or a continuation.

    The last of several blocks that define the function is used, with what it needs from the others.
    A block that is introduced as wrong or older, has no body (`...`) or only imports the function
    is used only if there is no better one. Statements that only try the function out (asserts,
    prints, a main guard) are left out.

    Args:
        prompt: the beginning of the module as given in the question, up to the function's
            docstring. Its imports and helpers are part of the result.
    """
    text = _without_tokens(after_thinking(answer).replace("\r\n", "\n").replace("\r", "\n"))
    prompt_nodes = [node for node in _given(prompt) if not _defines(node, entry_point)]
    blocks = _blocks(text)
    trees = [tree for tree in map(_parsed_block, blocks) if tree is not None]
    chosen = _defining(blocks, entry_point)
    if chosen is None and (tree := _bare(text, entry_point)) is not None:
        chosen, trees = tree, [*trees, tree]
    if chosen is not None:
        return _module(prompt_nodes, _with_helpers(chosen, trees, prompt_nodes), entry_point)
    for body in [*reversed(blocks), _Block(text)] if blocks else [_Block(text)]:
        if (tree := _continued(prompt, body.content, entry_point)) is not None:
            return _module([], tree.body, entry_point)
    return None


@dataclass(frozen=True)
class _Block:
    """The content of a fenced block, and the text that introduces it."""

    content: str
    before: tuple[str, ...] = ()
    """The heading over it and the last sentence before it, if there are any."""
    is_open: bool = False
    """It has no closing fence: the answer may have been cut in it."""


def _without_tokens(text: str) -> str:
    """The text up to the first token of a chat template that the server did not strip."""
    match = _TOKEN.search(text)
    text = text if match is None or not text[: match.start()].strip() else text[: match.start()]
    return text.replace("\u00a0", " ").replace("\u200b", "").replace("\ufeff", "")


def _blocks(text: str) -> list[_Block]:
    """The fenced blocks, by CommonMark's rules but at any indentation; the last may be unclosed."""
    blocks: list[_Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    prose: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = fence, []
            elif line.strip():
                prose.append(line)
        elif fence and not fence["info"].strip() and _closes(fence["marks"], opened["marks"]):
            blocks.append(_Block(_outdented(lines, opened["indent"]), _introduction(prose)))
            opened, prose = None, []
        else:
            lines.append(line)
    if opened is not None and any(line.strip() for line in lines):
        blocks.append(_Block(_outdented(lines, opened["indent"]), _introduction(prose), True))
    return blocks


def _introduction(lines: Sequence[str]) -> tuple[str, ...]:
    """The last heading of these lines of text, and their last sentence."""
    headings = [line for line in lines if re.match(r"\s*(?:#+\s|\*\*[^*]+\*\*\W*$)", line)]
    sentences = re.split(r"(?<=[.!?;])\s+", lines[-1].strip()) if lines else []
    return (*headings[-1:], *sentences[-1:])


def _is_shown_as_worse(block: _Block) -> bool:
    """Whether the text before a block, or its first comment, introduces it as wrong or older."""
    comment = re.match(r"\s*(#[^\n]*)", block.content)
    return any(map(_says_worse, (*block.before, *([comment[1]] if comment else []))))


def _says_worse(sentence: str) -> bool:
    if _FIXED.search(sentence):
        return False
    older = _OLDER.search(sentence)
    return bool(_WRONG.search(sentence)) or (older is not None and not older["aside"])


def _closes(marks: str, opened: str) -> bool:
    return marks[0] == opened[0] and len(marks) >= len(opened)


def _outdented(lines: Sequence[str], indent: str) -> str:
    """The lines without the indentation, or the `>` of a quotation, that precedes the fence."""
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
    """Parse a block's code; prompts (`>>>`), magics and indentation are removed where necessary."""
    source = block.content
    if re.search(r"^>>> ", source, re.MULTILINE) and _parsed(source) is None:
        typed = re.findall(r"^(?:>>>|\.\.\.)(?: (.*)|)$", source, re.MULTILINE)
        source = "\n".join(typed)
    source = re.sub(r"^[!%].*$", "", source, flags=re.MULTILINE)
    for each in (source, textwrap.dedent(source), html.unescape(source)):
        if each.strip() and (tree := _parsed(each)) is not None:
            is_cut = block.is_open and _ends_in_a_word(tree)
            return None if is_cut or _returns(tree.body) else tree
    return _longest(source)


def _ends_in_a_word(tree: ast.Module) -> bool:
    """Whether the last statement of the last function or class is just a name: a cut `retu`."""
    node: ast.AST | None = tree.body[-1] if tree.body else None
    is_within = isinstance(node, _Function | ast.ClassDef)
    while (body := getattr(node, "orelse", None) or getattr(node, "body", None)) is not None:
        if not isinstance(body, list) or not body:
            break
        node = body[-1]
    return is_within and isinstance(node, ast.Expr) and isinstance(node.value, ast.Name)


def _longest(source: str) -> ast.Module | None:
    """Parse the longest prefix that is Python; the rest may be cut code or prose.

    A last statement that continues in the rest is dropped: half a function is not a function.
    """
    every = lines = source.split("\n")
    for _ in range(MOST_TRIES):
        if not lines:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse("\n".join(lines))
                if tree.body and _goes_on(tree.body[-1], every[len(lines) :]):
                    tree.body.pop()
                return tree if tree.body and not _returns(tree.body) else None
            except SyntaxError as error:
                end = min(error.lineno or len(lines), len(lines)) - 1
                # An unclosed bracket is reported where it was opened, or at the end.
                lines = lines[: max(end, 0)]
            except (ValueError, RecursionError, MemoryError):
                return None
    return None


def _goes_on(node: ast.stmt, rest: Sequence[str]) -> bool:
    """Whether the next line of the rest belongs to this statement."""
    line = next((each for each in rest if each.strip()), "")
    is_block = isinstance(node, _Function | ast.ClassDef | ast.If | ast.For | ast.While | ast.Try)
    return is_block and bool(re.match(r"[ \t]|(?:else|elif|except|finally)\b", line))


def _defining(blocks: Sequence[_Block], name: str) -> ast.Module | None:
    """The best block that defines the function; the last of equally good ones."""
    parsed = [(block, tree) for block in blocks if (tree := _parsed_block(block)) is not None]
    ranked = [
        (
            max(_definition_rank(node, name) for node in tree.body),
            not _is_shown_as_worse(block),
            index,
        )
        for index, (block, tree) in enumerate(parsed)
        if tree.body
    ]
    if not ranked or (best := max(ranked))[0] == 0:
        return None
    return parsed[best[2]][1]


def _definition_rank(node: ast.stmt, name: str) -> int:
    """How well a statement defines the name: 0 not, 1 by an import, 2 without a body, 3 fully."""
    if _has_method(node, name):
        return 3
    if not _defines(node, name):
        return 0
    if isinstance(node, ast.Import | ast.ImportFrom):
        return 1
    return 2 if isinstance(node, _Function) and _is_empty(node) else 3


def _is_empty(function: _Function) -> bool:
    """Whether it has only a docstring, `...`, `pass` or `raise NotImplementedError`."""
    return all(
        isinstance(each, ast.Pass)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        or (isinstance(each, ast.Raise) and "NotImplementedError" in _used([each]))
        for each in function.body
    )


def _bare(text: str, name: str) -> ast.Module | None:
    """The last stretch of code without fences, in prose, that defines the function."""
    lines = text.split("\n")
    module: ast.Module | None = None
    index = tries = 0
    while index < len(lines) and tries < MOST_TRIES:
        outdented = re.match(r"[ \t]*", lines[index])
        indent = outdented[0] if outdented else ""
        if not _CODE_LINE.match(lines[index][len(indent) :]) or (
            indent and name not in lines[index]
        ):
            index += 1
            continue
        tries += 1
        source = _outdented(lines[index:], indent) if indent else "\n".join(lines[index:])
        tree = _longest(re.sub(r"^`+|`+$", "", source))
        if tree is None:
            index += 1
            continue
        end = index + max(tree.body[-1].end_lineno or 1, 1)
        is_cut = _ends_in_a_word(tree) and not any(line.strip() for line in lines[end:])
        if _provides(tree, name) and not is_cut:
            module = tree if module is None or indent == "" else module
        index = end
    if module is None and (
        inline := re.search(rf"`+\s*(def\s+{re.escape(name)}\b[^`\n]*)`+", text)
    ):
        module = _parsed(inline[1])
    return module


def _continued(prompt: str, text: str, name: str) -> ast.Module | None:
    """Parse the prompt followed by the text as its function's body, indented as necessary."""
    body = text.strip("\n")
    if not body.strip():
        return None
    dedented = textwrap.indent(textwrap.dedent(body), "    ")
    for each in dict.fromkeys((body, dedented, f"    {body.lstrip()}", _after_prose(body))):
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


def _after_prose(text: str) -> str:
    """The first indented paragraph after prose, and what follows; empty if the prose is code."""
    prose, blank, rest = re.split(r"(\n[ \t]*\n)(?=[ \t]+\S)|\Z", text, maxsplit=1)
    is_code = any(
        _CODE_LINE.match(line)
        or _FENCE.match(line)
        or re.match(r"(?:if|for|while|with)\b.*:$", line)
        for line in prose.split("\n")
    )
    return "" if is_code or not blank else rest


def _has_body(tree: ast.Module, name: str) -> bool:
    """Whether the function has more than a docstring, and returns, yields, raises or passes."""
    for node in tree.body:
        if isinstance(node, _Function) and node.name == name:
            return _returns(node.body[1:] or node.body) or any(
                isinstance(each, ast.Raise | ast.Pass) for each in node.body
            )
    return False


def _returns(body: Sequence[ast.stmt]) -> bool:
    """Whether this body has a return or yield outside of nested functions and classes."""
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
    """Whether the module defines the name, or a class with a method of that name."""
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
    chosen: ast.Module, trees: Sequence[ast.Module], prompt_nodes: Sequence[ast.stmt]
) -> list[ast.stmt]:
    """The chosen code, preceded by what it uses that only other blocks define."""
    others = [
        node
        for tree in trees
        if tree is not chosen and ast.dump(tree) != ast.dump(chosen)
        for node in tree.body
    ]
    known = set().union(*map(_defined, [*chosen.body, *prompt_nodes]))
    missing, helpers = _free(chosen.body) - known, []
    while missing:
        name = min(missing)
        known.add(name)
        definitions = [node for node in others if name in _defined(node) and node not in helpers]
        if definitions:
            helpers.append(
                max(reversed(definitions), key=lambda node: _definition_rank(node, name))
            )
            missing |= _free(helpers[-1:])
        missing -= known
    defined = set().union(_BUILTINS, *map(_defined, [*chosen.body, *prompt_nodes, *helpers]))
    if _free([*chosen.body, *helpers]) - defined:
        helpers += [node for node in others if "*" in _defined(node)]
    return [*(node for node in others if node in helpers), *chosen.body]


def _free(nodes: Sequence[ast.stmt]) -> set[str]:
    """The global and built-in names that these statements read."""
    try:
        table = symtable.symtable(ast.unparse(ast.Module(list(nodes), [])), "answer", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return _used(nodes)
    names, waiting = set(), [table]
    while waiting:
        table = waiting.pop()
        is_module = table.get_type() == "module"
        names |= {
            each.get_name()
            for each in table.get_symbols()
            if each.is_referenced() and (is_module or each.is_global())
        }
        waiting += table.get_children()
    return names


def _module(prompt_nodes: Sequence[ast.stmt], body: Sequence[ast.stmt], name: str) -> str | None:
    """The source of both, `__future__` first, without statements that only try the function out."""
    reached = _reached([*prompt_nodes, *body])
    nodes = [*prompt_nodes, *(node for node in body if not _is_trial(node, name, reached))]
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


def _reached(nodes: Sequence[ast.stmt]) -> dict[str, set[str]]:
    """The names that each function uses, directly or through other functions among `nodes`."""
    reached = {node.name: _used([node]) for node in nodes if isinstance(node, _Function)}
    for _ in reached:
        larger = {
            name: used.union(*(reached.get(each, ()) for each in used))
            for name, used in reached.items()
        }
        if larger == reached:
            break
        reached = larger
    return reached


def _is_trial(node: ast.stmt, name: str, reached: Mapping[str, set[str]]) -> bool:
    """Whether a statement of the module tries the function out, or ends the program."""
    if isinstance(node, ast.Assert | ast.Raise) or _is_main_guard(node):
        return True
    if _defines(node, name):
        return False
    if isinstance(node, ast.Expr):
        return _is_tried(node.value, name, reached)
    if isinstance(
        node, ast.Assign | ast.AnnAssign | ast.For | ast.While | ast.With | ast.Try | ast.If
    ):
        calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
        return any(isinstance(each, ast.Name) and each.id in (name, "input") for each in calls)
    return False


def _is_tried(value: ast.expr, name: str, reached: Mapping[str, set[str]]) -> bool:
    """Whether an expression tries the function out: `print(add(1, 2))`, `test_add()`; but not
    `setattr(add, "memo", {})`, which prepares it."""
    if not isinstance(value, ast.Call):
        return name in _used([value])
    word = getattr(value.func, "id", None) or getattr(value.func, "attr", "")
    if word in reached and not (value.args or value.keywords):
        # `main()` and `test_add()` use it or read input; `check_table()` may fill a table.
        return bool(_TRIALS.fullmatch(word)) and bool(reached[word] & {name, "input"})
    if _TRIALS.fullmatch(word):
        return True
    prepared = value.args[0] if word == "setattr" and value.args else value.func
    while isinstance(prepared, ast.Attribute):
        prepared = prepared.value
    is_called = isinstance(value.func, ast.Name) and value.func.id == name
    is_prepared = isinstance(prepared, ast.Name) and prepared.id == name and not is_called
    return name in _used([value]) and not is_prepared


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in _used([node.test])
