"""Sequence breakers: from the texts of a request to the tokens of a vocabulary that end a sequence.

A token breaks where its own text has one of them, as `:` and `):` have `:`. Of a text that no token
has as a whole, the last token of its tokenisation breaks. Special tokens always do: a sequence ends
where a turn of a conversation does.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.token_classes import Pieces, token_pieces

Mask = NDArray[np.bool_]

MAX_MADE = 64
"""Sets of breakers that are kept."""

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
        self._end_V = np.cumsum(lengths_V)
        between = bytes([_BETWEEN])
        text = between.join(piece or b"" for piece in pieces) + between
        self._text_N = np.frombuffer(text, np.uint8)
        self._made: OrderedDict[tuple[str, ...], Mask] = OrderedDict()

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
        if texts not in self._made:
            self._made[texts] = self._find(texts)
        self._made.move_to_end(texts)
        while len(self._made) > MAX_MADE:
            self._made.popitem(last=False)
        return self._made[texts]

    def _find(self, texts: tuple[str, ...]) -> Mask:
        breaks_V = self._special_V.copy()
        for text in texts:
            found_K = self._holding(text.encode("utf-8", "surrogatepass"))
            if not len(found_K):
                found_K = np.array(self._encode(text)[-1:], np.int64)
            breaks_V[found_K[found_K < len(breaks_V)]] = True
        return breaks_V

    def _holding(self, text: bytes) -> NDArray[np.int64]:
        """The tokens whose bytes have these in them."""
        place_K = np.flatnonzero(self._text_N == text[0])
        for behind, byte in enumerate(text[1:], 1):
            place_K = place_K[place_K + behind < len(self._text_N)]
            place_K = place_K[self._text_N[place_K + behind] == byte]
        return np.unique(np.searchsorted(self._end_V, place_K, side="right"))


NO_BREAKERS: Mask = np.zeros(1, bool)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Of a tokenizer of `transformers`, of `tokenizers`, or a `tiktoken.Encoding`."""
    if hasattr(tokenizer, "decode_single_token_bytes"):
        return tokenizer.encode(text, disallowed_special=())
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
