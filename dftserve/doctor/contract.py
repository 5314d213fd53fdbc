"""Checks whether a vLLM has every symbol that the plug-in needs, and what fails without one."""

import functools
import itertools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dftserve.doctor import packages
from dftserve.doctor.findings import Finding, error, ok, warning
from dftserve.vllm_contract import SYMBOLS, Hook, Problem, Root, missing_in_source, package

WITHOUT: Mapping[Hook, str] = {
    "field": "requests with the diversity field are not honoured",
    "processor V1": "nothing is applied on the V1 runner",
    "processor V2": "nothing is applied on the V2 runner",
    "statistics": "answers would have no statistics, and the field is refused",
    "answer": "answers could not report what was in force, and the field is refused; no "
    "/v1/dft/capabilities and no dft:* metrics",
    "adapters": "no style names an adapter; profiles and the field work",
    "numba": "vLLM's rebinding of kernels may fail with numba loaded; the field works",
    "seeds": "on a CPU, requests with a seed may end the engine, as on stock vLLM; the field works",
}
"""What is lost if a symbol of a hook is missing."""


def findings() -> Iterator[Finding]:
    """Findings about the vLLM that is installed here, if any."""
    folder = packages.folder("vllm")
    if folder is not None and (folder / "v1").is_dir():
        yield from _hooks(_missing_in_folder(folder))


def judge(place: Path) -> list[Finding]:
    """Findings about a vLLM that need not be installed: a folder, or a .whl.

    Raises:
        ValueError: the file is not a wheel.
        FileNotFoundError: there is no vLLM at that path.
    """
    root = _root(place)
    return [_version(root), *_hooks(missing_in_source(root))]


def _root(place: Path) -> Root:
    if not place.is_file():
        return place
    try:
        return zipfile.Path(place)
    except zipfile.BadZipFile:
        raise ValueError(f"got {place}, which is not a wheel; accepted: a .whl of vLLM.") from None


def _version(root: Root) -> Finding:
    """vLLM's build writes it into `_version.py`; a checkout has none."""
    file = package(root) / "_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"""^__version__ = (?:\w+ = )?["']([^"']+)""", text, re.MULTILINE)
    if match is None:
        return warning("vllm", "of unknown version: it was not built, there is no _version.py.")
    return packages.supported_vllm(match[1])


@functools.cache
def _missing_in_folder(folder: Path) -> tuple[Problem, ...]:
    """Cached: an installation does not change while this process runs."""
    return tuple(missing_in_source(folder))


def _hooks(problems: Iterable[Problem]) -> Iterator[Finding]:
    """One finding for each hook and module that lacks something, or one that nothing is missing."""

    def order(problem: Problem) -> tuple[int, str, str]:
        symbol = problem.symbol
        return list(WITHOUT).index(symbol.hook), symbol.module, problem.text

    grouped = itertools.groupby(sorted(problems, key=order), key=order)
    found = [_lacking(list(group)) for _, group in grouped]
    yield from found or [
        ok("hooks", f"all {len(SYMBOLS)} symbols of vLLM that the plug-in needs are there.")
    ]


def _lacking(problems: list[Problem]) -> Finding:
    """One finding for the problems of a hook and module that have the same fault."""
    symbol, fault = problems[0].symbol, problems[0].text
    names = ", ".join(problem.symbol.signature for problem in problems)
    text = f"{symbol.module}: {names}: {fault}. Without: {WITHOUT[symbol.hook]}."
    is_required = any(problem.symbol.required for problem in problems)
    return (error if is_required else warning)(symbol.hook, text)
