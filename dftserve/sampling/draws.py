"""Random numbers of a request's own, one for each position of its text.

A number is a hash of the request's key and the position, and takes nothing from any generator: what
is sampled with is untouched, every tensor-parallel rank has the same number, and a position that is
computed again (after a preemption, or for a rejected draft) has it again.
"""

import hashlib

from torch import Tensor

KEY_BITS = 48
HALF_BITS = KEY_BITS // 2
"""Of a key, the bits that a float32 holds exactly."""
WORD = 2**32 - 1
FIRST, SECOND = 0x7FEB352D, 0x1B873593
"""Odd, and below 2^31: their product with 32 bits stays within an int64."""
DRAW_BITS = 24


def draw_key(*parts: object) -> int:
    """A key of `KEY_BITS` bits from whatever names the request, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=KEY_BITS // 8)
    return int.from_bytes(digest.digest(), "big")


def key_halves(key: int) -> tuple[int, int]:
    """The high and the low half of a key."""
    return key >> HALF_BITS, key & (2**HALF_BITS - 1)


def uniform(high_R: Tensor, low_R: Tensor, position_R: Tensor) -> Tensor:
    """float32 [R], from 0 to below 1: a number for each row.

    Args:
        high_R, low_R: the halves of the request's key.
        position_R: int64.
    """
    bits_R = _mixed((position_R + low_R.long()) & WORD) ^ high_R.long()
    return (_mixed(bits_R) >> (32 - DRAW_BITS)).float() * 2.0**-DRAW_BITS


def _mixed(bits_R: Tensor) -> Tensor:
    """32 bits, each of which depends on all of the given 32."""
    bits_R = ((bits_R ^ (bits_R >> 16)) * FIRST) & WORD
    bits_R = ((bits_R ^ (bits_R >> 15)) * SECOND) & WORD
    return bits_R ^ (bits_R >> 16)
