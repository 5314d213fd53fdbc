"""Model names: a path is not taken for a name, and a misspelt name is reported at once."""

import subprocess
import sys

import pytest
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError

from dftserve.cli import main
from dftserve.hub import check_path, folder_of


@pytest.mark.parametrize("path", ["./m", "/m", "~/m", "a/b/m", "m/", "a\\m", "tests/no_such_model"])
def test_a_path_is_not_looked_up_on_the_hub(path):
    with pytest.raises(ValueError, match="there is no such folder"):
        check_path(path)


@pytest.mark.parametrize("name", ["gpt2", "openai/gpt2"])
def test_a_possible_name_on_the_hub_is_accepted(name):
    check_path(name)


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """The names requested from the hub, which is unreachable."""
    requested = []

    def unreachable(name, **more):
        requested.append(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    return requested


def test_the_folder_with_the_closest_name_is_suggested(tmp_path, monkeypatch, hub):
    (tmp_path / "models" / "tinyllama").mkdir(parents=True)
    (tmp_path / "models" / "tinylama.txt").write_text("no folder")
    with pytest.raises(ValueError, match=r"did you mean '.*/models/tinyllama'\?"):
        folder_of(tmp_path / "models" / "tinylama")
    monkeypatch.chdir(tmp_path / "models")
    with pytest.raises(ValueError, match=r"no such folder here \(did you mean 'tinyllama'\?\)"):
        folder_of("tinylama")
    assert hub == ["tinylama"], "one request, for the plain name only"


COMMANDS = """
target build texts --recipe creative --out out --model tinylama
target inspect store --model tinylama
train --set targets=store --set output=out --set model=tinylama
train --plan --set targets=store --set output=out --set model=tinylama
evaluate likelihood tinylama --anchors anchors
""".strip().splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_suggests_the_closest_name(command, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    for name in ("tinyllama", "texts", "store", "anchors"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The old river runs under the garden wall. " * 9)
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert "model: got 'tinylama'; there is no such folder here (did you mean" in result.output
    assert hub == ["tinylama"]
    assert not (tmp_path / "out").exists()


MORE_COMMANDS = """
serve tinylama --dry-run
checkpoint interpolate tinylama model --out out
checkpoint interpolate model tinylama --out out
style build texts --model tinylama --answers answers.jsonl --out out
evaluate tinylama --prompts texts --anchors anchors --out out
""".strip().splitlines()


@pytest.mark.parametrize("command", COMMANDS + MORE_COMMANDS)
def test_every_command_names_the_checkpoint_of_a_run(command, tmp_path, monkeypatch):
    monkeypatch.setattr("dftserve.serve._command", lambda: "vllm")
    monkeypatch.chdir(tmp_path)
    for name in ("tinylama/final", "model", "texts", "store", "anchors"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tinylama" / "final" / "config.json").write_text("{}")
    (tmp_path / "texts" / "a.txt").write_text("The old river runs under the garden wall. " * 9)
    (tmp_path / "answers.jsonl").write_text('{"prompt": "A", "response": "B"}\n')
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert "got 'tinylama', the folder of a run; give its checkpoint, tinylama/final." in " ".join(
        result.output.split()
    )
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_reported_before_slow_imports(tmp_path):
    """The imports take half a minute on a busy machine."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text.")
    (tmp_path / "texts" / "b.docx").write_text("A text.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    rest = ["--model", "model", "--recipe", "creative", "--out", "out"]
    wrong = [
        ["nowhere", *rest],
        ["texts", *rest],
        ["texts/b.docx", *rest],
        ["empty", *rest],
        ["texts/a.txt", *rest, "--heldout-from", "nowhere"],
        ["texts/a.txt", *rest[:-3], "creativ", *rest[-2:]],
        ["texts/a.txt", *rest, "--set", "corpus.strip=html"],
        ["texts/a.txt", "--model", "./none", *rest[2:]],
    ]
    code = f"""
import sys
from click.testing import CliRunner
from dftserve.cli import main
for arguments in {wrong!r}:
    result = CliRunner().invoke(main, ["target", "build", *arguments])
    assert result.exit_code == 2, (arguments, result.output)
    heavy = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_server_is_not_started_for_a_missing_folder(monkeypatch):
    monkeypatch.setattr("dftserve.serve._command", lambda: "vllm")
    refused = CliRunner().invoke(main, ["serve", "./no_such_model", "--dry-run"])
    assert refused.exit_code == 2
    assert "there is no such folder" in refused.output
    for name in ("openai-community/gpt2", "s3://bucket/models/base"):
        assert CliRunner().invoke(main, ["serve", name, "--dry-run"]).exit_code == 0
