"""Cross-fitted students as a source: each text by a model that was tuned on the others.

    source = Students.load(Path("students"), documents, vocabulary=len(tokenizer))

`train.cross_fit` writes such a folder: K models, each tuned by plain fine-tuning on all training
texts but those of one fold. What a student says of its fold is what the texts themselves teach
about one that is not among them.

    students.json        how many folds, of which corpus, by which settings
    fold-0/run/final/    an ordinary Hugging Face folder; fold-1, …
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from dftserve import lm, settings
from dftserve.bounded_files import read_json
from dftserve.targets.document import Document
from dftserve.targets.source import DenseSource, Rows
from dftserve.targets.teacher import Teacher

STUDENTS_FILE = "students.json"
LARGEST_FILE = 1 << 20
MOST_FOLDS = 100


@dataclass(frozen=True, kw_only=True)
class CrossFitted:
    """What a folder of students is of."""

    folds: int
    corpus_blake3: str
    """Of the training documents, and which fold each is in."""
    model_blake3: str
    """Of the model that they were tuned from, as `lm.model_digest` has it."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """The trainer's settings."""

    def __post_init__(self) -> None:
        check_folds(self.folds)

    @classmethod
    def read(cls, folder: Path) -> "CrossFitted":
        """Raises ValueError: no folder of students, or one that is unfinished."""
        path = folder / STUDENTS_FILE
        if not path.exists():
            raise ValueError(
                f"students: got {str(folder)!r}, which has no {STUDENTS_FILE}; accepted: the --out "
                "of `dftserve target students`."
            )
        found = settings.load(cls, read_json(path, within=folder, largest=LARGEST_FILE), str(path))
        for fold in range(found.folds):
            if not (final_of(folder, fold) / "config.json").exists():
                raise ValueError(
                    f"students: {folder} is unfinished: fold {fold} of {found.folds} has no model; "
                    "run its command again."
                )
        return found


def check_folds(folds: int) -> None:
    if not 2 <= folds <= MOST_FOLDS:
        raise ValueError(f"folds: got {folds}; accepted: from 2 to {MOST_FOLDS}.")


def run_of(folder: Path, fold: int) -> Path:
    """Where a student is trained."""
    return folder / f"fold-{fold}" / "run"


def final_of(folder: Path, fold: int) -> Path:
    return run_of(folder, fold) / "final"


def fold_of(document: Document, folds: int) -> int:
    """By the document's text and its kin: what is held out together is in one fold."""
    named = document.group.encode() if document.group else _digest(document)
    return int.from_bytes(blake3(named).digest(length=8), "little") % folds


def corpus_digest(documents: Sequence[Document], folds: int) -> str:
    parts = sorted(_digest(each) + bytes([fold_of(each, folds)]) for each in documents)
    return blake3(b"".join(parts)).hexdigest()


class Students(DenseSource):
    """The student that did not see a document. One that none saw, as held-out text, has the student
    of the fold that it would be in: what is measured on it is what training documents get."""

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
        """All of them at once.

        Args:
            train: the training documents, which must be those of the students.
            base: the folder or name of the model before tuning, which must be theirs.

        Raises:
            ValueError: no such folder, an unfinished one, of another corpus or another model; or a
                model that `lm` refuses.
        """
        found = CrossFitted.read(folder)
        if found.model_blake3 != lm.model_digest(lm.examine(base)):
            raise ValueError(
                f"students: {folder} was tuned from another model than the teacher {base!r}; "
                "accepted: students of the teacher, which is the model before tuning. Train them "
                "anew with that as --model, or set teacher to the model that they were tuned from."
            )
        if found.corpus_blake3 != corpus_digest(train, found.folds):
            raise ValueError(
                f"students: {folder} was trained on other texts than these; accepted: students of "
                "the same corpus, recipe, --heldout, --seed and --max-tokens. Train them anew, or "
                "give what they were trained with."
            )
        return cls(
            [
                Teacher.load(
                    lm.examine(str(final_of(folder, fold))),
                    vocabulary=vocabulary,
                    dtype=dtype,
                    device=device,
                )
                for fold in range(found.folds)
            ]
        )

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "students", "students": [each.describe() for each in self._students]}

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        rows: dict[int, Rows] = {}
        fold_of_each = [fold_of(document, len(self._students)) for document in documents]
        for fold, student in enumerate(self._students):
            places = [place for place, found in enumerate(fold_of_each) if found == fold]
            if places:
                read = student.read([documents[place] for place in places])
                rows |= zip(places, read, strict=True)
        return [rows[place] for place in range(len(documents))]


def _digest(document: Document) -> bytes:
    content = document.tokens_N.astype(np.int32).tobytes() + document.trained_N.tobytes()
    return blake3(content).digest()
