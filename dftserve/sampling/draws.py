"""Random numbers per request, one for each position of its text.

A number is a hash of the request's key and the position, and does not advance any generator: the
engine's sampling is unaffected, all tensor-parallel ranks compute the same number, and a position
that is computed again (after a preemption, or for a rejected draft) gets the same number again.
"""

import hashlib

from torch import Tensor

KEY_BITS = 48
"""Bits of a key, which two float32 columns hold."""
HALF_BITS = KEY_BITS // 2
"""Half of a key, which a float32 represents exactly."""
WORD = 2**32 - 1
"""Mask of 32 bits."""
FIRST, SECOND = 0x7FEB352D, 0x1B873593
"""Odd, and below 2^31: their product with a 32-bit number fits in an int64."""
DRAW_BITS = 24
"""Bits of a draw: as many as a float32 represents exactly."""


def draw_key(*parts: object) -> int:
    """A key of `KEY_BITS` bits derived from the parts that identify the request; the same on every
    machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=KEY_BITS // 8)
    return int.from_bytes(digest.digest(), "big")


def key_halves(key: int) -> tuple[int, int]:
    """The high and the low half of a key."""
    return key >> HALF_BITS, key & (2**HALF_BITS - 1)


def uniform(high_R: Tensor, low_R: Tensor, position_R: Tensor) -> Tensor:
    """float32 [R], in [0, 1): a number for each row.

    Args:
        high_R, low_R: the halves of the request's key.
        position_R: int64.
    """
    bits_R = _mixed((position_R + low_R.long()) & WORD) ^ high_R.long()
    return (_mixed(bits_R) >> (32 - DRAW_BITS)).float() * 2.0**-DRAW_BITS


def _mixed(bits_R: Tensor) -> Tensor:
    """A 32-bit hash; each output bit depends on all input bits."""
    bits_R = ((bits_R ^ (bits_R >> 16)) * FIRST) & WORD
    bits_R = ((bits_R ^ (bits_R >> 15)) * SECOND) & WORD
    return bits_R ^ (bits_R >> 16)
