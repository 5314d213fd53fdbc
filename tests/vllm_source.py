"""A stub source tree of vLLM with only the symbols that the plug-in needs."""

import zipfile
from collections import defaultdict
from pathlib import Path

from dftserve.vllm_contract import SYMBOLS, Symbol

FILES = {symbol.module: f"{symbol.module.replace('.', '/')}.py" for symbol in SYMBOLS}


def write_vllm(place: Path, *, version: str | None = None, without: str | None = None) -> None:
    """Write `place/vllm`, without the module `without`."""
    by_module = defaultdict(list)
    for symbol in SYMBOLS:
        by_module[symbol.module].append(symbol)
    (place / "vllm").mkdir()
    (place / "vllm" / "__init__.py").touch()
    if version is not None:
        (place / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    for module in by_module.keys() - {without}:
        file = place / FILES[module]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_source(by_module[module]))


def as_wheel(place: Path) -> Path:
    """Pack the Python files of a folder into a wheel in that folder."""
    wheel = place / "vllm-0.33.0-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(place.rglob("*.py")):
            archive.write(file, file.relative_to(place))
    return wheel


def _source(symbols: list[Symbol]) -> str:
    functions, classes = [], defaultdict(list)
    for symbol in symbols:
        owner, _, member = symbol.name.partition(".")
        if member:
            classes[owner].append(f"    {_definition(member, symbol, 'self')}")
        elif owner[0].isupper():
            classes[owner].append("    ...")
        else:
            functions.append(_definition(owner, symbol))
    bodies = [f"class {name}:\n" + "\n".join(lines) for name, lines in classes.items()]
    return "\n".join([*functions, *bodies]) + "\n"


def _definition(name: str, symbol: Symbol, *first: str) -> str:
    if symbol.parameters is None:
        return f"{name}: object" if first else f"def {name}(): ..."
    return f"def {name}({', '.join((*first, *symbol.parameters))}): ..."
