"""A style profile: phrases with their automaton, a tilt of word choice, and its folder.

    profile = read(Path("profiles/novels"))

    profile.json           format, fingerprints, phrases, settings, counts, checksums
    tensors.safetensors    every array of `Profile`, and the `Harms` that its factors come from

Profiles are untrusted input. Both files must be regular files in the profile's folder
(`bounded_files`), have bounded sizes, and match their checksums; every index in them is checked
before it is used.

Shapes: V token ids of the tokenizer, A automaton states (0 is the root), N entries of their rows,
C contexts, M bigrams in them, P phrases, H (state, phrase) pairs. An engine's rows of logits may
be wider than V: the additional ids lead to the root, with factor 1 and no tilt.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from dftserve import __version__, atomic, settings
from dftserve.bounded_files import FileError, parse_json, read_bytes, read_text, with_advice
from dftserve.fingerprints import mismatch

FORMAT = 1
MANIFEST, TENSORS = "profile.json", "tensors.safetensors"
REBUILD = "build the profile again"
MOST_PHRASES = 100_000
"""Maximum number of phrases."""
LARGEST_LOG_RATIO = 10.0
"""λ in nats: no phrase is made more than 22,026 times rarer."""
LARGEST_DELTA = 10.0
"""|δ| in nats."""
LARGEST_VOCABULARY = (1 << 24) - 1
"""As in a target store."""
MOST_STATES = 1 << 24
"""Maximum number of the automaton's states."""
MOST_ENTRIES = 1 << 27
"""Maximum length of a tensor that the constants above do not bound."""
LARGEST_MANIFEST = 64 << 20
LARGEST_TENSORS = 2 << 30
"""Maximum bytes of profile.json and of the tensors."""
LARGEST_HEADER = 1 << 14
"""Maximum bytes of the safetensors header; its names and shapes take about 1,500."""
LONGEST_PHRASE = 200
"""Characters."""
MOST_OF_DEFAULTS = {"strength": 1, "max_kl": 10}
"""Maxima of the values for requests that give none; both are at least 0."""
MODEL_NAME = "a name of at most 255 printable characters"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ProfileError(ValueError):
    """A profile cannot be used; the message says which, what is wrong, and what to do."""


@dataclass(frozen=True)
class Phrase:
    """A phrase that the model writes more often than people do."""

    text: str
    log_ratio: float
    """λ ≥ 0, in nats: at strength 1 the phrase occurs e^−λ times as often."""
    model_rate: float
    """Occurrences per 1,000 words of the model's own answers."""
    human_rate: float

    def __post_init__(self) -> None:
        if not (self.text.strip() and len(self.text) <= LONGEST_PHRASE):
            _refuse("phrase", f"{self.text!r:.80}", f"text of at most {LONGEST_PHRASE} characters")
        if not 0 <= self.log_ratio <= LARGEST_LOG_RATIO:
            where = f"the log ratio of {self.text!r:.80}"
            _refuse(where, f"{self.log_ratio}", f"0 to {LARGEST_LOG_RATIO:g} nats")
        for rate in (self.model_rate, self.human_rate):
            if not 0 <= rate <= 1000:
                _refuse(f"a rate of {self.text!r:.80}", f"{rate}", "0 to 1,000 per 1,000 words")


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """The data that decoding applies, validated on construction.

    Raises:
        ProfileError: an array has the wrong type or shape, an index is out of range, rows are not
            sorted, or a number is not finite or out of bounds.
    """

    name: str
    vocabulary: int
    """V: token ids of the tokenizer."""
    tokenizer_fingerprint: str
    """See `dftserve.fingerprints`."""
    template_fingerprint: str | None
    model: str
    """The name of the model whose answers were counted; for display only."""
    phrases: tuple[Phrase, ...]

    root_next_V: NDArray[np.int32]
    """The state that each token leads to from the root; 0: the root."""
    root_log_factor_V: NDArray[np.float32]
    """ln Π_k [1 − (1 − e^−λ_k)·h_k(state after the token)], ≤ 0, for each token at the root, at
    strength 1."""
    row_start_A: NDArray[np.int32]
    """[A + 1]: a state's row is the entries from its start up to the next state's start, with its
    tokens in ascending order. It has an entry for every token that leads to another state than it
    does from the root."""
    row_token_N: NDArray[np.int32]
    row_next_N: NDArray[np.int32]
    row_log_factor_N: NDArray[np.float32]

    unigram_V: NDArray[np.float32]
    """δ(v) in nats; 0 where nothing is known."""
    bigram_context_C: NDArray[np.int32]
    """Tokens u, in ascending order."""
    bigram_start_C: NDArray[np.int32]
    """[C + 1]: the start of each context's entries; the tokens of a context ascend."""
    bigram_token_M: NDArray[np.int32]
    bigram_delta_M: NDArray[np.float32]
    """δ(v|u), which replaces the unigram's."""

    strength: float = 1.0
    """For requests that give none."""
    max_kl: float = 0.05
    """Nats per token that the tilt may cost, for requests that give no bound."""

    def __post_init__(self) -> None:
        _check_names(self)
        if not 0 < self.vocabulary <= LARGEST_VOCABULARY:
            _refuse("vocabulary", f"{self.vocabulary}", f"1 to {LARGEST_VOCABULARY:,}")
        if len(self.phrases) > MOST_PHRASES:
            _refuse("phrases", f"{len(self.phrases):,}", f"at most {MOST_PHRASES:,}")
        for name, most in MOST_OF_DEFAULTS.items():
            value = getattr(self, name)
            if not 0 <= value <= most:
                _refuse(name, f"{value}", f"0 to {most}")
        _check_automaton(self)
        _check_tilt(self)

    @property
    def states(self) -> int:
        """A."""
        return len(self.row_start_A) - 1

    def belongs_to(self, *, tokenizer: str, template: str | None, vocabulary: int) -> None:
        """Check that the profile was built for a model's tokenizer and chat template.

        Args:
            tokenizer, template: the model's fingerprints.
            vocabulary: columns of its logits.

        Raises:
            ProfileError: the tokenizer or the chat template is another one, or there are too few
                columns.
        """
        why = mismatch(
            f"the style {self.name!r}",
            tokenizer=(self.tokenizer_fingerprint, tokenizer),
            template=(self.template_fingerprint, template),
            vocabulary=(self.vocabulary, vocabulary),
        )
        if why is not None:
            raise ProfileError(why)

    def step(self, state: int, token: int) -> tuple[int, float]:
        """The next state and the log factor of a token; the reference for the engine's code."""
        entries = slice(self.row_start_A[state], self.row_start_A[state + 1])
        place = int(np.searchsorted(self.row_token_N[entries], token)) + entries.start
        if place < entries.stop and self.row_token_N[place] == token:
            return int(self.row_next_N[place]), float(self.row_log_factor_N[place])
        if token >= self.vocabulary:
            return 0, 0.0
        return int(self.root_next_V[token]), float(self.root_log_factor_V[token])

    def delta(self, context: int | None, token: int) -> float:
        """δ of a token after another one; the reference for the engine's code."""
        if token >= self.vocabulary:
            return 0.0
        place = 0 if context is None else int(np.searchsorted(self.bigram_context_C, context))
        known = context is not None and place < len(self.bigram_context_C)
        if known and self.bigram_context_C[place] == context:
            entries = slice(self.bigram_start_C[place], self.bigram_start_C[place + 1])
            at = int(np.searchsorted(self.bigram_token_M[entries], token)) + entries.start
            if at < entries.stop and self.bigram_token_M[at] == token:
                return float(self.bigram_delta_M[at])
        return float(self.unigram_V[token])


@dataclass(frozen=True, eq=False)
class Harms:
    """h_k(s): the chance that phrase k is completed from state s, for each pair where it is begun.

    `start_A`, int32 [A + 1], is the start of each state's pairs, whose phrases ascend.
    """

    start_A: NDArray[np.int32]
    phrase_H: NDArray[np.int32]
    chance_H: NDArray[np.float32]
    """In [0, 1]; 1 in a state that completes the phrase."""

    def log_factors(self, log_ratio_P: NDArray) -> NDArray[np.float32]:
        """float32 [A]: ln Π_k [1 − (1 − e^−λ_k)·h_k(s)] for each state s; summed in fp64."""
        lost_H = -np.expm1(-np.asarray(log_ratio_P, np.float64)[self.phrase_H]) * self.chance_H
        # As λ ≤ 10, 1 − lost_H is above 0 even where h is 1.
        sums_H = np.concatenate([[0.0], np.cumsum(np.log1p(-lost_H))])
        factor_A = sums_H[self.start_A[1:]] - sums_H[self.start_A[:-1]]
        return np.minimum(factor_A, 0).astype(np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """A profile with everything else that its folder stores."""

    profile: Profile
    harms: Harms
    counts: Mapping[str, Any] = field(default_factory=dict)
    """Words and texts of each side, counts by phrase, recall, and what is only reported."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The settings that it was built with."""
    versions: Mapping[str, str] = field(default_factory=dict)


def with_log_ratios(stored: Stored, log_ratio_P: NDArray) -> Profile:
    """The profile with other λ: phrases and factors are recomputed, all else is unchanged.

    Raises:
        ProfileError: a λ is out of bounds.
    """
    profile = stored.profile
    pairs = zip(profile.phrases, np.asarray(log_ratio_P, float).tolist(), strict=True)
    phrases = tuple(replace(phrase, log_ratio=value) for phrase, value in pairs)
    factor_A = stored.harms.log_factors(log_ratio_P)
    return replace(
        profile,
        phrases=phrases,
        root_log_factor_V=factor_A[profile.root_next_V],
        row_log_factor_N=factor_A[profile.row_next_N],
    )


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────


def is_name(name: str) -> bool:
    """Whether a profile may have this name."""
    return _NAME.fullmatch(name) is not None


def is_model_name(name: str) -> bool:
    """Whether a profile may be of a model of this name: `MODEL_NAME`."""
    return bool(name) and len(name) <= 255 and name.isprintable()


def _check_names(profile: Profile) -> None:
    if not is_name(profile.name):
        _refuse("name", f"{profile.name!r:.80}", "up to 64 letters, digits, '.', '_' and '-'")
    fingerprints = [profile.tokenizer_fingerprint]
    if profile.template_fingerprint is not None:
        fingerprints.append(profile.template_fingerprint)
    for each in fingerprints:
        if not _SHA256.fullmatch(each):
            _refuse("fingerprint", f"{each!r:.80}", "64 hexadecimal digits")
    if not is_model_name(profile.model):
        _refuse("model", f"{profile.model!r:.80}", MODEL_NAME)


def _check_automaton(profile: Profile) -> None:
    V = profile.vocabulary
    states = profile.states
    if not 1 <= states <= MOST_STATES:
        _refuse("row_start_A", f"{states} states", f"1 to {MOST_STATES:,}")
    _check_kind("root_next_V", profile.root_next_V, np.int32, V)
    _check_range("root_next_V", profile.root_next_V, states)
    _check_kind("root_log_factor_V", profile.root_log_factor_V, np.float32, V)
    N = len(profile.row_token_N)
    _check_rows("row_start_A", profile.row_start_A, states, N)
    _check_kind("row_token_N", profile.row_token_N, np.int32, N)
    _check_range("row_token_N", profile.row_token_N, V)
    _check_rising("row_token_N", profile.row_token_N, profile.row_start_A)
    _check_kind("row_next_N", profile.row_next_N, np.int32, N)
    _check_range("row_next_N", profile.row_next_N, states)
    _check_kind("row_log_factor_N", profile.row_log_factor_N, np.float32, N)
    for name in ("root_log_factor_V", "row_log_factor_N"):
        factors = getattr(profile, name)
        if not (np.isfinite(factors) & (factors <= 0)).all():
            _refuse(name, "positive, infinite or NaN values", "finite log factors up to 0")


def _check_tilt(profile: Profile) -> None:
    V = profile.vocabulary
    _check_kind("unigram_V", profile.unigram_V, np.float32, V)
    C, M = len(profile.bigram_context_C), len(profile.bigram_token_M)
    _check_kind("bigram_context_C", profile.bigram_context_C, np.int32, C)
    _check_range("bigram_context_C", profile.bigram_context_C, V)
    _check_rising("bigram_context_C", profile.bigram_context_C, np.array([0, C]))
    _check_rows("bigram_start_C", profile.bigram_start_C, C, M)
    _check_kind("bigram_token_M", profile.bigram_token_M, np.int32, M)
    _check_range("bigram_token_M", profile.bigram_token_M, V)
    _check_rising("bigram_token_M", profile.bigram_token_M, profile.bigram_start_C)
    _check_kind("bigram_delta_M", profile.bigram_delta_M, np.float32, M)
    for name in ("unigram_V", "bigram_delta_M"):
        # NaN compares false.
        if not (np.abs(getattr(profile, name)) <= LARGEST_DELTA).all():
            _refuse(name, "other numbers", f"-{LARGEST_DELTA:g} to {LARGEST_DELTA:g} nats")


def _check_harms(harms: Harms, states: int, phrases: int) -> None:
    H = len(harms.phrase_H)
    _check_rows("harm_start_A", harms.start_A, states, H)
    _check_kind("harm_phrase_H", harms.phrase_H, np.int32, H)
    _check_range("harm_phrase_H", harms.phrase_H, phrases)
    _check_rising("harm_phrase_H", harms.phrase_H, harms.start_A)
    _check_kind("harm_chance_H", harms.chance_H, np.float32, H)
    if not ((harms.chance_H >= 0) & (harms.chance_H <= 1)).all():
        _refuse("harm_chance_H", "other numbers", "chances from 0 to 1")


def _check_kind(name: str, array: NDArray, dtype: Any, length: int) -> None:
    if array.dtype != dtype or array.shape != (length,):
        got = f"{array.dtype} {list(array.shape)}"
        _refuse(name, got, f"{np.dtype(dtype)} [{length}]")


def _check_range(name: str, ids: NDArray, stop: int) -> None:
    if len(ids) and not (ids.min() >= 0 and ids.max() < stop):
        _refuse(name, f"{ids.min()} to {ids.max()}", f"0 to {stop - 1}")


def _check_rows(name: str, start: NDArray, rows: int, entries: int) -> None:
    _check_kind(name, start, np.int32, rows + 1)
    if start[0] != 0 or start[-1] != entries or (np.diff(start) < 0).any():
        _refuse(name, "other starts", f"starts that ascend from 0 to {entries}")


def _check_rising(name: str, ids: NDArray, start: NDArray) -> None:
    falls_N = np.zeros(len(ids), bool)
    falls_N[1:] = np.diff(ids) <= 0
    begins = start[:-1]
    falls_N[begins[begins < len(ids)]] = False
    if falls_N.any():
        _refuse(name, "ids out of order", "ids that ascend in each row")


def _refuse(where: str, got: str, accepted: str) -> NoReturn:
    raise ProfileError(f"{where}: got {got}; accepted: {accepted}; {REBUILD}.")


# ── The folder ───────────────────────────────────────────────────────────────────────────────────

_TENSORS: Mapping[str, tuple[type, str]] = {
    "root_next_V": (np.int32, "vocabulary"),
    "root_log_factor_V": (np.float32, "vocabulary"),
    "row_start_A": (np.int32, "states"),
    "row_token_N": (np.int32, "entries"),
    "row_next_N": (np.int32, "entries"),
    "row_log_factor_N": (np.float32, "entries"),
    "unigram_V": (np.float32, "vocabulary"),
    "bigram_context_C": (np.int32, "contexts"),
    "bigram_start_C": (np.int32, "contexts"),
    "bigram_token_M": (np.int32, "bigrams"),
    "bigram_delta_M": (np.float32, "bigrams"),
    "harm_start_A": (np.int32, "states"),
    "harm_phrase_H": (np.int32, "harms"),
    "harm_chance_H": (np.float32, "harms"),
}
"""Type and size of each tensor; `*_start_*` have one entry more."""
_HARMS = {"start_A": "harm_start_A", "phrase_H": "harm_phrase_H", "chance_H": "harm_chance_H"}


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    vocabulary: int
    states: int
    entries: int
    contexts: int
    bigrams: int
    harms: int

    def __post_init__(self) -> None:
        bounds = {"vocabulary": LARGEST_VOCABULARY, "states": MOST_STATES}
        for name, value in asdict(self).items():
            most = bounds.get(name, MOST_ENTRIES)
            if not 0 <= value <= most:
                _refuse(name, f"{value}", f"0 to {most:,}")
        if self.tensor_bytes() > LARGEST_TENSORS:
            _refuse(
                "sizes", f"{self.tensor_bytes():,} bytes of tensors", f"{LARGEST_TENSORS:,} bytes"
            )

    def length(self, tensor: str) -> int:
        return getattr(self, _TENSORS[tensor][1]) + ("_start_" in tensor)

    def tensor_bytes(self) -> int:
        return sum(4 * self.length(name) for name in _TENSORS)


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """The content of profile.json."""

    format: int
    name: str
    model: str
    vocabulary: int
    tokenizer_fingerprint: str
    template_fingerprint: str | None
    strength: float
    max_kl: float
    phrases: tuple[Phrase, ...]
    sizes: _Sizes
    counts: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    tensors_blake3: str
    blake3: str = ""
    """Checksum of the manifest as written, with an empty `blake3`."""


def write(folder: Path, stored: Stored) -> None:
    """Write a profile to `folder` atomically.

    Raises:
        FileExistsError: `folder` exists.
        ProfileError: `stored.harms` does not match the profile's states and phrases.
        OSError: the disk failed.
    """
    profile = stored.profile
    _check_harms(stored.harms, profile.states, len(profile.phrases))
    tensors = save_tensors(
        {name: np.ascontiguousarray(each) for name, each in _arrays(stored).items()}
    )
    manifest = {
        "format": FORMAT,
        **{name: getattr(profile, name) for name in _NAMED},
        "phrases": [asdict(phrase) for phrase in profile.phrases],
        "sizes": asdict(_sizes(stored)),
        "counts": stored.counts,
        "settings": stored.settings,
        "versions": stored.versions,
        "tensors_blake3": blake3(tensors).hexdigest(),
        "blake3": "",
    }
    manifest["blake3"] = _digest_of(manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.folder(folder) as temporary:
        (temporary / TENSORS).write_bytes(tensors)
        (temporary / MANIFEST).write_text(_json(manifest), encoding="utf-8")


_NAMED = (
    "name",
    "model",
    "vocabulary",
    "tokenizer_fingerprint",
    "template_fingerprint",
    "strength",
    "max_kl",
)


def read(folder: Path) -> Profile:
    """The profile in a folder; raises as `load`."""
    return load(folder).profile


def load(folder: Path) -> Stored:
    """The profile in a folder, with everything else that the folder stores.

    Raises:
        ProfileError: a file is missing, is not a regular file in the folder, is too large, is
            damaged, or is not what `write` writes; the message names the file and the reason.
    """
    manifest = _manifest(folder)
    arrays = _tensors(folder, manifest)
    harms = Harms(**{name: arrays.pop(tensor) for name, tensor in _HARMS.items()})
    try:
        profile = Profile(
            **{name: getattr(manifest, name) for name in _NAMED},
            phrases=manifest.phrases,
            **arrays,
        )
        _check_harms(harms, profile.states, len(profile.phrases))
    except ProfileError as error:
        raise ProfileError(f"{folder / TENSORS}: {error}") from None
    return Stored(
        profile=profile,
        harms=harms,
        counts=manifest.counts,
        settings=manifest.settings,
        versions=manifest.versions,
    )


def versions() -> dict[str, str]:
    """The versions of the packages that determine a profile."""
    return {"dftserve": __version__, **{n: version(n) for n in ("numpy", "tokenizers")}}


def _arrays(stored: Stored) -> dict[str, NDArray]:
    names = {tensor: name for name, tensor in _HARMS.items()}
    return {
        tensor: getattr(stored.harms, names[tensor])
        if tensor in names
        else getattr(stored.profile, tensor)
        for tensor in _TENSORS
    }


def _sizes(stored: Stored) -> _Sizes:
    profile = stored.profile
    return _Sizes(
        vocabulary=profile.vocabulary,
        states=profile.states,
        entries=len(profile.row_token_N),
        contexts=len(profile.bigram_context_C),
        bigrams=len(profile.bigram_token_M),
        harms=len(stored.harms.phrase_H),
    )


def _manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        text = read_text(path, within=folder, largest=LARGEST_MANIFEST)
        content = parse_json(text, str(path))
        named = content.get("phrases") if isinstance(content, dict) else None
        if isinstance(named, list) and len(named) > MOST_PHRASES:
            _refuse(f"{path}, phrases", f"{len(named):,}", f"at most {MOST_PHRASES:,}")
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            _refuse(f"{path}, format", f"{content['format']!r:.40}", f"{FORMAT}")
        manifest = settings.load(_Manifest, content, str(path))
    except FileNotFoundError:
        raise ProfileError(
            f"{folder} has no {MANIFEST}; give the --out of a `dftserve style build`."
        ) from None
    except OSError as error:
        raise ProfileError(f"{path} cannot be read ({error.strerror}); {REBUILD}.") from None
    except ValueError as error:
        message = str(error)  # The dataclasses' own errors include the advice already.
        raise ProfileError(message if REBUILD in message else with_advice(error, REBUILD)) from None
    if manifest.blake3 != _digest_of(content):
        raise ProfileError(f"{path} was changed: its checksum does not match; {REBUILD}.")
    if manifest.sizes.vocabulary != manifest.vocabulary:
        got = f"{manifest.sizes.vocabulary}"
        _refuse(f"{path}, sizes.vocabulary", got, f"{manifest.vocabulary}")
    return manifest


def _tensors(folder: Path, manifest: _Manifest) -> dict[str, Any]:
    path = folder / TENSORS
    largest = manifest.sizes.tensor_bytes() + LARGEST_HEADER
    try:
        content = read_bytes(path, within=folder, largest=largest)
        if blake3(content).hexdigest() != manifest.tensors_blake3:
            raise ProfileError(
                f"{path} was changed: the checksum in {MANIFEST} does not match; {REBUILD}."
            )
        arrays = load_tensors(content)
    except FileNotFoundError:
        raise ProfileError(f"{path} is missing; {REBUILD}.") from None
    except FileError as error:
        raise ProfileError(with_advice(error, REBUILD)) from None
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ProfileError(f"{path} cannot be read ({error}); {REBUILD}.") from None
    shapes = {name: (each.dtype.type, each.shape) for name, each in arrays.items()}
    wanted = {
        name: (dtype, (manifest.sizes.length(name),)) for name, (dtype, _) in _TENSORS.items()
    }
    if shapes != wanted:
        differing = sorted(n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n))
        _refuse(f"{path}", f"the tensors {', '.join(differing)}"[:80], f"those of {MANIFEST}")
    return arrays


def _digest_of(manifest: Mapping[str, Any]) -> str:
    # JSON may contain a lone surrogate, which "surrogatepass" encodes.
    content = _json({**manifest, "blake3": ""}).encode("utf-8", "surrogatepass")
    return blake3(content).hexdigest()


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
