"""From a corpus and a recipe to a target store: what `dftserve target` does.

    build(Job(corpus=Path("novels"), model="path/to/model", recipe="creative", out=Path("targets")))

Everything that decides the store follows from the job and the files that it names: the same job
goes on where it was stopped, and each of several processes writes the same shards as one would.
"""

import multiprocessing
import os
import queue
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dftserve import atomic, lm
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
from dftserve.targets.document import (
    Document,
    load_tokenizer,
    spans,
)
from dftserve.targets.encoding import encode
from dftserve.targets.estimate import Estimate, estimate_of
from dftserve.targets.progress import Progress
from dftserve.targets.recipe import Recipe
from dftserve.targets.source import Source
from dftserve.targets.store import SPLITS, Manifest, Plan, StoreError, TargetStore

LOCAL, RAY = "local", "ray"
"""Engines."""
FAR = 2.0
"""How many times more or less than asked may be held out without a warning."""
WRITTEN_AT = "written_at"
"""Of a plan's corpus: the date and time that the chat template wrote, where it writes one."""
ENDED_SECONDS = 0.5
"""How often a wait for the processes looks whether they live."""


@dataclass(frozen=True, kw_only=True)
class Job:
    corpus: Path
    """A file or folder, or a YAML of several (`corpus.sources`)."""
    model: str
    """The folder, or the name on the Hub, of the model that will be trained: its tokenizer."""
    recipe: str
    out: Path
    values: Mapping[str, str] = field(default_factory=dict)
    """For the recipe's placeholders."""
    heldout: float = 0.05
    """Share of texts that is not trained on; where the corpus has splits, or `heldout_from` is
    given, those are held out and no others."""
    heldout_from: Path | None = None
    """A file or folder of texts that are held out."""
    seed: int = 0
    engine: str = LOCAL
    """`local`: processes of this machine; `ray` or `ray://HOST:PORT`: workers of a Ray cluster
    (`on_ray`)."""
    processes: int | None = None
    """None: one; on Ray, as `on_ray.Cluster.workers` says."""
    max_tokens: int | None = None
    """A longer text goes on in another document; a longer conversation is left out."""
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
    """Of a Ray cluster, where the engine names one."""
    return None if job.engine == RAY else job.engine


Say = Callable[[str], None]


def build(job: Job, say: Say = print) -> Manifest:
    """Build the store, or what is missing of it.

    Raises:
        ValueError: what is wrong with corpus, recipe, model, or the folder; nothing is written but
            shards that the same job finds again.
        KeyboardInterrupt: likewise.
    """
    if job.engine != LOCAL and not (job.out / store.MANIFEST).exists():
        from dftserve.targets import on_ray

        on_ray.check(_address(job))
    prepared = _prepared(job, say)
    plan, documents = prepared.plan, prepared.documents
    try:
        store.begin(job.out, plan)
        if (job.out / store.MANIFEST).exists():
            TargetStore(job.out).verify()
            say(f"{job.out} is complete already.")
            return Manifest.read(job.out)
        _work(job, prepared, say)
        manifest = store.finish(job.out, plan, documents, store.versions())
    except KeyboardInterrupt:
        say(_kept(job.out))
        raise
    except OSError as error:
        raise StoreError(f"{job.out} cannot be written: {error}.") from None
    say(f"{job.out}: {len(manifest.shards)} shards, {sum(map(manifest.tokens, SPLITS)):,} tokens.")
    return manifest


def estimate(job: Job, say: Say = print) -> Estimate:
    """What the build would take: measured on the first batches, where they would be read.

    Raises:
        ValueError: as `build`; nothing is written.
    """
    if job.engine != LOCAL:
        say("Measured on this machine; the Ray cluster is not asked.")
    prepared = _prepared(job, say)
    return estimate_of(prepared.source, prepared.plan, prepared.documents, job.processes or 1)


@dataclass(frozen=True)
class Material:
    """A corpus as the model reads it."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    documents: Mapping[str, Sequence[Document]]
    template: str | None
    """SHA-256 of the chat template; None for plain texts."""
    corpus: Mapping[str, Any]
    """What was read, and what of it was kept and dropped: a plan's `corpus`."""


@dataclass(frozen=True)
class _Prepared:
    recipe: Recipe
    documents: Mapping[str, Sequence[Document]]
    source: Source
    plan: Plan


def _prepared(job: Job, say: Say) -> _Prepared:
    material = read_documents(job, say)
    recipe, documents = material.recipe, material.documents
    known = store.begun(job.out).get("source")
    source = _source(recipe, material.tokenizer, documents, known, say)
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


def read_documents(job: Job, say: Say) -> Material:
    """The corpus of a job, filtered, split and encoded.

    Raises:
        ValueError: what is wrong with corpus, recipe or a model.
    """
    recipe = recipes.load(job.recipe, job.values)
    base = _base(job)
    tokenizer = _tokenizer(job.model)
    moment = _stopped_clock(tokenizer, store.begun(job.out).get("corpus"))
    if base is not None:
        base.check_tokenizer(tokenizer)
    teachers = _examined(recipe, tokenizer)
    texts = _told(read_all(job.corpus, job.heldout_from), say)
    corpus = prepare(
        texts,
        recipe.corpus,
        heldout=job.heldout,
        seed=job.seed,
        counts_answers=recipes.counts_answers(recipe),
    )
    documents, told = encode_all(
        corpus, tokenizer, recipe.corpus, max_tokens=job.max_tokens, skip_bad=job.skip_bad
    )
    say(shown(told))
    longest = max((len(d.tokens_N) for split in SPLITS for d in documents[split]), default=0)
    for teacher in teachers:
        teacher.check_length(longest, "--max-tokens")
    return Material(
        recipe=recipe,
        tokenizer=tokenizer,
        documents=documents,
        template=template_fingerprint(tokenizer) if _has_conversations(corpus) else None,
        corpus={
            "recipe": recipe.name,
            "filters": asdict(recipe.corpus),
            "heldout": job.heldout,
            "max_tokens": job.max_tokens,
            **({WRITTEN_AT: moment.isoformat()} if moment else {}),
            **told,
        },
    )


def _told(texts: Iterator[Text], say: Say) -> Iterator[Text]:
    """The texts, and now and then a line that says how many they are."""
    progress = Progress("texts read", say)
    for text in texts:
        progress.add(1)
        yield text


def _kept(out: Path) -> str:
    """What an interrupted build leaves: whole shards alone."""
    kept = len(list(out.glob("*.safetensors")))
    if not kept:
        return f"Stopped before the first shard of {out} was whole; the same command starts again."
    shards = "1 shard" if kept == 1 else f"{kept:,} shards"
    return f"Stopped; {shards} in {out} are kept, and the same command goes on behind them."


def inspect(folder: Path, *, model: str | None, html: Path | None, as_json: bool) -> str:
    """What a store holds, as text or JSON; also as one HTML file.

    Args:
        model: whose tokenizer writes the examples; None: token ids.

    Raises:
        StoreError: no store that can be read, another tokenizer, or no place for the HTML file.
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
    """One line that says that every byte is as it was built.

    Raises:
        StoreError: names the first file that is not.
    """
    opened = TargetStore(folder)
    opened.verify()
    return f"{folder}: {len(opened.manifest.shards)} shards, each as it was built."


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    # How much a model reads at once is the trainer's concern: no warning for each long text.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _stopped_clock(tokenizer: PreTrainedTokenizerBase, told: Any) -> datetime | None:
    """The moment that templates are given for now: of a plan's corpus (`told`), else the real.

    So a build goes on, or is found complete, on another day. None where no template asks for it.
    """
    if not tells_time(tokenizer):
        return None
    given = told.get(WRITTEN_AT) if isinstance(told, Mapping) else None
    try:
        moment = datetime.fromisoformat(given) if given else datetime.now()
    except (TypeError, ValueError):
        moment = datetime.now()  # Another plan, which `store.begin` refuses.
    stop_clock(tokenizer, moment)
    return moment


def _base(job: Job) -> lm.Examined | None:
    """The model that will be trained, refused as `lm.examine` does; None: a tokenizer alone."""
    if Path(job.model).is_dir() and not (Path(job.model) / CONFIG).exists():
        return None
    return lm.examine(job.model, weights=False)


def _examined(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[lm.Examined]:
    """The teachers; refused, as the model that will be trained, before any text is read.

    Raises:
        ValueError: as `lm.examine`; or a tokenizer with more tokens than an embedding.
    """
    found = [lm.examine(model) for model in recipes.teacher_models(recipe)]
    for teacher in found:
        teacher.check_tokenizer(tokenizer)
    return found


# ── Documents ────────────────────────────────────────────────────────────────────────────────────


def encode_all(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    filters: Filters,
    *,
    max_tokens: int | None,
    skip_bad: bool = False,
) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """The corpus as the model reads it, and what became of it on the way, in JSON's types.

    Raises:
        ValueError: a conversation that the tokenizer's template refuses, unless `skip_bad`; names
            it. Or nothing is left to learn.
    """
    told_of_templates = _templates(corpus, tokenizer)
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
    told = corpus.report.as_dict() | told_of_templates
    told["documents"] = {split: len(documents[split]) for split in SPLITS}
    told["tokens"] = {split: sum(len(d.tokens_N) for d in documents[split]) for split in SPLITS}
    told["trained"] = {split: sum(d.trained for d in documents[split]) for split in SPLITS}
    if not documents["train"]:
        raise ValueError(f"nothing is left to train on:\n{shown(told)}")
    return documents, told


def _whole(text: Text) -> str:
    """The origin of the text that a piece was cut from, or of the text itself."""
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
    """None: it is left out, and counted."""
    try:
        return encode(
            tokenizer,
            text,
            spelled=filters.special_tokens,  # type: ignore[arg-type]
            learnt=filters.answers,  # type: ignore[arg-type]
        )
    except UnfitError as error:
        report.drop(f"{error}", text.origin)
    except TemplateError as error:
        if not skip_bad:
            raise ValueError(f"{text.origin}: {error} (--skip-bad leaves it out)") from None
        report.drop(f"{error}", text.origin)
    return None


def _templates(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the conversations are written by, in JSON's types; nothing where there are none.

    Raises:
        ValueError: no template, or one that is no jinja; names the first conversation.
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
    """The document, in windows where it is longer than `size` tokens."""
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


def shown(told: Mapping[str, Any]) -> str:
    """What became of the corpus, for a terminal."""
    counts = ", ".join(f"{told[what]:,} {what}" for what in ("kept", "stripped", "joined"))
    lines = [f"{told['read']:,} texts read, {counts}."]
    for kind in ("dropped", "noted"):
        for reason, counted in told[kind].items():
            some = ", ".join(counted["examples"])
            more = ", …" if counted["count"] > len(counted["examples"]) else ""
            lines.append(f"  {kind}, {reason}: {counted['count']:,} ({some}{more})")
    lines += (f"  {title}: {what}" for title, what in told.get("templates", {}).items())
    if told["kept"] != (count := sum(told["documents"].values())):
        lines.append(f"  {told['kept']:,} texts in {count:,} documents: longer ones are cut")
    for split in SPLITS:
        documents, tokens, trained = (
            told[what][split] for what in ("documents", "tokens", "trained")
        )
        lines.append(f"  {split}: {documents:,} documents, {tokens:,} tokens, {trained:,} learnt")
    if languages := told["languages"]:
        counted = ", ".join(f"{name} {count:,}" for name, count in languages.items())
        lines.append(f"  languages of the first texts: {counted} (corpus.languages chooses)")
    if told["compared"] < 1:
        lines.append(
            f"  copies in part: long texts were compared by {told['compared']:.2%} of their 5-grams"
        )
    asked, share = told["heldout_asked"], told["heldout_share"]
    lines.append(f"  held out: {share:.1%} of the words; asked for: {asked:.1%} of the texts")
    if asked and not asked / FAR <= share <= asked * FAR:
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
    """`known`: a description of it, if what was fitted for it is known already."""
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
        # tqdm shows nothing where there is no terminal.
        progress = Progress("tokens", say if bar.disable else _nothing, total=total)
        for tokens in _built(job, prepared, say):
            bar.update(tokens)
            progress.add(tokens)


def _built(job: Job, prepared: _Prepared, say: Say) -> Iterator[int]:
    """Builds what is missing; yields the tokens of what is done."""
    recipe, plan, documents = prepared.recipe, prepared.plan, prepared.documents
    if job.engine != LOCAL:
        from dftserve.targets import on_ray

        cluster = on_ray.Cluster(
            address=_address(job),
            workers=job.processes,
            loads_models=any(recipes.teacher_models(recipe)),
        )
        make = partial(_made_again, job, recipe, plan)
        return on_ray.build(job.out, plan, documents, make, cluster, say)
    if job.processes in (None, 1):
        return store.build(job.out, plan, prepared.source, documents)
    return _shared(job, recipe, plan, documents, job.processes)


def _made_again(job: Job, recipe: Recipe, plan: Plan, documents: Mapping) -> Source:
    """The plan's source, in another process."""
    tokenizer = _tokenizer(job.model)
    _stopped_clock(tokenizer, plan.corpus)
    return _source(recipe, tokenizer, documents, plan.source, _nothing)


def _nothing(line: str) -> None:
    """What a bar shows already."""


def _shared(
    job: Job, recipe: Recipe, plan: Plan, documents: Mapping, processes: int
) -> Iterator[int]:
    """The same build by several processes; each makes the source anew and writes its own shards."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    workers = [
        context.Process(
            target=_worker, args=(job, recipe, plan, documents, (rank, processes), told)
        )
        for rank in range(processes)
    ]
    try:
        _start(workers)
        yield from _heard(told, workers)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join()


def _start(workers: Sequence[Any]) -> None:
    """With SIGINT ignored, which they inherit: a terminal sends it to all, and we end them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _heard(told: Any, workers: Sequence[Any]) -> Iterator[int]:
    """The tokens of each batch, from all of them, until each has said that it ended."""
    ended = 0
    while ended < len(workers):
        try:
            said = told.get(timeout=ENDED_SECONDS)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead:
                raise RuntimeError(
                    f"a process of the build ended with exit code {dead[0]}; run it again, with "
                    "fewer processes where memory was short."
                ) from None
            continue
        if isinstance(said, Exception):
            raise said
        if said is None:
            ended += 1
        else:
            yield said


def _take_device(rank: int) -> None:
    """Processes share out the GPUs that there are: "cuda" is another for each."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())


def _worker(
    job: Job, recipe: Recipe, plan: Plan, documents: Mapping, place: tuple[int, int], told: Any
) -> None:
    """`place`: its rank, and of how many."""
    rank, world = place
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Unwinds: no half a file stays behind.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _take_device(rank)
    try:
        source = _made_again(job, recipe, plan, documents)
        built = store.build(job.out, plan, source, documents, rank=rank, world=world)
        for tokens in built:
            told.put(tokens)
        told.put(None)
    except (ValueError, OSError, RuntimeError) as error:
        # Built anew: some exceptions cannot be sent as they are.
        kind = next(k for k in (ValueError, OSError, RuntimeError) if isinstance(error, k))
        anew = kind(str(error))
        anew.add_note(traceback.format_exc())  # Which goes with it, as a traceback does not.
        told.put(anew)
