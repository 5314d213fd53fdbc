"""Builds a target store from a corpus and a recipe: the implementation of `dftserve target`.

    build(Job(corpus=Path("novels"), model="path/to/model", recipe="creative", out=Path("targets")))

The store depends only on the job and the files that it names. Running the same job again continues
where it was stopped, and several processes write the same shards as a single one.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve import atomic, pretrained
from dftserve.corpus.prepare import Corpus, prepare
from dftserve.corpus.sources import read_all
from dftserve.corpus.text import Text
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.model_folder import CONFIG
from dftserve.targets import calibrated, on_processes, report, signals, store
from dftserve.targets import recipe as recipes
from dftserve.targets.chat_template import stop_clock, tells_time
from dftserve.targets.document import Document, load_tokenizer
from dftserve.targets.encode_corpus import corpus_text, encode_corpus
from dftserve.targets.estimate import Estimate, estimate_of
from dftserve.targets.progress import Progress
from dftserve.targets.recipe import Recipe
from dftserve.targets.source import Source
from dftserve.targets.store import SPLITS, Manifest, Plan, StoreError, TargetStore
from dftserve.targets.students import CrossFitted

LOCAL, RAY = "local", "ray"
"""Engines."""
WRITTEN_AT = "written_at"
"""Key in a plan's corpus: the date and time used by the chat template, if it writes one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `dftserve target build` builds a store from."""

    corpus: Path
    """A file or folder, or a YAML of several (`corpus.sources`)."""
    model: str
    """Folder, or name on the Hub, of the model that will be trained; its tokenizer is used."""
    recipe: str
    out: Path
    values: Mapping[str, str] = field(default_factory=dict)
    """Values of the recipe's placeholders."""
    heldout: float = 0.05
    """Share of texts that is not trained on. If the corpus has splits, or `heldout_from` is given,
    exactly those texts are held out instead."""
    heldout_from: Path | None = None
    """A file or folder of texts that are held out."""
    seed: int = 0
    engine: str = LOCAL
    """`local`: processes on this machine; `ray` or `ray://HOST:PORT`: workers of a Ray cluster
    (`on_ray`)."""
    processes: int | None = None
    """None: one; on Ray, as `on_ray.Cluster.workers` says."""
    max_tokens: int | None = None
    """A longer text is split into several documents; a longer conversation is left out."""
    skip_bad: bool = False
    """Leave out, and count, conversations that the chat template refuses."""

    def __post_init__(self) -> None:
        if self.engine not in (LOCAL, RAY) and not _is_address(self.engine):
            raise ValueError(
                f"engine: got {self.engine!r:.80}; accepted: {LOCAL}, {RAY}, ray://HOST:PORT."
            )
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes: got {self.processes}; accepted: 1 or more.")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens: got {self.max_tokens}; accepted: 2 or more.")


def _is_address(engine: str) -> bool:
    match = re.fullmatch(r"ray://[^/\s]+:(\d{1,5})", engine)
    return match is not None and 0 < int(match[1]) < 1 << 16


def _address(job: Job) -> str | None:
    """The address of a Ray cluster, if the engine gives one."""
    return None if job.engine == RAY else job.engine


Say = Callable[[str], None]


def build(job: Job, say: Say = print) -> Manifest:
    """Build the store, or the missing part of it.

    Raises:
        ValueError: the corpus, recipe, model or folder is invalid. Shards that were written are
            reused when the same job is run again.
        OSError: `job.out` cannot be made or written to; nothing has been read.
        KeyboardInterrupt, SystemExit: stopped by SIGINT or SIGTERM; likewise.
    """
    if not (job.out / store.MANIFEST).exists():
        # A calibrated source is fitted for hours before anything is written.
        atomic.check_writable(job.out)
        if job.engine != LOCAL:
            from dftserve.targets import on_ray

            on_ray.check(_address(job))
    store.refuse_locked(job.out)
    prepared = _prepared(job, say)
    try:
        with store.locked(job.out), signals.unwinding_on_sigterm():
            store.begin(job.out, prepared.plan)
            if (job.out / store.MANIFEST).exists():
                TargetStore(job.out).verify()
                say(f"{job.out} is complete already.")
                return Manifest.read(job.out)
            _work(job, prepared, say)
            manifest = store.finish(job.out, prepared.plan, prepared.documents, store.versions())
    except (KeyboardInterrupt, SystemExit):
        say(_interrupted_message(job.out))
        raise
    except OSError as error:
        raise StoreError(f"{job.out} cannot be written: {error}.") from None
    say(f"{job.out}: {len(manifest.shards)} shards, {sum(map(manifest.tokens, SPLITS)):,} tokens.")
    return manifest


def estimate(job: Job, say: Say = print) -> Estimate:
    """Estimate the time of a build by measuring the first batches on the same device.

    Raises:
        ValueError: as `build`; nothing is written.
    """
    if job.engine != LOCAL:
        say("Measured on this machine; the Ray cluster is not asked.")
    prepared = _prepared(job, say)
    say("Measuring the first batches; with a model on a CPU this may take minutes.")
    return estimate_of(prepared.source, prepared.plan, prepared.documents, job.processes or 1)


@dataclass(frozen=True)
class EncodedCorpus:
    """A tokenised corpus."""

    tokenizer: PreTrainedTokenizerBase
    documents: Mapping[str, Sequence[Document]]
    template: str | None
    """SHA-256 of the chat template; None for plain texts."""
    written_at: str | None
    """The date and time that the chat template writes, in ISO format; None if it writes none."""
    corpus: Mapping[str, Any]
    """The report of what was read, kept and dropped: a plan's `corpus`."""


@dataclass(frozen=True)
class _Prepared:
    recipe: Recipe
    documents: Mapping[str, Sequence[Document]]
    source: Source
    plan: Plan


def _prepared(job: Job, say: Say) -> _Prepared:
    begun = store.existing_plan(job.out)
    recipe = recipes.load(job.recipe, job.values)
    recipes.check_inputs(recipe)
    material = read_documents(job, recipe, say, written_at=_written_at(recipe, begun))
    documents = material.documents
    source = _source(recipe, material.tokenizer, documents, begun.get("source"), say)
    for calibration in calibrated.calibrations(source.describe()):
        say(calibrated.as_text(calibration))
    plan = store.plan(
        source,
        documents,
        tokenizer=tokenizer_fingerprint(material.tokenizer),
        template=material.template,
        corpus=material.corpus,
        k=recipe.store.k,
        draws=recipe.store.draws,
        seed=job.seed,
    )
    return _Prepared(recipe, documents, source, plan)


def _written_at(recipe: Recipe, begun: Mapping[str, Any]) -> str | None:
    """The time that chat templates write, if another build has fixed it: the one whose students
    were tuned on these texts, else the one that began in the same folder."""
    for folder in recipes.students(recipe):
        return CrossFitted.read(Path(folder)).written_at
    return _written_in(begun.get("corpus"))


def _written_in(corpus: Any) -> str | None:
    """The time in a plan's corpus."""
    written_at = corpus.get(WRITTEN_AT) if isinstance(corpus, Mapping) else None
    return written_at if isinstance(written_at, str) else None


def read_documents(job: Job, recipe: Recipe, say: Say, *, written_at: str | None) -> EncodedCorpus:
    """The corpus of a job, filtered, split and encoded.

    Args:
        written_at: the time that chat templates write, in ISO format; None: the current time.

    Raises:
        ValueError: the corpus or a model is invalid.
    """
    base = _checked_model(job)
    tokenizer = _tokenizer(job.model)
    moment = _stopped_clock(tokenizer, written_at)
    if base is not None:
        base.check_tokenizer(tokenizer)
    teachers = _checked_teachers(recipe, tokenizer)
    texts = _with_progress(read_all(job.corpus, job.heldout_from), say)
    corpus = prepare(
        texts,
        recipe.corpus,
        heldout=job.heldout,
        seed=job.seed,
        counts_answers=recipes.counts_answers(recipe),
    )
    documents, counts = encode_corpus(
        corpus, tokenizer, recipe.corpus, max_tokens=job.max_tokens, skip_bad=job.skip_bad
    )
    say(corpus_text(counts))
    longest = max((len(d.tokens_N) for split in SPLITS for d in documents[split]), default=0)
    for teacher in teachers.values():
        teacher.check_length(longest, "--max-tokens")
    for model, principles in recipes.principles(recipe):
        _check_under_principles(teachers[model], tokenizer, principles, documents)
    return EncodedCorpus(
        tokenizer=tokenizer,
        documents=documents,
        template=template_fingerprint(tokenizer) if _has_conversations(corpus) else None,
        written_at=moment.isoformat() if moment else None,
        corpus={
            "recipe": recipe.name,
            "filters": asdict(recipe.corpus),
            "heldout": job.heldout,
            "max_tokens": job.max_tokens,
            **({WRITTEN_AT: moment.isoformat()} if moment else {}),
            **counts,
        },
    )


def _with_progress(texts: Iterator[Text], say: Say) -> Iterator[Text]:
    """Pass texts through, and print their number at intervals."""
    progress = Progress("texts read", say)
    for text in texts:
        progress.add(1)
        yield text


def _interrupted_message(out: Path) -> str:
    """The message after an interruption; only complete shards are left."""
    kept = len(list(out.glob("*.safetensors")))
    if not kept:
        return (
            f"Stopped before the first shard of {out} was complete; the same command starts again."
        )
    shards = "1 shard" if kept == 1 else f"{kept:,} shards"
    return f"Stopped; {shards} in {out} are kept, and the same command continues after them."


def inspect(folder: Path, *, model: str | None, html: Path | None, as_json: bool) -> str:
    """A summary of a store, as text or JSON; optionally also as an HTML file.

    Args:
        model: the model whose tokenizer decodes the examples; None: token ids are shown.

    Raises:
        StoreError: no readable store, another tokenizer, or the HTML file cannot be written.
    """
    tokenizer = _tokenizer(model) if model is not None else None
    summary = report.inspect(TargetStore(folder), tokenizer)
    if html is not None:
        try:
            atomic.write_text(html, report.as_html(summary))
        except OSError as error:
            raise StoreError(f"{html} cannot be written: {error}.") from None
    return report.as_json(summary) if as_json else report.as_text(summary)


def verify(folder: Path) -> str:
    """Check all files of a store; returns a line that says they are unchanged.

    Raises:
        StoreError: names the first file that is missing or changed.
    """
    opened = TargetStore(folder)
    opened.verify()
    return f"{folder}: {len(opened.manifest.shards)} shards, each as it was built."


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    # The context length is the trainer's concern; avoids a warning for each long text.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _stopped_clock(tokenizer: PreTrainedTokenizerBase, written_at: str | None) -> datetime | None:
    """Fix the time that templates see: the given one, else the current time.

    Thus a build can be continued, or is found complete, on another day. Returns None if no template
    uses the time.
    """
    if not tells_time(tokenizer):
        return None
    try:
        moment = datetime.fromisoformat(written_at) if written_at else datetime.now()
    except ValueError:
        moment = datetime.now()  # Another plan, which `store.begin` refuses.
    stop_clock(tokenizer, moment)
    return moment


def _checked_model(job: Job) -> pretrained.ModelFiles | None:
    """The model that will be trained, checked by `pretrained.examine`; None: the folder has no
    model, only a tokenizer."""
    if Path(job.model).is_dir() and not (Path(job.model) / CONFIG).exists():
        return None
    return pretrained.examine(job.model, weights=False)


def _checked_teachers(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> dict[str, pretrained.ModelFiles]:
    """The teachers by name, checked before any text is read, like the model that will be trained.

    Raises:
        ValueError: as `pretrained.examine`; or a tokenizer with more tokens than a teacher's
            embedding.
    """
    models = dict.fromkeys(recipes.teacher_models(recipe))
    teachers = {model: pretrained.examine(model) for model in models}
    for teacher in teachers.values():
        teacher.check_tokenizer(tokenizer)
    return teachers


def _check_under_principles(
    teacher: pretrained.ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    principles: Mapping[str, str],
    documents: Mapping[str, Sequence[Document]],
) -> None:
    """Refuse documents that are too long for the teacher with a principle before them."""
    from dftserve.targets.principles import check_lengths

    if teacher.positions is not None:
        for split in SPLITS:
            check_lengths(teacher.positions, tokenizer, principles, documents[split])


def _has_conversations(corpus: Corpus) -> bool:
    return any(text.messages is not None for text in (*corpus.train, *corpus.heldout))


# ── Sources and shards ───────────────────────────────────────────────────────────────────────────


def _source(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping,
    known: Any,
    say: Say,
) -> Source:
    """`known`: a description of the source from an earlier run, whose fits are reused."""
    return recipes.source_of(
        recipe,
        tokenizer=tokenizer,
        documents=documents,
        vocabulary=len(tokenizer),
        known=known,
        say=say,
    )


def _work(job: Job, prepared: _Prepared, say: Say) -> None:
    from tqdm import tqdm

    documents = prepared.documents
    total = sum(len(document.tokens_N) for split in SPLITS for document in documents[split])
    with tqdm(total=total, unit=" tokens", unit_scale=True, disable=None) as bar:
        # tqdm shows nothing if there is no terminal.
        progress = Progress("tokens", say if bar.disable else _silent, total=total)
        for tokens in _built(job, prepared, say):
            bar.update(tokens)
            progress.add(tokens)


def _built(job: Job, prepared: _Prepared, say: Say) -> Iterator[int]:
    """Build the missing shards; yields the number of tokens of each finished batch or shard."""
    recipe, plan, documents = prepared.recipe, prepared.plan, prepared.documents
    make = partial(_rebuilt_source, job, recipe, plan)
    if job.engine != LOCAL:
        from dftserve.targets import on_ray

        cluster = on_ray.Cluster(
            address=_address(job),
            workers=job.processes,
            loads_models=any(recipes.teacher_models(recipe)),
        )
        return on_ray.build(job.out, plan, documents, make, cluster, say)
    if job.processes in (None, 1):
        return store.build(job.out, plan, prepared.source, documents)
    return on_processes.build(job.out, plan, documents, make, job.processes)


def _rebuilt_source(job: Job, recipe: Recipe, plan: Plan, documents: Mapping) -> Source:
    """The plan's source, built again in another process."""
    tokenizer = _tokenizer(job.model)
    _stopped_clock(tokenizer, _written_in(plan.corpus))
    return _source(recipe, tokenizer, documents, plan.source, _silent)


def _silent(line: str) -> None:
    """A `say` that prints nothing."""
