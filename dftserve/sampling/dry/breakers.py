"""Sequence breakers: maps the strings of a request to the tokens that end a sequence.

A token is a breaker if its text contains one of the strings, as `:` and `):` contain `:`. For a
string that no single token contains, the last token of its tokenisation is a breaker. Special
tokens are always breakers, so that a sequence ends with a turn of a conversation.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.token_classes import Pieces, token_pieces

Mask = NDArray[np.bool_]

MAX_SETS = 64
"""Maximum number of cached masks; equal sets share one mask."""
MAX_TEXTS = 1024
"""Maximum number of strings whose tokens are cached, at one bit per token: 19 kB per string for a
vocabulary of 150,000 tokens."""

_BETWEEN = 0xFF
"""Separator between two tokens' bytes; invalid in UTF-8, so that no string matches across it."""


class Breakers:
    """The breakers of one vocabulary.

    Args:
        pieces: the bytes that each token id adds to a text, None for special tokens.
        encode: returns a text's token ids, without adding special tokens.
    """

    def __init__(self, pieces: Pieces, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._special_V = np.array([piece is None for piece in pieces], bool)
        lengths_V = np.array([len(piece or b"") + 1 for piece in pieces], np.int64)
        between = bytes([_BETWEEN])
        text = between.join(piece or b"" for piece in pieces) + between
        self._text_N = np.frombuffer(text, np.uint8)
        self._owner_N = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths_V)
        """The token to which each byte belongs."""
        self._sets: OrderedDict[frozenset[str], Mask] = OrderedDict()
        self._texts: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Breakers":
        """As `TokenClasses.from_tokenizer`.

        Raises:
            ValueError: its vocabulary is of no known form.
        """
        return cls(token_pieces(tokenizer), lambda text: _encoded(tokenizer, text))

    def tokens(self, texts: tuple[str, ...]) -> Mask:
        """bool [V]: which tokens are breakers; `NO_BREAKERS` without texts. Must not be changed."""
        if not texts:
            return NO_BREAKERS
        return _cached(self._sets, frozenset(texts), self._mask_of, MAX_SETS)

    def _mask_of(self, texts: frozenset[str]) -> Mask:
        packed = [_cached(self._texts, text, self._packed, MAX_TEXTS) for text in texts]
        any_V = np.unpackbits(np.bitwise_or.reduce(packed), count=len(self._special_V))
        return any_V.view(bool) | self._special_V

    def _packed(self, text: str) -> NDArray[np.uint8]:
        """The breakers of one string, one bit per token."""
        breaks_V = np.zeros(len(self._special_V), bool)
        found_K = self._containing(text.encode())
        if not len(found_K):
            found_K = np.array(self._encode(text)[-1:], np.int64)
        breaks_V[found_K[found_K < len(breaks_V)]] = True
        return np.packbits(breaks_V)

    def _containing(self, text: bytes) -> NDArray[np.int32]:
        """The tokens whose bytes contain `text`, possibly with duplicates."""
        start_K = np.flatnonzero(self._text_N == text[0])
        for offset, byte in enumerate(text[1:], 1):
            start_K = start_K[start_K + offset < len(self._text_N)]
            start_K = start_K[self._text_N[start_K + offset] == byte]
        return self._owner_N[start_K]


Key = TypeVar("Key")
Made = TypeVar("Made")


def _cached(
    cache: OrderedDict[Key, Made], key: Key, make: Callable[[Key], Made], most: int
) -> Made:
    """Like `lru_cache`, which on a method would keep a reference to the whole object."""
    if key not in cache:
        cache[key] = make(key)
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)
    return cache[key]


NO_BREAKERS: Mask = np.zeros(1, bool)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """A text's token ids; accepts the same tokenizers as `TokenClasses.from_tokenizer`."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return tokenizer.encode(text, disallowed_special=())
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
