"""A target store: a folder of memory-mapped shards and the manifest that says what they hold.

    store = TargetStore(Path("targets/novels"))
    document, targets = store["train", 0]

    manifest.json                what it is: format, tokenizer, source, seed, shards with BLAKE3
    train-00000.safetensors …    documents and their targets, by split
    heldout-00000.safetensors …
    plan.json                    only while it is built: what the manifest will say of it all

A store may come from anywhere. Its files are regular ones that lie in its folder (`bounded_files`);
what the manifest counts is compared with the shards' sizes before anything is made of it, and what
a shard holds with the manifest when it is opened.

A shard appears whole or not at all, and depends on the plan and its own documents alone: a build
goes on where it was stopped, and several processes may share it. A token takes four bytes and its
target 3·(k + M) + 2·k + 6: 58 in all at k = M = 6.

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

from dftserve import __version__, atomic, settings
from dftserve.bounded_files import (
    INTEGERS,
    FileError,
    advised,
    is_plain_name,
    parse_json,
    read_json,
    read_text,
    real_file,
)
from dftserve.digest import digest_of
from dftserve.targets.document import Document
from dftserve.targets.limits import LARGEST_KEPT
from dftserve.targets.source import Source
from dftserve.targets.sparse import Targets

FORMAT = 1
MANIFEST, PLAN = "manifest.json", "plan.json"
SPLITS = ("train", "heldout")
SHARD_TOKENS = 1 << 20
TOKENS_AT_ONCE = 8192
"""That a source reads in one batch, padding included; a longer document is read alone."""
LARGEST_ID = (1 << 24) - 1
LARGEST_MANIFEST = 16 << 20
"""Bytes: some 60,000 shards, 6e10 tokens."""
LARGEST_DOCUMENT = 1 << 26
"""Tokens: what the largest text of a corpus comes to, at one for a byte."""
LARGEST_HEADER = 1 << 14
"""Bytes of a shard that are not tensors: its names and shapes take some 1,000."""
TAILS = ("sampled", "lumped")
ANEW = "build the store anew"
_BLAKE3 = re.compile(r"[0-9a-f]{64}")


class StoreError(ValueError):
    """A store that cannot be used: which, what is wrong with it, what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a store's content."""

    tokenizer: str
    """SHA-256; see `fingerprints`."""
    template: str | None
    """SHA-256 of the chat template; None for plain texts."""
    vocabulary: int
    source: Mapping[str, Any]
    """As the source describes itself."""
    corpus: Mapping[str, Any]
    """What was read, and what of it was kept and dropped."""
    corpus_blake3: str
    """Of all documents' tokens and marks."""
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
            accepted = settings.among(self.tail, TAILS)
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
            raise StoreError(f"file: got {self.file!r:.80}; accepted: a file beside the manifest.")
        if self.split not in SPLITS:
            raise StoreError(f"split: got {self.split!r:.80}; accepted: {', '.join(SPLITS)}.")
        most = SHARD_TOKENS + LARGEST_DOCUMENT
        if not 2 <= self.tokens <= most:
            raise StoreError(f"tokens: got {self.tokens}; accepted: from 2 to {most}.")
        if not 1 <= self.documents <= self.tokens // 2:
            raise StoreError(
                f"documents: got {self.documents} in {self.tokens} tokens; accepted: from 1 to one "
                "for two tokens."
            )
        if not 0 <= self.trained <= self.tokens - self.documents:
            raise StoreError(
                f"trained: got {self.trained} of {self.tokens} tokens in {self.documents} "
                "documents; accepted: at most all but the first of each."
            )
        if not _BLAKE3.fullmatch(self.blake3):
            raise StoreError(f"blake3: got {self.blake3!r:.80}; accepted: 64 hexadecimal digits.")

    def tensor_bytes(self, plan: Plan) -> int:
        """Of all its tensors, as `_write_shard` packs them."""
        return sum(
            shape[0] * (shape[1] if len(shape) > 1 else 1) * _BYTES[dtype]
            for dtype, shape in self.tensors(plan).values()
        )

    def tensors(self, plan: Plan) -> dict[str, tuple[str, list[int]]]:
        """The type and shape of each tensor of its file, in safetensors' words."""
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
"""Of `Targets`, in nats."""
_BYTES = {"U8": 1, "U16": 2, "F16": 2, "I64": 8}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    plan: Plan
    shards: tuple[Shard, ...]
    versions: Mapping[str, str]
    blake3: str = ""
    """Of all of the above, as it is written; `TargetStore.verify` compares it."""

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises StoreError where there is none, or it is not what `build` writes."""
        path = folder / MANIFEST
        if not path.is_symlink() and not path.exists():
            unfinished = (folder / PLAN).exists()
            why = (
                "is unfinished; run its build again"
                if unfinished
                else f"has no {MANIFEST}; give the --out of a build"
            )
            raise StoreError(f"the target store {folder} {why}.")
        try:
            content = read_json(path, within=folder, largest=LARGEST_MANIFEST)
            manifest = settings.load(cls, content, str(path))
        except ValueError as error:
            raise StoreError(advised(error, ANEW)) from None
        if manifest.plan.format != FORMAT:
            raise StoreError(
                f"{path}: got the format {manifest.plan.format}; accepted: {FORMAT}; {ANEW}."
            )
        names = [shard.file for shard in manifest.shards]
        if len(set(names)) < len(names):
            raise StoreError(f"{path}: got the same shard twice; accepted: each once; {ANEW}.")
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
    """What a build from this source and these documents will hold.

    Raises:
        StoreError: no documents to train on, or token ids beyond the source's vocabulary.
    """
    if not documents.get("train"):
        raise StoreError("the corpus has no document to train on; give it more text.")
    digest = blake3()
    for split in SPLITS:
        for document in documents.get(split, ()):
            highest = int(document.tokens_N.max())
            if highest >= source.vocabulary:
                raise StoreError(
                    f"the text holds the token {highest}; the source knows {source.vocabulary} "
                    "tokens: tokenizer and source do not belong together."
                )
            if len(document.tokens_N) > LARGEST_DOCUMENT:
                raise StoreError(
                    f"a text has {len(document.tokens_N)} tokens; accepted: at most "
                    f"{LARGEST_DOCUMENT}; cut it (--max-tokens)."
                )
            digest.update(split.encode())
            digest.update(document.tokens_N.tobytes())
            digest.update(document.trained_N.tobytes())
    if source.vocabulary > LARGEST_ID:
        raise StoreError(f"a vocabulary of {source.vocabulary}; accepted: below {LARGEST_ID}.")
    return Plan(
        tokenizer=tokenizer,
        template=template,
        vocabulary=source.vocabulary,
        source=source.describe(),
        corpus=corpus,
        corpus_blake3=digest.hexdigest(),
        seed=seed,
        k=min(k, source.vocabulary),
        draws=draws if source.tail == "sampled" else 0,
        tail=source.tail,
    )


def write(
    folder: Path, wanted: Plan, source: Source, documents: Mapping[str, Sequence[Document]]
) -> Manifest:
    """A whole store, built in this process; raises as `begin` and `finish`."""
    begin(folder, wanted)
    for _ in build(folder, wanted, source, documents):
        pass
    return finish(folder, wanted, documents, versions())


def begin(folder: Path, wanted: Plan) -> None:
    """Start a build, or go on with one of the same plan.

    Raises:
        StoreError: the folder holds a build of another plan, or something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / MANIFEST, folder / PLAN):
        if path.exists():
            found = _plan_in(folder, path)
            other = difference(found, json.loads(_json(asdict(wanted))))
            if other:
                raise StoreError(
                    f"{folder} holds a store of another plan: {other}. Choose another folder, "
                    "or remove this one."
                )
            if path.name == MANIFEST:
                # There still where a kill came between the two.
                (folder / PLAN).unlink(missing_ok=True)
            return
    # A kill may have left what was to become the plan, and nothing else.
    if any(path.name != PLAN + atomic.PARTIAL for path in folder.iterdir()):
        raise StoreError(f"{folder} is neither empty nor a target store; choose another folder.")
    atomic.write_text(folder / PLAN, _json(asdict(wanted)))


def begun(folder: Path) -> Mapping[str, Any]:
    """The plan of the build that the folder holds, finished or not; empty where it holds none.

    Raises:
        StoreError: what is there is no plan.
    """
    for path in (folder / MANIFEST, folder / PLAN):
        if path.exists():
            return _plan_in(folder, path)
    return {}


def _plan_in(folder: Path, path: Path) -> Mapping[str, Any]:
    """What a manifest or an unfinished build says that it is of."""
    try:
        found = read_json(path, within=folder, largest=LARGEST_MANIFEST)
    except FileError as error:
        raise StoreError(advised(error, "choose another folder, or remove this one")) from None
    plan = found.get("plan", found) if isinstance(found, Mapping) else None
    if not isinstance(plan, Mapping):
        raise StoreError(f"{path} is no plan of a store; choose another folder, or remove it.")
    return plan


@dataclass(frozen=True)
class Part:
    """The run of documents that becomes one shard, whoever builds it."""

    split: str
    number: int
    """Of the split's shards."""
    start: int
    stop: int
    """Of the split's documents."""
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
    """Write this process's missing shards; yields the tokens of each batch when it is done."""
    for part in parts_of(documents)[rank::world]:
        path = folder / part.file
        if path.exists():
            yield part.tokens
            continue
        batch = part.of(documents)
        found = yield from _targets(wanted, source, part, batch)
        atomic.write_file(path, lambda temporary: _write_shard(temporary, batch, found))  # noqa: B023


def shard_bytes(
    wanted: Plan, source: Source, part: Part, documents: Mapping[str, Sequence[Document]]
) -> bytes:
    """The content of one shard's file, for a process that does not write it itself."""
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
    """Of each document of a part; yields the tokens of what was read together."""
    found: dict[int, Targets] = {}
    for places in batches_of(batch):
        some = [batch[place] for place in places]
        seeds = [_seed(wanted, part.split, part.start + place) for place in places]
        given = source.targets(some, k=wanted.k, draws=wanted.draws, seeds=seeds)
        found |= zip(places, given, strict=True)
        yield sum(len(document.tokens_N) for document in some)
    return [found[place] for place in range(len(batch))]


def batches_of(documents: Sequence[Document]) -> Iterator[list[int]]:
    """The places of documents that are read together: of like lengths, since a batch is as wide as
    its longest; the longest come first, so that memory that suffices for them suffices."""
    lengths = [len(document.tokens_N) for document in documents]
    places = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    start = 0
    while start < len(places):
        many = max(TOKENS_AT_ONCE // lengths[places[start]], 1)
        yield places[start : start + many]
        start += many


def finish(
    folder: Path, wanted: Plan, documents: Mapping[str, Sequence[Document]], versions: Mapping
) -> Manifest:
    """Write the manifest, once every shard is there.

    Raises:
        StoreError: a shard is missing, or is not one of this plan's.
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
    """Each document's own, whoever builds it and whatever came before."""
    name = f"{wanted.seed} {split} {document}".encode()
    return int.from_bytes(blake3(name).digest(length=8), "little") >> 1


def _write_shard(path: Path, documents: Sequence[Document], parts: Sequence[Targets]) -> None:
    # Not by save_file, which leaves files of its own names behind when it is killed.
    path.write_bytes(_packed_shard(documents, parts))


def _packed_shard(documents: Sequence[Document], parts: Sequence[Targets]) -> bytes:
    targets = Targets.joined(list(parts))
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
    """A finished store, read through memory maps."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError: no store, an unfinished or a damaged one."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: dict[str, list[_ShardFile]] = {split: [] for split in SPLITS}
        self.bytes = 0
        """Of all shards."""
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
        """Documents of a split."""
        ends = self._ends[split]
        return ends[-1] if ends else 0

    def __getitem__(self, key: tuple[str, int]) -> tuple[Document, Targets]:
        """(split, number) → the document and the targets of its trained positions.

        Raises:
            IndexError: no such number.
            StoreError: the shard is not what the manifest says.
        """
        file, place = self._found(*key)
        return file.read(place)

    def _found(self, split: str, number: int) -> tuple["_ShardFile", int]:
        """The shard of a document, and the document's place in it."""
        if not 0 <= number < self.count(split):
            raise IndexError(f"{split} document {number} of {self.count(split)}")
        place = bisect_right(self._ends[split], number)
        before = self._ends[split][place - 1] if place else 0
        return self._files[split][place], number - before

    def lengths(self, split: str) -> list[int]:
        """Tokens of each document."""
        return [
            int(length)
            for file in self._files[split]
            for length in np.diff(file.document_ends_D, prepend=0)
        ]

    def trained(self, split: str) -> list[int]:
        """Trained tokens of each document."""
        return [
            int(count)
            for file in self._files[split]
            for count in np.diff(file.trained_ends_D, prepend=0)
        ]

    def trained_within(self, split: str, number: int, start: int, stop: int) -> int:
        """Trained tokens among the tokens `start` to `stop` of a document."""
        file, place = self._found(split, number)
        return file.trained_within(place, start, stop)

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
            raise StoreError(advised(error, ANEW)) from None
        if content.get("blake3") != _digest_of(content) or text != _json(content):
            raise StoreError(f"{path} is not the file that the build wrote; build it anew.")
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if _digest_in(self.folder, shard) != shard.blake3:
                raise StoreError(f"{path} is not the file that the build wrote; build it anew.")

    def belongs_to(self, *, tokenizer: str, template: str | None, vocabulary: int) -> None:
        """Refuse a model that reads text otherwise.

        Raises:
            StoreError: another tokenizer, another chat template, or a vocabulary too small.
        """
        of = self.manifest.plan
        if of.tokenizer != tokenizer:
            raise StoreError(
                f"{self.folder} was built with another tokenizer ({of.tokenizer[:12]}…) than the "
                f"model's ({tokenizer[:12]}…); build it with the model's."
            )
        if of.template is not None and of.template != template:
            raise StoreError(
                f"{self.folder} was built with another chat template than the model's; build it "
                "with the model's."
            )
        if of.vocabulary > vocabulary:
            raise StoreError(
                f"{self.folder} names tokens up to {of.vocabulary - 1}; the model knows "
                f"{vocabulary}. Build the store with the model's tokenizer."
            )


def _checked_size(folder: Path, shard: Shard, plan: Plan) -> int:
    """Bytes of a shard's file, which are those that the manifest's counts come to."""
    tensors = shard.tensor_bytes(plan)
    with _as_store_error(folder / shard.file):
        path = real_file(folder / shard.file, within=folder, largest=tensors + LARGEST_HEADER)
        size = path.stat().st_size
    if size <= tensors:
        raise StoreError(
            f"{folder / shard.file}: got {size:,} bytes; accepted: more than {tensors:,}, by the "
            f"counts of {MANIFEST}; {ANEW}."
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
        raise StoreError(f"{path} is missing; {ANEW}.") from None
    except FileError as error:
        raise StoreError(advised(error, ANEW)) from None
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({error}); {ANEW}.") from None


class _ShardFile:
    """One shard; opened when first read, once in each process."""

    def __init__(self, folder: Path, shard: Shard, plan: Plan) -> None:
        self._folder, self.shard, self._plan = folder, shard, plan

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "shard": self.shard, "_plan": self._plan}

    @property
    def _path(self) -> Path:
        return self._folder / self.shard.file

    @cached_property
    def _open(self) -> Any:
        """With tensors of the types and shapes that follow from the manifest, and no others."""
        wanted = self.shard.tensors(self._plan)
        with _as_store_error(self._path):
            largest = self.shard.tensor_bytes(self._plan) + LARGEST_HEADER
            path = real_file(self._path, within=self._folder, largest=largest)
            opened: Any = safe_open(path, framework="np")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
        if found != wanted:
            differing = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise self._other(f"the tensors {', '.join(differing)}"[:80], "those of its manifest")
        return opened

    @cached_property
    def document_ends_D(self) -> np.ndarray:
        return self._ends("document_ends", self.shard.tokens, least=2)

    @cached_property
    def trained_ends_D(self) -> np.ndarray:
        return self._ends("trained_ends", self.shard.trained, least=0)

    def _ends(self, name: str, total: int, *, least: int) -> np.ndarray:
        """Where each document ends: rising by `least` or more, up to `total`."""
        ends_D = self._open.get_tensor(name)
        if int(ends_D[-1]) != total or (np.diff(ends_D, prepend=0) < least).any():
            raise self._other(f"{name} that do not rise to {total}", "ends of documents in order")
        return ends_D

    def _other(self, got: str, accepted: str) -> StoreError:
        return StoreError(f"{self._path}: got {got}; accepted: {accepted}; {ANEW}.")

    def read(self, place: int) -> tuple[Document, Targets]:
        tokens, trained = _span(self.document_ends_D, place), _span(self.trained_ends_D, place)
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
            raise self._other("marks of trained tokens without targets", "a target for each")
        numbers = (getattr(targets, name) for name in NUMBERS)
        if any(np.isnan(each).any() for each in numbers) or np.isinf(targets.entropy_T).any():
            raise self._other("NaN in targets", "numbers")
        return Document(tokens_N, trained_N), targets

    def trained_within(self, place: int, start: int, stop: int) -> int:
        first = _span(self.document_ends_D, place).start
        return int(np.count_nonzero(self._slice("trained", slice(first + start, first + stop))))

    def _slice(self, name: str, span: slice) -> np.ndarray:
        return self._open.get_slice(name)[span]

    def _ids(self, name: str, span: slice) -> np.ndarray:
        low, high = self._slice(f"{name}_low", span), self._slice(f"{name}_high", span)
        ids = low.astype(np.int64) | high.astype(np.int64) << 16
        if ids.size and ids.max() >= self._plan.vocabulary:
            raise self._other(
                f"the token {ids.max()} in {name}", f"below the vocabulary, {self._plan.vocabulary}"
            )
        return ids


def _span(ends_D: np.ndarray, place: int) -> slice:
    return slice(int(ends_D[place - 1]) if place else 0, int(ends_D[place]))


def _digest_of(manifest: Mapping[str, Any]) -> str:
    """BLAKE3 of a manifest's text, with nothing where the digest will stand."""
    return blake3(_json({**manifest, "blake3": ""}).encode()).hexdigest()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"dftserve": __version__, **{n: version(n) for n in ("torch", "transformers", "numpy")}}


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first thing that is wanted and not found, in words."""
    for name in wanted:
        if found.get(name) != wanted[name]:
            return f"{name} is {_cut(found.get(name))} there and {_cut(wanted[name])} here"
    return None


def _cut(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
