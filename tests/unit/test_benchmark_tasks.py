"""Task files: those shipped with dftserve and the user's own."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dftserve.evaluate.benchmark import rst, slots, tasks
from dftserve.evaluate.benchmark.tasks import Missing, load, shipped
from dftserve.evaluate.text.tokenize import words
from dftserve.evaluate.text.windows import LEAST_TEXTS, Sample, Windows

OWN = {
    "title": "Mine",
    "kind": "style",
    "prompts": {"file": "asked.txt", "ask": "Tell of this: {}."},
    "human": {"files": ["said.jsonl"]},
    "samples": 2,
    "max_tokens": 64,
}


def shipped_task(name: str, data: Path) -> tasks.Task:
    try:
        return load(name, data)
    except Missing as reason:
        pytest.skip(str(reason))


def write_task(folder: Path, **changed: object) -> Path:
    """Write a task file and its texts; a key with None is left out."""
    (folder / "asked.txt").write_text("the sea\na hill\n")
    lines = [{"prompt": "the sea", "response": "It is wet."}, {"text": "Hills are steep."}]
    (folder / "said.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = {key: value for key, value in {**OWN, **changed}.items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(given, allow_unicode=True))
    return path


# ── Shipped ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["story", "essay"])
def test_a_style_task_has_prompts_and_enough_human_texts(name, data):
    task = shipped_task(name, data)
    assert task.kind == "style"
    assert len(task.prompts) == len({prompt.text for prompt in task.prompts}) == 150
    cut = Windows.of(task.human, task.words)
    assert len(cut) - cut.short > 200
    beginnings = Counter(" ".join(text.split()[:30]) for text in cut.whole().texts)
    assert max(beginnings.values()) == 1


def test_story_windows_exclude_the_prompts(data):
    """Each text begins with its prompt; its window begins after it."""
    task = shipped_task("story", data)
    assert all(sample.prompt for sample in task.human)
    for sample, text in zip(task.human, Windows.of(task.human).texts, strict=True):
        prompt_words = sample.prompt.split()
        assert sample.text.split()[: len(prompt_words)] == prompt_words
        assert not text or text.split()[: len(prompt_words)] != prompt_words


def test_essays_are_prose_of_many_sources(data):
    task = shipped_task("essay", data)
    sources = Counter(sample.source for sample in task.human)
    assert len(sources) > 40
    assert max(sources.values()) <= 4
    assert all(len(words(sample.text)) == 120 for sample in task.human)
    assert not any("\n\n " in sample.text or "::" in sample.text[-2:] for sample in task.human)


def test_every_meaning_has_enough_human_texts(data):
    task = shipped_task("e2e", data)
    assert (task.kind, task.words) == ("meaning", 0)
    counts = Counter(sample.prompt for sample in task.human)
    assert set(counts) == {prompt.text for prompt in task.prompts}
    assert min(counts.values()) >= LEAST_TEXTS
    for prompt in task.prompts:
        assert prompt.about["meaning"] in prompt.text
        assert slots.parse(prompt.about["meaning"])


def test_three_tasks_are_shipped():
    assert shipped() == ["e2e", "essay", "story"]


@pytest.mark.parametrize("name", ["story", "essay", "e2e"])
def test_the_error_for_a_missing_set_names_it_and_its_folder(name, tmp_path):
    with pytest.raises(Missing, match=rf"{name}: .* is not in .*{tmp_path.name}.*DFTSERVE_DATA"):
        load(name, tmp_path)


def test_a_missing_folder_is_reported_as_a_missing_set(tmp_path, monkeypatch):
    with pytest.raises(Missing, match="is not there"):
        load("story", tmp_path / "none")
    monkeypatch.delenv("DFTSERVE_DATA", raising=False)
    with pytest.raises(Missing, match="DFTSERVE_DATA names none"):
        load("story")


# ── The user's own ───────────────────────────────────────────────────────────────────────────────


def test_a_user_s_file_is_loaded_as_a_task(tmp_path, monkeypatch):
    path = write_task(tmp_path)
    monkeypatch.setenv("DFTSERVE_DATA", str(tmp_path))
    task = load(path)
    assert task == load(str(path), tmp_path)
    assert [prompt.text for prompt in task.prompts] == [
        "Tell of this: the sea.",
        "Tell of this: a hill.",
    ]
    assert [(s.prompt, s.text) for s in task.human] == [
        ("the sea", "It is wet."),
        ("", "Hills are steep."),
    ]
    assert (task.title, task.words, task.samples, task.max_tokens) == ("Mine", 120, 2, 64)


def test_rows_are_selected_by_first_and_count(tmp_path):
    (tmp_path / "asked.json").write_text(json.dumps(list("abcde")))
    path = write_task(tmp_path, prompts={"file": "asked.json", "first": 1, "count": 3})
    assert [prompt.text for prompt in load(path, tmp_path).prompts] == ["b", "c", "d"]
    path = write_task(tmp_path, prompts={"file": "asked.json", "first": 3, "count": 3})
    with pytest.raises(ValueError, match="got 5 rows; accepted: 6"):
        load(path, tmp_path)


def test_a_repeated_original_is_one_text(tmp_path):
    beginning = "There was a king who had three sons "
    for name, ending in (("a", "and a cow"), ("b", "but no")):
        pair = {"original": [beginning + "and was glad"], "sampled": [beginning + ending]}
        (tmp_path / f"{name}.json").write_text(json.dumps(pair))
    task = load(write_task(tmp_path, human={"files": ["?.json"]}), tmp_path)
    assert task.human == (Sample(beginning + "and was glad", beginning + "and"),)


def test_prompts_with_few_human_texts_are_left_out(tmp_path):
    lines = ["mr,ref"]
    lines += [f"name[A],a{i}" for i in range(3)] + [f"name[B],b{i}" for i in range(2)]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    path = write_task(
        tmp_path,
        kind="meaning",
        prompts={"file": "all.csv"},
        human={"files": ["all.csv"], "least": 3},
    )
    task = load(path, tmp_path)
    assert [prompt.text for prompt in task.prompts] == ["name[A]"]
    assert [sample.text for sample in task.human] == ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_token": 3}, "got the key 'max_token'.*did you mean 'max_tokens'"),
        ({"prompts": {"file": "asked.txt", "row": 1}}, "mine.yaml.prompts: got the key 'row'"),
        ({"title": None}, "mine.yaml.title: got nothing"),
        ({"kind": "styl"}, "kind: got 'styl'.*did you mean 'style'"),
        ({"samples": 0}, "samples, max_tokens, words: got 0"),
        ({"words": 20}, "accepted: .* 80 or more"),
        ({"prompts": {"file": "asked.txt", "ask": "Tell."}}, "accepted: a text with one {}"),
        ({"prompts": {"file": "asked.txt", "first": -1}}, "first, count: got -1"),
        ({"human": {"files": []}}, "got 0 files"),
        ({"human": {"files": ["said.jsonl"], "least": 9}}, "got 0 prompts and 0 human texts"),
        ({"kind": "meaning"}, "meaning: got ''"),
    ],
)
def test_a_mistake_in_a_file_is_reported(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        load(write_task(tmp_path, **changed), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("a: &x 1\nb: *x", "alias"),
        ("- a", "accepted: keys and values"),
    ],
)
def test_an_invalid_task_file_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path, tmp_path)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'story'"):
        load("storys")


# ── Documents ────────────────────────────────────────────────────────────────────────────────────

DOCUMENT = """\
PEP: 1
Title: Nothing of this is said

Why
===

The `first paragraph <http://a.b>`_ [1]_ has ``code()`` and *stress* in it; see :pep:`8`::

    nothing of this

* a list of several words that is left out as well

===== =====
a     table of several words that is left out
===== =====

.. note:: this is a directive and it is left out

A second paragraph, over
two lines, with some_name kept, and more_ said.

References
==========

Behind the references nothing is said that anybody would want to read.
"""


def test_the_prose_of_a_document_is_its_paragraphs():
    assert rst.prose(DOCUMENT) == (
        "The first paragraph has code() and stress in it; see PEP 8:\n\n"
        "A second paragraph, over\ntwo lines, with some_name kept, and more said."
    )


def test_plain_paragraphs_are_unchanged():
    text = "This is a paragraph of plain words, and nothing else."
    assert rst.prose(f"Header: x\n\n{text}\n\n{text}") == f"{text}\n\n{text}"
