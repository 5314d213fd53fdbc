"""Token classes of a vocabulary: whether a token begins a word, continues one, or neither.

    start    a word begins in the token: a letter after a blank or punctuation; every token of a
             script that is written without blanks (Han, Kana, Thai, Lao, Khmer, Myanmar)
    inside   the token continues a word, a number or an incomplete character
    other    punctuation, blanks, first digits, symbols, special tokens, ids without a token

A token's class depends on the state in which the preceding text ends. One byte per token encodes
its class for each state, and the state after it:

    bits 0-1, 2-3, 4-5   the class if the text ends outside a word, in a word, or in a word and a
                         joiner (apostrophe, hyphen or underscore)
    bits 6-7             the state of a text that ends in this token: 0, 1 or 2 in the order above

Letters, digits and marks are defined by Unicode's categories. A token is classified by the bytes
that its tokenizer decodes it to, not by its spelling in the vocabulary.
"""

import hashlib
import json
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Pieces = list[bytes | None]
"""The bytes that each token id adds to a text; None for a special token or an id without a token.
"""

OTHER, START, INSIDE = range(3)
OUTSIDE_WORD, IN_WORD, AT_JOINER = range(3)
"""The states in which a text can end."""
STATE_SHIFT, CLASS_MASK = 6, 3


@dataclass(frozen=True, eq=False)
class TokenClasses:
    """The classes of one vocabulary: see the module's docstring for `packed_V`, uint8."""

    packed_V: Bytes

    def __post_init__(self) -> None:
        # Kernels use them as indices without checking.
        if (self.packed_V & self.packed_V >> np.uint8(1) & np.uint8(0b01010101)).any():
            raise ValueError("token classes: got a fourth class or state; accepted: three of each.")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TokenClasses":
        """The classes of a tokenizer's vocabulary, cached by vocabulary within the process.

        Args:
            tokenizer: from `transformers` (fast, or slow with a vocabulary of a known form), from
                `tokenizers`, a `tiktoken.Encoding`, or one that wraps mistral_common's Tekkenizer.

        Raises:
            ValueError: its vocabulary is of no known form.
        """
        pieces = token_pieces(tokenizer)
        key = _fingerprint(pieces)
        if key not in _made:
            _made[key] = cls.from_pieces(pieces)
        _made.move_to_end(key)
        while len(_made) > MAX_MADE:
            _made.popitem(last=False)
        return _made[key]

    @classmethod
    def from_pieces(cls, pieces: Pieces) -> "TokenClasses":
        """From the bytes that each token id adds to a text."""
        return cls(_packed(pieces))

    def states(self) -> Bytes:
        """uint8 [V]: the state of a text that ends in each token."""
        return self.packed_V >> np.uint8(STATE_SHIFT)

    def classes_after(self, state: int) -> Bytes:
        """uint8 [V]: the class of each token after a text in this state."""
        return (self.packed_V >> np.uint8(2 * state)) & np.uint8(CLASS_MASK)

    def to(self, device: torch.device | str) -> Tensor:
        """`packed_V` on a device."""
        # A tensor created in inference mode could not be used outside of it.
        with torch.inference_mode(mode=False):
            return torch.from_numpy(self.packed_V.copy()).to(device)


MAX_MADE = 8
"""Number of vocabularies whose classes are kept for later calls."""
_made: "OrderedDict[bytes, TokenClasses]" = OrderedDict()


def _fingerprint(pieces: Pieces) -> bytes:
    digest = hashlib.sha256()
    digest.update(np.array([-1 if p is None else len(p) for p in pieces], np.int64).tobytes())
    digest.update(b"".join(p for p in pieces if p))
    return digest.digest()


# ── What a token adds to a text ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Form:
    """How tokens are spelled in a vocabulary."""

    byte_level: bool = False
    """Each byte is one printable character (GPT-2's table)."""
    byte_fallback: bool = False
    """Single bytes are spelled like <0xE2>, for characters that are not in the vocabulary."""
    replaced: tuple[tuple[str, str], ...] = ()
    """Replacements made by decoding, such as ▁ by a blank."""
    continuing: str | None = None
    """The prefix of tokens that are not preceded by a blank, such as ##."""
    ending: str | None = None
    """The suffix of tokens that are followed by a blank, such as </w>."""


def token_pieces(tokenizer: Any) -> Pieces:
    """The bytes that each token id adds to a text.

    Raises:
        ValueError: the tokenizer's vocabulary is of no known form.
    """
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return _of_tiktoken(tokenizer)
    if (tekkenizer := _tekkenizer(tokenizer)) is not None:
        return _of_tekkenizer(tekkenizer)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))
    if hasattr(backend, "get_added_tokens_decoder"):
        added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
        special |= {i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        vocabulary = backend.get_vocab(with_added_tokens=True)
        form = _form_of_decoder(backend.decoder) or _form_of_vocabulary(vocabulary)
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        added = {i: token for token, i in getattr(tokenizer, "get_added_vocab", dict)().items()}
        form = _form_of_vocabulary(vocabulary)
    else:
        form, vocabulary, added = None, {}, {}
    if form is None:
        raise ValueError(
            f"tokenizer: got {type(tokenizer).__name__}, whose vocabulary is of no known form; "
            "accepted: byte-level BPE, SentencePiece, WordPiece, tiktoken, Tekken."
        )
    return _pieces(vocabulary, added, special, form)


def _of_tiktoken(encoding: Any) -> Pieces:
    special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    pieces: Pieces = []
    for token in range(encoding.n_vocab):
        try:
            pieces.append(None if token in special else encoding.decode_single_token_bytes(token))
        except KeyError:  # Ranks may have gaps.
            pieces.append(None)
    return pieces


TEKKENIZER = ("id_to_byte_piece", "num_special_tokens", "n_words")
"""Attributes that, of mistral_common's tokenizers, only the Tekkenizer has all of."""


def _tekkenizer(tokenizer: Any) -> Any:
    """The Tekkenizer in a tokenizer of mistral_common, or in one of vLLM or `transformers` that
    wraps it; None if there is none. The wrappers' own vocabularies are decoded text, which does not
    have the bytes of incomplete characters."""
    wrapped = getattr(tokenizer, "tokenizer", None)
    instruct = getattr(wrapped, "instruct_tokenizer", None)
    for candidate in (tokenizer, wrapped, getattr(instruct, "tokenizer", None)):
        if all(hasattr(candidate, name) for name in TEKKENIZER):
            return candidate
    return None


def _of_tekkenizer(tekkenizer: Any) -> Pieces:
    special = tekkenizer.num_special_tokens  # They have the first ids.
    others = range(special, tekkenizer.n_words)
    return [*[None] * special, *map(tekkenizer.id_to_byte_piece, others)]


def _form_of_decoder(decoder: Any) -> _Form | None:
    """The form given by the decoder of a `tokenizers` tokenizer; None if it cannot be inferred."""
    if decoder is None:
        return None
    config = json.loads(decoder.__getstate__())
    steps = config["decoders"] if config["type"] == "Sequence" else [config]
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return _Form(byte_level=True)
    if "WordPiece" in kinds:
        return _Form(continuing=kinds["WordPiece"]["prefix"])
    if "BPEDecoder" in kinds:
        return _Form(ending=kinds["BPEDecoder"]["suffix"])
    replaced = [
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    if "Metaspace" in kinds:
        replaced.append((kinds["Metaspace"]["replacement"], " "))
    if not replaced:
        return None
    return _Form(byte_fallback="ByteFallback" in kinds, replaced=tuple(replaced))


LEAST_MARKED = 1e-3
"""The share of a vocabulary's tokens that have the marker of its form. Tokens of a text can begin
with ## by chance, such as Markdown's headings, but these are fewer than one in 10,000."""


def _form_of_vocabulary(vocabulary: Mapping[Any, int]) -> _Form | None:
    """The form whose markers occur in most tokens; None if there are too few markers, or if the
    bytes of its tokens are lost."""
    if any(isinstance(token, bytes) for token in vocabulary):
        return _Form()
    if _is_lossy(vocabulary):
        return None
    counts = {
        _Form(byte_level=True): sum(token[:1] in ("Ġ", "Ċ") for token in vocabulary),
        _Form(byte_fallback=True, replaced=(("▁", " "),)): sum("▁" in t for t in vocabulary),
        _Form(continuing="##"): sum(token.startswith("##") for token in vocabulary),
        _Form(ending="</w>"): sum(token.endswith("</w>") for token in vocabulary),
    }
    form = max(counts, key=lambda form: counts[form])
    return form if counts[form] > LEAST_MARKED * len(vocabulary) else None


LOST_BYTES = 127
"""The bytes from 0x80 on are each decoded to U+FFFD, and so a vocabulary of decoded tokens has one
id for all 128."""


def _is_lossy(vocabulary: Mapping[Any, int]) -> bool:
    """Whether the tokens are spelled as decoded text, in which incomplete characters are U+FFFD.

    U+FFFD alone does not show it, since it may be a token, and neither do ids without a token.
    """
    without_token = 1 + max(vocabulary.values(), default=-1) - len(vocabulary)
    return "\N{REPLACEMENT CHARACTER}" in vocabulary and without_token >= LOST_BYTES


def _pieces(
    vocabulary: Mapping[Any, int], added: Mapping[int, str], special: frozenset[int], form: _Form
) -> Pieces:
    pieces: Pieces = [None] * (1 + max([*vocabulary.values(), *added], default=-1))
    piece_of = _byte_level_piece if form.byte_level else _other_piece
    for token, i in vocabulary.items():
        if i not in special:
            pieces[i] = token if isinstance(token, bytes) else piece_of(token, form)
    for i, text in added.items():
        pieces[i] = None if i in special else text.encode("utf-8", "surrogatepass")
    return pieces


@cache
def _byte_of_character() -> dict[int, int]:
    """The inverse of GPT-2's table: printable bytes map to themselves, the others to consecutive
    characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {b: b for b in printable} | {0x100 + n: byte for n, byte in enumerate(hidden)}


def _byte_level_piece(token: str, form: _Form) -> bytes:
    try:
        return token.translate(_byte_of_character()).encode("latin-1")
    except UnicodeEncodeError:  # A character outside the table: the token is spelled literally.
        return token.encode("utf-8", "surrogatepass")


_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _other_piece(token: str, form: _Form) -> bytes:
    if form.byte_fallback and (byte := _FALLBACK.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    for old, new in form.replaced:
        token = token.replace(old, new)
    if form.continuing is not None:
        # A token without the prefix is preceded by a blank.
        is_continuing = token.startswith(form.continuing)
        token = token[len(form.continuing) :] if is_continuing else f" {token}"
    if form.ending is not None and token.endswith(form.ending):
        token = f"{token[: -len(form.ending)]} "
    return token.encode("utf-8", "surrogatepass")


# ── Classes ──────────────────────────────────────────────────────────────────────────────────────

_BLANK, _LETTER, _UNSPACED, _DIGIT, _EXTEND, _JOINER, _CONNECTOR, _SYMBOL = range(8)
"""Kinds of characters."""

_JOINERS = frozenset("'’ʼ＇-‐‑־׳״·")
"""Characters that belong to the word when between letters: apostrophes, hyphens, Hebrew and Catalan
marks."""
_UNSPACED_NAMES = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO",
    "YI ",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TAI ",
    "NEW TAI",
    "JAVANESE",
    "BALINESE",
)
"""Prefixes of the Unicode names of letters in scripts written without blanks."""


def _kind(character: str) -> int:
    point = ord(character)
    if 0xDC80 <= point < 0xDCC0:  # A continuation byte on its own.
        return _EXTEND
    if 0xDCC0 <= point <= 0xDCFF:
        return _kind_of_prefix(bytes([point - 0xDC00]))
    category = unicodedata.category(character)
    if character in _JOINERS:
        return _JOINER
    if category[0] == "Z" or character.isspace():
        return _BLANK
    if category in ("Mn", "Mc", "Me", "Cf"):
        return _EXTEND
    if category[0] == "L" or category == "Nl":
        is_unspaced = unicodedata.name(character, "").startswith(_UNSPACED_NAMES)
        return _UNSPACED if is_unspaced else _LETTER
    if category == "Nd":
        return _DIGIT
    return _CONNECTOR if category == "Pc" else _SYMBOL


MAX_SAMPLED = 1024
"""Characters by which a prefix of UTF-8 is classified, evenly spaced among those that begin with
it."""


@cache
def _kind_of_prefix(prefix: bytes) -> int:
    """The most frequent kind among the characters whose encoding begins with these bytes."""
    lead = prefix[0]
    if prefix in (b"\xf0", b"\xf0\x9f"):
        return _SYMBOL  # Most such characters are rare Han, but most occurrences are emoji.
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    missing = length - len(prefix)
    if not 0xC2 <= lead <= 0xF4 or missing < 1:
        return _SYMBOL  # Not valid in UTF-8.
    point = lead & (0x7F >> length)
    for byte in prefix[1:]:
        point = point << 6 | byte & 0x3F
    low = max(point << 6 * missing, (0x80, 0x800, 0x10000)[length - 2])
    high = min((point + 1 << 6 * missing) - 1, 0x10FFFF)
    sampled = map(chr, range(low, high + 1, max((high - low) // MAX_SAMPLED, 1)))
    kinds = [_kind(c) for c in sampled if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    return max(set(kinds), key=kinds.count) if kinds else _SYMBOL


def _kinds(text: str) -> Bytes:
    """uint8, the kind of each character; bytes of incomplete characters are given as the lone
    surrogates of "surrogateescape"."""
    points_N = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    unique, inverse_N = np.unique(points_N, return_inverse=True)
    kinds_N = np.array([_kind(chr(p)) for p in unique.tolist()], np.uint8)[inverse_N]
    # The bytes that follow a leading byte narrow down the character.
    for n in np.flatnonzero((points_N >= 0xDCE0) & (points_N <= 0xDCF4)).tolist():
        end = n + 1
        while end < min(n + 3, len(points_N)) and 0xDC80 <= points_N[end] < 0xDCC0:
            end += 1
        kinds_N[n] = _kind_of_prefix(bytes((points_N[n:end] - 0xDC00).tolist()))
    return kinds_N


def _packed(pieces: Pieces) -> Bytes:
    """The byte of each token; 0 (class `other`, state outside a word) for a token without text."""
    packed_V = np.zeros(len(pieces), np.uint8)
    texts = [piece.decode("utf-8", "surrogateescape") if piece else "" for piece in pieces]
    lengths_V = np.fromiter(map(len, texts), np.int64, len(texts))
    filled = np.flatnonzero(lengths_V)
    if not len(filled):
        return packed_V
    # Separated by NUL, so that bytes of two tokens are never combined into a character.
    kinds_N = _kinds("\0".join(texts[v] for v in filled.tolist()))
    ends_W = np.cumsum(lengths_V[filled] + 1) - 1
    begins_W = ends_W - lengths_V[filled]
    by_state = _classes(kinds_N, begins_W, ends_W)
    packed_V[filled] = sum(c << (2 * state) for state, c in enumerate(by_state)) | (
        _states(kinds_N, begins_W, ends_W) << STATE_SHIFT
    )
    return packed_V


def _classes(kinds_N: Bytes, begins_W: NDArray, ends_W: NDArray) -> tuple[Bytes, Bytes, Bytes]:
    """uint8 [W] for each of `OUTSIDE_WORD`, `IN_WORD`, `AT_JOINER`."""
    index_N = np.arange(len(kinds_N))
    beyond = len(kinds_N)

    def first(of: Iterable[int]) -> NDArray:
        """The index of each token's first character of these kinds; `beyond` if it has none."""
        found_N = np.where(np.isin(kinds_N, list(of)), index_N, beyond)
        # Each range ends at the next token; the separator in between has none of these kinds.
        return np.minimum.reduceat(found_N, begins_W)

    letter_W, digit_W = first([_LETTER, _UNSPACED]), first([_DIGIT])
    has_word_W = letter_W < digit_W
    kind_W = kinds_N[begins_W]
    next_W = np.where(begins_W + 1 < ends_W, kinds_N[np.minimum(begins_W + 1, beyond - 1)], _SYMBOL)
    joins_W = (kind_W == _JOINER) & (next_W == _LETTER)
    opens_W = np.where(has_word_W, START, OTHER)
    outside = {_UNSPACED: START, _LETTER: START, _EXTEND: INSIDE, _DIGIT: OTHER}
    in_word = {
        _UNSPACED: START,
        _LETTER: INSIDE,
        _EXTEND: INSIDE,
        _DIGIT: INSIDE,
        _CONNECTOR: INSIDE,
    }
    at_joiner = in_word | {_DIGIT: OTHER}

    def by_kind(classes: Mapping[int, int], joined: int) -> Bytes:
        chosen = [kind_W == kind for kind in classes]
        class_W = np.select([joins_W, *chosen], [joined, *classes.values()], opens_W)
        return class_W.astype(np.uint8)

    return by_kind(outside, START), by_kind(in_word, INSIDE), by_kind(at_joiner, START)


def _states(kinds_N: Bytes, begins_W: NDArray, ends_W: NDArray) -> Bytes:
    """uint8 [W]: the state of a text that ends in each token."""
    index_N = np.arange(len(kinds_N))
    # Marks belong to the character before them. Separators, which are not marks, are skipped too.
    base_N = np.where(kinds_N != _EXTEND, index_N, -1)
    base_N[ends_W[ends_W < len(kinds_N)]] = -1
    last_W = np.maximum.reduceat(base_N, begins_W)
    kind_W = np.where(last_W >= 0, kinds_N[last_W], _LETTER)
    before_W = kinds_N[np.maximum(last_W - 1, 0)]
    follows_W = np.isin(before_W, [_LETTER, _DIGIT, _EXTEND, _CONNECTOR]) | (last_W == begins_W)
    is_joiner_W = np.isin(kind_W, [_JOINER, _CONNECTOR]) & follows_W
    is_word_W = np.isin(kind_W, [_LETTER, _DIGIT])
    return np.select([is_joiner_W, is_word_W], [AT_JOINER, IN_WORD], OUTSIDE_WORD).astype(np.uint8)
