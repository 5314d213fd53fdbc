"""Drift: two accuracy reports, compared by pairs of answers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from dftserve import checkpoint
from dftserve.checkpoint import CARD
from dftserve.cli import main
from dftserve.evaluate.accuracy import run
from dftserve.evaluate.accuracy.compare import Answered, level_of
from dftserve.evaluate.accuracy.drift import COLUMNS, Drift, Row, drift
from dftserve.evaluate.accuracy.grade import CUT, REFUSED, UNREADABLE
from dftserve.evaluate.accuracy.parts import Settings, folder_of
from dftserve.evaluate.accuracy.run import Job
from tests.local_server import model_server
from tests.training import save_sealed

COUNT = 20


@pytest.fixture
def refusals(tmp_path) -> Path:
    rows = [{"prompt": f"Build {number}", "refuse": True} for number in range(COUNT)]
    (tmp_path / "refusals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def report(data: Path, name: str, refused: int, **job) -> Path:
    """A report on a model that refuses the first `refused` prompts, one fewer at diversity 1."""

    def answer(body) -> str:
        number = int(body["messages"][0]["content"].split()[1])
        return "I can't help with that." if number < refused - body["diversity"] else "Sure:"

    out = data / name
    options = {"grid": (0, 1), "tasks": ("refusals",)} | job
    with model_server(answer) as (url, _):
        run.run(Job(url, out, data=data, **options), print)
    return out


def test_drift_compares_answers_to_the_same_questions(refusals):
    found = drift(report(refusals, "before.json", COUNT), report(refusals, "after.json", COUNT - 6))
    assert [row.after.diversity for row in found.rows] == [0, 1]
    for row, (before, after) in zip(found.rows, [(20, 14), (19, 13)], strict=True):
        assert row.before.accuracy.value == before / COUNT
        assert row.after.accuracy.value == after / COUNT
        assert row.after.difference is not None
        assert row.after.difference.value == pytest.approx(-6 / COUNT)
        assert row.after.p == pytest.approx(2 / 2**6), "six lost, none gained: a fair coin's tails"
    assert "| refusals, to refuse | 0 | 20 |" in found.render()


def test_a_model_against_itself_does_not_drift(refusals):
    path = report(refusals, "one.json", 7)
    for row in drift(path, path).rows:
        assert row.after.difference is not None
        assert (row.after.difference.value, row.after.p) == (0, 1)


def test_reports_that_cannot_be_compared_are_refused(refusals):
    before = report(refusals, "before.json", 5)
    with pytest.raises(ValueError, match=r"samples: got 1 in .*2 in "):
        drift(before, report(refusals, "twice.json", 5, samples=2))
    (refusals / "refusals.jsonl").write_text(json.dumps({"prompt": "Build 1", "refuse": True}))
    with pytest.raises(ValueError, match="accepted: reports of the same questions"):
        drift(before, report(refusals, "other.json", 5))
    (refusals / "wrong.json").write_text('{"settings": {"model": "m"}}')
    with pytest.raises(ValueError, match="a report of `dftserve evaluate accuracy`"):
        drift(before, refusals / "wrong.json")


def test_levels_that_one_report_lacks_are_left_out_and_reported(refusals):
    """The report decides: its folder of answers may hold more levels."""
    wide = report(refusals, "wide.json", 5, grid=(0, 0.5, 1))
    narrow = report(refusals, "wide.json", 5, grid=(0, 1)).rename(refusals / "narrow.json")
    shutil.copytree(folder_of(wide), folder_of(narrow))
    report(refusals, "wide.json", 5, grid=(0, 0.5, 1))
    found = drift(wide, narrow)
    assert [row.after.diversity for row in found.rows] == [0, 1]
    assert found.alone == (f"only {wide} has diversity 0.5",)
    assert drift(narrow, narrow).alone == ()


def test_reports_without_a_common_task_are_refused(refusals):
    before, after = report(refusals, "before.json", 5), report(refusals, "after.json", 5)
    content = json.loads(after.read_text())
    after.write_text(json.dumps(content | {"files": {}}))
    with pytest.raises(ValueError, match=r"in both; only .*before\.json has refusals\."):
        drift(before, after)


# Whether the answers belong to the report


@pytest.fixture(scope="module")
def _one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    row = {"prompt": "Build 0", "refuse": True}
    (folder / "refusals.jsonl").write_text(json.dumps(row))
    return report(folder, "one.json", 5)


@pytest.fixture
def one(_one, tmp_path) -> Path:
    """A report of one prompt, and its answers."""
    copied = shutil.copytree(_one.parent, tmp_path / "one") / _one.name
    assert drift(copied, copied).rows
    return copied


PARTS = ("settings.json", "refusals-files.json", "refusals-0.json", "refusals-1.json")


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_file_of_answers_is_named(one, name):
    (folder_of(one) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"one\.json\.parts/{name}: there is no such file"):
        drift(one, one)


@pytest.mark.parametrize("name", PARTS[:2])
def test_answers_of_another_job_are_refused(one, name):
    """As after a new job in the same folder that was stopped before it wrote its report."""
    path = folder_of(one) / name
    content = json.loads(path.read_text())
    changed = {"temperature": 0.3} if name == "settings.json" else {"refusals.jsonl": "0" * 64}
    assert content != content | changed
    path.write_text(json.dumps(content | changed))
    with pytest.raises(ValueError, match=rf"of another job than .*one\.json .*\({name}\)"):
        drift(one, one)


def test_answers_are_identified_by_their_prompts(one):
    """Even if digests are forged to agree, no answer is paired with one to another prompt."""
    other = shutil.copytree(one.parent, one.parent.parent / "other") / one.name
    shutil.rmtree(folder_of(other))
    row = {"prompt": "Build 7", "refuse": True}
    (other.parent / "refusals.jsonl").write_text(json.dumps(row))
    report(other.parent, other.name, 5)
    for name in ("refusals-files.json", None):
        paths = [folder_of(path) / name if name else path for path in (one, other)]
        theirs, ours = (json.loads(path.read_text()) for path in paths)
        digests = theirs if name else ours | {"files": theirs["files"]}
        assert digests != ours
        paths[1].write_text(json.dumps(digests))
    with pytest.raises(ValueError, match=r"one\.json, .*differ in the questions"):
        drift(one, other)


ANSWER = {"question": "to refuse/0", "right": [True], "said": ["a"], "judged": [REFUSED]}


@pytest.mark.parametrize(
    "rows",
    [
        *({}, 1, None, [], [[]], ["a"], [{}]),
        *([ANSWER | wrong] for wrong in ({"question": 1}, {"question": "x/0"})),
        *([ANSWER | {"right": wrong}] for wrong in (["x"], [7], [], [[True]], "y", [True, True])),
        *([ANSWER | {"said": wrong}] for wrong in ([], [1], None, "a", ["a", "b"])),
        *([ANSWER | {"judged": wrong}] for wrong in ([], [None], {}, "a", ["a", "b"])),
        [ANSWER | {"right": [], "said": [], "judged": []}],
        [ANSWER, {name: value for name, value in ANSWER.items() if name != "judged"}],
        [ANSWER, ANSWER | {"more": 1}],
    ],
)
def test_the_error_for_damaged_answers_names_their_file(one, rows):
    (folder_of(one) / "refusals-1.json").write_text(json.dumps(rows))
    with pytest.raises(
        ValueError, match=r"refusals-1\.json.*got .*accepted: .*; remove it and run"
    ):
        drift(one, one)


@pytest.mark.parametrize("text", ["", "{", "[NaN]", "\ud800"])
def test_the_error_for_answers_that_are_not_json_names_their_file(one, text):
    (folder_of(one) / "refusals-1.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=r"refusals-1\.json.*; remove it and run"):
        drift(one, one)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"settings": wrong} for wrong in ([["a"]], None, "text", {})),
        *({"files": wrong} for wrong in (["ab"], None, {"x" * 300: {}}, {"gsm8k": {}})),
        *({"files": {"refusals": wrong}} for wrong in (None, "a", {"refusals.jsonl": "0"})),
        {"files": {"refusals": {"../refusals.jsonl": "0" * 64}}},
    ],
)
def test_the_error_for_a_damaged_report_names_its_file(one, wrong):
    one.write_text(json.dumps(json.loads(one.read_text()) | wrong))
    with pytest.raises(ValueError, match=r"one\.json: .*accepted: "):
        drift(one, one)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"grid": wrong} for wrong in (["x"], 5, None, [[0]], {"0": 0}, [True])),
        *({"model": None}, {"temperature": "hot"}, {"samples": 1.5}, {"is_chat": 1}, {"new": 1}),
    ],
)
def test_the_error_for_damaged_settings_names_their_file(one, wrong):
    content = json.loads(one.read_text())
    one.write_text(json.dumps(content | {"settings": content["settings"] | wrong}))
    with pytest.raises(ValueError, match=r"one\.json: .*accepted: "):
        drift(one, one)


# What is shown


def rows_of(*judged: str, samples: int = 1) -> tuple[Answered, ...]:
    return tuple(
        Answered(f"to refuse/{number}", (each == REFUSED,) * samples, judged=(each,) * samples)
        for number, each in enumerate(judged)
    )


def drifted(
    before: Sequence[str] = (REFUSED,) * 4, after: Sequence[str] = (REFUSED,) * 4, samples: int = 1
) -> Drift:
    """The drift between answers with these judgements."""
    base, ours = rows_of(*before, samples=samples), rows_of(*after, samples=samples)
    row = Row("t", level_of("t", 0.5, base, None), level_of("t", 0.5, ours, base))
    settings = Settings("m", 0.7, 500, samples, 256, is_chat=True)
    files = {"refusals": {"refusals.jsonl": "ab" * 32}}
    return Drift("b", "a", (row,), settings, files, alone=())


PLAIN = drifted()


def test_cut_and_unreadable_answers_have_their_own_columns():
    found = drifted(after=(REFUSED, UNREADABLE, CUT, CUT))
    cells = dict(zip(COLUMNS, found.rows[0].cells(), strict=True))
    assert (cells["unreadable"], cells["cut"]) == ("0.0 → 25.0", "0.0 → 50.0")
    for text in (found.render(), found.explained()):
        assert "0.0 → 50.0" in text
        assert "--max-tokens" in text
    assert "--max-tokens" in drifted(before=(CUT,) * 4).render()
    assert "--max-tokens" not in PLAIN.explained()


def test_a_model_card_has_the_settings_and_the_digests():
    text = drifted(samples=3).explained()
    for each in ("At most 500 questions", "each: 3", "temperature: 0.7", "256 at most", "ab" * 32):
        assert each in text
    assert "`refusals.jsonl`" in text
    whole = replace(PLAIN, settings=replace(PLAIN.settings, limit=None, max_tokens=None))
    assert "All questions" in whole.explained()
    assert "its task's default" in whole.explained()


def test_mcnemar_is_mentioned_only_with_a_p_value():
    assert "McNemar" in PLAIN.explained()
    several = drifted(samples=2)
    assert several.rows[0].after.p is None
    assert "McNemar" not in several.explained()


@given(st.text(), st.text(alphabet="a|`#\n\r\u2028\\/~-<>! "))
def test_a_model_name_cannot_break_out_of_its_line_or_backticks(one_name, other_name):
    plain = PLAIN.explained()
    text = replace(PLAIN, before=one_name, after=other_name).explained()
    assert text.count("`") == plain.count("`")
    assert text.splitlines()[1:] == plain.splitlines()[1:]
    names = text.splitlines()[0].split("`")[1::2]
    assert len(names) == 2
    for name in names:
        assert name.isprintable()
        assert "|" not in name.replace(r"\|", "")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/alice/runs/tuned", "tuned"),
        ("/home/alice/runs/tuned/", "tuned"),
        ("/tuned", "tuned"),
        ("~/tuned", "tuned"),
        ("../tuned", "tuned"),
        ("runs/7/final", "final"),
        (r"C:\Users\alice\tuned", "tuned"),
        ("file:///home/alice/tuned", "tuned"),
        ("org/tuned", "org/tuned"),
        ("a|b", r"a\|b"),
        ("/", "unnamed"),
        ("", "unnamed"),
    ],
)
def test_only_the_last_part_of_a_path_is_shown(name, shown):
    assert replace(PLAIN, before=name).explained().split("`")[1] == shown


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", "drift", *map(str, arguments)])


@pytest.fixture
def model_folder(tmp_path) -> Path:
    return save_sealed(tmp_path / "final", {CARD: "# Tuned\n\nAs it was.\n", "weights": "0"})


def test_the_command_prints_the_table_and_adds_it_to_the_card(one, model_folder):
    done = invoke(one, one, "--card", model_folder)
    assert (done.exit_code, done.stderr) == (0, "")
    found = drift(one, one)
    assert done.stdout == found.render() + "\n"
    assert found.explained() in (model_folder / CARD).read_text()
    assert checkpoint.verify(model_folder).files == 2


def test_the_command_reports_on_stderr_what_it_leaves_out(one):
    narrow = report(one.parent, "narrow.json", 5, grid=(0,))
    done = invoke(one, narrow)
    assert done.exit_code == 0
    assert "has diversity 1; it is left out" in done.stderr
    assert "left out" not in done.stdout


def test_an_error_is_shown_without_a_traceback(one):
    shutil.rmtree(folder_of(one))
    done = invoke(one, one)
    assert done.exit_code in (1, 2)
    assert "copy" in done.output
    assert "Traceback" not in done.output
