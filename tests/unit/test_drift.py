"""Two reports of accuracy, paired; and the section that they make in a checkpoint's card."""

import json
from pathlib import Path

import pytest

from dftserve import checkpoint
from dftserve.checkpoint import CARD, CheckpointError
from dftserve.evaluate.accuracy import run
from dftserve.evaluate.accuracy.drift import drift
from dftserve.evaluate.accuracy.run import Job
from tests.local_server import model_server

COUNT = 20


@pytest.fixture
def asked(tmp_path) -> Path:
    rows = [{"prompt": f"Build {number}", "refuse": True} for number in range(COUNT)]
    (tmp_path / "refusals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def report(data: Path, name: str, refused: int, **job) -> Path:
    """Of a model that refuses the first prompts, and one fewer at diversity 1."""

    def say(body) -> str:
        number = int(body["messages"][0]["content"].split()[1])
        return "I can't help with that." if number < refused - body["diversity"] else "Sure:"

    out = data / name
    options = {"grid": (0, 1), "tasks": ("refusals",)} | job
    with model_server(say) as (url, _):
        run.run(Job(url, out, data=data, **options), print)
    return out


def test_a_drift_is_that_of_the_same_questions(asked):
    found = drift(report(asked, "before.json", COUNT), report(asked, "after.json", COUNT - 6))
    assert [row.after.diversity for row in found.rows] == [0, 1]
    for row, (before, after) in zip(found.rows, [(20, 14), (19, 13)], strict=True):
        assert row.before.accuracy.value == before / COUNT
        assert row.after.accuracy.value == after / COUNT
        assert row.after.difference is not None
        assert row.after.difference.value == pytest.approx(-6 / COUNT)
        assert row.after.p == pytest.approx(2 / 2**6), "six lost, none gained: a fair coin's tails"
    assert "| refusals, to refuse | 0 | 20 |" in found.render()


def test_a_model_against_itself_does_not_drift(asked):
    path = report(asked, "one.json", 7)
    for row in drift(path, path).rows:
        assert row.after.difference is not None
        assert (row.after.difference.value, row.after.p) == (0, 1)


def test_what_cannot_be_compared_is_refused(asked):
    before = report(asked, "before.json", 5)
    with pytest.raises(ValueError, match=r"samples: got 1 in .*2 in "):
        drift(before, report(asked, "twice.json", 5, samples=2))
    (asked / "refusals.jsonl").write_text(json.dumps({"prompt": "Build 1", "refuse": True}))
    with pytest.raises(ValueError, match="accepted: reports of the same questions"):
        drift(before, report(asked, "other.json", 5))
    (asked / "wrong.json").write_text('{"settings": {"model": "m"}}')
    with pytest.raises(ValueError, match="a report of `dftserve evaluate accuracy`"):
        drift(before, asked / "wrong.json")


def test_levels_that_one_report_lacks_are_left_out(asked):
    narrow = report(asked, "narrow.json", 5, grid=(0,))
    assert [row.after.diversity for row in drift(report(asked, "b.json", 5), narrow).rows] == [0]


@pytest.fixture
def written(tmp_path) -> Path:
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / CARD).write_text("# Tuned\n\nAs it was.\n")
    (folder / "weights").write_bytes(b"0")
    checkpoint.seal(folder)
    return folder


def test_a_section_of_the_card_is_put_in_and_replaced(written):
    for text in ("first", "| second |", r"third \1"):
        checkpoint.add_to_card(written, "Accuracy", text)
        checkpoint.add_to_card(written, "Other", "stays")
        card = (written / CARD).read_text()
        assert card.startswith("# Tuned\n\nAs it was.\n")
        assert card.count("## Accuracy\n") == card.count("## Other\n") == 1
        assert f"## Accuracy\n\n{text}\n" in card
        assert checkpoint.verify(written).files == 2
    assert "first" not in card
    assert "second" not in card


def test_a_card_of_a_changed_checkpoint_is_left_alone(written):
    (written / "weights").write_bytes(b"1")
    before = (written / CARD).read_text()
    with pytest.raises(CheckpointError, match="weights is not the file"):
        checkpoint.add_to_card(written, "Accuracy", "text")
    assert (written / CARD).read_text() == before
