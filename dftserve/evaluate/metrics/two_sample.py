"""Distances between two sets of texts: by their features (MMD, a classifier) and by their token
frequencies.

A set is given as its features `x_MF`, M texts with F features each, or as its tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats
from scipy.spatial import distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dftserve.evaluate.metrics.intervals import LEVEL, Estimate, group_numbers
from dftserve.evaluate.metrics.lexical import gram_counts

PENALTY = 1.0
"""Weight of ‖w‖²/2 relative to the summed log loss: the usual default for standardised features."""
ROUNDING = 1e-12
"""Tolerance within which a permutation that repeats the observed split counts as equal to it."""
NEAR = 1e-9
"""Smaller than any difference between two AUCs."""


@dataclass(frozen=True)
class Mmd:
    """An MMD and how often a random split would reach it."""

    value: float
    """√max(0, mmd2), in [0, √2]."""
    mmd2: float
    """Unbiased: if both sets come from one source, 0 on average and often negative."""
    p: float


def median_distance(x_MF: ArrayLike) -> float:
    """The median Euclidean distance between two of the M rows: the σ of `mmd2`, to be measured
    once on human text and then fixed (Gretton et al. 2012, section 8).

    Raises:
        ValueError: fewer than two rows, a number that is not finite, or a median of 0.
    """
    x_MF = _features(x_MF, "x", 2)
    σ = float(np.median(distance.pdist(x_MF)))
    if σ == 0:
        raise ValueError("x: got a median distance of 0; accepted: rows that differ.")
    return σ


def mmd2(x_MF: ArrayLike, y_NF: ArrayLike, sigma: float) -> float:
    """The unbiased squared maximum mean discrepancy
    Σ_{i≠j} k(x_i,x_j)/M(M−1) + Σ_{i≠j} k(y_i,y_j)/N(N−1) − 2·mean k(x_i,y_j)
    with k(a,b) = exp(−‖a−b‖²/2σ²) (Gretton et al. 2012, JMLR 13, lemma 6); at most 2.

    Raises:
        ValueError: fewer than two rows on a side, different numbers of features, numbers that are
            not finite, or a σ that is not above 0.
    """
    K_LL, member_L = _kernel(x_MF, y_NF, sigma)
    return float(_mmd2(K_LL, member_L[None])[0])


def mmd_from_squared(squared: Estimate) -> Estimate:
    """√max(0, mmd2) with its interval, from those of `mmd2`. An interval of the roots themselves
    would be [0, 0] if all are of numbers below 0, as between two sets from one source."""
    value, low, high = (
        None if each is None else max(0.0, each) ** 0.5
        for each in (squared.value, squared.low, squared.high)
    )
    left_out = tuple(max(0.0, each) ** 0.5 for each in squared.left_out)
    return replace(squared, value=value, low=low, high=high, left_out=left_out)


def mmd_test(
    x_MF: ArrayLike,
    y_NF: ArrayLike,
    sigma: float,
    *,
    groups: Sequence[str] = (),
    permutations: int = 999,
    seed: int = 0,
) -> Mmd:
    """`mmd2` between groups of texts, compared with random splits of all groups into sides of the
    same sizes: p = (1 + #{permuted ≥ observed}) / (1 + permutations).

    k of two groups is the mean of k over the pairs of their texts, and a group is never compared
    with itself: the answers to one prompt are similar whoever writes them, so eight of them are one
    draw of a prompt. p is exact if the groups are exchangeable, as groups of equal size are when
    both sides come from one source.

    Args:
        groups: the group of each of the M rows of x, then of the N rows of y, such as the prompt
            that a text answers. Rows with the same group and side form one group; a row with the
            group "" is a group of its own. Empty: every row is, and `mmd2` is that of the texts.

    Raises:
        ValueError: what `mmd2` refuses; fewer than one permutation, not one group per row, or
            fewer than two groups on a side.
    """
    if permutations < 1:
        raise ValueError(f"permutations: got {permutations}; accepted: at least 1.")
    K_GG, member_G = _between_groups(*_kernel(x_MF, y_NF, sigma), groups)
    rng = np.random.default_rng(seed)
    member_PG = rng.permuted(np.tile(member_G, (permutations, 1)), axis=1)
    observed, null_P = float(_mmd2(K_GG, member_G[None])[0]), _mmd2(K_GG, member_PG)
    return Mmd(
        value=max(0.0, observed) ** 0.5,
        mmd2=observed,
        p=float(1 + (null_P >= observed - ROUNDING).sum()) / (1 + permutations),
    )


def c2st(
    x_MF: ArrayLike,
    y_NF: ArrayLike,
    *,
    groups: Sequence[str] = (),
    folds: int = 5,
    seed: int = 0,
) -> Estimate:
    """How well a linear classifier distinguishes the two sets: AUC on held-out texts, .5 at chance
    (classifier two-sample test, Lopez-Paz & Oquab, arXiv 1610.06545).

    The mean over stratified folds of the AUC of an L2 logistic regression on features
    standardised on the fold's training part. The interval is Newcombe's (2006, method 5), which
    inverts the variance of Hanley & McNeil and so has a positive width at an AUC of 1. It treats
    the M + N scores as independent, which those of cross-validation are not: between two samples of
    one source it contains .5 in about 75 to 90 % of draws. No unbiased estimate of their variance
    exists (Bengio & Grandvalet 2004, JMLR 5).

    Args:
        groups: the group of each of the M rows of x, then of the N rows of y, such as the prompt
            that a text answers. Rows of one group are in one fold; a row with the group "" is a
            group of its own, and so is every row if no groups are given.
        folds: number of folds; fewer are used if a side has fewer groups.

    Raises:
        ValueError: fewer rows on a side than folds, fewer than two folds or groups, different
            numbers of features, or numbers that are not finite.
    """
    if folds < 2:
        raise ValueError(f"folds: got {folds}; accepted: at least 2.")
    x_MF, y_NF = _features(x_MF, "x", folds), _features(y_NF, "y", folds)
    all_LF, is_y_L = _stack(x_MF, y_NF)
    aucs = []
    for fitted_L, tested_L in _folds(is_y_L, groups, folds, seed):
        sides = len(set(is_y_L[fitted_L])), len(set(is_y_L[tested_L]))
        if sides != (2, 2):  # One side is missing from the training or the test part.
            continue
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / PENALTY))
        classifier.fit(all_LF[fitted_L], is_y_L[fitted_L])
        score_L = classifier.decision_function(all_LF[tested_L])
        aucs.append(roc_auc_score(is_y_L[tested_L], score_L))
    if not aucs:
        raise ValueError(
            "groups: got no fold with both sets; accepted: prompts that both sets answer."
        )
    auc = float(np.mean(aucs))
    return Estimate(auc, *_auc_interval(auc, len(x_MF), len(y_NF)))


def _folds(
    is_y_L: NDArray[np.float64], groups: Sequence[str], folds: int, seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Yields (rows to fit on, rows to test on) for each fold."""
    empty_LF = np.empty((len(is_y_L), 0))
    named = [name or f"row {row}" for row, name in enumerate(groups)]
    if len(set(named)) == len(named):
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
        yield from splitter.split(empty_LF, is_y_L)
        return
    if len(named) != len(is_y_L):
        raise ValueError(f"groups: got {len(named)}; accepted: one for each of {len(is_y_L)} rows.")
    count = min(
        len({n for n, y in zip(named, is_y_L, strict=True) if y == side}) for side in (0, 1)
    )
    if count < 2:
        raise ValueError(f"groups: got {count} on a side; accepted: at least 2.")
    grouped = StratifiedGroupKFold(min(folds, count), shuffle=True, random_state=seed)
    yield from grouped.split(empty_LF, is_y_L, named)


def token_distances(
    tokens_a: Sequence[Sequence[str]], tokens_b: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """(L2, JS) between the relative frequencies f of the tokens of two sets of texts.

    L2 = ‖f_a − f_b‖₂, in [0, √2]. JS = ½KL(f_a‖m) + ½KL(f_b‖m), m = ½(f_a + f_b), in nats, in
    [0, ln 2] (Lin 1991). Both decrease with the amount of text: compare sets of equal size.

    Raises:
        ValueError: a set without tokens.
    """
    if not any(map(len, tokens_a)) or not any(map(len, tokens_b)):
        raise ValueError("tokens: got a set without any; accepted: at least one on both sides.")
    parts_T = np.repeat([0, 1], [len(tokens_a), len(tokens_b)])
    return frequency_distances(*gram_counts([*tokens_a, *tokens_b], 1, parts_T))


def frequency_distances(a_V: NDArray, b_V: NDArray) -> tuple[float, float]:
    """As `token_distances`, from token counts in the same order on both sides."""
    f_V, g_V = a_V / a_V.sum(), b_V / b_V.sum()
    m_V = (f_V + g_V) / 2
    js = (special.rel_entr(f_V, m_V) + special.rel_entr(g_V, m_V)).sum() / 2
    return float(np.linalg.norm(f_V - g_V)), float(max(0.0, js))


def _kernel(
    x_MF: ArrayLike, y_NF: ArrayLike, sigma: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The kernel of all rows with a zero diagonal, and for each row 1 if it is of x, else 0."""
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma: got {sigma}; accepted: above 0.")
    all_LF, is_y_L = _stack(_features(x_MF, "x", 2), _features(y_NF, "y", 2))
    squared = distance.pdist(all_LF, "sqeuclidean")
    return distance.squareform(np.exp(-squared / (2 * sigma**2))), 1 - is_y_L


def _between_groups(
    K_LL: NDArray[np.float64], member_L: NDArray[np.float64], groups: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean kernel of each pair of groups with a zero diagonal, and for each group 1 if it is of
    x, else 0."""
    if not groups:
        return K_LL, member_L
    if len(groups) != len(K_LL):
        raise ValueError(f"groups: got {len(groups)}; accepted: one for each of {len(K_LL)} rows.")
    sided = [
        f"{is_x:g} {name}" if name else "" for name, is_x in zip(groups, member_L, strict=True)
    ]
    group_L = group_numbers(sided)
    share_GL = np.zeros((group_L.max() + 1, len(K_LL)))
    share_GL[group_L, np.arange(len(K_LL))] = 1.0
    member_G = share_GL @ member_L > 0
    fewest = int(min(member_G.sum(), (~member_G).sum()))
    if fewest < 2:
        raise ValueError(f"groups: got {fewest} on a side; accepted: at least 2.")
    share_GL /= share_GL.sum(axis=1, keepdims=True)
    K_GG = share_GL @ K_LL @ share_GL.T
    np.fill_diagonal(K_GG, 0.0)
    return K_GG, member_G.astype(float)


def _mmd2(K_LL: NDArray[np.float64], member_PL: NDArray[np.float64]) -> NDArray[np.float64]:
    """`mmd2` of each split P, from the kernel sums within and between its sides."""
    near_PL = member_PL @ K_LL
    within_x_P = np.einsum("pl,pl->p", near_PL, member_PL)
    between_P = near_PL.sum(1) - within_x_P
    within_y_P = K_LL.sum() - within_x_P - 2 * between_P
    m = member_PL[0].sum()
    n = len(K_LL) - m
    return within_x_P / (m * (m - 1)) + within_y_P / (n * (n - 1)) - 2 * between_P / (m * n)


def _auc_interval(auc: float, m: int, n: int) -> tuple[float, float]:
    """All θ with |auc − θ| ≤ z·sd(θ); sd² is Hanley & McNeil's (1982) for exponential scores,
    with both sizes replaced by their mean in the covariance terms."""
    z = float(stats.norm.ppf((1 + LEVEL) / 2))

    def excess(θ: float) -> float:
        spread = 1 + ((m + n) / 2 - 1) * ((1 - θ) / (2 - θ) + θ / (1 + θ))
        return (auc - θ) ** 2 - z**2 * θ * (1 - θ) * spread / (m * n)

    # At an AUC of 0 or 1, θ = AUC is a root but no end of the interval: exclude it.
    low = _root(excess, 0, auc - NEAR) if auc > NEAR else 0.0
    high = _root(excess, auc + NEAR, 1) if auc < 1 - NEAR else 1.0
    return low, high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.root_scalar(function, bracket=(low, high)).root)


def _features(x_MF: ArrayLike, name: str, least: int) -> NDArray[np.float64]:
    x_MF = np.asarray(x_MF, np.float64)
    if x_MF.ndim != 2 or len(x_MF) < least or not x_MF.shape[1]:
        raise ValueError(
            f"{name}: got the shape {x_MF.shape}; accepted: [texts, features], at least {least} "
            "texts."
        )
    if not np.isfinite(x_MF).all():
        raise ValueError(f"{name}: got a number that is not finite; accepted: finite ones.")
    return x_MF


def _stack(
    x_MF: NDArray[np.float64], y_NF: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All rows, and for each 1 if it is of y, else 0."""
    if x_MF.shape[1] != y_NF.shape[1]:
        raise ValueError(
            f"features: got {x_MF.shape[1]} in x and {y_NF.shape[1]} in y; accepted: equal numbers."
        )
    return np.concatenate([x_MF, y_NF]), np.repeat([0.0, 1.0], [len(x_MF), len(y_NF)])
