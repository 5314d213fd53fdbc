"""Cross-fitted students as a source: each text is predicted by a model tuned on other texts.

    source = Students.load(Path("students"), documents, vocabulary=len(tokenizer))

`train.cross_fit` writes such a folder: K models, each tuned by plain fine-tuning on all training
texts except those of one fold. A student's predictions for its fold show what can be learnt from
the texts about a text that is not among them.

    students.json        number of folds, digests of corpus and model, settings
    fold-0/run/final/    an ordinary Hugging Face folder; fold-1, …
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from dftserve import pretrained, settings
from dftserve.bounded_files import read_json
from dftserve.spec import FINAL
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows
from dftserve.targets.teacher import Teacher

STUDENTS_FILE = "students.json"
LARGEST_FILE = 1 << 20
"""Maximum bytes of students.json."""
MOST_FOLDS = 100
"""Each fold is a training, and its student is in memory during a build."""


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """Metadata of a folder of students."""

    folds: int
    corpus_blake3: str
    """Digest of the training documents and their folds."""
    model_blake3: str
    """`pretrained.model_digest` of the model that they were tuned from."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's settings."""
    written_at: str | None = None
    """The date and time that the chat template wrote into the documents; None: it writes none."""

    def __post_init__(self) -> None:
        check_folds(self.folds)

    @classmethod
    def started(cls, folder: Path) -> "CrossFitted | None":
        """The metadata of finished or unfinished students; None if none were begun.

        Raises:
            ValueError: the file is not metadata of students.
        """
        path = folder / STUDENTS_FILE
        if not path.exists():
            return None
        return settings.load(cls, read_json(path, within=folder, largest=LARGEST_FILE), str(path))

    @classmethod
    def read(cls, folder: Path) -> "CrossFitted":
        """Raises ValueError: not a folder of students, or an unfinished one."""
        students = cls.started(folder)
        if students is None:
            raise ValueError(
                f"students: got {str(folder)!r}, which has no {STUDENTS_FILE}; accepted: the --out "
                "of `dftserve target students`."
            )
        for fold in range(students.folds):
            if not (final_of(folder, fold) / "config.json").exists():
                raise ValueError(
                    f"students: {folder} is unfinished: fold {fold} of {students.folds} has no "
                    "model; run its command again."
                )
        return students


def check_folds(folds: int) -> None:
    """Raises ValueError for a number of folds out of range."""
    if not 2 <= folds <= MOST_FOLDS:
        raise ValueError(f"folds: got {folds}; accepted: from 2 to {MOST_FOLDS}.")


def run_of(folder: Path, fold: int) -> Path:
    """The folder in which a student is trained."""
    return folder / f"fold-{fold}" / "run"


def final_of(folder: Path, fold: int) -> Path:
    """The folder of the model that was trained without this fold."""
    return run_of(folder, fold) / FINAL


def fold_of(document: Document, folds: int) -> int:
    """The fold of a document, by a hash of its group: one group is always in one fold."""
    return int.from_bytes(blake3(document.identifier).digest(length=8), "little") % folds


def corpus_digest(documents: Sequence[Document], folds: int) -> str:
    """BLAKE3 of the documents and their folds, whatever their order."""
    parts = sorted(each.digest + bytes([fold_of(each, folds)]) for each in documents)
    return blake3(b"".join(parts)).hexdigest()


class Students(DenseSource):
    """Predicts each document with the student that was not trained on it. A held-out document, on
    which none was trained, gets the student of the fold it would be in, so that measurements on it
    apply to training documents."""

    def __init__(self, students: Sequence[Teacher]) -> None:
        self._students = students
        self.vocabulary = students[0].vocabulary

    @classmethod
    def load(
        cls,
        folder: Path,
        train: Sequence[Document],
        *,
        base: str,
        vocabulary: int,
        dtype: str = "auto",
        device: str | None = None,
    ) -> "Students":
        """Load all students at once.

        Args:
            train: the training documents; must be those the students were made from.
            base: folder or name of the model before tuning; must be the one they were tuned from.

        Raises:
            ValueError: the folder is missing, unfinished, or for another corpus or base model; or
                `lm` refuses a model.
        """
        students = CrossFitted.read(folder)
        if students.model_blake3 != pretrained.model_digest(pretrained.examine(base)):
            raise ValueError(
                f"students: {folder} was tuned from another model than the teacher {base!r}; "
                "accepted: students of the teacher, which is the model before tuning. Train them "
                "again with that as --model, or set teacher to the model that they were tuned from."
            )
        if students.corpus_blake3 != corpus_digest(train, students.folds):
            raise ValueError(
                f"students: {folder} was trained on other texts than these; accepted: students of "
                "the same corpus, recipe, --heldout, --seed and --max-tokens. Train them again, or "
                "use the settings they were trained with."
            )
        return cls(
            [
                Teacher.load(
                    pretrained.examine(str(final_of(folder, fold))),
                    vocabulary=vocabulary,
                    dtype=dtype,
                    device=device,
                )
                for fold in range(students.folds)
            ]
        )

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "students", "students": [each.describe() for each in self._students]}

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        rows: dict[int, Rows] = {}
        fold_of_each = [fold_of(document, len(self._students)) for document in documents]
        for fold, student in enumerate(self._students):
            indices = [index for index, own_fold in enumerate(fold_of_each) if own_fold == fold]
            if indices:
                read = student.read([documents[index] for index in indices])
                rows |= zip(indices, read, strict=True)
        return [rows[index] for index in range(len(documents))]
