"""No code of this project unpickles data, which could come from an untrusted source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dftserve", "plugins/vllm/dftserve_vllm", "bench", "tools")
UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def unsafe_calls(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module] if (node.module or "").partition(".")[0] in UNSAFE else []
        elif isinstance(node, ast.Call):
            names += _unsafe_call(ast.unparse(node.func), node.keywords)
    return names


def _unsafe_call(name: str, keywords: list[ast.keyword]) -> list[str]:
    arguments = {word.arg: ast.unparse(word.value) for word in keywords}
    is_torch = name == "torch.load" and arguments.get("weights_only") != "True"
    is_numpy = name.endswith(".load") and arguments.get("allow_pickle", "False") != "False"
    is_pandas = name.endswith("read_pickle")
    return [name] if is_torch or is_numpy or is_pandas else []


def test_the_source_files_are_found():
    assert len(SOURCES) > 100


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_source_file_reads_a_pickle(folder):
    sources = [path for path in SOURCES if path.is_relative_to(ROOT / folder)]
    by_file = {path.name: unsafe_calls(path.read_text(encoding="utf-8")) for path in sources}
    assert {name: names for name, names in by_file.items() if names} == {}


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
def test_an_unsafe_line_is_found(source):
    assert unsafe_calls(source)


@pytest.mark.parametrize("source", ["torch.load(path, weights_only=True)", "np.load(path)"])
def test_a_safe_line_is_accepted(source):
    assert not unsafe_calls(source)
