"""Mixture weights: the likelihood of each step, known mixtures, and bins with few positions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.targets import mixture_weights
from dftserve.targets.mixture_weights import fit


def observations(seed, positions, components, *, excluded=0.0):
    """The observed tokens' log-probabilities by component, and bins; the first component excludes
    none."""
    random = np.random.default_rng(seed)
    logprobs_TC = np.log(random.random((positions, components)))
    excluded_TC = random.random((positions, components)) < excluded
    excluded_TC[:, 0] = False
    return np.where(excluded_TC, -np.inf, logprobs_TC), random.integers(0, 4, positions)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 200),
    st.integers(1, 5),
    st.sampled_from([0.0, 5.0, 1e3]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_step_decreases_the_objective(seed, positions, components, shrinkage, excluded):
    logprobs_TC, bins_T = observations(seed, positions, components, excluded=excluded)
    fitted = fit(logprobs_TC, bins_T, bins=4, shrinkage=shrinkage)
    for trace in (fitted.trace, fitted.bins_trace):
        assert np.isfinite(trace).all()
        assert (np.diff(trace) > -1e-10).all()
    for weights in (fitted.pooled_C[None], fitted.bins_BC):
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)


def test_the_weights_of_a_known_mixture_are_recovered():
    """Within five standard errors of maximum likelihood, by the Fisher information of the truth."""
    random, tokens, true_C = np.random.default_rng(4), 20_000, np.array([0.6, 0.3, 0.1])
    p_CV = random.dirichlet(np.full(50, 0.3), size=3)
    p_CV = 0.99 * p_CV + 0.01 / 50
    mixed_V = true_C @ p_CV
    fitted = fit(
        np.log(p_CV[:, random.choice(50, tokens, p=mixed_V)].T),
        np.zeros(tokens, np.int64),
        bins=1,
        shrinkage=0.0,
    )
    slope_CV = p_CV[:2] - p_CV[2]
    information = tokens * (slope_CV / mixed_V) @ slope_CV.T
    errors_C = np.sqrt(np.diag(np.linalg.inv(information)))
    assert (np.abs(fitted.pooled_C[:2] - true_C[:2]) < 5 * errors_C).all()
    assert errors_C.max() < 0.02  # Otherwise the assertion above is too weak.


def test_bins_have_weights_of_their_own_and_shrink_to_the_pooled_ones():
    """Bin 0 is of the first component, bin 1 of the second; bin 2 has one position, 3 none."""
    random = np.random.default_rng(0)
    first_TC = np.log([[0.9, 0.1]] * 500 + [[0.1, 0.9]] * 500 + [[0.1, 0.9]])
    bins_T = np.array([0] * 500 + [1] * 500 + [2])
    order = random.permutation(1001)
    fitted = fit(first_TC[order], bins_T[order], bins=4, shrinkage=50.0)
    assert fitted.bins_BC[0, 0] > 0.9
    assert fitted.bins_BC[1, 0] < 0.1
    assert abs(fitted.bins_BC[2, 0] - fitted.pooled_C[0]) < 1 / 50
    np.testing.assert_allclose(fitted.bins_BC[3], fitted.pooled_C, rtol=1e-12)


def test_nll_is_that_of_the_mixture():
    logprobs_TC, _ = observations(1, 30, 3, excluded=0.4)
    weights_TC = np.random.default_rng(2).dirichlet(np.ones(3), size=30)
    expected_T = -np.log((np.exp(logprobs_TC) * weights_TC).sum(axis=1))
    np.testing.assert_allclose(mixture_weights.nll(logprobs_TC, weights_TC), expected_T)
    tiny_TC = logprobs_TC - 2000  # Too small for probabilities in float64.
    np.testing.assert_allclose(mixture_weights.nll(tiny_TC, weights_TC), expected_T + 2000)


@pytest.mark.parametrize(
    ("logprobs_TC", "message"),
    [
        (np.zeros((0, 2)), "got no positions"),
        (np.full((3, 2), -np.inf), "no component gives some observed token"),
        (np.full((3, 2), np.nan), "no component gives some observed token"),
    ],
)
def test_impossible_observations_are_refused(logprobs_TC, message):
    with pytest.raises(ValueError, match=message):
        fit(logprobs_TC, np.zeros(len(logprobs_TC), np.int64), bins=1, shrinkage=0.0)
