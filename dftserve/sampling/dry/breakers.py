"""Sequence breakers: from the texts of a request to the tokens of a vocabulary that end a sequence.

A token breaks where its own text has one of them, as `:` and `):` have `:`. Of a text that no token
has as a whole, the last token of its tokenisation breaks. Special tokens always do: a sequence ends
where a turn of a conversation does.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.token_classes import Pieces, token_pieces

Mask = NDArray[np.bool_]

MAX_SETS = 64
"""Sets of breakers that are kept as a mask, so that equal ones are one."""
MAX_TEXTS = 1024
"""Texts whose tokens are kept, in a bit each: 19 kB a text where there are 150,000 tokens."""

_BETWEEN = 0xFF
"""Between two tokens' bytes; in no UTF-8, so that no text is found across it."""


class Breakers:
    """Of one vocabulary.

    Args:
        pieces: what each token id adds to a text, None for special tokens.
        encode: a text's token ids, without special ones around them.
    """

    def __init__(self, pieces: Pieces, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._special_V = np.array([piece is None for piece in pieces], bool)
        lengths_V = np.array([len(piece or b"") + 1 for piece in pieces], np.int64)
        between = bytes([_BETWEEN])
        text = between.join(piece or b"" for piece in pieces) + between
        self._text_N = np.frombuffer(text, np.uint8)
        self._owner_N = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths_V)
        """The token that each byte is of."""
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
        """bool [V]: the tokens that break; none where there are no texts. Not to be changed."""
        if not texts:
            return NO_BREAKERS
        return _kept(self._sets, frozenset(texts), self._of_all, MAX_SETS)

    def _of_all(self, texts: frozenset[str]) -> Mask:
        packed = [_kept(self._texts, text, self._packed, MAX_TEXTS) for text in texts]
        any_V = np.unpackbits(np.bitwise_or.reduce(packed), count=len(self._special_V))
        return any_V.view(bool) | self._special_V

    def _packed(self, text: str) -> NDArray[np.uint8]:
        """A bit a token."""
        breaks_V = np.zeros(len(self._special_V), bool)
        found_K = self._holding(text.encode("utf-8", "surrogatepass"))
        if not len(found_K):
            found_K = np.array(self._encode(text)[-1:], np.int64)
        breaks_V[found_K[found_K < len(breaks_V)]] = True
        return np.packbits(breaks_V)

    def _holding(self, text: bytes) -> NDArray[np.int32]:
        """The tokens whose bytes have these in them, some more than once."""
        place_K = np.flatnonzero(self._text_N == text[0])
        for behind, byte in enumerate(text[1:], 1):
            place_K = place_K[place_K + behind < len(self._text_N)]
            place_K = place_K[self._text_N[place_K + behind] == byte]
        return self._owner_N[place_K]


Key = TypeVar("Key")
Made = TypeVar("Made")


def _kept(kept: OrderedDict[Key, Made], key: Key, make: Callable[[Key], Made], most: int) -> Made:
    """As `lru_cache` has it, which would keep the whole object of a method."""
    if key not in kept:
        kept[key] = make(key)
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


NO_BREAKERS: Mask = np.zeros(1, bool)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Of a tokenizer of `transformers`, of `tokenizers`, or a `tiktoken.Encoding`."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return tokenizer.encode(text, disallowed_special=())
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
