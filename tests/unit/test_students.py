"""Cross-fitted students: the texts that each is tuned on, and those that it scores."""

import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.targets import run
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource
from dftserve.targets.store import TargetStore
from dftserve.targets.students import Students, final_of, fold_of
from dftserve.targets.text_itself import TextItself
from dftserve.train import cross_fit
from tests.training import save_model, save_texts

FOLDS = 2


def document(seed, group=""):
    tokens_N = np.random.default_rng(seed).integers(0, 9, 12).astype(np.int32)
    return Document(tokens_N, np.arange(12) > 0, group)


class Certain(DenseSource):
    """Predicts one token everywhere."""

    vocabulary = 9

    def __init__(self, token):
        self._row_1V = torch.full((1, 9), -torch.inf)
        self._row_1V[0, token] = 0.0

    def describe(self):
        return {"kind": "sure"}

    def read(self, documents):
        return [lambda start, stop: self._row_1V.expand(stop - start, 9) for _ in documents]


def test_documents_of_a_group_are_in_one_fold():
    assert len({fold_of(document(seed, "a book"), 5) for seed in range(20)}) == 1
    assert {fold_of(document(seed), 5) for seed in range(60)} == set(range(5))


def test_each_text_is_scored_by_the_student_of_its_fold():
    source = Students([Certain(token) for token in (0, 1, 2)])  # type: ignore[list-item]
    documents = [document(seed) for seed in range(20)]
    for each, rows in zip(documents, source.read(documents), strict=True):
        expected_T = torch.full((11,), fold_of(each, 3))
        torch.testing.assert_close(rows(0, 11).argmax(dim=1), expected_T)


def test_the_text_itself_has_probability_one():
    text = document(0)
    targets = TextItself(vocabulary=9).targets([text], k=1, draws=0, seeds=[0])[0]
    np.testing.assert_array_equal(targets.top_ids_TK[:, 0], text.labels_T)
    assert (targets.top_logprobs_TK == 0).all()
    assert (targets.tail_logprob_T == -np.inf).all()
    with pytest.raises(ValueError, match="got k 6, draws 0; accepted: 1 and 0"):
        TextItself(vocabulary=9).targets([text], k=6, draws=0, seeds=[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("corpus") / "texts", 96, words=52)


def target(command, texts, small, out, *more):
    arguments = ["target", command, texts, "--model", small, "--recipe", "calibrated", "--out", out]
    arguments += ["--set", f"teacher={small}", "--heldout", "0.5", *more]
    return CliRunner().invoke(main, [str(each) for each in arguments])


TRAINING = ("--folds", FOLDS, "--train", "steps=2", "--train", "max_length=64")


@pytest.fixture(scope="module")
def students(tmp_path_factory, texts, small):
    out = tmp_path_factory.mktemp("students") / "out"
    result = target("students", texts, small, out, *TRAINING)
    assert result.exit_code == 0, result.output
    return out


def tokens_of(store, split):
    return {store[split, i][0].tokens_N.tobytes() for i in range(store.count(split))}


def test_a_student_is_tuned_on_all_folds_but_its_own(students):
    stores = [TargetStore(students / f"fold-{fold}" / "targets") for fold in range(FOLDS)]
    heldout = [tokens_of(store, "heldout") for store in stores]
    for fold, store in enumerate(stores):
        others = set.union(*(each for i, each in enumerate(heldout) if i != fold))
        assert tokens_of(store, "train") == others
        assert heldout[fold]
        assert not heldout[fold] & others
        run = json.loads((final_of(students, fold) / "run.json").read_text())
        assert run["settings"]["divergence"]["name"] == "sft"


def test_a_repeated_command_trains_no_fold_again(students, texts, small):
    """A command with other settings is refused."""
    before = [(final_of(students, fold) / "checksums.json").read_bytes() for fold in range(FOLDS)]
    again = target("students", texts, small, students, *TRAINING)
    assert again.exit_code == 0, again.output
    assert again.output.count("is trained already") == FOLDS
    other = target("students", texts, small, students, *TRAINING, "--train", "steps=3")
    assert other.exit_code == 2
    assert "holds students of another training; accepted: the training that they" in other.output
    assert before == [
        (final_of(students, fold) / "checksums.json").read_bytes() for fold in range(FOLDS)
    ]


def test_students_can_be_a_component_and_a_baseline(tmp_path, students, texts, small):
    options = ("--set", f"students={students}")
    result = target("build", texts, small, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    calibration = TargetStore(tmp_path / "out").manifest.plan.source["calibration"]
    assert "students" in [each["name"] for each in calibration["components"]]
    assert "students" in [each["over"] for each in calibration["gains"]]
    other = target("build", texts, small, tmp_path / "other", *options, "--seed", "1")
    assert other.exit_code == 2
    assert "was trained on other texts than these" in other.output
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """A model with the same configuration and tokenizer."""
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


def test_students_of_two_models_are_not_mixed(tmp_path, students, texts, small, other_weights):
    """Missing folds are not trained from another model, and students fit only their own teacher."""
    unfinished = tmp_path / "begun"
    shutil.copytree(students, unfinished)
    shutil.rmtree(unfinished / "fold-1")
    result = target("students", texts, other_weights, unfinished, *TRAINING)
    assert result.exit_code == 2, result.output
    assert "holds students of another model; accepted: the model that they were" in result.output
    assert not (unfinished / "fold-1").exists()
    options = ("--set", f"students={students}", "--set", f"teacher={other_weights}")
    built = target("build", texts, small, tmp_path / "out", *options)
    assert built.exit_code == 2, built.output
    assert f"another model than the teacher {str(other_weights)!r}; accepted" in built.output
    assert not (tmp_path / "out").exists()


DATED = (
    "w{{ strftime_now('%d') }} {% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <end>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
"""A template that writes the day of the month, as one word of the small model."""


def on_day(monkeypatch, day):
    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, day, 12)

    monkeypatch.setattr(run, "datetime", Day)


@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_students_with_a_dated_template_are_resumed_and_used_on_other_days(
    tmp_path, monkeypatch, texts, kind
):
    model, out = save_model(tmp_path / "model"), tmp_path / "students"
    (model / "chat_template.jinja").write_text(DATED)
    corpus = texts if kind == "texts" else save_chats(tmp_path / "chats.jsonl", texts)

    def interrupted(config):
        raise KeyboardInterrupt

    on_day(monkeypatch, 11)
    with monkeypatch.context() as patched:
        patched.setattr(cross_fit, "train", interrupted)
        assert target("students", corpus, model, out, *TRAINING).exit_code != 0
    assert (out / "fold-0" / "targets").exists()
    on_day(monkeypatch, 12)
    result = target("students", corpus, model, out, *TRAINING)
    assert result.exit_code == 0, result.output
    on_day(monkeypatch, 13)
    built = target("build", corpus, model, tmp_path / "out", "--set", f"students={out}")
    assert built.exit_code == 0, built.output
    plan = TargetStore(tmp_path / "out").manifest.plan
    assert plan.corpus["written_at"].startswith("2031-05-11")


def save_chats(path, texts):
    """Each text as a conversation: its first words are the question."""
    words = [each.read_text().split() for each in sorted(texts.iterdir())]
    chats = [{"prompt": " ".join(w[:6]), "response": " ".join(w[6:])} for w in words]
    path.write_text("".join(json.dumps(each) + "\n" for each in chats))
    return path


def test_patience_is_refused_before_texts_are_read(tmp_path, texts, small, monkeypatch):
    monkeypatch.setattr(
        cross_fit, "read_documents", lambda *_, **given: pytest.fail("texts are read")
    )
    result = target("students", texts, small, tmp_path / "out", "--train", "patience=2")
    assert "--train patience: got 2; accepted: none" in result.output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--folds", "1"), "folds: got 1; accepted: from 2 to 100"),
        (("--folds", "90"), "folds: fold "),
        (("--train", "divergence.name=gem"), "a student's divergence is set by its fold"),
        (("--train", "epoch=2"), "got the key 'epoch'"),
        (("--train", "steps"), "--train: got 'steps'; accepted: KEY=VALUE"),
    ],
)
def test_students_that_cannot_be_trained_are_refused(tmp_path, texts, small, more, message):
    result = target("students", texts, small, tmp_path / "out", *more)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_folders_without_finished_students_are_refused(tmp_path, students, texts, small):
    empty, unfinished = tmp_path / "empty", tmp_path / "unfinished"
    empty.mkdir()
    unfinished.mkdir()
    description = (students / "students.json").read_bytes()
    (unfinished / "students.json").write_bytes(description)
    for folder, message in (
        (empty, "has no students.json; accepted: the --out of `dftserve target students`"),
        (unfinished, "is unfinished: fold 0 of 2 has no model; run its command again"),
    ):
        out = tmp_path / "out"
        result = target("build", texts, small, out, "--set", f"students={folder}")
        assert result.exit_code == 2, result.output
        assert message in result.output
