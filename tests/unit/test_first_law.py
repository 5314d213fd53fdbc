"""The metrics of bench/first_law.py against values computed by hand."""

import importlib
import math
import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dftserve.sampling import Controls, LawConstants, control_row
from dftserve.sampling.transform import transform as plain
from dftserve.spec import parse
from dftserve.stories import grammar
from tests.future import no_future_warnings
from tests.rows import make_rows
from tests.training import VOCABULARY, small_model

pytestmark = no_future_warnings

NO_TOKENS = torch.empty(0, dtype=torch.int64)
"""For laws that do not read the previous token."""
FOX = "Tell me a story with a fox in it."


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("first_law")


def samples_of(bench, prompt, texts, ended=True):
    return [bench.Sample(prompt, text, ended, 1.0) for text in texts]


def test_copies_share_one_credit_and_none_gets_no_credit(bench):
    assert bench.credits(["a", "a", None, "b"]) == [0.5, 0.5, 0.0, 1.0]


def test_entropy_of_counts_by_hand(bench):
    # G(2) = ψ(2) + (ψ(3/2) − ψ(1))/2 = (1 − γ) + (1 − ln 2), with ψ(3/2) = 2 − γ − 2 ln 2.
    g2 = 2 - np.euler_gamma - math.log(2)
    assert bench.entropy(np.array([[2, 2]])) == pytest.approx([math.log(4) - g2])
    # G(1) = ψ(1) − (ψ(1) − ψ(1/2))/2 = −γ − ln 2: one choice seen once does not mean certainty.
    assert bench.entropy(np.array([[1]])) == pytest.approx([np.euler_gamma + math.log(2)])


def test_entropy_does_not_depend_on_how_many_texts_are_valid(bench):
    """80 uniform options, seen as often as a slot among 1,000 half-valid texts.

    Mean of 200 draws: standard error below .0005 of uniform, so .005 is ten of them.
    """
    rng = np.random.default_rng(0)
    shares = {
        n: bench.entropy(rng.multinomial(n, [1 / 80] * 80, size=200)).mean() / math.log(80)
        for n in (200, 1000)
    }
    assert shares[200] == pytest.approx(1, abs=0.005)
    assert shares[1000] == pytest.approx(1, abs=0.005)


def test_share_of_uniform_counts_only_the_open_slots(bench):
    seasons = [{"season": name} for name in ("spring", "summer", "autumn", "winter")] * 1000
    share = bench.share_of_uniform(seasons, {"season"}, np.ones((1, 4000)))
    assert share == pytest.approx([1.0], abs=1e-3)
    assert np.isnan(bench.share_of_uniform(seasons, {"thing"}, np.ones((1, 4000)))).all()
    story = grammar.generate(random.Random(0), FOX)
    assert "animal" not in bench.open_choices(FOX, story)
    assert bench.open_choices(FOX, story)["narrator"] == story.narrator


def test_measures_of_three_texts(bench):
    story = grammar.generate(random.Random(0), FOX).text
    samples = samples_of(bench, FOX, [story, story, story + " "])
    samples += samples_of(bench, FOX, [story], ended=False)
    measures = bench.measure(samples, np.ones((1, 4)))
    assert measures["validity"] == pytest.approx([0.5])
    assert measures["distinct_valid"] == pytest.approx([250])
    assert measures["openings"] == pytest.approx([250])
    assert measures["entropy"] == pytest.approx([1.0])


def test_an_interval_is_centred_on_its_estimate(bench):
    values = np.concatenate(([10.0], np.linspace(0, 2, 401)))
    interval = bench.Interval.of(values)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((10, 9.05, 10.95))


def test_a_front_keeps_the_points_that_no_other_dominates(bench):
    validity, diversity = bench.front(
        np.array([0.9, 0.5, 0.6, 0.8]), np.array([0.7, 0.9, 0.6, 0.7])
    )
    assert validity.tolist() == [0.5, 0.9]
    assert diversity.tolist() == [0.9, 0.7]


def test_lead_is_taken_over_shared_validities_only(bench):
    line = np.array([0.5, 1.0]), np.array([0.9, 0.7])
    above = np.array([0.75, 1.0]), np.array([0.85, 0.75])
    assert bench.lead(*above, *line) == pytest.approx(0.05)
    assert math.isnan(bench.lead(np.array([0.1, 0.2]), np.array([0.9, 0.8]), *line))


def test_gain_at_a_point(bench):
    line = np.array([0.5, 1.0]), np.array([0.9, 0.7])
    assert bench.gain_at(*line, 0.75, 0.7) == pytest.approx(0.1)
    assert bench.gain_at(*line, 0.2, 0.7) == pytest.approx(0.2), "the more valid point is used"
    assert math.isnan(bench.gain_at(np.array([0.5]), np.array([0.9]), 0.75, 0.7))


def test_the_cache_is_passed_under_the_name_that_this_transformers_has(bench, caplog):
    model = small_model()
    cache = DynamicCache(config=model.config)
    ids_RN = torch.randint(2, VOCABULARY, (2, 5))
    with caplog.at_level("WARNING", logger="transformers"):
        model(ids_RN, **{bench.Writer("any", model, None).cache_argument: cache})
    assert cache.get_seq_length() == 5
    assert "deprecated" not in caplog.text


def test_unfinished_rows_move_into_the_gaps(bench):
    going = torch.tensor([True, False, True, False, True])
    assert bench.closed_up(going).tolist() == [0, 4, 2]


@pytest.mark.parametrize(
    "constants",
    [
        LawConstants(strength=0.0),
        LawConstants(strength=3.0),
        LawConstants(guard_start=0.5, guard_end=0.5),
        LawConstants(gate_power=0.0),
    ],
    ids=["c 0", "c 3", "guard .5", "power 0"],
)
def test_a_setting_samples_the_law_of_its_constants(bench, constants):
    """The entropy that the bench samples is that of plain torch with the same constants."""
    source_RV = make_rows(["gaussian", "zipf", "few"], 200, seed=2)
    after_RV = bench.gated(constants, 1.0).rewrite(source_RV, NO_TOKENS, 3)
    p_RV = after_RV.softmax(dim=1)
    entropy_R = torch.special.entr(p_RV).sum(dim=1)
    expected_R, by_default_R = (
        _entropy_after(source_RV, each) for each in (constants, LawConstants())
    )
    torch.testing.assert_close(entropy_R, expected_R, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected_R, by_default_R, rtol=1e-2)


def _entropy_after(logits_RV, constants):
    row = control_row(parse(1.0), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({3}))
    controls = Controls.stack([row] * len(logits_RV))
    return plain(logits_RV.clone(), controls, None, constants).entropy_after_R


def test_each_rewrite_keeps_the_right_tokens(bench):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    end = 3
    kept = {
        bench.top_p(0.8): [True, True, False, False],
        bench.top_p(0.81): [True, True, True, False],
        bench.min_p_last(0.2, 1.0): [True, True, True, False],
        # 0.05/0.5 is 0.1 at T=1 and 0.32 at T=2.
        bench.min_p_last(0.31, 2.0): [True, True, True, True],
        # Stop tokens are never cut.
        bench.fixed(0.5, 2.0): [True, True, False, True],
    }
    for setting, expected in kept.items():
        out = setting.rewrite(logits.clone(), NO_TOKENS, end)
        assert out.isfinite()[0].tolist() == expected, setting.label
    # The two tokens above the guard have the ratio sqrt(.5/.3) at T=2.
    p = bench.fixed(0.5, 2.0).rewrite(logits.clone(), NO_TOKENS, end).softmax(dim=1)[0]
    assert float(p[0] / p[1]) == pytest.approx(math.sqrt(0.5 / 0.3), rel=1e-4)
