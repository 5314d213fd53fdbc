"""Each closed form against fp64 autograd of its definition, and properties of the definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.lm import Head
from dftserve.targets.sparse import sparsify
from dftserve.train import divergences as d
from dftserve.train.head import CHUNK_ELEMENTS, _Gradients, head_loss

V, R, D = 41, 7, 5


def dense_target(seed: int, *, sharpness: float = 2.0, rows: int = R, holes: bool = False):
    """(logprobs_RV float64, labels_R)."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = sharpness * torch.randn(rows, V, dtype=torch.float64, generator=generator)
    if holes:
        logits_RV = logits_RV.masked_fill(
            torch.rand(rows, V, generator=generator) < 0.9, -torch.inf
        )
        logits_RV[:, 0] = 0.0
    labels_R = torch.randint(V, (rows,), generator=generator)
    return logits_RV.log_softmax(dim=1), labels_R


def stored(logprobs_RV, labels_R, *, k=6, draws=6, seed=0) -> d.TargetRows:
    targets = sparsify(
        logprobs_RV.float(),
        labels_R,
        k=k,
        draws=draws,
        generator=torch.Generator().manual_seed(seed),
    )
    return d.TargetRows.of(labels_R.numpy(), targets)


def every_divergence(weight: float) -> list[d.Divergence]:
    generator = torch.Generator().manual_seed(5)
    lines = d.Projections.of(torch.randn(V, D, generator=generator), lines=8, seed=1)
    return [
        d.ForwardKL(weight=weight),
        d.ReverseKL(weight=weight),
        d.SkewKL(weight=weight),
        d.JSD(weight=weight, share=0.3),
        d.SlicedW1(weight=weight, projections=lines),
        d.SFT(),
        d.LabelSmoothing(epsilon=0.2),
        d.EntropyBonus(strength=0.3),
        d.GEM(temperature=0.6),
    ]


@pytest.mark.parametrize("divergence", every_divergence(0.7), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (2.0, 5.0)])
@pytest.mark.parametrize("holes", [False, True])
def test_gradients_equal_fp64_autograd(monkeypatch, divergence, scale, cap, holes):
    """Of hidden states, head and bias, over several chunks: relative error at most 1e-6."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 3 * V)
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(R, D, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(V, D, dtype=torch.float64, generator=generator, requires_grad=True)
    bias_V = torch.randn(V, dtype=torch.float64, generator=generator, requires_grad=True)
    target = stored(*dense_target(3, holes=holes))
    head = Head(weight_VD, bias_V, scale, cap)
    expected = divergence.reference(head.logits(hidden_ND), target).sum()
    expected_gradients = torch.autograd.grad(expected, [hidden_ND, weight_VD, bias_V])
    result = head_loss(head, hidden_ND, target, divergence)
    gradients = torch.autograd.grad(3.0 * result.loss, [hidden_ND, weight_VD, bias_V])
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours / 3.0 - theirs).norm() <= 1e-6 * theirs.norm()
    p_RV = head.logits(hidden_ND).softmax(dim=1)
    assert result.model_entropy.item() == pytest.approx(-(p_RV * p_RV.log()).sum().item(), rel=1e-9)


def dense_value(name: str, p_V: np.ndarray, q_V: np.ndarray) -> float:
    """The divergence of whole distributions, in numpy."""

    def kl(a, b):
        seen = a > 0
        return float((a[seen] * np.log(a[seen] / b[seen])).sum())

    match name:
        case "ForwardKL":
            return kl(q_V, p_V)
        case "ReverseKL":
            return kl(p_V, np.maximum(q_V, d.FLOOR))
        case "SkewKL":
            return kl(q_V, 0.1 * q_V + 0.9 * p_V)
        case "JSD":
            middle_V = 0.5 * q_V + 0.5 * p_V
            return 0.5 * kl(q_V, middle_V) + 0.5 * kl(p_V, middle_V)
    raise AssertionError(name)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([d.ForwardKL, d.ReverseKL, d.SkewKL, d.JSD]),
    st.floats(0.05, 1.0),
)
def test_values_equal_the_dense_divergence_when_everything_is_stored(seed, kind, weight):
    logprobs_RV, labels_R = dense_target(seed)
    target = stored(logprobs_RV, labels_R, k=V)
    logits_RV = torch.randn(
        R, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)
    )
    values_R = kind(weight=weight).reference(logits_RV, target)
    p_RV, q_RV = logits_RV.softmax(dim=1).numpy(), weight * logprobs_RV.exp().numpy()
    q_RV[np.arange(R), labels_R.numpy()] += 1 - weight
    for row in range(R):
        expected = dense_value(kind.__name__, p_RV[row], q_RV[row])
        assert float(values_R[row]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([d.ReverseKL, d.SkewKL, d.JSD]), st.integers(1, 20))
def test_lumping_gives_a_lower_bound(seed, kind, k):
    logprobs_RV, labels_R = dense_target(seed)
    logits_RV = torch.randn(
        R, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)
    )
    whole_R = kind(weight=0.9).reference(logits_RV, stored(logprobs_RV, labels_R, k=V))
    lumped_R = kind(weight=0.9).reference(logits_RV, stored(logprobs_RV, labels_R, k=k))
    assert bool((lumped_R <= whole_R + 1e-5).all())


def test_the_sampled_tail_is_unbiased():
    """The mean gradient over draws is the dense one: a χ² of V − 4 degrees at most 6 sigma high.

    Under the null hypothesis Σ z² over the V − 4 drawn entries has the mean V − 4 and a standard
    deviation below √(2V)·(1 + the entries' correlation); six of them are crossed with probability
    below 1e-6. The same statistic rejects a tail with 6 % more mass, and a top that is renormalised
    instead of sampling a tail.
    """
    draws, k = 20_000, 4
    logprobs_1V, label_1 = dense_target(8, rows=1)
    many = stored(logprobs_1V.expand(draws, -1), label_1.expand(draws), k=k, draws=3, seed=9)
    logits_1V = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, gradient_RV = d.ForwardKL(weight=0.8).loss_and_gradient(
        d.LogitRows.of(logits_1V.repeat(draws, 1)), many
    )
    p_V = logprobs_1V[0].exp()
    in_top_V = torch.zeros(V, dtype=torch.bool).index_fill(0, p_V.topk(k).indices, value=True)
    renormalised_V = torch.where(in_top_V, p_V, 0) / p_V[in_top_V].sum()

    def expected_of(target_V):
        mixed_V = 0.8 * target_V
        mixed_V[label_1] += 0.2
        return logits_1V[0].softmax(dim=0) - mixed_V

    error_V = gradient_RV.std(dim=0) / math.sqrt(draws)
    drawn_V = error_V > 1e-9
    degrees = int(drawn_V.sum())
    assert degrees == V - k
    difference_V = gradient_RV.mean(dim=0) - expected_of(p_V)
    assert float(difference_V[~drawn_V].abs().max()) < 1e-6

    def excess(target_V):
        z_V = (gradient_RV.mean(dim=0) - expected_of(target_V))[drawn_V] / error_V[drawn_V]
        return float(z_V.square().sum()) - degrees

    bound = 6 * 2 * math.sqrt(2 * degrees)
    assert excess(p_V) < bound
    assert excess(torch.where(in_top_V, p_V, 1.06 * p_V)) > bound
    assert excess(renormalised_V) > bound


@pytest.mark.parametrize("divergence", every_divergence(0.7), ids=lambda x: type(x).__name__)
def test_an_empty_tail_needs_no_draws(divergence):
    """As of a store whose k is the whole vocabulary."""
    dense = dense_target(6)
    logits_RV = torch.randn(R, V, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    drawn, without = (stored(*dense, k=V, draws=draws) for draws in (6, 0))
    for ours, theirs in zip(
        divergence.loss_and_gradient(d.LogitRows.of(logits_RV.clone()), without),
        divergence.loss_and_gradient(d.LogitRows.of(logits_RV.clone()), drawn),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.allclose(
        divergence.reference(logits_RV, without), divergence.reference(logits_RV, drawn), rtol=1e-6
    )


def test_no_gradient_is_computed_where_none_is_recorded(monkeypatch):
    """An evaluation would take twice the time, and memory for the head's gradient."""
    needs = []
    empty = _Gradients.empty
    monkeypatch.setattr(_Gradients, "empty", lambda *given: needs.append(given[2]) or empty(*given))
    weight_VD = torch.randn(V, D, requires_grad=True)
    hidden_ND = torch.randn(R, D, requires_grad=True)
    head, target = Head(weight_VD, None), stored(*dense_target(8))
    recorded = head_loss(head, hidden_ND, target, d.SFT())
    with torch.no_grad():
        evaluated = head_loss(head, hidden_ND, target, d.SFT())
    assert needs == [(True, True, False), (False, False, False)]
    assert torch.equal(recorded.loss, evaluated.loss)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_forward_kl_of_weight_zero_is_sft(seed):
    target = stored(*dense_target(seed))
    logits_RV = torch.randn(
        R, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    ours = d.ForwardKL(weight=0.0).loss_and_gradient(d.LogitRows.of(logits_RV.clone()), target)
    sft = d.SFT().loss_and_gradient(d.LogitRows.of(logits_RV.clone()), target)
    assert torch.equal(ours[0], sft[0])
    assert torch.equal(ours[1], sft[1])


@pytest.mark.parametrize("weight", [0.2, 0.7, 1.0])
def test_every_divergence_is_zero_where_the_model_is_the_target(weight):
    logprobs_RV, labels_R = dense_target(4)
    target = stored(logprobs_RV, labels_R, k=V)
    q_RV = weight * logprobs_RV.exp()
    q_RV[torch.arange(R), labels_R] += 1 - weight
    for divergence in every_divergence(weight)[:5]:
        loss_R, gradient_RV = divergence.loss_and_gradient(d.LogitRows.of(q_RV.log()), target)
        assert float(loss_R.abs().max()) < 1e-5, divergence
        if not isinstance(divergence, d.SlicedW1):  # |x| has no unique slope at 0.
            assert float(gradient_RV.abs().max()) < 1e-5, divergence


def test_sliced_w1_equals_scipys_distance_averaged_over_lines():
    from scipy.stats import wasserstein_distance

    generator = torch.Generator().manual_seed(3)
    embeddings_VD = torch.randn(V, D, generator=generator)
    lines = d.Projections.of(embeddings_VD, lines=8, seed=4)
    logprobs_RV, labels_R = dense_target(6)
    target = stored(logprobs_RV, labels_R, k=V)
    logits_RV = torch.randn(R, V, dtype=torch.float64, generator=generator)
    values_R = d.SlicedW1(weight=1.0, projections=lines).reference(logits_RV, target)
    directions_DL = torch.randn(D, 8, generator=torch.Generator().manual_seed(4)).double()
    scaled_VD = embeddings_VD.double() / embeddings_VD.double().norm(dim=1, keepdim=True)
    positions_VL = (scaled_VD @ (directions_DL / directions_DL.norm(dim=0))).numpy()
    p_RV, q_RV = logits_RV.softmax(dim=1).numpy(), logprobs_RV.exp().numpy()
    for row in range(R):
        expected = np.mean(
            [wasserstein_distance(x_V, x_V, p_RV[row], q_RV[row]) for x_V in positions_VL.T]
        )
        assert float(values_R[row]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.ReverseKL(weight=0.0), "reverse KL accepts a number above 0"),
        (lambda: d.ForwardKL(weight=1.5), "accepted: a number from 0 to 1"),
        (lambda: d.ForwardKL(weight=math.nan), "accepted: a number from 0 to 1"),
        (lambda: d.JSD(share=1.0), "between 0 and 1"),
        (lambda: d.SkewKL(skew=0.0), "between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
