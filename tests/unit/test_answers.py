"""The answer file: no row is lost, torn or written twice, however a run ends."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve import lock
from dftserve.evaluate.generate import answers
from dftserve.evaluate.generate.answers import AnswerStore, read


@dataclass(frozen=True)
class Row:
    key: str
    text: str


ROWS = [Row(str(n), f"answer {n} — “ok”") for n in range(5)]


def write(path, rows) -> None:
    with AnswerStore(path, Row) as store:
        for row in rows:
            store.append(row)


def content(rows) -> bytes:
    lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines).encode()


ROUNDS, BATCH = 20, 5
WRITER = f"""
import sys
from pathlib import Path
from tests.unit.test_answers import AnswerStore, Row, read
path, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range({ROUNDS}):
    rows = [Row(f"{{name}} {{number}} {{n}}", "x" * 5000) for n in range({BATCH})]
    while True:
        try:
            with AnswerStore(path, Row) as store:
                before = read(path, Row)
                for row in rows:
                    store.append(row)
                assert read(path, Row) == before + rows, "another process wrote meanwhile"
            break
        except ValueError as error:
            assert "another run writes" in str(error), error
"""


def test_concurrent_processes_lose_and_tear_no_row(tmp_path):
    path = tmp_path / "answers.jsonl"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    keys = [row.key for row in read(path, Row)]
    expected = {f"{a} {r} {n}" for a in "ab" for r in range(ROUNDS) for n in range(BATCH)}
    assert len(keys) == len(expected)
    assert set(keys) == expected


@pytest.mark.parametrize("cut", range(1, len(content(ROWS[-1:])) + 1))
def test_a_kill_in_the_middle_of_a_row_loses_only_that_row(tmp_path, cut):
    """At any byte of the last row."""
    path = tmp_path / "answers.jsonl"
    torn = content(ROWS)[:-cut]
    path.write_bytes(torn)
    whole = ROWS[:-1]
    assert read(path, Row) == whole
    assert path.read_bytes() == torn, "reading changes nothing"
    with AnswerStore(path, Row) as store:
        assert store.rows == tuple(whole)
        store.append(ROWS[-1])
    assert path.read_bytes() == content(ROWS)


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerStore(path, Row) as store:
        store.append(ROWS[0])
        with path.open("ab") as file:
            file.write(b'{"key": "half a')  # As if the first writer were in the middle of a row.
        before = path.read_bytes()
        with pytest.raises(ValueError, match="another run writes"), AnswerStore(path, Row):
            pass
        assert path.read_bytes() == before
    with AnswerStore(path, Row) as store:
        assert store.rows == (ROWS[0],), "the lock ends with the writer"


FULL = """
import resource, sys
from pathlib import Path
from tests.unit.test_answers import ROWS, AnswerStore, Row
with AnswerStore(Path(sys.argv[1]), Row) as store:
    store.append(ROWS[0])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        store.append(Row("long", "x" * 200))
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        store.append(ROWS[1])
"""


def test_a_row_that_does_not_fit_leaves_no_partial_row(tmp_path):
    path = tmp_path / "answers.jsonl"
    subprocess.run([sys.executable, "-c", FULL, str(path)], check=True)
    assert path.read_bytes() == content(ROWS[:2])


def test_rows_of_many_threads_are_complete(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [Row(str(n), "x" * 2000) for n in range(100)]
    with AnswerStore(path, Row) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(store.append, rows))
    assert sorted(read(path, Row), key=lambda row: int(row.key)) == rows


@given(st.lists(st.builds(Row, st.text(), st.text(st.characters())), max_size=5))
def test_any_text_is_read_back_and_the_file_is_utf_8(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("any") / "answers.jsonl"
    write(path, rows)
    assert read(path, Row) == rows
    path.read_text(encoding="utf-8")


def test_a_lone_surrogate_is_read_back(tmp_path):
    row = Row("key", "half of a pair: \ud83d")
    write(tmp_path / "answers.jsonl", [row])
    assert read(tmp_path / "answers.jsonl", Row) == [row]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"my novel", 1),
        (content(ROWS[:2]) + b"\n", 3),
        (content(ROWS[:1]) + b'{"key": "b"}\n', 2),
        (content(ROWS[:1]) + b'{"key": "b", "text": 3}\n', 2),
        (content(ROWS[:1]) + b'{"key": "b", "text": "", "more": 1}\n', 2),
        (content(ROWS[:1]) + b'{"text": "b", "k', 2),
    ],
)
def test_a_file_of_another_kind_is_refused_unchanged(tmp_path, data, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"line {line} is no answer"), AnswerStore(path, Row):
        pass
    with pytest.raises(ValueError, match=f"line {line} is no answer"):
        read(path, Row)
    assert path.read_bytes() == data


def test_a_path_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="cannot be written"),
        AnswerStore(tmp_path / "file" / "answers.jsonl", Row),
    ):
        pass


def test_without_flock_the_store_writes_without_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    write(tmp_path / "answers.jsonl", ROWS)
    assert read(tmp_path / "answers.jsonl", Row) == ROWS


def test_a_link_out_of_the_folder_is_neither_written_nor_read(tmp_path):
    """Either could reach a file of another owner."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_bytes(content(ROWS[:1]))
    folder.mkdir()
    (folder / "answers").symlink_to(outside)
    with pytest.raises(ValueError, match="got a link"):
        write(folder / "answers", ROWS)
    with pytest.raises(ValueError, match="got a link"):
        read(folder / "answers", Row)
    assert outside.read_bytes() == content(ROWS[:1])


@pytest.mark.parametrize("use", [lambda path: write(path, ROWS), lambda path: read(path, Row)])
def test_a_file_above_the_size_limit_is_refused_unchanged(tmp_path, monkeypatch, use):
    path = tmp_path / "answers"
    write(path, ROWS)
    monkeypatch.setattr(answers, "LARGEST", len(content(ROWS)) - 1)
    with pytest.raises(ValueError, match="accepted: at most"):
        use(path)
    assert path.read_bytes() == content(ROWS)


@pytest.mark.parametrize("use", [lambda path: write(path, ROWS), lambda path: read(path, Row)])
def test_a_line_nested_too_deeply_is_refused(tmp_path, use):
    path = tmp_path / "answers"
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match="line 1 is no answer"):
        use(path)
