"""Finds the vLLM classes that a class inherits from, in source files; nothing is imported."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FARTHEST = 16
"""Maximum number of imports and base classes that are followed."""


def vllm_bases(module: str, name: str, *, left: int = FARTHEST) -> set[str] | None:
    """The full names of vLLM's classes that a class inherits from; a function has none.

    None if the source does not show it: there is no Python file, or a name or a base class is
    created at run time.
    """
    package = module.partition(".")[0]
    if package == "vllm":
        return {f"{module}.{name}"}
    if package in sys.stdlib_module_names:
        return set()
    source = _source(module) if left else None
    if source is None:
        return None
    match source.names.get(name):
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return set()
        case ast.ImportFrom() as statement:
            owner, original = source.imported(statement, name)
            return vllm_bases(owner, original, left=left - 1)
        case ast.ClassDef(bases=bases):
            return _union([_of_base(module, base, left - 1) for base in bases])
        case _:
            return None


def _of_base(module: str, base: ast.expr, left: int) -> set[str] | None:
    match base:
        case ast.Name(id="object"):
            return set()
        case ast.Name(id=name):
            return vllm_bases(module, name, left=left)
        case _:
            return None


def _union(names_of_bases: list[set[str] | None]) -> set[str] | None:
    """The known names; None only if there are none and a base class is unknown."""
    known = {name for one in names_of_bases if one for name in one}
    return known if known or None not in names_of_bases else None


@dataclass(frozen=True)
class _Source:
    module: str
    is_package: bool
    names: dict[str, ast.stmt]

    def imported(self, statement: ast.ImportFrom, name: str) -> tuple[str, str]:
        """The module that a name is imported from, and its name there."""
        original = next(a.name for a in statement.names if (a.asname or a.name) == name)
        if not statement.level:
            return statement.module or "", original
        here = self.module.split(".")
        up = statement.level - self.is_package
        return ".".join(filter(None, (*here[: len(here) - up], statement.module))), original


def _source(module: str) -> _Source | None:
    file = _file(module)
    try:
        tree = None if file is None else ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None  # The caller reports it as unknown.
    if file is None or tree is None:
        return None
    return _Source(module, file.name == "__init__.py", dict(_names(tree.body)))


def _file(module: str) -> Path | None:
    package, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    if not rest:
        return path
    path = path.parent.joinpath(*rest)
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)


def _names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """The statement that binds each name; of two branches, the one likely to run comes last."""
    for statement in body:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement.name, statement
            case ast.ImportFrom(names=names):
                yield from ((a.asname or a.name, statement) for a in names)
            case ast.Assign(targets=targets):
                yield from ((t.id, statement) for t in targets if isinstance(t, ast.Name))
            case ast.If(body=then, orelse=otherwise):
                yield from _names([*otherwise, *then])
            case ast.Try(body=tried, handlers=handlers):
                yield from _names([*(s for h in handlers for s in h.body), *tried])
