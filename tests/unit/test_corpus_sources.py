"""Records of other formats, several corpora as one, and splits held out by name."""

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
from dftserve.corpus.prepare import DUPLICATE, GIVEN_AGAIN, LIKE_HELDOUT, prepare
from dftserve.corpus.read import read
from dftserve.corpus.records import Fields, opening
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
        (
            {"instruction": "And?", "output": "No.", "history": [["Why?", "So."]], "system": "Be."},
            [
                {"role": "system", "content": "Be."},
                *(USER, ANSWER),
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "No."},
            ],
        ),
        ({"instruction": "Why?", "output": "So.", "history": []}, [USER, ANSWER]),
        ({"instruction": "Why?", "output": "So.", "text": "### Why? ### So."}, [USER, ANSWER]),
        ({"prompt": "Why?", "response": "So.", "text": "Why? So."}, [USER, ANSWER]),
        ({"prompt": "Why?", "completion": "So."}, [USER, ANSWER]),
        ({"prompt": "Why?", "completion": "So.", "label": True}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "tools": ""}, [USER, ANSWER]),
        (
            {"messages": [{**USER, "role": "Human"}, {**ANSWER, "role": "Assistant"}]},
            [USER, ANSWER],
        ),
        (
            {"messages": [{**USER, "role": "ipython"}, ANSWER]},
            [{**USER, "role": "ipython"}, ANSWER],
        ),
        (
            {"conversations": [{"from": "User", "value": "Why?"}, {"from": "GPT", "value": "So."}]},
            [USER, ANSWER],
        ),
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
def test_known_formats_are_read(tmp_path, record, turns):
    (text,) = read(lines(tmp_path / "a.jsonl", record))
    assert text.messages is not None
    assert [dict(turn) for turn in text.messages] == turns


def test_keys_that_a_table_adds_to_all_structs_are_removed(tmp_path):
    """A table gives each row the keys of all rows. The items of a list stay."""

    def record(number: int, arguments: dict, properties: dict) -> dict:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        parameters = {"type": "object", "properties": properties}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        return {"messages": [{**USER, "content": f"{number}?"}, turn], "tools": tools}

    rows = [
        record(1, {"city": "Paris"}, {"city": {"type": "string"}}),
        record(2, {"expr": "1", "xs": ["a", None]}, {"expr": {"enum": ["1", None]}}),
    ]
    expected = list(read(lines(tmp_path / "a.jsonl", *rows)))
    assert [text.tools[0]["function"]["parameters"]["properties"] for text in expected] == [
        {"city": {"type": "string"}},
        {"expr": {"enum": ["1", None]}},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "a.parquet", tmp_path / "d"):
        loaded = list(read(path))
        assert [replace(text, origin="") for text in loaded] == [
            replace(text, origin="") for text in expected
        ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_in_a_json_file_is_read_like_a_jsonl_file(tmp_path, indent):
    """The usual format of Alpaca and ShareGPT."""
    records = [
        {"instruction": "Name a river.", "input": "", "output": "The Rhine\u2028is one."},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"text": "é"},
    ]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, indent=indent), "utf-8")
    loaded = list(read(tmp_path / "a.json"))
    expected = list(read(lines(tmp_path / "a.jsonl", *records)))
    assert [replace(text, origin="") for text in loaded] == [
        replace(text, origin="") for text in expected
    ]
    assert [text.origin for text in loaded] == ["a.json:1", "a.json:2", "a.json:3"]


def test_csv_and_gzipped_jsonl_are_read_like_jsonl(tmp_path):
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
        loaded = list(read(path))
        assert [replace(text, origin="") for text in loaded] == [
            replace(text, origin="") for text in expected
        ]
        assert [text.origin for text in loaded] == [f"{path.name}:{n}" for n in range(1, 5)]
    (tmp_path / "a.jsonl").unlink()
    assert {(each.origin[:5], each.split) for each in read(tmp_path)} == {
        ("test.", "heldout"),
        ("train", "train"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', "got a dict; accepted: a list of records.*jsonl"),
        ('{"text": "a"}\n{"text": "b"}', r"not JSON.*one record a line, name it \.jsonl"),
        ('[{"text": "a"}, "b"]', "record 2: got 'b'"),
        ('[{"text": "a"}, {"body": "b"}]', "record 2: "),
    ],
)
def test_an_invalid_json_file_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
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


def test_fields_of_other_names_are_mapped(tmp_path):
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
    ("record", "message"),
    [
        ({"body": "x"}, "got the fields 'body'; accepted: `text`, or `messages`"),
        ({"messages": [{"role": "user", "content": None}]}, r"content: got None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools: got"),
        ({"prompt": [USER], "completion": "So."}, r"prompt: got \[.*accepted: a text"),
        ({"prompt": [USER], "completion": [USER]}, "completion: got no turn of the assistant"),
        ({"prompt": [USER], "completion": []}, "completion: got .*accepted: a list of turns"),
        ({"prompt": "a", "completion": "b", "label": False}, "line 1, label: got False.* KTO"),
        ({"messages": [USER, ANSWER], "label": False}, "line 1, label: got False.*fields"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "line 1, kto_tag: got False"),
        (
            {"prompt": "a", "response": "b", "history": ["c"]},
            r"history: got \['c'\].*list of pairs",
        ),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"\[0\].from: got 'bot'.*roles"),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, "got 'function_call'"),
        ({"messages": [USER, {**ANSWER, "reasoning": "\ud800"}]}, r"messages\[1\]: half a surr"),
        ({"messages": [USER, {**ANSWER, "\ud800": 1}]}, r"messages\[1\]: half a surrogate"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]}, "tools: half a surrogate"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "\ud800"}]}]},
            r"messages\[1\]: half a surrogate",
        ),
    ],
)
def test_invalid_records_are_refused_with_the_reason(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        list(read(lines(tmp_path / "a.jsonl", record)))


def test_named_fields_say_what_an_ambiguous_record_means(tmp_path):
    record = {"prompt": "Why?", "completion": "So.", "label": False, "text": "T"}
    path = lines(tmp_path / "a.jsonl", record)
    (pair,) = read(path, Fields(prompt="prompt", response="completion"))
    (plain,) = read(path, Fields(text="text"))
    assert pair.messages == (USER, ANSWER)
    assert (plain.content, plain.messages) == ("T", None)
    said = [{"from": "bot", "value": "So."}]
    (text,) = read(
        lines(tmp_path / "b.jsonl", {"conversations": said}), Fields(roles={"bot": "assistant"})
    )
    assert text.messages == (ANSWER,)


OTHER_COLUMNS = {
    "year 146138": pyarrow.array([1 << 62], pyarrow.timestamp("us")),
    "time zone": pyarrow.array([1], pyarrow.timestamp("us", tz="Nowhere/Else")),
    "date": pyarrow.array([1 << 30], pyarrow.date32()),
    "duration": pyarrow.array([1 << 62], pyarrow.duration("s")),
}


@pytest.mark.parametrize("name", OTHER_COLUMNS)
def test_columns_of_times_do_not_matter(tmp_path, name):
    table = pyarrow.table({"text": ["a"], "other": OTHER_COLUMNS[name]})
    parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "a.parquet", tmp_path / "d"):
        assert [text.content for text in read(path)] == ["a"]


def test_a_value_of_a_table_that_cannot_be_read_is_refused(tmp_path):
    buffers = pyarrow.array([b"ok", b"\xff"]).buffers()
    table = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, rows from 1, column text: got a value"):
        list(read(tmp_path / "a.parquet"))
    twice = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet.*each name once"):
        list(read(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    "names", [{"system": "s"}, {"roles": {"me": "user"}}, {"role": "who"}, {"content": "said"}]
)
def test_names_of_secondary_fields_keep_the_known_formats(tmp_path, names):
    fields = Fields(**names)
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


def test_tools_are_read_together_with_a_prompt(tmp_path):
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
    )  # Of 60: outside with a probability below 1e-4.
    assert texts[0].origin == "novels/0.txt"


def test_one_corpus_of_several_may_be_held_out(tmp_path):
    corpus = prepare(read_all(corpora(tmp_path, split="heldout")), ANY, heldout=0.5)
    assert {each.messages is None for each in corpus.train} == {True}
    assert {each.messages is None for each in corpus.heldout} == {False}
    assert len(corpus.train) == 30


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_texts_of_a_corpus_that_is_trained_on_are_not_held_out(tmp_path, share):
    """Nor are copies of them."""
    path = corpora(tmp_path, split="train")
    (tmp_path / "novels" / "copy.txt").write_text(
        prose(20, 100) + "\n" + (tmp_path / "novels" / "3.txt").read_text()
    )
    record = {"q": "Which?", "a": (tmp_path / "novels" / "5.txt").read_text()}
    with (tmp_path / "forum.jsonl").open("a") as opened:
        opened.write(json.dumps(record) + "\n")
    corpus = prepare(read_all(path), ANY, heldout=share)
    assert corpus.heldout
    assert {each.split for each in corpus.heldout} == {None}
    assert sum(each.split == "train" for each in corpus.train) == 61
    assert "novels/5.txt" in {each.origin for each in corpus.train}


def test_nothing_can_be_held_out_if_all_is_trained_on(tmp_path):
    path = corpora(tmp_path, split="train")
    path.write_text(json.dumps({"corpora": [{"path": "novels", "split": "train"}]}))
    with pytest.raises(ValueError, match=r"`split: train`.*--heldout 0"):
        prepare(read_all(path), ANY, heldout=0.2)
    assert len(prepare(read_all(path), ANY, heldout=0).train) == 30


@pytest.mark.parametrize("counts_answers", [False, True])
def test_answers_that_differ_in_reasoning_or_tools_are_no_copies(tmp_path, counts_answers):
    def chat(thought, tool):
        answer = {**ANSWER, "reasoning_content": thought}
        return {"messages": [USER, answer], "tools": [{"name": tool}]}

    chats = [chat(prose(30, n), "f") for n in range(5)] + [chat(prose(30, 0), "g")]
    texts = [*read(lines(tmp_path / "a.jsonl", *chats, chats[0]))]
    report = prepare(texts, ANY, heldout=0, counts_answers=counts_answers).report
    assert report.documents["train"] == (7 if counts_answers else 6)
    found = report.noted[GIVEN_AGAIN] if counts_answers else report.dropped[DUPLICATE]
    assert found.examples == ("a.jsonl:7",)


def test_only_the_assistants_other_texts_count(tmp_path):
    """A question is the same one at another time, so that its answers stay together."""
    asked = {**USER, "asked_at": "a Monday"}
    answer = {**ANSWER, "reasoning": "It must.", "name": "Ann", "weight": 1}
    (text,) = read(lines(tmp_path / "a.jsonl", {"messages": [asked, answer]}))
    assert text.content == "Why?\n\nSo.\nIt must."
    assert opening(text) == "Why?\n\n"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 2}, "the share of its texts"),
        ({"split": "test"}, "accepted: train, heldout"),
        ({"fieldz": {}}, "did you mean 'fields'"),
        ({"fields": {"prompt": "q"}}, "accepted: both, or neither"),
        ({"fields": {"roles": {"a": "b"}}}, "accepted: system, user"),
    ],
)
def test_a_wrong_list_of_corpora_is_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        list(read_all(corpora(tmp_path, **entry)))


# Splits held out by name


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


def test_files_named_after_a_test_split_are_held_out(tmp_path):
    for name, seed in (("train-00000-of-00002", 0), ("train-00001-of-00002", 50), ("test", 100)):
        lines(tmp_path / f"{name}.jsonl", *({"text": prose(60, seed + n)} for n in range(9)))
    corpus = prepare(read(tmp_path), ANY, heldout=0.05)
    assert {each.origin for each in corpus.heldout} == {f"test.jsonl:{n}" for n in range(1, 10)}
    (tmp_path / "test.jsonl").rename(tmp_path / "tests.jsonl")
    assert {each.split for each in read(tmp_path)} == {None}


TRAIN_AND_TEST = {
    # Names of the Hugging Face hub's older Parquet files end with a hash.
    "hash": (
        "data/train-00000-of-00001-a09b74b3ef9c3b56.jsonl",
        "data/test-00000-of-00001-d9a5a5f0b7a8a1c2.jsonl",
    ),
    "kind": ("train_sft.jsonl", "test_sft.jsonl"),
    "prefix": ("alpaca_train_v2.jsonl", "alpaca-eval.jsonl"),
    "case": ("Train.jsonl", "Validation.jsonl"),
    "synonyms": ("training.jsonl", "testing.jsonl"),
    "folders": ("train/a.jsonl", "test/a.jsonl"),
    "folders of texts": ("novels/train/a.txt", "novels/test/a.txt"),
    "texts": ("train.txt", "valid.txt"),
}
NEITHER = {
    "no train": ("a.jsonl", "test.jsonl"),
    "both words": ("a.jsonl", "train-test.jsonl"),
    "part of a word": ("trainers.jsonl", "contest.jsonl"),
    "titles": ("the train.txt", "the test.txt"),
}


@pytest.mark.parametrize("names", [TRAIN_AND_TEST, NEITHER], ids=["split", "not split"])
def test_names_of_splits(tmp_path, names):
    for case, (train, test) in names.items():
        for name in (train, test):
            path = tmp_path / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": "a"}))
        found = {text.origin.removesuffix(":1"): text.split for text in read(tmp_path / case)}
        is_split = names is TRAIN_AND_TEST
        expected = ("train", "heldout") if is_split else (None, None)
        assert found == dict(zip((train, test), expected, strict=True)), case


def test_splits_of_a_dataset_may_name_their_kind(tmp_path):
    names = ("train_sft", "test_sft", "train_gen", "test_gen")
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path))
    expected = {name: "train" if name.startswith("train") else "heldout" for name in names}
    assert {text.content: text.split for text in read(tmp_path)} == expected


@pytest.mark.parametrize("name", ["README.md", "readme.txt", "data/Readme.md"])
def test_a_readme_is_read_only_among_texts(tmp_path, name):
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text("About it.")
    (tmp_path / "a.md").write_text("a")
    assert {text.origin for text in read(tmp_path)} == {"a.md", name}
    lines(tmp_path / "data" / "b.jsonl", {"text": "b"})
    assert {text.origin for text in read(tmp_path)} == {"a.md", "data/b.jsonl:1"}


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


def test_texts_given_to_be_held_out_are_not_replaced_by_a_draw(tmp_path):
    """If none of them is left, nothing else is held out in their place."""
    mine = lines(tmp_path / "mine.jsonl", *({"text": prose(60, n)} for n in range(20)))
    short = lines(tmp_path / "short.jsonl", {"text": "Too short."}, {"text": "This too."})
    with pytest.raises(ValueError, match=r"none of the 2 texts given .* kept: .*2 too short.*20 h"):
        prepare(read_all(mine, short), Filters(), heldout=0.05)
    with pytest.raises(ValueError, match="none of the 2 texts given to be held out is kept"):
        prepare(read_all(mine, short), Filters(), heldout=0)
    empty = lines(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: got no texts to hold out"):
        prepare(read_all(mine, empty), Filters(), heldout=0.05)


COPIES = {"near": changed(prose(200, 1), 0.03, 1), "further": changed(prose(200, 1), 0.07, 1)}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("layout", ["dataset", "files", "corpora", "one of several"])
def test_copies_of_texts_in_a_held_out_split_are_not_trained_on(tmp_path, copy, layout):
    """Whichever is read first."""
    train = [{"text": text} for text in (COPIES[copy], prose(200, 2), prose(200, 3))]
    heldout = [{"text": prose(200, 1)}, {"text": prose(200, 4)}]
    path = tmp_path / "corpus"
    if layout == "dataset":
        splits = {"train": train, "validation": heldout}
        listed = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(listed).save_to_disk(str(path))
    elif layout == "files":
        path.mkdir()
        lines(path / "train.jsonl", *train)
        lines(path / "valid.jsonl", *heldout)
    else:
        for name, rows in (("mine", train[:1]), ("exam/test", heldout), ("exam/train", train[1:])):
            (tmp_path / "exam").mkdir(exist_ok=True)
            lines(tmp_path / f"{name}.jsonl", *rows)
        entries = [{"path": "mine.jsonl"}, {"path": "exam"}]
        if layout == "one of several":
            tests = {"path": "exam/test.jsonl", "split": "heldout"}
            entries = [{"path": "mine.jsonl"}, {"path": "exam/train.jsonl"}, tests]
        path = tmp_path / "mix.yaml"
        path.write_text(json.dumps({"corpora": entries}))
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
