"""Prompt files."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.evaluate.generate import prompts
from dftserve.evaluate.generate.prompts import Prompt, read


@pytest.fixture
def file(tmp_path):
    def write(content, name="p.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_a_text_file_has_one_prompt_per_line(file):
    result = read(file("One\n\n  Two \r\nThree and 3\u2028lines\n", "p.TXT"))
    assert result == (Prompt("One"), Prompt("Two"), Prompt("Three and 3\u2028lines"))
    assert result[0].messages() == [{"role": "user", "content": "One"}]


def test_a_jsonl_file_has_one_object_per_line(file):
    line = {"prompt": "One", "system": "Be brief.", "answer": 3, "choices": ["a"]}
    (prompt,) = read(file(json.dumps(line)))
    assert prompt == Prompt("One", "Be brief.", {"answer": 3, "choices": ["a"]})
    assert prompt.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
    ]


TEXT = st.text().filter(str.strip)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, st.text()), min_size=1, unique=True), st.booleans())
def test_any_json_text_is_read(tmp_path_factory, pairs, escaped):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [{"prompt": text, "system": system} for text, system in pairs]
    path.write_text(
        "\n".join(json.dumps(line, ensure_ascii=escaped) for line in lines),
        encoding="utf-8",
        newline="",
    )
    assert read(path) == tuple(Prompt(text, system) for text, system in pairs)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_ignored(file, name):
    line = "One" if name == "p.txt" else '{"prompt": "One"}'
    assert read(file(b"\xef\xbb\xbf" + line.encode(), name)) == (Prompt("One"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got 0 prompts; accepted: 1 to"),
        ("\n \n", "got 0 prompts"),
        ('{"prompt": "One"}\n{"prompt"', "line 2: not JSON"),
        ('\n{"prompt": "\\ud800"}', "line 2: got half a surrogate pair"),
        ('{"prompt": "One", "topic": ["\\ud800"]}', "line 1: got half a surrogate pair"),
        ('{"text": "One"}', "line 1: got no `prompt`"),
        ('{"prompt": ""}', "line 1: got no `prompt`"),
        ('{"prompt": " "}', "line 1: got no `prompt`"),
        ('{"prompt": 3}', "line 1: got no `prompt`"),
        ("[1]", "line 1: got no `prompt`"),
        ("null", "line 1: got no `prompt`"),
        ('\n{"prompt": "One", "system": 3}', "line 2, system: got 3; accepted: a text"),
        ('{"prompt": "One"}\n{"prompt": "One", "x": 1}', "got 'One' twice; accepted: each"),
        (b'{"prompt": "\xff"}', "accepted: UTF-8"),
    ],
)
def test_invalid_content_is_refused(file, content, message):
    with pytest.raises(ValueError, match=message):
        read(file(content))


def test_the_same_prompt_with_different_systems_is_accepted(file):
    lines = [{"prompt": "One", "system": system} for system in ("", "a", "b")]
    assert len(read(file("\n".join(map(json.dumps, lines))))) == 3


@pytest.mark.parametrize("name", ["p.csv", "p", "p.json"])
def test_other_suffixes_are_refused(file, name):
    with pytest.raises(ValueError, match=r"accepted: a \.txt or \.jsonl"):
        read(file("One", name))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, message in {"none.txt": "that exists", "folder.txt": "got a folder"}.items():
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


def test_too_many_prompts_and_too_large_a_file_are_refused(file, monkeypatch):
    path = file("1\n2\n3\n", "p.txt")
    monkeypatch.setattr(prompts, "MOST", 2)
    with pytest.raises(ValueError, match="got 3 prompts; accepted: 1 to 2"):
        read(path)
    monkeypatch.setattr(prompts, "LARGEST", 5)
    with pytest.raises(ValueError, match="6 bytes; accepted: at most 5"):
        read(path)
