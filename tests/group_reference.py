"""Arithmetic codes in fp64, token by token, independent of `dftserve/sampling/group`."""

import hashlib
import math

import numpy as np


def first_code_reference(name: str, index: int, size: int) -> float:
    digest = hashlib.blake2b(f"('group', {name!r})".encode(), digest_size=8).hexdigest()
    first = (int(digest, 16) // 2**11) / 2**53
    return math.fmod(first + index / size, 1.0)


def cut_reference(
    p_V: np.ndarray, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """The probabilities after a request's own cuts, normalised; without ties."""
    kept = [int(v) for v in np.argsort(-p_V) if p_V[v] > 0 and p_V[v] >= min_p * p_V.max()]
    kept = kept[: top_k or None]
    total, so_far, nucleus = sum(p_V[v] for v in kept), 0.0, []
    for token in kept:
        if so_far / total >= top_p:
            break
        nucleus.append(token)
        so_far += p_V[token]
    cut_V = np.zeros(len(p_V))
    cut_V[nucleus] = p_V[nucleus]
    return cut_V / cut_V.sum()


def drawn_reference(p_V: np.ndarray, code: float) -> tuple[int, float]:
    """The token whose interval contains the code, and the code's relative position in it."""
    begin = 0.0
    for token, p in enumerate(p_V.tolist()):
        if p > 0 and code < begin + p:
            return token, (code - begin) / p
        begin += p
    raise ValueError(f"no interval of {p_V} contains {code}")
