"""The known source of bench/known_source.py against enumeration, and targets built from it."""

import importlib
import itertools
import math

import pytest
import torch

from dftserve.targets.sparse import sparsify
from dftserve.train.divergences import ForwardKL, LogitRows, TargetRows


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("known_source")


@pytest.fixture(scope="module")
def settings(bench):
    return bench.Settings(narrators=2, slots=3, words=5, length=4)


@pytest.fixture(scope="module")
def source(bench, settings):
    return bench.make_source(settings, settings.narrators, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def texts(bench, source, settings):
    return bench.Texts.of(source, 16, settings.length, torch.Generator().manual_seed(1))


def probability(source, words) -> float:
    """p(words), summed over every narrator and every walk through the slots."""
    total = 0.0
    slots = range(source.start_KS.shape[1])
    for who in range(source.narrators):
        for walk in itertools.product(slots, repeat=len(words)):
            p = source.start_KS[who, walk[0]] / source.narrators
            for slot, following in itertools.pairwise(walk):
                p = p * source.move_KST[who, slot, following]
            for slot, word in zip(walk, words, strict=True):
                p = p * source.say_KSV[who, slot, word]
            total += float(p)
    return total


def test_next_token_matches_enumeration(source):
    words = [3, 1, 5]
    p_NV = source.next_token(torch.tensor([words]))[0]
    for index in range(len(words)):
        before = words[:index]
        p_before = probability(source, before) if before else 1.0
        expected = [
            probability(source, [*before, word]) / p_before for word in range(source.vocabulary)
        ]
        assert p_NV[index].tolist() == pytest.approx(expected, abs=1e-12)


def test_next_token_sums_to_one_over_the_words(source, settings, texts):
    torch.testing.assert_close(texts.p_RV.sum(dim=1), torch.ones(16 * 4, dtype=torch.float64))
    specials = [0, *range(1 + settings.words, source.vocabulary)]
    assert not texts.p_RV[:, specials].any()


def test_true_kl_is_zero_to_itself_and_as_computed_by_hand_otherwise(bench, texts):
    assert bench.true_kl(texts.p_RV, texts.p_RV.log()) == pytest.approx(0, abs=1e-12)
    p_RV = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    other_RV = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64)
    assert bench.true_kl(p_RV, other_RV.log()) == pytest.approx(0.5 * math.log(2))
    assert bench.true_kl(other_RV, p_RV.log()) == math.inf


def test_renormalised_top_k_is_biased_and_the_sampled_tail_is_not(bench, texts):
    """At the true distribution the mean gradient over the draws is 0, or the target is biased.

    40,000 draws of a tail: a standard error of .0025 at most, so .0125 is five of them.
    """
    p_RV = texts.p_RV[:8].clamp_min(1e-30)
    labels_R = texts.labels_R[:8]
    generator = torch.Generator().manual_seed(2)
    sampled = sparsify(p_RV.log().float(), labels_R, k=2, draws=40_000, generator=generator)

    def gradient_at_truth(targets) -> torch.Tensor:
        rows = TargetRows.of(labels_R.numpy(), targets)
        return ForwardKL(weight=1.0).loss_and_gradient(LogitRows.of(p_RV.log()), rows)[1]

    assert gradient_at_truth(sampled).abs().max() < 0.0125
    mass_R = p_RV.topk(2, dim=1).values.sum(dim=1)
    missing_R = gradient_at_truth(bench.renormalised(sampled, labels_R)).abs().sum(dim=1)
    torch.testing.assert_close(missing_R, 2 * (1 - mass_R), atol=1e-5, rtol=0)
    assert missing_R.min() > 0.05


def test_the_posterior_of_exact_personas_is_the_source(bench, source, settings, texts):
    result = bench.personas(bench.ExactTeacher(source, settings), texts, settings)
    assert result.posterior == pytest.approx(0, abs=1e-5)
    assert result.fixed > 0.01


def test_interval_as_computed_by_hand_and_a_claim_needs_the_whole_interval(bench):
    interval = bench.Interval.of([1.0, 2.0, 3.0])
    reach = 4.302653 / math.sqrt(3)  # Student's t of 2 degrees of freedom.
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (2, 2 - reach, 2 + reach), abs=1e-4
    )
    values = torch.tensor([1.0, 2.0, 3.0]).numpy()
    assert bench.claim(values, -1.0)["holds"]
    assert not bench.claim(values, 0.0)["holds"]


def test_a_stored_token_takes_58_bytes(bench):
    assert bench.bytes_a_token(bench.Settings()) == 58


def test_every_method_is_run(bench):
    """A short run with few words: it does not check the quality of the results."""
    settings = bench.Settings(
        narrators=2,
        slots=3,
        words=9,
        length=8,
        train_documents=16,
        validation_documents=16,
        test_documents=16,
        base_documents=128,
        teacher_documents=128,
        base_hidden=16,
        teacher_hidden=16,
        layers=2,
        batch=8,
        epochs=2,
        shorter=(1,),
        top_k=3,
        draws=2,
        temperatures=(0.8, 1.0),
    )
    result = bench.measure(settings, seed=0)
    assert set(bench.BASELINES) < set(result.outcomes)
    assert {"hybrid", "reverse_kl", "sliced_w1"} < set(result.outcomes)
    kls = [outcome.true_kl for outcome in result.outcomes.values()]
    assert all(0 < kl < 20 for kl in kls)
    # The same start and documents: different methods give different results.
    assert len({round(kl, 9) for kl in kls}) >= len(kls) - 2
