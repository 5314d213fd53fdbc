"""Adding a section to the model card of an existing checkpoint."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from dftserve import atomic, checkpoint
from dftserve.checkpoint import CARD, CheckpointError
from dftserve.spec import CHECKSUMS, CheckpointInfo
from tests.training import save_sealed


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_sealed(tmp_path / "final", {CARD: "# Tuned\n\nAs it was.\n", "weights": "0"})


@pytest.mark.parametrize("end", ["\n", "", "\r\n"])
def test_a_section_is_added_to_the_card_and_replaced(folder, end):
    (folder / CARD).write_bytes(f"# Tuned\r\n\nAs it was.{end}".encode())
    checkpoint.seal(folder)
    for text in ("first", "| second |", r"third \1"):
        checkpoint.add_to_card(folder, "Accuracy", text)
        checkpoint.add_to_card(folder, "Other", "stays")
        card = (folder / CARD).read_bytes().decode()
        assert card.startswith(f"# Tuned\r\n\nAs it was.{end}")
        assert card.count("## Accuracy\n") == card.count("## Other\n") == 1
        assert f"## Accuracy\n\n{text}\n" in card
        assert checkpoint.verify(folder).files == 2
        checkpoint.add_to_card(folder, "Other", "stays")
        assert (folder / CARD).read_bytes().decode() == card, "the same again changes nothing"
    assert "first" not in card
    assert "second" not in card


@pytest.mark.parametrize(
    "others",
    [
        "## Accuracy\n\nby hand\n",
        "```\n## Accuracy\nin a fence\n```\n\ntail\n",
        "<!-- dftserve: Accuracy -->\n\n# Cut off\n",
    ],
)
def test_everything_outside_the_section_is_kept(folder, others):
    """Text before it, and text that somebody added after it."""
    (folder / CARD).write_text(others)
    checkpoint.seal(folder)
    checkpoint.add_to_card(folder, "Accuracy", "old")
    licence = "\n# Licence\n\nStays.\n"
    with (folder / CARD).open("a") as file:
        file.write(licence)
    checkpoint.seal(folder)
    checkpoint.add_to_card(folder, "Accuracy", "new")
    card = (folder / CARD).read_text()
    assert card.startswith(others)
    assert card.endswith(licence)
    assert ("new" in card, "old" in card) == (True, False)


class Died(BaseException):
    """A kill: nothing more is written."""


@pytest.fixture
def failing(monkeypatch):
    """Writes raise the given errors from the second one on, one each; then they work."""

    def fail(*errors: BaseException) -> None:
        write, remaining = atomic.write_file, [None, *errors]

        def write_file(path, made):
            error = remaining.pop(0) if remaining else None
            if error is not None:
                raise error
            write(path, made)

        monkeypatch.setattr(atomic, "write_file", write_file)

    return fail


@pytest.mark.parametrize("earlier", [(), ("old",)])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_second_write_leaves_the_checkpoint_unchanged(folder, failing, earlier, error):
    for text in earlier:
        checkpoint.add_to_card(folder, "Accuracy", text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    failing(error)
    with pytest.raises(type(error)):
        checkpoint.add_to_card(folder, "Accuracy", "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    checkpoint.verify(folder)


@pytest.mark.parametrize("earlier", [(), ("old",)])
@pytest.mark.parametrize("text", ["new", "newer"])
def test_a_kill_between_the_two_writes_is_repaired_by_running_again(folder, failing, earlier, text):
    for each in earlier:
        checkpoint.add_to_card(folder, "Accuracy", each)
    failing(Died(), Died())
    with pytest.raises(Died):
        checkpoint.add_to_card(folder, "Accuracy", "new")
    for name in (CARD, CHECKSUMS):
        (folder / f"{name}{atomic.PARTIAL}").write_text("half")
    with pytest.raises(CheckpointError):
        checkpoint.verify(folder)
    checkpoint.add_to_card(folder, "Accuracy", text)
    assert checkpoint.verify(folder).files == 2
    assert f"\n{text}\n" in (folder / CARD).read_text()
    assert "old" not in (folder / CARD).read_text()


@pytest.mark.parametrize("change", ["# Tuned", "As it was."])
def test_a_card_that_differs_by_more_than_the_section_is_left_alone(folder, change):
    checkpoint.add_to_card(folder, "Accuracy", "old")
    changed = (folder / CARD).read_text().replace(change, "Other")
    (folder / CARD).write_text(changed)
    with pytest.raises(CheckpointError, match=rf"{CARD} is not the file that was written"):
        checkpoint.add_to_card(folder, "Accuracy", "new")
    assert (folder / CARD).read_text() == changed


@pytest.mark.parametrize("name", [CARD, CHECKSUMS])
def test_a_link_is_not_replaced_by_a_file(folder, name):
    """As in a snapshot of the Hugging Face cache."""
    blobs = folder.parent / "models--o--m" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc"
    shutil.copytree(folder, blobs)
    shutil.copytree(folder, snapshot)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(f"../../blobs/{name}")
    checkpoint.verify(snapshot)
    with pytest.raises(CheckpointError, match=rf"{name}: got a link.*cp -rL"):
        checkpoint.add_to_card(snapshot, "Accuracy", "new")
    assert (snapshot / name).is_symlink()
    assert (blobs / name).read_bytes() == (folder / name).read_bytes()


def test_a_card_that_is_too_long_is_not_written(folder):
    before = (folder / CARD).read_bytes()
    with pytest.raises(CheckpointError, match=r"got more than .* bytes"):
        checkpoint.add_to_card(folder, "Accuracy", "x" * checkpoint.LARGEST_CARD)
    assert (folder / CARD).read_bytes() == before


def test_a_checkpoint_without_a_card_is_refused(folder):
    (folder / CARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{CARD}.* is missing"):
        checkpoint.add_to_card(folder, "Accuracy", "new")
    checkpoint.seal(folder)
    with pytest.raises(CheckpointError, match=rf"no {CARD} that"):
        checkpoint.add_to_card(folder, "Accuracy", "new")


def test_a_card_of_a_changed_checkpoint_is_left_alone(folder):
    (folder / "weights").write_bytes(b"1")
    before = (folder / CARD).read_text()
    with pytest.raises(CheckpointError, match="weights is not the file"):
        checkpoint.add_to_card(folder, "Accuracy", "text")
    assert (folder / CARD).read_text() == before


def test_names_of_metrics_and_stores_are_escaped():
    name = "a_b*c*_d_[e](f)`g`"
    run = checkpoint.Run.of(
        {}, {"model": "base"}, steps=1, metrics={f"human_nll/{name}": 1.5, "human_nll": 2.5}
    )
    card = checkpoint._card(CheckpointInfo(recipe=f"forward_kl toward {name}"), run)
    escaped = r"a_b\*c\*\_d\_\[e\](f)\`g\`"
    assert f"- human nll/{escaped}: 1.5000\n" in card
    assert "- human nll: 2.5000\n" in card
    assert f"- Target: forward_kl toward {escaped}\n" in card


def test_a_command_line_that_is_not_utf8_is_recorded(tmp_path, monkeypatch):
    """Such bytes are surrogates in Python's strings, which UTF-8 cannot encode."""
    path = os.fsdecode(b"caf\xe9.yaml")
    monkeypatch.setattr(sys, "argv", ["dftserve", "train", path])
    run = checkpoint.Run.of({"model": path}, {}, steps=1, metrics={})
    checkpoint.describe(tmp_path, CheckpointInfo(recipe=path), run)
    recorded = json.loads((tmp_path / checkpoint.RUN).read_text())
    assert recorded["argv"][-1] == recorded["settings"]["model"] == path
    assert "caf" in (tmp_path / CARD).read_text()
