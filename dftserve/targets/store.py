"""A target store: a folder of memory-mapped shards and a manifest that describes them.

    store = TargetStore(Path("targets/novels"))
    document, targets = store["train", 0]

    manifest.json                metadata: format, tokenizer, source, seed, shards with BLAKE3
    train-00000.safetensors …    documents and their targets, by split
    heldout-00000.safetensors …
    plan.json                    only during a build: the plan that the manifest will contain
    lock                         only during a build: locked by the process that writes

A store may come from an untrusted origin. Its files must be regular files inside its folder
(`bounded_files`). The counts in the manifest are compared with the shards' sizes before they are
used, and a shard's tensors with the manifest when it is opened.

Shards are written atomically, and a shard depends only on the plan and its own documents: a build
can be continued where it was stopped, and be shared by several processes. A token takes four bytes
and its target 3·(k + M) + 2·k + 6: 58 in all at k = M = 6.

Shapes: N tokens, D documents, T trained positions, K top entries, M draws.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dftserve import __version__, atomic, lock, settings
from dftserve.bounded_files import (
    INTEGERS,
    FileError,
    is_plain_name,
    open_growing,
    parse_json,
    read_json,
    read_text,
    real_file,
    with_advice,
)
from dftserve.digest import digest_of
from dftserve.fingerprints import mismatch
from dftserve.targets.document import Document
from dftserve.targets.limits import LARGEST_KEPT
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets

FORMAT = 1
"""Number of the format; a store of another one is refused."""
MANIFEST, PLAN, LOCK = "manifest.json", "plan.json", "lock"
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 20
"""Tokens from which a shard is complete: at most this much is lost when a build is stopped."""
TOKENS_AT_ONCE = 8192
"""Tokens in one batch for a source, including padding; a longer document is a batch of its own."""
LARGEST_ID = (1 << 24) - 1
"""The largest token id: ids have three bytes."""
LARGEST_MANIFEST = 16 << 20
"""In bytes: enough for some 60,000 shards, or 6e10 tokens."""
LARGEST_DOCUMENT = 1 << 26
"""Tokens of the largest text of a corpus, at one token per byte."""
LARGEST_HEADER = 1 << 14
"""Bytes of a shard's header: tensor names and shapes take some 1,000."""
TAILS = ("sampled", "lumped")
REBUILD = "build the store again"
_BLAKE3 = re.compile(r"[0-9a-f]{64}")


class StoreError(ValueError):
    """A store cannot be used; the message says which one, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that determines a store's content."""

    tokenizer: str
    """SHA-256; see `fingerprints`."""
    template: str | None
    """SHA-256 of the chat template; None for plain texts."""
    vocabulary: int
    source: Mapping[str, Any]
    """The source's description of itself."""
    corpus: Mapping[str, Any]
    """The report of what was read, kept and dropped."""
    corpus_blake3: str
    """Digest of the tokens and trained marks of all documents."""
    seed: int
    k: int
    draws: int
    tail: str
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("vocabulary", self.vocabulary, 1, LARGEST_ID),
            ("k", self.k, 1, LARGEST_KEPT),
            ("draws", self.draws, 0, LARGEST_KEPT),
        ):
            if not least <= value <= most:
                raise StoreError(f"{name}: got {value}; accepted: from {least} to {most}.")
        if self.seed not in INTEGERS:
            raise StoreError(f"seed: got {self.seed}; accepted: a whole number of 64 bits.")
        if self.tail not in TAILS:
            accepted = settings.accepted_names(self.tail, TAILS)
            raise StoreError(f"tail: got {self.tail!r:.80}; accepted: {accepted}.")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a store."""

    file: str
    split: str
    documents: int
    tokens: int
    trained: int
    blake3: str

    def __post_init__(self) -> None:
        if not is_plain_name(self.file):
            raise StoreError(f"file: got {self.file!r:.80}; accepted: a file next to the manifest.")
        if self.split not in SPLITS:
            raise StoreError(f"split: got {self.split!r:.80}; accepted: {', '.join(SPLITS)}.")
        most = SHARD_TOKENS + LARGEST_DOCUMENT
        if not 2 <= self.tokens <= most:
            raise StoreError(f"tokens: got {self.tokens}; accepted: from 2 to {most}.")
        if not 1 <= self.documents <= self.tokens // 2:
            raise StoreError(
                f"documents: got {self.documents} in {self.tokens} tokens; accepted: from 1 to one "
                "per two tokens."
            )
        if not 0 <= self.trained <= self.tokens - self.documents:
            raise StoreError(
                f"trained: got {self.trained} of {self.tokens} tokens in {self.documents} "
                "documents; accepted: at most all but the first token of each."
            )
        if not _BLAKE3.fullmatch(self.blake3):
            raise StoreError(f"blake3: got {self.blake3!r:.80}; accepted: 64 hexadecimal digits.")

    def tensor_bytes(self, plan: Plan) -> int:
        """Total size of its tensors, as packed by `_write_shard`."""
        return sum(
            shape[0] * (shape[1] if len(shape) > 1 else 1) * _BYTES[dtype]
            for dtype, shape in self.tensors(plan).values()
        )

    def tensors(self, plan: Plan) -> dict[str, tuple[str, list[int]]]:
        """The expected safetensors dtype and shape of each tensor in its file."""
        N, D, T, K, M = self.tokens, self.documents, self.trained, plan.k, plan.draws
        return {
            "tokens_low": ("U16", [N]),
            "tokens_high": ("U8", [N]),
            "trained": ("U8", [N]),
            "document_ends": ("I64", [D]),
            "trained_ends": ("I64", [D]),
            "top_ids_low": ("U16", [T, K]),
            "top_ids_high": ("U8", [T, K]),
            "top_logprobs": ("F16", [T, K]),
            "tail_ids_low": ("U16", [T, M]),
            "tail_ids_high": ("U8", [T, M]),
            "tail_logprob": ("F16", [T]),
            "token_logprob": ("F16", [T]),
            "entropy": ("F16", [T]),
        }


NUMBERS = ("top_logprobs_TK", "tail_logprob_T", "token_logprob_T", "entropy_T")
"""Floating-point fields of `Targets`, in nats."""
_BYTES = {"U8": 1, "U16": 2, "F16": 2, "I64": 8}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished store contains, and how it was built."""

    plan: Plan
    shards: tuple[Shard, ...]
    versions: Mapping[str, str]
    blake3: str = ""
    """Digest of the above as written to the file; checked by `TargetStore.verify`."""

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises StoreError if there is no manifest, or not one that `build` writes."""
        path = folder / MANIFEST
        if not path.is_symlink() and not path.exists():
            if (folder / PLAN).exists():
                why = "is unfinished; run its build again"
            elif folder.exists():
                why = f"has no {MANIFEST}; give the --out of a build"
            else:
                why = "does not exist; give the --out of a build"
            raise StoreError(f"the target store {folder} {why}.")
        try:
            content = read_json(path, within=folder, largest=LARGEST_MANIFEST)
            manifest = settings.load(cls, content, str(path))
        except ValueError as error:
            raise StoreError(with_advice(error, REBUILD)) from None
        if manifest.plan.format != FORMAT:
            raise StoreError(
                f"{path}: got the format {manifest.plan.format}; accepted: {FORMAT}; {REBUILD}."
            )
        names = [shard.file for shard in manifest.shards]
        if len(set(names)) < len(names):
            raise StoreError(f"{path}: got the same shard twice; accepted: each once; {REBUILD}.")
        return manifest


# ── Building ─────────────────────────────────────────────────────────────────────────────────────


def plan(
    source: Source,
    documents: Mapping[str, Sequence[Document]],
    *,
    tokenizer: str,
    template: str | None,
    corpus: Mapping[str, Any],
    k: int,
    draws: int,
    seed: int,
) -> Plan:
    """The plan of a build from this source and these documents.

    Raises:
        StoreError: no documents to train on, or token ids beyond the source's vocabulary.
    """
    if not documents.get("train"):
        raise StoreError("the corpus has no document to train on; give it more text.")
    for split in SPLITS:
        for document in documents.get(split, ()):
            _check_document(document, source.vocabulary)
    if source.vocabulary > LARGEST_ID:
        raise StoreError(f"a vocabulary of {source.vocabulary}; accepted: below {LARGEST_ID}.")
    return Plan(
        tokenizer=tokenizer,
        template=template,
        vocabulary=source.vocabulary,
        source=source.describe(),
        corpus=corpus,
        corpus_blake3=_digest_of_corpus(documents),
        seed=seed,
        k=min(k, source.vocabulary),
        draws=draws if source.tail == "sampled" else 0,
        tail=source.tail,
    )


def _check_document(document: Document, vocabulary: int) -> None:
    highest = int(document.tokens_N.max())
    if highest >= vocabulary:
        raise StoreError(
            f"the text contains the token {highest}; the source has {vocabulary} tokens: tokenizer "
            "and source do not belong together."
        )
    if len(document.tokens_N) > LARGEST_DOCUMENT:
        raise StoreError(
            f"a text has {len(document.tokens_N)} tokens; accepted: at most {LARGEST_DOCUMENT}; "
            "cut it (--max-tokens)."
        )


def _digest_of_corpus(documents: Mapping[str, Sequence[Document]]) -> str:
    digest = blake3()
    for split in SPLITS:
        for document in documents.get(split, ()):
            digest.update(split.encode())
            digest.update(document.tokens_N.tobytes())
            digest.update(document.trained_N.tobytes())
    return digest.hexdigest()


def write(
    folder: Path, wanted: Plan, source: Source, documents: Mapping[str, Sequence[Document]]
) -> Manifest:
    """Build a whole store in this process; raises as `locked`, `begin` and `finish`."""
    with locked(folder):
        begin(folder, wanted)
        for _ in build(folder, wanted, source, documents):
            pass
        return finish(folder, wanted, documents, versions())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other build write to a folder meanwhile. It is created; a finished store is not
    locked, since nothing is written to it.

    Raises:
        StoreError: another build writes to it.
        FileError: the lock is a link, or has content.
        OSError: the folder cannot be created, or the lock cannot be opened or taken.
    """
    if (folder / MANIFEST).exists():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open_growing(folder / LOCK, largest=0) as file:
        if not lock.take(file):
            raise StoreError(
                f"{folder}: another build writes to it; wait for it, or choose another folder."
            )
        yield
        if (folder / MANIFEST).exists():
            (folder / LOCK).unlink(missing_ok=True)


def refuse_locked(folder: Path) -> None:
    """Raises StoreError if another build writes to the folder."""
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def begin(folder: Path, wanted: Plan) -> None:
    """Start a build, or continue one with the same plan.

    Raises:
        StoreError: the folder contains a build with another plan, or other files.
    """
    written = existing_plan(folder)
    if not written:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(folder / PLAN, _json(asdict(wanted)))
        return
    here = json.loads(_json(asdict(wanted)))
    here["source"] = here.pop("source")  # Last, since it may have only a digest of the corpus.
    if other := difference(written, here):
        raise StoreError(
            f"{folder} holds a store of another plan: {other}. Choose another folder, "
            "or remove this one."
        )
    if (folder / MANIFEST).exists():
        # They are still there if the build was killed before removing them.
        (folder / PLAN).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)


def existing_plan(folder: Path) -> Mapping[str, Any]:
    """The plan of the finished or unfinished build in a folder; empty if none was started.

    Raises:
        StoreError: the file is not a plan, or the folder contains other files.
    """
    for path in (folder / MANIFEST, folder / PLAN):
        if path.exists():
            return _plan_in(folder, path)
    # A killed process may have left a partially written plan, and the lock.
    if not atomic.has_only(folder, {PLAN + atomic.PARTIAL, LOCK}):
        raise StoreError(f"{folder} is neither empty nor a target store; choose another folder.")
    return {}


def _plan_in(folder: Path, path: Path) -> Mapping[str, Any]:
    """The plan in a manifest, or in the plan file of an unfinished build."""
    try:
        content = read_json(path, within=folder, largest=LARGEST_MANIFEST)
    except FileError as error:
        raise StoreError(with_advice(error, "choose another folder, or remove this one")) from None
    plan = content.get("plan", content) if isinstance(content, Mapping) else None
    if not plan or not isinstance(plan, Mapping):
        raise StoreError(f"{path} is no plan of a store; choose another folder, or remove it.")
    return plan


@dataclass(frozen=True)
class Part:
    """A run of documents that becomes one shard."""

    split: str
    number: int
    """Index among the split's shards."""
    start: int
    stop: int
    """Range of the split's documents."""
    tokens: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05}.safetensors"

    def of(self, documents: Mapping[str, Sequence[Document]]) -> Sequence[Document]:
        return documents[self.split][self.start : self.stop]


def parts_of(documents: Mapping[str, Sequence[Document]]) -> list[Part]:
    """Runs of whole documents of about SHARD_TOKENS tokens."""
    parts = []
    for split in SPLITS:
        of_split = documents.get(split, ())
        number = start = held = 0
        for stop, document in enumerate(of_split, 1):
            held += len(document.tokens_N)
            if held >= SHARD_TOKENS or stop == len(of_split):
                parts.append(Part(split, number, start, stop, held))
                number, start, held = number + 1, stop, 0
    return parts


def build(
    folder: Path,
    wanted: Plan,
    source: Source,
    documents: Mapping[str, Sequence[Document]],
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[int]:
    """Write this process's missing shards; yields the number of tokens of each finished batch."""
    for part in parts_of(documents)[rank::world]:
        path = folder / part.file
        if path.exists():
            yield part.tokens
            continue
        batch = part.of(documents)
        targets = yield from _targets(wanted, source, part, batch)
        atomic.write_file(path, lambda temporary: _write_shard(temporary, batch, targets))  # noqa: B023


def shard_bytes(
    wanted: Plan, source: Source, part: Part, documents: Mapping[str, Sequence[Document]]
) -> bytes:
    """The content of one shard's file, for a process that does not write files itself."""
    batch = part.of(documents)
    reading = _targets(wanted, source, part, batch)
    while True:
        try:
            next(reading)
        except StopIteration as ended:
            return _packed_shard(batch, ended.value)


def _targets(
    wanted: Plan, source: Source, part: Part, batch: Sequence[Document]
) -> Generator[int, None, list[Targets]]:
    """The targets of each document of a part; yields the number of tokens of each batch."""
    by_index: dict[int, Targets] = {}
    for indices in batches_of(batch):
        some = [batch[index] for index in indices]
        seeds = [_seed(wanted, part.split, part.start + index) for index in indices]
        computed = source.targets(some, k=wanted.k, draws=wanted.draws, seeds=seeds)
        by_index |= zip(indices, computed, strict=True)
        yield sum(len(document.tokens_N) for document in some)
    return [by_index[index] for index in range(len(batch))]


def batches_of(documents: Sequence[Document]) -> Iterator[list[int]]:
    """Indices of the documents of each batch. Documents in a batch have similar lengths, to limit
    padding; the longest come first, so that running out of memory shows up at the start."""
    lengths = [len(document.tokens_N) for document in documents]
    indices = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(indices):
        many = max(TOKENS_AT_ONCE // lengths[indices[start]], 1)
        yield indices[start : start + many]
        start += many


def finish(
    folder: Path, wanted: Plan, documents: Mapping[str, Sequence[Document]], versions: Mapping
) -> Manifest:
    """Write the manifest, once all shards exist.

    Raises:
        StoreError: a shard is missing, or its counts are out of range.
    """
    shards = []
    for part in parts_of(documents):
        path = folder / part.file
        if not path.exists():
            raise StoreError(f"{path} is missing; run the build again.")
        batch = part.of(documents)
        shards.append(
            Shard(
                file=part.file,
                split=part.split,
                documents=len(batch),
                tokens=part.tokens,
                trained=sum(document.trained for document in batch),
                blake3=digest_of(path, within=folder),
            )
        )
    manifest = Manifest(plan=wanted, shards=tuple(shards), versions=dict(versions))
    manifest = replace(manifest, blake3=_digest_of(asdict(manifest)))
    atomic.write_text(folder / MANIFEST, _json(asdict(manifest)))
    (folder / PLAN).unlink(missing_ok=True)
    return manifest


def _seed(wanted: Plan, split: str, document: int) -> int:
    """A seed for each document, independent of the process and of other documents."""
    name = f"{wanted.seed} {split} {document}".encode()
    return int.from_bytes(blake3(name).digest(length=8), "little") >> 1


def _write_shard(path: Path, documents: Sequence[Document], parts: Sequence[Targets]) -> None:
    # save_file would leave temporary files with names of its own if it were killed.
    path.write_bytes(_packed_shard(documents, parts))


def _packed_shard(documents: Sequence[Document], parts: Sequence[Targets]) -> bytes:
    targets = Targets.concatenate(list(parts))
    tokens_N = np.concatenate([document.tokens_N for document in documents])
    tensors = {
        **_packed("tokens", tokens_N),
        "trained": np.concatenate([d.trained_N for d in documents]).astype(np.uint8),
        "document_ends": np.cumsum([len(d.tokens_N) for d in documents], dtype=np.int64),
        "trained_ends": np.cumsum([d.trained for d in documents], dtype=np.int64),
        **_packed("top_ids", targets.top_ids_TK),
        "top_logprobs": targets.top_logprobs_TK.astype(np.float16),
        **_packed("tail_ids", targets.tail_ids_TM),
        "tail_logprob": targets.tail_logprob_T.astype(np.float16),
        "token_logprob": targets.token_logprob_T.astype(np.float16),
        "entropy": targets.entropy_T.astype(np.float16),
    }
    return save({name: np.ascontiguousarray(each) for name, each in tensors.items()})


def _packed(name: str, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Token ids in three bytes: no vocabulary reaches 2^24."""
    return {f"{name}_low": ids.astype(np.uint16), f"{name}_high": (ids >> 16).astype(np.uint8)}


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


class TargetStore:
    """A finished store, read with memory mapping."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError: not a store, or an unfinished or damaged one."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: dict[str, list[_ShardFile]] = {split: [] for split in SPLITS}
        self.bytes = 0
        """Size of all shards."""
        for shard in self.manifest.shards:
            self.bytes += _checked_size(folder, shard, self.manifest.plan)
            self._files[shard.split].append(_ShardFile(folder, shard, self.manifest.plan))
        self._ends = {
            split: list(accumulate(file.shard.documents for file in files))
            for split, files in self._files.items()
        }

    def __len__(self) -> int:
        return self.count("train")

    def count(self, split: str) -> int:
        """Number of documents of a split."""
        ends = self._ends[split]
        return ends[-1] if ends else 0

    def __getitem__(self, key: tuple[str, int]) -> tuple[Document, Targets]:
        """(split, number) → the document and the targets of its trained positions.

        Raises:
            IndexError: no such number.
            StoreError: the shard does not match the manifest.
        """
        file, index = self._locate(*key)
        return file.read(index)

    def _locate(self, split: str, number: int) -> tuple["_ShardFile", int]:
        """The shard of a document, and the document's index in it."""
        if not 0 <= number < self.count(split):
            raise IndexError(f"{split} document {number} of {self.count(split)}")
        index = bisect_right(self._ends[split], number)
        before = self._ends[split][index - 1] if index else 0
        return self._files[split][index], number - before

    def lengths(self, split: str) -> list[int]:
        """Number of tokens of each document."""
        return [
            int(length)
            for file in self._files[split]
            for length in np.diff(file.document_ends_D, prepend=0)
        ]

    def trained(self, split: str) -> list[int]:
        """Number of trained tokens of each document."""
        return [
            int(count)
            for file in self._files[split]
            for count in np.diff(file.trained_ends_D, prepend=0)
        ]

    def trained_within(self, split: str, number: int, start: int, stop: int) -> int:
        """Number of trained tokens among the tokens `start` to `stop` of a document."""
        file, index = self._locate(split, number)
        return file.trained_within(index, start, stop)

    def token_digests(self, split: str) -> Iterator[bytes]:
        """A digest of the tokens of each document; nothing but tokens is read."""
        for file in self._files[split]:
            yield from file.token_digests()

    def verify(self) -> None:
        """Read every byte of every shard and compare it with the manifest.

        Raises:
            StoreError: names the first file that is missing or changed.
        """
        path = self.folder / MANIFEST
        try:
            text = read_text(path, within=self.folder, largest=LARGEST_MANIFEST)
            content = parse_json(text, str(path))
        except FileError as error:
            raise StoreError(with_advice(error, REBUILD)) from None
        if content.get("blake3") != _digest_of(content) or text != _json(content):
            raise StoreError(f"{path} is not the file that the build wrote; build it again.")
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if _digest_in(self.folder, shard) != shard.blake3:
                raise StoreError(f"{path} is not the file that the build wrote; build it again.")

    def belongs_to(self, *, tokenizer: str, template: str | None, vocabulary: int) -> None:
        """Refuse a model that tokenises text differently.

        Raises:
            StoreError: another tokenizer, another chat template, or a vocabulary too small.
        """
        of = self.manifest.plan
        why = mismatch(
            str(self.folder),
            tokenizer=(of.tokenizer, tokenizer),
            template=(of.template, template),
            vocabulary=(of.vocabulary, vocabulary),
        )
        if why is not None:
            raise StoreError(why)


def _checked_size(folder: Path, shard: Shard, plan: Plan) -> int:
    """The size of a shard's file in bytes, checked against the manifest's counts."""
    tensors = shard.tensor_bytes(plan)
    with _as_store_error(folder / shard.file):
        path = real_file(folder / shard.file, within=folder, largest=tensors + LARGEST_HEADER)
        size = path.stat().st_size
    if size <= tensors:
        raise StoreError(
            f"{folder / shard.file}: got {size:,} bytes; accepted: more than {tensors:,}, by the "
            f"counts of {MANIFEST}; {REBUILD}."
        )
    return size


def _digest_in(folder: Path, shard: Shard) -> str:
    with _as_store_error(folder / shard.file):
        return digest_of(folder / shard.file, within=folder)


@contextmanager
def _as_store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; {REBUILD}.") from None
    except FileError as error:
        raise StoreError(with_advice(error, REBUILD)) from None
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {REBUILD}.") from None


class _ShardFile:
    """One shard; opened at the first access, once in each process."""

    def __init__(self, folder: Path, shard: Shard, plan: Plan) -> None:
        self._folder, self.shard, self._plan = folder, shard, plan

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "shard": self.shard, "_plan": self._plan}

    @property
    def _path(self) -> Path:
        return self._folder / self.shard.file

    @cached_property
    def _open(self) -> Any:
        """The opened file; it must have exactly the tensors, dtypes and shapes given by the
        manifest."""
        wanted = self.shard.tensors(self._plan)
        with _as_store_error(self._path):
            largest = self.shard.tensor_bytes(self._plan) + LARGEST_HEADER
            path = real_file(self._path, within=self._folder, largest=largest)
            opened: Any = safe_open(path, framework="np")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        if shapes != wanted:
            differing = sorted(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
            raise self._error(f"the tensors {', '.join(differing)}"[:80], "those of its manifest")
        return opened

    @cached_property
    def document_ends_D(self) -> np.ndarray:
        return self._ends("document_ends", self.shard.tokens, least=2)

    @cached_property
    def trained_ends_D(self) -> np.ndarray:
        return self._ends("trained_ends", self.shard.trained, least=0)

    def _ends(self, name: str, total: int, *, least: int) -> np.ndarray:
        """The end of each document: must rise by at least `least` each, up to `total`."""
        ends_D = self._open.get_tensor(name)
        if int(ends_D[-1]) != total or (np.diff(ends_D, prepend=0) < least).any():
            raise self._error(f"{name} that do not rise to {total}", "ends of documents in order")
        return ends_D

    def _error(self, got: str, accepted: str) -> StoreError:
        return StoreError(f"{self._path}: got {got}; accepted: {accepted}; {REBUILD}.")

    def read(self, index: int) -> tuple[Document, Targets]:
        tokens, trained = _span(self.document_ends_D, index), _span(self.trained_ends_D, index)
        tokens_N = self._ids("tokens", tokens).astype(np.int32)
        trained_N = self._slice("trained", tokens).astype(bool)
        targets = Targets(
            top_ids_TK=self._ids("top_ids", trained),
            top_logprobs_TK=self._slice("top_logprobs", trained).astype(np.float32),
            tail_ids_TM=self._ids("tail_ids", trained),
            tail_logprob_T=self._slice("tail_logprob", trained).astype(np.float32),
            token_logprob_T=self._slice("token_logprob", trained).astype(np.float32),
            entropy_T=self._slice("entropy", trained).astype(np.float32),
        )
        if trained_N[0] or int(trained_N.sum()) != len(targets):
            raise self._error("marks of trained tokens without targets", "a target for each")
        numbers = (getattr(targets, name) for name in NUMBERS)
        if any(np.isnan(each).any() for each in numbers) or np.isinf(targets.entropy_T).any():
            raise self._error("NaN in targets", "numbers")
        return Document(tokens_N, trained_N), targets

    def token_digests(self) -> Iterator[bytes]:
        low_N, high_N = (self._slice(f"tokens_{part}", slice(None)) for part in ("low", "high"))
        for index in range(len(self.document_ends_D)):
            span = _span(self.document_ends_D, index)
            yield blake3(low_N[span].tobytes() + high_N[span].tobytes()).digest()

    def trained_within(self, index: int, start: int, stop: int) -> int:
        first = _span(self.document_ends_D, index).start
        return int(np.count_nonzero(self._slice("trained", slice(first + start, first + stop))))

    def _slice(self, name: str, span: slice) -> np.ndarray:
        return self._open.get_slice(name)[span]

    def _ids(self, name: str, span: slice) -> np.ndarray:
        low, high = self._slice(f"{name}_low", span), self._slice(f"{name}_high", span)
        ids = low.astype(np.int64) | high.astype(np.int64) << 16
        if ids.size and ids.max() >= self._plan.vocabulary:
            raise self._error(
                f"the token {ids.max()} in {name}", f"below the vocabulary, {self._plan.vocabulary}"
            )
        return ids


def _span(ends_D: np.ndarray, index: int) -> slice:
    return slice(int(ends_D[index - 1]) if index else 0, int(ends_D[index]))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """BLAKE3 of a manifest's text with an empty digest field."""
    return blake3(_json({**manifest, "blake3": ""}).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the packages that computed the targets, by name."""
    from importlib.metadata import version

    return {"dftserve": __version__, **{n: version(n) for n in ("torch", "transformers", "numpy")}}


def difference(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """A description of the first field of `wanted` that differs in `written`; None if all are
    equal."""
    for name, here in wanted.items():
        there = written.get(name)
        if there != here:
            name, there, here = _innermost(name, there, here)
            return f"{name} is {_short(there)} there and {_short(here)} here"
    return None


def _innermost(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """The first difference inside two unequal values of JSON, with its path. Values of different
    kinds, and mappings with different keys or lists with different lengths, are the difference."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        inner = [(f"{name}.{key}", there[key], here[key]) for key in here]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        inner = [(f"{name}[{place}]", *pair) for place, pair in pairs]
    else:
        return name, there, here
    return next(_innermost(*each) for each in inner if each[1] != each[2])


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
