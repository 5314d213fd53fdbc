"""The usual measures of how varied a set of texts is. Each of them rates random words highly, so
none may be shown without a measure of quality.

A text is given as its tokens, a set of texts as `tokens`.
"""

import gzip
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

ZIPF_RANKS = 1000
"""Ranks that the slope is fitted to; words beyond them occur only once or twice."""
TOLERANCE = 1e-5
"""Rounding error that is accepted in similarities computed in float32."""


def distinct_n(tokens: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams of all texts / n-grams of all texts (Li et al., arXiv 1510.03055); in
    (0, 1]. It decreases with the amount of text.

    Raises:
        ValueError: n below 1, or no text with n tokens.
    """
    _check_order(n)
    counts_G = gram_counts(tokens, n).sum(axis=0)
    if not counts_G.any():
        raise ValueError(f"tokens: got no text with {n} tokens; accepted: at least one.")
    return distinct(counts_G)


def distinct(counts_G: NDArray) -> float:
    """`distinct_n` from counts of n-grams, some of which may be 0."""
    return float(np.count_nonzero(counts_G) / counts_G.sum())


def gram_counts(
    tokens: Sequence[Sequence[str]], n: int, parts_T: NDArray | None = None
) -> NDArray[np.int64]:
    """int64 [parts, G]: how often each n-gram occurs in each part of a set of texts.

    Args:
        parts_T: the part that each text belongs to, from 0; None: all texts are one part.
    """
    *_, grams = _grams(tokens, n)
    parts_T = np.zeros(len(tokens), np.int64) if parts_T is None else parts_T
    parts = int(parts_T.max(initial=0)) + 1
    kinds, gram_P = np.unique(grams.gram_P, return_inverse=True)
    place_P = parts_T[grams.text_P] * len(kinds) + gram_P
    counts = np.bincount(place_P, grams.count_P, parts * len(kinds))
    return counts.astype(np.int64).reshape(parts, len(kinds))


def self_bleu(tokens: Sequence[Sequence[str]], max_order: int = 4) -> float:
    """The mean of `self_bleus` (Zhu et al., arXiv 1802.01886); in [0, 100], 100 for copies."""
    return float(self_bleus(tokens, max_order).mean())


def self_bleus(tokens: Sequence[Sequence[str]], max_order: int = 4) -> NDArray[np.float64]:
    """float64 [T]: BLEU of each text against all others as its references, in [0, 100].

    The BLEU is that of `sacrebleu.sentence_bleu` on these tokens with its defaults: `exp`
    smoothing, effective order, clipped counts, the closest reference length (of two, the shorter).

    Raises:
        ValueError: fewer than two texts, or an order below 1.
    """
    _check_order(max_order)
    if len(tokens) < 2:
        raise ValueError(f"tokens: got {len(tokens)} texts; accepted: at least 2.")
    matched_TN = np.transpose(
        [_matched(grams, len(tokens)) for grams in _grams(tokens, max_order)]
    ).tolist()
    lengths = sorted(map(len, tokens))
    scores = [
        _bleu(matched_N, len(text), _closest_other(lengths, len(text)))
        for text, matched_N in zip(tokens, matched_TN, strict=True)
    ]
    return np.array(scores)


def compression_ratio(texts: Sequence[str]) -> float:
    """Bytes of the texts, joined by line breaks / the same gzipped once (Shaib et al., arXiv
    2403.00553). Higher: more repetition. gzip looks 32 KiB back, so the order matters a little.

    Raises:
        ValueError: no text at all.
    """
    raw = "\n".join(texts).encode()
    if not raw:
        raise ValueError("texts: got none; accepted: at least one character.")
    return len(raw) / len(gzip.compress(raw, mtime=0))


def self_repetition(tokens: Sequence[Sequence[str]], n: int = 4) -> float:
    """The mean of `self_repetitions` (Salkar et al., arXiv 2210.08145; as in 2403.00553)."""
    return float(self_repetitions(tokens, n).mean())


def self_repetitions(tokens: Sequence[Sequence[str]], n: int = 4) -> NDArray[np.float64]:
    """float64 [T]: ln(1 + Σ_g N_g), at least 0: g runs over a text's different n-grams, N_g is the
    number of other texts with g.

    Raises:
        ValueError: fewer than two texts, or n below 1.
    """
    _check_order(n)
    if len(tokens) < 2:
        raise ValueError(f"tokens: got {len(tokens)} texts; accepted: at least 2.")
    *_, grams = _grams(tokens, n)
    others_P = np.bincount(grams.gram_P)[grams.gram_P] - 1 if len(grams.gram_P) else []
    return np.log1p(np.bincount(grams.text_P, others_P, len(tokens)))


def vendi(similarity_TT: ArrayLike, q: float = 1.0) -> float:
    """The effective number of different texts: exp of the Rényi entropy of order q of the
    eigenvalues λ of K/n, exp(ln Σλ^q / (1−q)) (Friedman & Dieng, arXiv 2210.02410; orders:
    2310.12952). q=1: exp(−Σ λ ln λ); q=∞: 1/max λ; q=2: n²/ΣK², without eigenvalues. In [1, n].

    Raises:
        ValueError: q not above 0; K not square, not symmetric, without ones on its diagonal, or
            (except at q=2, which does not compute them) with negative eigenvalues.
    """
    K_TT = _similarity(similarity_TT)
    if not q > 0:
        raise ValueError(f"q: got {q}; accepted: above 0, or infinity.")
    if q == 2:
        return float(len(K_TT) ** 2 / np.square(K_TT).sum())
    λ_T = np.linalg.eigvalsh(K_TT / len(K_TT))
    if λ_T[0] < -TOLERANCE:
        raise ValueError(
            f"similarity: got an eigenvalue of {λ_T[0] * len(K_TT):.3g}; accepted: a kernel, "
            "which has none below 0."
        )
    λ_T = λ_T[λ_T > 0] / λ_T[λ_T > 0].sum()
    if q == 1:
        return float(np.exp(-(λ_T * np.log(λ_T)).sum()))
    if math.isinf(q):
        return float(1 / λ_T.max())
    # Relative to the largest eigenvalue, because high orders would underflow.
    powers = q * np.log(λ_T.max()) + np.log(((λ_T / λ_T.max()) ** q).sum())
    return float(np.exp(powers / (1 - q)))


def zipf_slope(counts_G: NDArray) -> float:
    """The least-squares slope of ln frequency on ln rank, over the `ZIPF_RANKS` most frequent
    tokens (all, if there are fewer); about −1 for prose, 0 if all are equally frequent (Zipf 1935).

    Args:
        counts_G: how often each token occurs; may be 0.

    Raises:
        ValueError: fewer than two different tokens.
    """
    frequencies = np.sort(counts_G[counts_G > 0])[::-1][:ZIPF_RANKS]
    if len(frequencies) < 2:
        raise ValueError(f"tokens: got {len(frequencies)} different; accepted: at least 2.")
    x = np.log(np.arange(1, len(frequencies) + 1))
    x -= x.mean()
    return float(x @ np.log(frequencies) / (x @ x))


def burstiness(lengths: ArrayLike) -> float:
    """(σ−μ)/(σ+μ) of, say, sentence lengths in words (Goh & Barabási 2008, arXiv physics/0610233);
    in [−1, 1): −1 if all are equal, 0 for an exponential distribution.

    Raises:
        ValueError: none, a negative one, or only zeros.
    """
    lengths_N = np.asarray(lengths, float)
    if not lengths_N.size or lengths_N.min() < 0 or not lengths_N.any():
        raise ValueError("lengths: got none, a negative one or only zeros; accepted: 0 and above.")
    # For equal values, std can be a rounding error instead of 0.
    σ, μ = 0.0 if np.ptp(lengths_N) == 0 else lengths_N.std(), lengths_N.mean()
    return float((σ - μ) / (σ + μ))


def classes(similarity_TT: ArrayLike, threshold: float) -> NDArray[np.int64]:
    """The class of each text: the earliest class whose first text has a similarity of at least
    `threshold` to it, else a new one (greedy, as in NoveltyBench, arXiv 2504.05228). Classes are
    numbered as they appear; the order of the texts matters.

    Raises:
        ValueError: K not square, not symmetric or without ones on its diagonal; a threshold above
            1, which not even identical texts reach.
    """
    K_TT = _similarity(similarity_TT)
    if not threshold <= 1:
        raise ValueError(f"threshold: got {threshold}; accepted: at most 1.")
    firsts: list[int] = []
    labels_T = np.empty(len(K_TT), np.int64)
    for text, row_T in enumerate(K_TT):
        near = np.flatnonzero(row_T[firsts] >= threshold)
        labels_T[text] = near[0] if len(near) else len(firsts)
        if not len(near):
            firsts.append(text)
    return labels_T


def distinct_k(labels: ArrayLike, k: int) -> float:
    """The expected number of classes among k of n texts, drawn without replacement:
    Σ_c 1 − C(n−n_c, k)/C(n, k), over classes of n_c texts (hypergeometric). At k = n the number
    of classes: NoveltyBench's distinct_k (arXiv 2504.05228). In [1, k].

    Raises:
        ValueError: k not among 1 to n.
    """
    labels_T = np.asarray(labels)
    n = len(labels_T)
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k} of {n} texts; accepted: 1 to their number.")
    sizes = np.unique(labels_T, return_counts=True)[1].tolist()
    return math.fsum(1 - math.comb(n - size, k) / math.comb(n, k) for size in sizes)


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one order, as pairs P of a text and an n-gram that occurs in it."""

    gram_P: NDArray[np.int64]
    text_P: NDArray[np.int64]
    count_P: NDArray[np.int64]


def _grams(tokens: Sequence[Sequence[str]], max_order: int) -> Iterator[_Grams]:
    """Yields orders 1 to `max_order`. n-grams are numbers, which sort faster than tuples hash."""
    known: dict[str, int] = {}
    token_L = np.array(
        [known.setdefault(token, len(known)) for text in tokens for token in text], np.int64
    )
    text_L = np.repeat(np.arange(len(tokens)), [len(text) for text in tokens])
    gram_L = token_L
    for order in range(1, max_order + 1):
        if order > 1:
            # Extend each n-gram by a token. Those that reach into the next text are not counted.
            longer_L = gram_L[:-1] * len(known) + token_L[order - 1 :]
            gram_L = np.unique(longer_L, return_inverse=True)[1]
        last_L = text_L[order - 1 :]
        whole_L = text_L[: len(last_L)] == last_L
        pair_L = gram_L[whole_L] * len(tokens) + last_L[whole_L]
        pair_P, count_P = np.unique(pair_L, return_counts=True)
        yield _Grams(pair_P // len(tokens), pair_P % len(tokens), count_P)


def _matched(grams: _Grams, texts: int) -> NDArray:
    """For each text, how many of its n-grams also occur in another text, with clipped counts.

    The two largest counts of each n-gram are enough: a text with the largest count is clipped to
    the second largest, and no other text is clipped.
    """
    order_P = np.lexsort((grams.count_P, grams.gram_P))
    gram_P, count_P = grams.gram_P[order_P], grams.count_P[order_P]
    is_largest_P = np.append(gram_P[1:] != gram_P[:-1], True)[: len(gram_P)]
    largest_P = np.flatnonzero(is_largest_P)
    # The entry before the largest, unless it belongs to another n-gram.
    second_P = np.where(np.insert(is_largest_P, 0, True)[largest_P], 0, count_P[largest_P - 1])
    place_P = np.cumsum(is_largest_P) - is_largest_P
    matched_P = np.where(count_P == count_P[largest_P][place_P], second_P[place_P], count_P)
    return np.bincount(grams.text_P[order_P], matched_P, texts)


def _closest_other(lengths: list[int], length: int) -> int:
    """The closest to `length` among the other sorted lengths; the shorter of two equally close."""
    at = bisect_left(lengths, length)
    neighbours = lengths[max(0, at - 1) : at] + lengths[at + 1 : at + 2]
    return min(neighbours, key=lambda other: (abs(other - length), other))


def _bleu(matched_N: list[float], length: int, reference_length: int) -> float:
    """BLEU from the matches of each order: a text without any scores 0, the k-th order without any
    counts as 2^−k matches, and orders longer than the text are left out."""
    if not any(matched_N):
        return 0.0
    logs, credit = [], 1.0
    for order, matched in enumerate(matched_N[:length]):
        if not matched:
            credit /= 2
        logs.append(math.log((matched or credit) / (length - order)))
    brevity = min(0.0, 1 - reference_length / length)
    return 100 * math.exp(brevity + math.fsum(logs) / len(logs))


def _similarity(similarity_TT: ArrayLike) -> NDArray[np.float64]:
    K_TT = np.asarray(similarity_TT, np.float64)
    if K_TT.ndim != 2 or K_TT.shape[0] != K_TT.shape[1] or not len(K_TT):
        raise ValueError(f"similarity: got the shape {K_TT.shape}; accepted: [T, T], T at least 1.")
    if not np.allclose(K_TT.diagonal(), 1, rtol=0, atol=TOLERANCE):
        raise ValueError("similarity: got a diagonal other than 1; accepted: ones.")
    if not np.allclose(K_TT, K_TT.T, rtol=0, atol=TOLERANCE):
        raise ValueError("similarity: got K other than its transpose; accepted: symmetric ones.")
    return K_TT


def _check_order(n: int) -> None:
    if n < 1:
        raise ValueError(f"n: got {n}; accepted: at least 1.")
