"""Records of other formats, several corpora as one, and what is held out by name."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from dftserve.corpus.filters import Filters
from dftserve.corpus.prepare import LIKE_HELDOUT, prepare
from dftserve.corpus.read import read
from dftserve.corpus.records import Fields
from dftserve.corpus.sources import read_all
from dftserve.targets import recipe
from tests.unit.test_corpus import ANY, changed, prose

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So.", "weight": 0},
                ]
            },
            [USER, {**ANSWER, "weight": 0}],
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}], "system": "Be kind."},
            [{"role": "system", "content": "Be kind."}, USER],
        ),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Why?", "input": "", "output": "So."}, [USER, ANSWER]),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            [
                {"role": "user", "content": "Add.\n\n1, 2"},
                {"role": "assistant", "content": "3"},
            ],
        ),
        ({"prompt": "Why?", "completion": "So."}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        (
            {"prompt": [USER, ANSWER, USER], "response": [ANSWER], "system": "Be."},
            [{"role": "system", "content": "Be."}, USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, ANSWER]},
            [USER, ANSWER],
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]},
            [USER, {"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}],
        ),
    ],
)
def test_formats_that_are_known(tmp_path, record, turns):
    (text,) = read(lines(tmp_path / "a.jsonl", record))
    assert text.messages is not None
    assert [dict(turn) for turn in text.messages] == turns


def test_keys_that_a_column_gives_to_all_structs_are_no_arguments(tmp_path):
    """A table has every key of any row in all; what a list holds stays."""

    def asked(number: int, arguments: dict, properties: dict) -> dict:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        parameters = {"type": "object", "properties": properties}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        return {"messages": [{**USER, "content": f"{number}?"}, turn], "tools": tools}

    rows = [
        asked(1, {"city": "Paris"}, {"city": {"type": "string"}}),
        asked(2, {"expr": "1", "xs": ["a", None]}, {"expr": {"enum": ["1", None]}}),
    ]
    expected = list(read(lines(tmp_path / "a.jsonl", *rows)))
    assert [text.tools[0]["function"]["parameters"]["properties"] for text in expected] == [
        {"city": {"type": "string"}},
        {"expr": {"enum": ["1", None]}},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "a.parquet", tmp_path / "d"):
        found = list(read(path))
        assert [replace(text, origin="") for text in found] == [
            replace(text, origin="") for text in expected
        ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_in_a_json_file_is_what_its_records_are_in_a_jsonl_file(tmp_path, indent):
    """As Alpaca and ShareGPT usually come."""
    records = [
        {"instruction": "Name a river.", "input": "", "output": "The Rhine\u2028is one."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"text": "é"},
    ]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, indent=indent), "utf-8")
    found = list(read(tmp_path / "a.json"))
    expected = list(read(lines(tmp_path / "a.jsonl", *records)))
    assert [replace(text, origin="") for text in found] == [
        replace(text, origin="") for text in expected
    ]
    assert [text.origin for text in found] == ["a.json:1", "a.json:2", "a.json:3"]


def test_a_table_and_packed_lines_are_what_the_lines_are(tmp_path):
    records = [
        {"prompt": "Why, so?", "response": 'He said "so".\nAnd so on.', "system": "Be."},
        {"text": "x" * 200_000},
        {"messages": [USER, ANSWER]},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
    ]
    expected = list(read(lines(tmp_path / "a.jsonl", *records)))
    packed = tmp_path / "train-00000-of-00001.JSONL.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    names = list(dict.fromkeys(name for each in records for name in each))
    with (tmp_path / "test.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        for each in records:
            cells = {n: json.dumps(v) if isinstance(v, list) else v for n, v in each.items()}
            table.writerow(cells)
            file.write("\r\n")
    for path in (packed, tmp_path / "test.csv"):
        found = list(read(path))
        assert [replace(text, origin="") for text in found] == [
            replace(text, origin="") for text in expected
        ]
        assert [text.origin for text in found] == [f"{path.name}:{n}" for n in range(1, 5)]
    (tmp_path / "a.jsonl").unlink()
    assert {(each.origin[:5], each.split) for each in read(tmp_path)} == {
        ("test.", "heldout"),
        ("train", "train"),
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a"}', "got a dict; accepted: a list of records.*jsonl"),
        ('{"text": "a"}\n{"text": "b"}', "not JSON"),
        ('[{"text": "a"}, "b"]', "record 2: got 'b'"),
        ('[{"text": "a"}, {"body": "b"}]', "record 2: "),
    ],
)
def test_another_json_file_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        list(read(tmp_path / "a.json"))


def test_a_json_file_is_bounded(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    monkeypatch.setattr("dftserve.corpus.read.LARGEST_LIST", 8)
    with pytest.raises(ValueError, match=r"write it as \.jsonl, one record a line"):
        list(read(tmp_path / "a.json"))


def test_a_folder_without_files_is_refused(tmp_path):
    (tmp_path / ".hidden.txt").write_text("a")
    with pytest.raises(ValueError, match=r"got no files with the suffix \.txt, \.md"):
        list(read(tmp_path))


def test_other_names_by_a_mapping(tmp_path):
    fields = Fields(
        messages="dialog", role="speaker", content="said", roles={"me": "user", "it": "assistant"}
    )
    said = [{"speaker": "me", "said": "Why?"}, {"speaker": "it", "said": "So."}]
    (text,) = read(lines(tmp_path / "a.jsonl", {"dialog": said, "text": "no"}), fields)
    assert text.messages == (USER, ANSWER)
    (text,) = read(lines(tmp_path / "b.jsonl", {"body": "T"}), Fields(text="body"))
    assert (text.content, text.messages) == ("T", None)
    pair = Fields(prompt="q", response="a", system="s")
    (text,) = read(lines(tmp_path / "c.jsonl", {"q": "Why?", "a": "So.", "s": "Be."}), pair)
    assert text.messages == ({"role": "system", "content": "Be."}, USER, ANSWER)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"body": "x"}, "got the fields 'body'; accepted: `text`, or `messages`"),
        ({"messages": [{"role": "user", "content": None}]}, r"content: got None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools: got"),
        ({"prompt": [USER], "completion": "So."}, r"prompt: got \[.*accepted: a text"),
        ({"prompt": [USER], "completion": [USER]}, "completion: got no turn of the assistant"),
        ({"prompt": [USER], "completion": []}, "completion: got .*accepted: a list of turns"),
    ],
)
def test_what_is_refused_is_named(tmp_path, record, said):
    with pytest.raises(ValueError, match=said):
        list(read(lines(tmp_path / "a.jsonl", record)))


@pytest.mark.parametrize(
    "beside", [{"system": "s"}, {"roles": {"me": "user"}}, {"role": "who"}, {"content": "said"}]
)
def test_names_of_what_is_beside_leave_the_known_ones(tmp_path, beside):
    fields = Fields(**beside)
    records = [
        {"prompt": "Why?", "response": "So.", "s": "Be."},
        {"instruction": "Add.", "input": "1", "output": "2"},
        {"text": "T"},
    ]
    pair, alpaca, plain = read(lines(tmp_path / "a.jsonl", *records), fields)
    system = ({"role": "system", "content": "Be."},) if fields.system else ()
    assert pair.messages == (*system, USER, ANSWER)
    assert alpaca.content == "Add.\n\n1\n\n2"
    assert (plain.content, plain.messages) == ("T", None)


def test_tools_stand_beside_a_prompt_too(tmp_path):
    record = {"prompt": [USER], "completion": [ANSWER], "tools": [{"name": "f"}]}
    (text,) = read(lines(tmp_path / "a.jsonl", record))
    assert text.tools == ({"name": "f"},)


# Several corpora


def corpora(tmp_path: Path, **second) -> Path:
    (tmp_path / "novels").mkdir()
    for number in range(30):
        (tmp_path / "novels" / f"{number}.txt").write_text(prose(60, number))
    answers = [{"q": prose(20, 100 + n), "a": prose(40, 200 + n)} for n in range(60)]
    lines(tmp_path / "forum.jsonl", *answers)
    fields = {"prompt": "q", "response": "a"}
    entries = [{"path": "novels"}, {"path": "forum.jsonl", "fields": fields, **second}]
    path = tmp_path / "mix.yaml"
    path.write_text(json.dumps({"corpora": entries}))
    return path


def test_a_weight_is_the_share_of_a_corpus_that_is_taken(tmp_path):
    path = corpora(tmp_path, weight=0.5)
    texts = list(read_all(path))
    assert texts == list(read_all(path))
    assert sum(text.messages is None for text in texts) == 30
    assert (
        15 <= sum(text.messages is not None for text in texts) <= 45
    )  # Of 60: below 1e-4 outside.
    assert texts[0].origin == "novels/0.txt"


def test_one_corpus_of_several_may_be_what_is_held_out(tmp_path):
    corpus = prepare(read_all(corpora(tmp_path, split="heldout")), ANY, heldout=0.5)
    assert {each.messages is None for each in corpus.train} == {True}
    assert {each.messages is None for each in corpus.heldout} == {False}
    assert len(corpus.train) == 30


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": 2}, "the share of its texts"),
        ({"split": "test"}, "accepted: train, heldout"),
        ({"fieldz": {}}, "did you mean 'fields'"),
        ({"fields": {"prompt": "q"}}, "accepted: both, or neither"),
        ({"fields": {"roles": {"a": "b"}}}, "accepted: system, user"),
    ],
)
def test_a_wrong_list_of_corpora(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        list(read_all(corpora(tmp_path, **given)))


# What is held out by name


def test_the_test_split_of_a_dataset_is_not_trained_on(tmp_path):
    rows = {
        split: datasets.Dataset.from_list([{"text": prose(60, seed + n)} for n in range(20)])
        for split, seed in (("train", 0), ("test", 100), ("validation", 200))
    }
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "d"))
    corpus = prepare(read(tmp_path / "d"), ANY, heldout=0.05)
    assert {each.origin.split(":")[0] for each in corpus.train} == {"train"}
    assert {each.origin.split(":")[0] for each in corpus.heldout} == {"test", "validation"}
    alone = datasets.DatasetDict({"train": rows["train"]})
    alone.save_to_disk(str(tmp_path / "e"))
    assert len(prepare(read(tmp_path / "e"), ANY, heldout=0.3).heldout) < 20


def test_files_with_names_of_splits(tmp_path):
    for name, seed in (("train-00000-of-00002", 0), ("train-00001-of-00002", 50), ("test", 100)):
        lines(tmp_path / f"{name}.jsonl", *({"text": prose(60, seed + n)} for n in range(9)))
    corpus = prepare(read(tmp_path), ANY, heldout=0.05)
    assert {each.origin for each in corpus.heldout} == {f"test.jsonl:{n}" for n in range(1, 10)}
    (tmp_path / "test.jsonl").rename(tmp_path / "tests.jsonl")
    assert {each.split for each in read(tmp_path)} == {None}


def test_copies_of_a_held_out_text_are_not_trained_on(tmp_path):
    """Neither those that are dropped as duplicates nor those that differ more."""
    exam = [prose(200, n) for n in range(5)]
    lines(tmp_path / "exam.jsonl", *({"text": each} for each in exam))
    copies = [changed(exam[0], 0.03, 1), changed(exam[1], 0.07, 1)]
    others = [prose(200, 50 + n) for n in range(5)]
    lines(tmp_path / "mine.jsonl", *({"text": each} for each in [*copies, *others]))
    texts = read_all(tmp_path / "mine.jsonl", tmp_path / "exam.jsonl")
    corpus = prepare(texts, Filters(min_words=0), heldout=0.05)
    assert [each.origin for each in corpus.train] == [f"mine.jsonl:{n}" for n in range(3, 8)]
    assert len(corpus.heldout) == 5
    assert corpus.report.dropped[LIKE_HELDOUT].examples == ("mine.jsonl:2",)


COPIES = {"near": changed(prose(200, 1), 0.03, 1), "further": changed(prose(200, 1), 0.07, 1)}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("way", ["dataset", "files", "corpora", "one of several"])
def test_copies_of_what_a_split_holds_out_are_not_trained_on(tmp_path, copy, way):
    """Whatever comes first by its name."""
    train = [{"text": text} for text in (COPIES[copy], prose(200, 2), prose(200, 3))]
    heldout = [{"text": prose(200, 1)}, {"text": prose(200, 4)}]
    path = tmp_path / "corpus"
    if way == "dataset":
        splits = {"train": train, "validation": heldout}
        listed = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(listed).save_to_disk(str(path))
    elif way == "files":
        path.mkdir()
        lines(path / "train.jsonl", *train)
        lines(path / "valid.jsonl", *heldout)
    else:
        for name, rows in (("mine", train[:1]), ("exam/test", heldout), ("exam/train", train[1:])):
            (tmp_path / "exam").mkdir(exist_ok=True)
            lines(tmp_path / f"{name}.jsonl", *rows)
        given = [{"path": "mine.jsonl"}, {"path": "exam"}]
        if way == "one of several":
            tests = {"path": "exam/test.jsonl", "split": "heldout"}
            given = [{"path": "mine.jsonl"}, {"path": "exam/train.jsonl"}, tests]
        path = tmp_path / "mix.yaml"
        path.write_text(json.dumps({"corpora": given}))
    corpus = prepare(read_all(path), ANY, heldout=0.05)
    assert [each.content for each in corpus.heldout] == [each["text"] for each in heldout]
    assert [each.content for each in corpus.train] == [each["text"] for each in train[1:]]


# Filters by --set


def test_filters_are_set_on_the_command_line():
    values = {"corpus.min_words": "7", "corpus.languages": "[en, de]", "corpus.answers": "last"}
    filters = recipe.load("creative", {**values, "order": "4"}).corpus
    assert (filters.min_words, filters.languages, filters.answers) == (7, ("en", "de"), "last")
    assert filters.split_words == 1000
    with pytest.raises(ValueError, match="did you mean 'min_words'"):
        recipe.load("creative", {"corpus.minwords": "7"})
    with pytest.raises(ValueError, match="accepted: all, last"):
        recipe.load("creative", {"corpus.answers": "first"})
