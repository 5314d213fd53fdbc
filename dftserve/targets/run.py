"""Builds a target store from a corpus and a recipe: the implementation of `dftserve target`.

    build(Job(corpus=Path("novels"), model="path/to/model", recipe="creative", out=Path("targets")))

The store depends only on the job and the files that it names. Running the same job again continues
where it was stopped, and several processes write the same shards as a single one.
"""

import multiprocessing
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve import atomic, pretrained
from dftserve.corpus.filters import Filters
from dftserve.corpus.prepare import Corpus, Report, prepare
from dftserve.corpus.records import opening
from dftserve.corpus.sources import read_all
from dftserve.corpus.text import Text
from dftserve.fingerprints import template_fingerprint, tokenizer_fingerprint
from dftserve.model_folder import CONFIG
from dftserve.targets import calibrated, report, store
from dftserve.targets import recipe as recipes
from dftserve.targets.chat_template import ChatTemplate, TemplateError, stop_clock, tells_time
from dftserve.targets.conversation import Encoded, UnfitError
from dftserve.targets.document import Document, load_tokenizer, spans
from dftserve.targets.encoding import encode
from dftserve.targets.estimate import Estimate, estimate_of
from dftserve.targets.progress import Progress
from dftserve.targets.recipe import Recipe
from dftserve.targets.source import Source
from dftserve.targets.store import SPLITS, Manifest, Plan, StoreError, TargetStore
from dftserve.targets.students import CrossFitted

LOCAL, RAY = "local", "ray"
"""Engines."""
FAR_FACTOR = 2.0
"""Factor by which the held-out share may differ from the requested one without a warning."""
WRITTEN_AT = "written_at"
"""Key in a plan's corpus: the date and time used by the chat template, if it writes one."""
CHECK_SECONDS = 0.5
"""Interval at which the processes of a build are checked for crashes."""


@dataclass(frozen=True, kw_only=True)
class Job:
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
    found = re.fullmatch(r"ray://[^/\s]+:(\d{1,5})", engine)
    return found is not None and 0 < int(found[1]) < 1 << 16


def _address(job: Job) -> str | None:
    """The address of a Ray cluster, if the engine gives one."""
    return None if job.engine == RAY else job.engine


Say = Callable[[str], None]


def build(job: Job, say: Say = print) -> Manifest:
    """Build the store, or the missing part of it.

    Raises:
        ValueError: the corpus, recipe, model or folder is invalid. Shards that were written are
            reused when the same job is run again.
        KeyboardInterrupt, SystemExit: stopped by SIGINT or SIGTERM; likewise.
    """
    if job.engine != LOCAL and not (job.out / store.MANIFEST).exists():
        from dftserve.targets import on_ray

        on_ray.check(_address(job))
    store.refuse_locked(job.out)
    prepared = _prepared(job, say)
    try:
        with store.locked(job.out), _unwinding_on_sigterm():
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
class Material:
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
    begun = store.begun(job.out)
    recipe = recipes.load(job.recipe, job.values)
    recipes.check_inputs(recipe)
    material = read_documents(job, recipe, say, written_at=_written_at(recipe, begun))
    documents = material.documents
    source = _source(recipe, material.tokenizer, documents, begun.get("source"), say)
    for found in calibrated.calibrations(source.describe()):
        say(calibrated.shown(found))
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
    given = corpus.get(WRITTEN_AT) if isinstance(corpus, Mapping) else None
    return given if isinstance(given, str) else None


def read_documents(job: Job, recipe: Recipe, say: Say, *, written_at: str | None) -> Material:
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
    documents, found = encode_all(
        corpus, tokenizer, recipe.corpus, max_tokens=job.max_tokens, skip_bad=job.skip_bad
    )
    say(shown(found))
    longest = max((len(d.tokens_N) for split in SPLITS for d in documents[split]), default=0)
    for teacher in teachers.values():
        teacher.check_length(longest, "--max-tokens")
    for model, principles in recipes.principles(recipe):
        _check_under_principles(teachers[model], tokenizer, principles, documents)
    return Material(
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
            **found,
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


def _checked_model(job: Job) -> pretrained.Examined | None:
    """The model that will be trained, checked by `pretrained.examine`; None: the folder has no
    model, only a tokenizer."""
    if Path(job.model).is_dir() and not (Path(job.model) / CONFIG).exists():
        return None
    return pretrained.examine(job.model, weights=False)


def _checked_teachers(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> dict[str, pretrained.Examined]:
    """The teachers by name, checked before any text is read, like the model that will be trained.

    Raises:
        ValueError: as `pretrained.examine`; or a tokenizer with more tokens than a teacher's
            embedding.
    """
    models = dict.fromkeys(recipes.teacher_models(recipe))
    found = {model: pretrained.examine(model) for model in models}
    for teacher in found.values():
        teacher.check_tokenizer(tokenizer)
    return found


def _check_under_principles(
    teacher: pretrained.Examined,
    tokenizer: PreTrainedTokenizerBase,
    principles: Mapping[str, str],
    documents: Mapping[str, Sequence[Document]],
) -> None:
    """Refuse documents that are too long for the teacher with a principle before them."""
    from dftserve.targets.principles import check_lengths

    if teacher.positions is not None:
        for split in SPLITS:
            check_lengths(teacher.positions, tokenizer, principles, documents[split])


# ── Documents ────────────────────────────────────────────────────────────────────────────────────


def encode_all(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    filters: Filters,
    *,
    max_tokens: int | None,
    skip_bad: bool = False,
) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """Tokenise a corpus; returns the documents by split, and a report in JSON types.

    Raises:
        ValueError: a conversation that the tokenizer's template refuses, unless `skip_bad`; the
            message names it. Or nothing is left to train on, or of what is held out.
    """
    templates = _templates(corpus, tokenizer)
    kept: set[str] = set()
    lost: set[str] = set()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for text in getattr(corpus, split):
            encoded = _encoded(corpus.report, tokenizer, text, filters, skip_bad=skip_bad)
            if encoded is None:
                lost.add(_whole(text))
                continue
            reason = _unfit(encoded.document, text, max_tokens)
            if reason is not None:
                corpus.report.drop(reason, text.origin)
                lost.add(_whole(text))
                continue
            for note in dict.fromkeys(encoded.notes):
                corpus.report.note(note, text.origin)
            grouped = replace(encoded.document, group=text.family or opening(text) or _whole(text))
            documents[split] += windows(grouped, max_tokens)
            kept.add(_whole(text))
    for origin in lost - kept:
        corpus.report.lose(origin)
    found = corpus.report.as_dict() | templates
    found["documents"] = {split: len(documents[split]) for split in SPLITS}
    found["tokens"] = {split: sum(len(d.tokens_N) for d in documents[split]) for split in SPLITS}
    found["trained"] = {split: sum(d.trained for d in documents[split]) for split in SPLITS}
    if not documents["train"]:
        raise ValueError(f"nothing is left to train on:\n{shown(found)}")
    if corpus.heldout and not documents["heldout"]:
        raise ValueError(
            "nothing is left of what is held out; hold out other texts (--heldout-from), more of "
            f"them or by another --seed, or none (--heldout 0):\n{shown(found)}"
        )
    return documents, found


def _whole(text: Text) -> str:
    """The origin of the text that a piece was cut from; unchanged for a whole text."""
    return _PIECE.sub("", text.origin)


_PIECE = re.compile(r"#\d+$")


def _encoded(
    report: Report,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    filters: Filters,
    *,
    skip_bad: bool,
) -> Encoded | None:
    """None if the text is left out, which is recorded in the report."""
    try:
        return encode(
            tokenizer,
            text,
            spelled=filters.special_tokens,  # type: ignore[arg-type]
            answers=filters.answers,  # type: ignore[arg-type]
        )
    except UnfitError as error:
        report.drop(f"{error}", text.origin)
    except TemplateError as error:
        if not skip_bad:
            raise ValueError(f"{text.origin}: {error} (--skip-bad leaves it out)") from None
        report.drop(f"{error}", text.origin)
    return None


def _templates(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The chat templates that render the conversations, in JSON types; empty without conversations.

    Raises:
        ValueError: no template, or one that is not valid jinja; names the first conversation.
    """
    found: dict[str, str] = {}
    for text in (*corpus.train, *corpus.heldout):
        if text.messages is None or (len(found) and not text.tools):
            continue
        try:
            template = ChatTemplate.of(tokenizer, tools=bool(text.tools))
        except TemplateError as error:
            raise ValueError(f"{text.origin}: {error}") from None
        found[template.title] = (
            "learns what it marks" if template.marks else "learns the answers, has no marks"
        )
        if len(found) > 1 or not isinstance(tokenizer.chat_template, dict):
            break
    return {"templates": found} if found else {}


def windows(document: Document, size: int | None) -> Iterator[Document]:
    """The document, split into windows if it is longer than `size` tokens."""
    count = len(document.tokens_N)
    if size is None or count <= size:
        yield document
        return
    for start, stop in spans(count, size):
        yield document.window(start, stop)


def _unfit(document: Document, text: Text, max_tokens: int | None) -> str | None:
    if not document.trained_N.any():
        return "nothing to train on"
    if text.messages is not None and max_tokens and len(document.tokens_N) > max_tokens:
        return "longer than max_tokens"
    return None


def _has_conversations(corpus: Corpus) -> bool:
    return any(text.messages is not None for text in (*corpus.train, *corpus.heldout))


def shown(found: Mapping[str, Any]) -> str:
    """The report of a corpus, for a terminal."""
    counts = ", ".join(f"{found[what]:,} {what}" for what in ("kept", "stripped", "joined"))
    lines = [f"{found['read']:,} texts read, {counts}."]
    for kind in ("dropped", "noted"):
        for reason, counted in found[kind].items():
            some = ", ".join(counted["examples"])
            more = ", …" if counted["count"] > len(counted["examples"]) else ""
            lines.append(f"  {kind}, {reason}: {counted['count']:,} ({some}{more})")
    lines += (f"  {title}: {what}" for title, what in found.get("templates", {}).items())
    if found["kept"] != (count := sum(found["documents"].values())):
        lines.append(f"  {found['kept']:,} texts in {count:,} documents: longer ones are cut")
    for split in SPLITS:
        documents, tokens, trained = (
            found[what][split] for what in ("documents", "tokens", "trained")
        )
        lines.append(f"  {split}: {documents:,} documents, {tokens:,} tokens, {trained:,} trained")
    if languages := found["languages"]:
        counted = ", ".join(f"{name} {count:,}" for name, count in languages.items())
        lines.append(f"  languages of the first texts: {counted} (corpus.languages chooses)")
    if found["compared"] < 1:
        lines.append(
            "  copies in part: long texts were compared by "
            f"{found['compared']:.2%} of their 5-grams"
        )
    asked, share = found["heldout_asked"], found["heldout_share"]
    lines.append(f"  held out: {share:.1%} of the words; asked for: {asked:.1%} of the texts")
    if asked and not asked / FAR_FACTOR <= share <= asked * FAR_FACTOR:
        lines.append(
            "  warning: that is far from what was asked: texts are few, or of very different "
            "lengths; give more of them, or another --heldout or --seed"
        )
    return "\n".join(lines)


# ── Processes ────────────────────────────────────────────────────────────────────────────────────


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
    if job.engine != LOCAL:
        from dftserve.targets import on_ray

        cluster = on_ray.Cluster(
            address=_address(job),
            workers=job.processes,
            loads_models=any(recipes.teacher_models(recipe)),
        )
        make = partial(_rebuilt_source, job, recipe, plan)
        return on_ray.build(job.out, plan, documents, make, cluster, say)
    if job.processes in (None, 1):
        return store.build(job.out, plan, prepared.source, documents)
    return _in_processes(job, recipe, plan, documents, job.processes)


def _rebuilt_source(job: Job, recipe: Recipe, plan: Plan, documents: Mapping) -> Source:
    """The plan's source, built again in another process."""
    tokenizer = _tokenizer(job.model)
    _stopped_clock(tokenizer, _written_in(plan.corpus))
    return _source(recipe, tokenizer, documents, plan.source, _silent)


def _silent(line: str) -> None:
    """A `say` that prints nothing."""


def _in_processes(
    job: Job, recipe: Recipe, plan: Plan, documents: Mapping, processes: int
) -> Iterator[int]:
    """The same build by several processes; each loads the source and writes its own shards."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(job, recipe, plan, documents, (rank, processes), results)
        )
        for rank in range(processes)
    ]
    try:
        _start(workers)
        yield from _finished_tokens(results, workers)
    except BaseException:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        raise
    finally:
        # Workers that have built all are left to end by themselves.
        for worker in workers:
            if worker.pid is not None:
                worker.join()


def _start(workers: Sequence[Any]) -> None:
    """Start workers that SIGINT does not reach: a terminal sends it to all processes, and the
    parent ends the workers."""
    with _signals_deferred():
        # The workers inherit the mask. In the parent, another thread may receive the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for worker in workers:
                worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end: a worker whose start they interrupt would get
    half of its arguments and print a traceback. Python allows this in the main thread only, which
    is also the only one that they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def _finished_tokens(results: Any, workers: Sequence[Any]) -> Iterator[int]:
    """The number of tokens of each batch of all workers, until each has sent None."""
    ended = 0
    while ended < len(workers):
        try:
            result = results.get(timeout=CHECK_SECONDS)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise RuntimeError(
                    f"a process of the build ended with exit code {dead[0]}; run it again, with "
                    "fewer processes if memory ran out."
                ) from None
            continue
        if isinstance(result, Exception):
            raise result
        if result is None:
            ended += 1
        else:
            yield result


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM raises SystemExit, so that the processes of a build are ended and no
    partial file is left. Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # A second signal would interrupt the unwinding.
    sys.exit(128 + number)


def _end_with_parent(results: Any) -> None:
    """End this process, as by SIGTERM, once its parent has died without ending it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        results.cancel_join_thread()  # Nobody reads them any more.
        os.kill(os.getpid(), signal.SIGTERM)


def _take_device(rank: int) -> None:
    """Distribute the available GPUs over the processes: "cuda" is a different one for each."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def _worker(
    job: Job,
    recipe: Recipe,
    plan: Plan,
    documents: Mapping,
    rank_and_world: tuple[int, int],
    results: Any,
) -> None:
    rank, world = rank_and_world
    signal.signal(signal.SIGTERM, _exit_once)
    threading.Thread(target=_end_with_parent, args=(results,), daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _take_device(rank)
    try:
        source = _rebuilt_source(job, recipe, plan, documents)
        built = store.build(job.out, plan, source, documents, rank=rank, world=world)
        for tokens in built:
            results.put(tokens)
        results.put(None)
    except (ValueError, OSError, RuntimeError) as error:
        # Send a new exception, since some cannot be pickled.
        kind = next(k for k in (ValueError, OSError, RuntimeError) if isinstance(error, k))
        sent = kind(str(error))
        sent.add_note(traceback.format_exc())  # Notes are pickled; tracebacks are not.
        results.put(sent)
