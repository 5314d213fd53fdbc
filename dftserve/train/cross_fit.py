"""Train students on a corpus, each on all folds but one, for `targets.students`.

    cross_fit(job, folds=3, training={"epochs": "2", "lora.rank": "16"})

Plain fine-tuning with the ordinary trainer, one fold after another. After an interruption, the same
command continues: finished folds are kept, and the trainer resumes the unfinished one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dftserve import atomic, pretrained, settings
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.targets import recipe as recipes
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.run import EncodedCorpus, Job, Say, read_documents
from dftserve.targets.students import (
    STUDENTS_FILE,
    CrossFitted,
    check_folds,
    corpus_digest,
    final_of,
    fold_of,
    run_of,
)
from dftserve.targets.text_itself import TextItself
from dftserve.train import config as configs
from dftserve.train.config import DivergenceConfig, TrainConfig
from dftserve.train.run import train

PATHS = ("model", "targets", "output")
OURS = (*PATHS, "divergence")
"""Settings of the trainer that are set for each fold and not by the user."""


def cross_fit(
    job: Job,
    *,
    folds: int,
    training: Mapping[str, str],
    say: Say = print,
) -> Path:
    """Train the students that are missing in the folder `job.out`.

    Args:
        job: corpus, model and recipe; only the recipe's filters are used.
        training: the trainer's settings by name, as in `--set`.

    Raises:
        ValueError: an error in corpus, recipe, model or settings; an unsuitable number of folds; or
            a folder of other students.
        OSError: the folder cannot be made or written to; the corpus has not been read.
        SystemExit: a signal stopped the trainer after it saved.
    """
    check_folds(folds)
    config = _config(job, training)
    begun = _begun(job.out)
    material = read_documents(
        job,
        recipes.load(job.recipe, job.values),
        say,
        # A template that writes the date gives the documents of the day that they were begun on.
        written_at=begun.written_at if begun else None,
    )
    train_folds(job.out, material, config, folds=folds, seed=job.seed, say=say)
    return job.out


def train_folds(
    folder: Path,
    material: EncodedCorpus,
    config: TrainConfig,
    *,
    folds: int,
    seed: int = 0,
    say: Say = print,
) -> None:
    """Train the students that are missing in the folder, on the training documents.

    Args:
        config: the trainer's settings, whose `model` is the model before tuning; targets and output
            are set for each fold.
        seed: of the stores.

    Raises:
        ValueError: an unsuitable number of folds, or a folder of other students.
        SystemExit: a signal stopped the trainer after it saved.
    """
    documents = material.documents["train"]
    parts = [[each for each in documents if fold_of(each, folds) == fold] for fold in range(folds)]
    for fold, part in enumerate(parts):
        if not part or len(part) == len(documents):
            raise ValueError(
                f"folds: fold {fold} of {folds} has {len(part)} of {len(documents)} documents; "
                "accepted: some in each, where a text and its copies share a fold. Use fewer "
                "folds, or give more texts."
            )
    wanted = CrossFitted(
        folds=folds,
        corpus_blake3=corpus_digest(documents, folds),
        model_blake3=pretrained.model_digest(pretrained.examine(config.model)),
        training={name: each for name, each in asdict(config).items() if name not in OURS},
        written_at=material.written_at,
    )
    _begin(folder, _begun(folder), wanted)
    for fold, part in enumerate(parts):
        if final_of(folder, fold).exists():
            say(f"Fold {fold + 1} of {folds} is trained already.")
            continue
        say(f"Fold {fold + 1} of {folds}: {len(part):,} of {len(documents):,} documents held out.")
        others = [each for each in documents if fold_of(each, folds) != fold]
        output = run_of(folder, fold)
        targets = _text_itself(output.parent, material, {"train": others, "heldout": part}, seed)
        train(replace(config, targets=str(targets), output=str(output)))


def _config(job: Job, training: Mapping[str, str]) -> TrainConfig:
    """The settings, checked before anything is read."""
    own_settings = [name for name in training if name.split(".")[0] in OURS]
    if own_settings:
        raise ValueError(
            f"--train {own_settings[0]}: a student's {own_settings[0].split('.')[0]} is set by its "
            "fold; accepted: the trainer's other settings, such as epochs=2."
        )
    paths = dict.fromkeys(PATHS, "set by the fold")
    config = configs.load(None, {**training, **paths})
    if config.patience is not None:
        raise ValueError(
            f"--train patience: got {config.patience}; accepted: none, since it would choose each "
            "student by the fold that it must not have seen. Set epochs or steps."
        )
    if config.feature_matching is not None:
        raise ValueError(
            "--train feature_matching: a student is tuned on its text alone; accepted: the "
            "trainer's other settings, such as epochs=2."
        )
    return replace(config, model=job.model, divergence=DivergenceConfig(name="sft"))


def _begun(folder: Path) -> CrossFitted | None:
    """The students in a folder, refused before the corpus is read if it holds something else."""
    students = CrossFitted.started(folder)
    if students is None:
        atomic.check_writable(folder)
    # A killed process may have left partially written metadata.
    if students is None and not atomic.has_only(folder, {STUDENTS_FILE + atomic.PARTIAL}):
        raise ValueError(f"{folder} is neither empty nor a folder of students; choose another.")
    return students


def _begin(folder: Path, was: CrossFitted | None, wanted: CrossFitted) -> None:
    """Write the metadata, or refuse students of another kind than those begun."""
    path = folder / STUDENTS_FILE
    if was is None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, _json(wanted))
        return
    now: CrossFitted = settings.load(CrossFitted, json.loads(_json(wanted)), str(path))
    if was != now:
        differs = next(name for name in asdict(was) if getattr(was, name) != getattr(now, name))
        what = differs.removesuffix("_blake3")
        raise ValueError(
            f"{folder} holds students of another {what}; accepted: the {what} that they were "
            "begun with. Give that, choose another --out, or remove the folder."
        )


def _json(wanted: CrossFitted) -> str:
    return json.dumps(asdict(wanted), indent=2) + "\n"


def _text_itself(
    folder: Path, material: EncodedCorpus, documents: Mapping[str, Sequence[Document]], seed: int
) -> Path:
    """Write a store whose target is the text itself."""
    targets = folder / "targets"
    source = TextItself(vocabulary=len(material.tokenizer))
    planned = store.plan(
        source,
        documents,
        tokenizer=tokenizer_fingerprint(material.tokenizer),
        template=material.template,
        corpus=material.corpus,
        k=1,
        draws=0,
        seed=seed,
    )
    store.write(targets, planned, source, documents)
    return targets
