"""Wrong commands: each ends in a sentence that says what to do, as recorded in
tests/cases/wrong_commands.json (`python -m tests.unit.test_wrong_commands` writes that file)."""

import json
import re
import shlex
import sys
import tempfile
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dftserve import cli, commandline
from dftserve.commandline import FAULT, Group, usage_errors
from tests.conftest import ROOT
from tests.training import tokenizer

CASES = Path(__file__).parent.parent / "cases" / "wrong_commands.json"
COMMANDS = """
nonsense
target
target build
target build corpus.txt --model model --recipe creative --out out
target build corpus.txt --model model --recipe creative --out texts
target build nowhere --model model --recipe creative --out out
target build texts --model ./none --recipe creative --out out
target build texts --model empty --recipe creative --out out
target build texts --model broken --recipe creative --out out
target build texts --model broken --recipe creativ --out out
target build texts --model broken --recipe nowhere.yaml --out out
target build texts --model broken --recipe bad.yaml --out out
target build texts --model broken --recipe unknown.yaml --out out
target build texts --model model --recipe served_in_a_mix.yaml --out out
target build texts --model model --recipe principles_without_texts.yaml --out out
target build texts --model model --recipe tilt_without_samples.yaml --out out
target build texts --model model --recipe calibrated --out out --set teacher=m --set students=none
target build texts --model model --recipe creative --out out --heldout 2
target build texts --model model --recipe creative --out out --heldout half
target build texts --model model --recipe creative --out out --processes 0
target build texts --model broken --recipe creative --out out --max-tokens 1
target build texts --model broken --recipe creative --out out --set x
target build texts --model broken --recipe creative --out out --set noname=1
target build latin1.txt --model model --recipe creative --out out
target build broken.jsonl --model model --recipe creative --out out
target build fields.jsonl --model model --recipe creative --out out
target build broken.parquet --model model --recipe creative --out out
target build picture.png --model model --recipe creative --out out
target inspect empty
target inspect nowhere
target verify empty
target verify broken
train
train nowhere.yaml
train bad.yaml
train --set model=m
train --set model=empty --set targets=empty --set output=out
train --set model=m --set targets=t --set output=o --set stepz=1
train --set model=m --set targets=t --set output=o --set steps=many
train --set model=m --set targets=t --set output=o --set divergence.name=kl
checkpoint verify empty
checkpoint verify nowhere
checkpoint interpolate empty nowhere --out out
checkpoint interpolate empty empty --share 1 --out out
serve --port 8000 m
serve m --default-diversity 7
serve m --default-diversity checkpoint
doctor --url localhost
doctor --wheel nowhere.whl
doctor --vllm empty
evaluate accuracy http://127.0.0.1:9 --out a.json --tasks mmlo
evaluate accuracy http://127.0.0.1:9 --out a.json --grid 0,2
evaluate accuracy http://127.0.0.1:9 --out a.json --data nowhere
evaluate drift nowhere.json nowhere.json
evaluate compare nowhere.json bad.yaml
evaluate anchors build nowhere --out anchors
evaluate http://127.0.0.1:9 --prompts nowhere.txt --out e
evaluate http://127.0.0.1:9 --prompts texts --anchors texts --out e --grid 0,2
evaluate http://127.0.0.1:9 --prompts texts --anchors texts --out e --temperature 3
evaluate benchmark http://127.0.0.1:9 --out e --grid 0,2
""".strip().splitlines()
HELPFUL = re.compile(
    r"accepted|Try '|--help|such as|give|name |choose|remove|install|run it|build it|is it|"
    r"did you mean|see |convert|correct|write it|again|"
    r"Missing|No such command|is not a valid|does not exist",  # click's, below the usage line
    re.IGNORECASE,
)


def make_files(folder: Path) -> None:
    """Make the files that the commands name."""
    for name in ("texts", "empty", "broken"):
        (folder / name).mkdir()
    tokenizer().save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("A short text.")
    (folder / "texts" / "a.txt").write_text("The old river runs under the garden wall. " * 9)
    (folder / "texts" / "b.txt").write_text(
        "A captain wrote a letter to the quiet winter town. " * 9
    )
    (folder / "broken" / "tokenizer.json").write_text("{")
    (folder / "broken" / "manifest.json").write_text("{")
    (folder / "bad.yaml").write_text("a: [")
    (folder / "unknown.yaml").write_text("name: x\nabout: y\nsource: {ngrams: {}}\n")
    served = "{weight: 1, served: {url: 'http://127.0.0.1:9', model: m}}"
    (folder / "served_in_a_mix.yaml").write_text(
        f"source: {{mix: [{served}, {{weight: 1, ngram: {{}}}}]}}\n"
    )
    (folder / "principles_without_texts.yaml").write_text(
        "source: {principles: {teacher: {model: model}, principles: {}}}\n"
    )
    (folder / "tilt_without_samples.yaml").write_text(
        "source: {tilt: {of: {ngram: {}}, phrases: [a thing], samples: nowhere}}\n"
    )
    (folder / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "fields.jsonl").write_text('{"body": "a"}\n')
    (folder / "broken.parquet").write_bytes(b"PAR1")
    (folder / "picture.png").write_bytes(b"\x89PNG")


def outcome_of(command: str) -> dict:
    result = CliRunner().invoke(cli.main, shlex.split(command))
    text = " ".join(result.output.replace("│", " ").split())
    text = re.sub(r"\(Couldn't .*?\)(?=;)", "(…)", text)  # The words are those of transformers.
    return {"command": command, "code": result.exit_code, "said": text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    make_files(folder)
    return folder


SNAPSHOT = json.loads(CASES.read_text()) if CASES.exists() else []


def test_the_snapshot_has_every_command():
    assert [each["command"] for each in SNAPSHOT] == COMMANDS
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize("expected", SNAPSHOT, ids=lambda expected: expected["command"])
def test_a_wrong_command_ends_in_a_helpful_sentence(monkeypatch, folder, expected):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DFTSERVE_DATA", raising=False)
    outcome = outcome_of(expected["command"])
    assert "Traceback" not in outcome["said"]
    assert outcome["code"] in (1, 2)
    assert HELPFUL.search(outcome["said"].rpartition("Error: ")[2])
    assert outcome == expected


# Exceptions


def run_callback(raising) -> tuple[int, str]:
    command = click.Command("command", callback=raising)
    result = CliRunner().invoke(Group("g", commands=[command]), ["command"])
    return result.exit_code, result.output


def raiser(error: BaseException):
    def raising():
        raise error

    return raising


def test_the_extras_install_the_packages_that_the_advice_names():
    """`EXTRAS` has names of modules, pyproject.toml names of distributions."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml", "harper": "harper-py"}
    for extra, packages in commandline.EXTRAS.items():
        lines = declared["optional-dependencies"][extra]
        installed = {re.split(r"[<>=~! ]", line, maxsplit=1)[0] for line in lines}
        needed = {distributions.get(each, each.replace("_", "-")) for each in packages}
        assert needed <= installed, extra


def test_a_missing_package_is_named_with_the_extra_that_installs_it():
    code, output = run_callback(lambda: __import__("peft_is_not_here"))
    assert (code, "needs the package peft_is_not_here" in output) == (1, True)
    code, output = run_callback(raiser(ModuleNotFoundError("no", name="datasketch.lsh")))
    assert (
        "needs the package datasketch, which is not installed: pip install 'dftserve[train]'"
        in output
    )


def test_an_exception_of_a_library_is_shown_as_a_sentence(tmp_path):
    import safetensors

    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    code, output = run_callback(lambda: safetensors.safe_open(tmp_path / "w.safetensors", "np"))
    assert code == 1
    assert "Traceback" not in output
    assert "Check the files" in output
    library: dict = {"__name__": "somelib.inner"}
    exec("def f(): return [][0]", library)
    code, output = run_callback(library["f"])
    assert code == 1
    assert "somelib cannot use what it was given: list index out of range" in output


@pytest.mark.parametrize("error", [IndexError("ours"), KeyError("ours"), AssertionError("ours")])
def test_a_bug_of_dftserve_shows_a_traceback_and_asks_for_a_report(monkeypatch, error):
    monkeypatch.setitem(raiser.__globals__, "__name__", "dftserve.somewhere")
    code, output = run_callback(raiser(error))
    assert code == FAULT
    assert "Traceback" in output
    assert "fault of dftserve" in output.splitlines()[-1]
    assert "report" in output.splitlines()[-1]


# Deliberate errors and bugs of our code


def of_module(name: str, source: str):
    """A function `f` of a module of this name."""
    module: dict = {"__name__": name}
    exec(source, module)
    return module["f"]


DELIBERATE = {
    "a refusal": ("raise ValueError('x: got 7')", 2),
    "a failure": ("raise RuntimeError('the server is gone')", 1),
    "a refusal made of a library's": (
        "try:\n  int('x')\n except ValueError:\n  raise ValueError('x: got 7') from None",
        2,
    ),
}
FAULTS = {
    "of numpy": "import numpy; numpy.zeros(2) + numpy.zeros(3)",
    "of torch": "import torch; torch.zeros(2) + torch.zeros(3)",
    "of zip": "list(zip([1], [1, 2], strict=True))",
    "of a conversion": "float('x')",
    "raised again": "\n try:\n  float('x')\n except ValueError:\n  raise",
}


@pytest.mark.parametrize("what", DELIBERATE)
def test_deliberate_errors_have_a_traceback_only_on_request(monkeypatch, what):
    body, code = DELIBERATE[what]
    monkeypatch.delenv(commandline.TRACEBACK, raising=False)
    f = of_module("dftserve.somewhere", f"def f():\n {body}")
    without_traceback = run_callback(f)
    assert without_traceback[0] == code
    assert "Traceback" not in without_traceback[1]
    monkeypatch.setenv(commandline.TRACEBACK, "1")
    with_traceback = run_callback(f)
    assert with_traceback[0] == code
    assert with_traceback[1].endswith(without_traceback[1])
    assert with_traceback[1].count("Traceback") == (2 if "library" in what else 1)


@pytest.mark.parametrize("what", FAULTS)
def test_exceptions_of_operations_in_our_code_are_bugs(what):
    code, output = run_callback(of_module("dftserve.somewhere", f"def f(): {FAULTS[what]}"))
    assert code == FAULT
    assert "Traceback" in output
    assert "Usage" not in output


def test_a_librarys_value_error_is_not_a_usage_error(monkeypatch):
    monkeypatch.delenv(commandline.TRACEBACK, raising=False)
    code, output = run_callback(
        of_module("somelib.inner", "def f(): raise ValueError('odd shapes')")
    )
    assert code == 1
    assert "somelib cannot use what it was given: odd shapes" in output
    assert f"{commandline.TRACEBACK}=1" in output
    assert "Usage" not in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    "raising",
    ["raise MemoryError", "import torch; torch.empty(1 << 62, dtype=torch.uint8)"],
)
def test_too_little_memory_is_reported(raising):
    code, output = run_callback(of_module("dftserve.somewhere", f"def f(): {raising}"))
    assert code == 1
    assert "ask for less at once" in output
    assert "Traceback" not in output


def test_a_usage_error_is_passed_on_unchanged():
    with pytest.raises(click.UsageError, match="as it is"), usage_errors():
        raise click.UsageError("as it is")


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        os.chdir(folder)
        os.environ.pop("DFTSERVE_DATA", None)
        found = [outcome_of(command) for command in COMMANDS]
    CASES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write("".join(f"{each['code']} {each['said'][-300:]}\n" for each in found))
