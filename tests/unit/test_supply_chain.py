"""Nothing of ours makes objects of bytes that somebody else may have written."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dftserve", "plugins/vllm/dftserve_vllm", "bench", "tools")
UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in UNSAFE else []
        elif isinstance(node, ast.Call):
            found += _of_call(ast.unparse(node.func), node.keywords)
    return found


def _of_call(name: str, keywords: list[ast.keyword]) -> list[str]:
    said = {word.arg: ast.unparse(word.value) for word in keywords}
    is_torch = name == "torch.load" and said.get("weights_only") != "True"
    is_numpy = name.endswith(".load") and said.get("allow_pickle", "False") != "False"
    is_pandas = name.endswith("read_pickle")
    return [name] if is_torch or is_numpy or is_pandas else []


def test_there_are_sources():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_reads_a_pickle(folder):
    sources = [path for path in SOURCES if path.is_relative_to(ROOT / folder)]
    found = {path.name: complaints(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
    ],
)
def test_such_a_line_is_found(source):
    assert complaints(source)


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "np.load(path)"])
def test_a_safe_one_is_not(source):
    assert not complaints(source)
