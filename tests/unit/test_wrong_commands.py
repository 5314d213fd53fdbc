"""Commands that a user gets wrong: each ends in a sentence that says what to do, as kept in
tests/cases/wrong_commands.json (`python -m tests.unit.test_wrong_commands` writes it anew)."""

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
target build nowhere --model model --recipe creative --out out
target build texts --model ./none --recipe creative --out out
target build texts --model empty --recipe creative --out out
target build texts --model broken --recipe creative --out out
target build texts --model broken --recipe creativ --out out
target build texts --model broken --recipe nowhere.yaml --out out
target build texts --model broken --recipe bad.yaml --out out
target build texts --model broken --recipe unknown.yaml --out out
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
""".strip().splitlines()
HELPFUL = re.compile(
    r"accepted|Try '|--help|such as|give|name |choose|remove|install|run it|build it|is it|"
    r"did you mean|see |convert|correct|write it|anew|"
    r"Missing|No such command|is not a valid|does not exist",  # click's, below the usage line
    re.IGNORECASE,
)


def make(place: Path) -> None:
    """What the commands name."""
    for name in ("texts", "empty", "broken"):
        (place / name).mkdir()
    tokenizer().save_pretrained(place / "model")
    (place / "corpus.txt").write_text("A short text.")
    (place / "texts" / "a.txt").write_text("The old river runs under the garden wall. " * 9)
    (place / "texts" / "b.txt").write_text(
        "A captain wrote a letter to the quiet winter town. " * 9
    )
    (place / "broken" / "tokenizer.json").write_text("{")
    (place / "broken" / "manifest.json").write_text("{")
    (place / "bad.yaml").write_text("a: [")
    (place / "unknown.yaml").write_text("name: x\nabout: y\nsource: {ngrams: {}}\n")
    (place / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (place / "fields.jsonl").write_text('{"body": "a"}\n')
    (place / "broken.parquet").write_bytes(b"PAR1")
    (place / "picture.png").write_bytes(b"\x89PNG")


def said_by(command: str) -> dict:
    result = CliRunner().invoke(cli.main, shlex.split(command))
    lines = " ".join(result.output.replace("│", " ").split())
    lines = re.sub(r"\(Couldn't .*?\)(?=;)", "(…)", lines)  # In transformers' words.
    return {"command": command, "code": result.exit_code, "said": lines}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("wrong")
    make(place)
    return place


KEPT = json.loads(CASES.read_text()) if CASES.exists() else []


def test_the_snapshot_has_every_command():
    assert [each["command"] for each in KEPT] == COMMANDS
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept["command"])
def test_a_wrong_command_ends_in_a_sentence(monkeypatch, place, kept):
    monkeypatch.chdir(place)
    monkeypatch.delenv("DFTSERVE_DATA", raising=False)
    found = said_by(kept["command"])
    assert "Traceback" not in found["said"]
    assert found["code"] in (1, 2)
    assert HELPFUL.search(found["said"].rpartition("Error: ")[2])
    assert found == kept


# What is raised


def ended(raising) -> tuple[int, str]:
    command = click.Command("command", callback=raising)
    result = CliRunner().invoke(Group("g", commands=[command]), ["command"])
    return result.exit_code, result.output


def raised(error: BaseException):
    def raising():
        raise error

    return raising


def test_an_extra_brings_what_the_advice_says_it_does():
    """`EXTRAS` has import names, pyproject.toml those of distributions."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"sklearn": "scikit-learn", "yaml": "pyyaml", "harper": "harper-py"}
    for extra, packages in commandline.EXTRAS.items():
        lines = declared["optional-dependencies"][extra]
        brought = {re.split(r"[<>=~! ]", line, maxsplit=1)[0] for line in lines}
        wanted = {named.get(each, each.replace("_", "-")) for each in packages}
        assert wanted <= brought, extra


def test_a_package_that_is_missing_is_named_with_what_brings_it():
    code, said = ended(lambda: __import__("peft_is_not_here"))
    assert (code, "needs the package peft_is_not_here" in said) == (1, True)
    code, said = ended(raised(ModuleNotFoundError("no", name="datasketch.lsh")))
    assert (
        "needs the package datasketch, which is not installed: pip install 'dftserve[train]'"
        in said
    )


def test_what_a_library_raises_is_a_sentence(tmp_path):
    import safetensors

    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    code, said = ended(lambda: safetensors.safe_open(tmp_path / "w.safetensors", "np"))
    assert code == 1
    assert "Traceback" not in said
    assert "Check the files" in said
    library: dict = {"__name__": "somelib.inner"}
    exec("def f(): return [][0]", library)
    code, said = ended(library["f"])
    assert code == 1
    assert "somelib cannot use what it was given: list index out of range" in said


@pytest.mark.parametrize("error", [IndexError("ours"), KeyError("ours"), AssertionError("ours")])
def test_a_fault_of_ours_shows_its_traceback_and_says_so(monkeypatch, error):
    monkeypatch.setitem(raised.__globals__, "__name__", "dftserve.somewhere")
    code, said = ended(raised(error))
    assert code == FAULT
    assert "Traceback" in said
    assert "fault of dftserve" in said.splitlines()[-1]
    assert "report" in said.splitlines()[-1]


# What is ours, said or not


def of_module(name: str, source: str):
    """A function `f` of a module of this name."""
    module: dict = {"__name__": name}
    exec(source, module)
    return module["f"]


SAID = {
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


@pytest.mark.parametrize("what", SAID)
def test_what_we_say_has_a_traceback_only_where_it_is_asked_for(monkeypatch, what):
    body, code = SAID[what]
    monkeypatch.delenv(commandline.TRACEBACK, raising=False)
    f = of_module("dftserve.somewhere", f"def f():\n {body}")
    found = ended(f)
    assert found[0] == code
    assert "Traceback" not in found[1]
    monkeypatch.setenv(commandline.TRACEBACK, "1")
    again = ended(f)
    assert again[0] == code
    assert again[1].endswith(found[1])
    assert again[1].count("Traceback") == (2 if "library" in what else 1)


@pytest.mark.parametrize("what", FAULTS)
def test_what_operations_raise_in_our_code_is_a_fault_of_ours(what):
    code, said = ended(of_module("dftserve.somewhere", f"def f(): {FAULTS[what]}"))
    assert code == FAULT
    assert "Traceback" in said
    assert "Usage" not in said


def test_a_librarys_value_error_is_no_usage_error(monkeypatch):
    monkeypatch.delenv(commandline.TRACEBACK, raising=False)
    code, said = ended(of_module("somelib.inner", "def f(): raise ValueError('odd shapes')"))
    assert code == 1
    assert "somelib cannot use what it was given: odd shapes" in said
    assert f"{commandline.TRACEBACK}=1" in said
    assert "Usage" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "raising",
    ["raise MemoryError", "import torch; torch.empty(1 << 62, dtype=torch.uint8)"],
)
def test_too_little_memory_is_told_as_such(raising):
    code, said = ended(of_module("dftserve.somewhere", f"def f(): {raising}"))
    assert code == 1
    assert "ask for less at once" in said
    assert "Traceback" not in said


def test_a_usage_error_passes_as_it_is():
    with pytest.raises(click.UsageError, match="as it is"), usage_errors():
        raise click.UsageError("as it is")


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        os.chdir(folder)
        os.environ.pop("DFTSERVE_DATA", None)
        found = [said_by(command) for command in COMMANDS]
    CASES.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write("".join(f"{each['code']} {each['said'][-300:]}\n" for each in found))
