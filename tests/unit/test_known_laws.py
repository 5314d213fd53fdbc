"""The laws that cut as known samplers do, without heating: against fp64, and their properties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, control_row, get_backend, transform
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.draws import KEY_BITS, draw_key, key_halves, uniform
from dftserve.spec import parse
from tests.reference import cut_reference, draw_reference
from tests.rows import KINDS, make_rows

LOG_PROBABILITY_ERROR = 2e-4
ENTROPY_ERROR = 1e-3
KEY = draw_key("a request")
BACKENDS = pytest.mark.parametrize("kind", [TorchBackend, get_backend], ids=["plain", "fast"])


@st.composite
def law_objects(draw):
    """A diversity object of a law that does not heat."""
    law = draw(st.sampled_from(["guard", "top_n_sigma", "xtc"]))
    if law == "top_n_sigma":
        return {"law": law, "n_sigma": draw(st.floats(0.1, 3.0))}
    diversity = {"law": law}
    if law == "guard" or draw(st.booleans()):
        diversity["min_p"] = draw(st.floats(0.001, 0.9))
    if law == "xtc":
        diversity["xtc_threshold"] = draw(st.floats(0.001, 0.5))
        diversity["xtc_probability"] = draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    return diversity


@st.composite
def batches(draw, max_rows=6):
    """Rows of every kind, and for each its diversity, temperature and stop tokens."""
    vocabulary = draw(st.sampled_from([2, 3, 17, 64, 257, 1024]))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=max_rows))
    stops = st.frozensets(st.integers(0, 20), max_size=3)
    requests = [(draw(law_objects()), draw(st.floats(0.2, 2.0)), draw(stops)) for _ in kinds]
    return make_rows(kinds, vocabulary, draw(st.integers(0, 2**32 - 1))), requests


def controls_of(requests, *, divide=False):
    """Row i is at position i."""
    rows = [
        control_row(
            parse(diversity),
            temperature=t,
            logits_divisor=t if divide else 1.0,
            stop_ids=stops,
            draw_key=KEY,
        )
        for diversity, t, stops in requests
    ]
    return Controls.stack(rows).at(torch.arange(len(rows)))


@BACKENDS
@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_rows_match_the_fp64_reference(kind, batch, divide):
    logits_RV, requests = batch
    T_R1 = torch.tensor([t for _, t, _ in requests], dtype=torch.float64)[:, None]
    divisor_R1 = T_R1 if divide else torch.ones_like(T_R1)
    rows_RV = (logits_RV.double() / divisor_R1).float()
    arrived_RV = rows_RV.double() * divisor_R1
    statistics = transform(rows_RV, controls_of(requests, divide=divide), None, kind("cpu"))
    for r, (diversity, t, stops) in enumerate(requests):
        expected = cut_reference(
            arrived_RV[r].numpy(),
            temperature=t,
            stop_ids=stops,
            draw=draw_reference(KEY, r),
            **diversity,
        )
        largest = arrived_RV[r].abs().nan_to_num(0, 0, 0).max().item()
        if expected.margin < max(1e-4, 4 * np.spacing(np.float32(largest))):
            continue
        got_V = torch.log_softmax(rows_RV[r].double() / (1.0 if divide else t), dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(expected.log_p_V)).all()
        likely_V = expected.log_p_V > -30
        np.testing.assert_allclose(
            got_V[likely_V], expected.log_p_V[likely_V], atol=LOG_PROBABILITY_ERROR
        )
        assert statistics.entropy_before_R[r] == pytest.approx(
            expected.entropy_before, abs=ENTROPY_ERROR
        )
        assert statistics.entropy_after_R[r] == pytest.approx(
            expected.entropy_after, abs=ENTROPY_ERROR
        )
        assert statistics.temperature_R[r] == pytest.approx(t, rel=1e-6)


@BACKENDS
@settings(max_examples=100, deadline=None)
@given(batches(), st.floats(0.2, 2.0))
def test_the_kept_tokens_do_not_depend_on_the_temperature(kind, batch, other):
    logits_RV, requests = batch
    after_RV, other_RV = logits_RV.clone(), logits_RV.clone()
    transform(after_RV, controls_of(requests), None, kind("cpu"))
    transform(other_RV, controls_of([(d, other, s) for d, _, s in requests]), None, kind("cpu"))
    assert torch.equal(after_RV == -torch.inf, other_RV == -torch.inf)


@BACKENDS
@settings(max_examples=100, deadline=None)
@given(batches())
def test_stop_probabilities_infinities_and_some_content_are_kept(kind, batch):
    """A stop token's probability is that on the guarded support at T, before any content token is
    excluded."""
    logits_RV, requests = batch
    guards = [
        # An xtc that never excludes, but for one draw in 2^24, keeps what is left before exclusion.
        (d if d["law"] != "xtc" else d | {"xtc_probability": 1e-9}, t, s)
        for d, t, s in requests
    ]
    after_RV, guarded_RV = logits_RV.clone(), logits_RV.clone()
    transform(after_RV, controls_of(requests), None, kind("cpu"))
    transform(guarded_RV, controls_of(guards), None, kind("cpu"))
    assert not after_RV.isnan().any()
    assert (after_RV[logits_RV == -torch.inf] == -torch.inf).all()
    for r, (_, t, stops) in enumerate(requests):
        is_content_V = torch.ones(logits_RV.shape[1], dtype=torch.bool)
        is_content_V[[i for i in stops if i < len(is_content_V)]] = False
        before_V, after_V = guarded_RV[r] > -torch.inf, after_RV[r] > -torch.inf
        assert (before_V & is_content_V).any() == (after_V & is_content_V).any()
        before_V = torch.softmax(guarded_RV[r].double() / t, dim=0)[~is_content_V]
        after_V = torch.softmax(after_RV[r].double() / t, dim=0)[~is_content_V]
        torch.testing.assert_close(after_V, before_V, atol=2e-5, rtol=1e-3)


def rewritten(probabilities, diversity, kind, **fields):
    """The probabilities that the transform makes of these, and how much it changed."""
    logits_RV = torch.tensor([probabilities]).log()
    fields = {"temperature": 1.0, "logits_divisor": 1.0, "stop_ids": frozenset(), **fields}
    controls = Controls.stack([control_row(parse(diversity), **fields)])
    statistics = transform(logits_RV, controls, None, kind("cpu"))
    return torch.softmax(logits_RV[0], 0).tolist(), float(statistics.changed_R[0])


ALWAYS = {"law": "xtc", "xtc_probability": 1.0, "xtc_threshold": 0.1}


@BACKENDS
def test_xtc_keeps_the_least_probable_top_choice_and_all_below(kind):
    left, changed = rewritten([0.5, 0.2, 0.15, 0.09, 0.06], ALWAYS, kind)
    assert left == pytest.approx([0, 0, 0.5, 0.3, 0.2], abs=1e-6)
    assert changed == pytest.approx(0.7, abs=1e-6)


@BACKENDS
def test_xtc_excludes_nothing_if_only_one_choice_is_above_the_threshold(kind):
    row = [0.92, 0.05, 0.03]
    left, changed = rewritten(row, ALWAYS, kind)
    assert left == pytest.approx(row, abs=1e-6)
    assert changed == pytest.approx(0, abs=1e-6)


@BACKENDS
def test_xtc_never_excludes_a_stop_token(kind):
    """Nor does a stop token count as the top choice that is kept."""
    left, _ = rewritten([0.4, 0.3, 0.2, 0.1], ALWAYS, kind, stop_ids=frozenset({0}))
    assert left == pytest.approx([0.4, 0, 0, 0.6], abs=1e-6)
    left, _ = rewritten([0.4, 0.3, 0.2, 0.1], ALWAYS, kind, stop_ids=frozenset({3}))
    assert left == pytest.approx([0, 0, 0.9, 0.1], abs=1e-6)


@BACKENDS
def test_top_n_sigma_uses_all_finite_logits_including_stop_tokens(kind):
    """Logits 4, 2, 0, 0: mean 1.5, σ 1.658."""
    row = torch.tensor([4.0, 2.0, 0.0, 0.0, -torch.inf]).exp().tolist()
    for n, expected in ((1.2, [0, 3]), (1.21, [0, 1, 3]), (2.42, [0, 1, 2, 3])):
        diversity = {"law": "top_n_sigma", "n_sigma": n}
        left, _ = rewritten(row, diversity, kind, stop_ids=frozenset({3}))
        assert [i for i, p in enumerate(left) if p > 0] == expected


@BACKENDS
def test_a_steps_draw_depends_on_the_request_and_position_only(kind):
    """Not on the order of the rows in the batch."""
    row = [0.5, 0.3, 0.2]
    diversity = parse({"law": "xtc", "xtc_probability": 0.5})
    fields = {"temperature": 1.0, "logits_divisor": 1.0, "stop_ids": frozenset()}
    keys = [draw_key(seed) for seed in range(8)]
    rows = [control_row(diversity, draw_key=key, **fields) for key in keys for _ in range(64)]
    position_R = torch.arange(64).repeat(8)
    expected_R = [draw_reference(key, at) < 0.5 for key in keys for at in range(64)]
    for order_R in (torch.arange(512), torch.randperm(512, generator=torch.Generator())):
        logits_RV = torch.tensor([row]).log().repeat(512, 1)
        controls = Controls.stack(rows).at(position_R).select(order_R)
        state = torch.get_rng_state()
        transform(logits_RV, controls, None, kind("cpu"))
        assert torch.equal(torch.get_rng_state(), state)
        excluded_R = logits_RV[:, 0] == -torch.inf
        assert excluded_R.tolist() == [expected_R[r] for r in order_R.tolist()]


def test_draws_are_uniform_and_independent():
    """For neighbouring positions and neighbouring keys: each share within four standard errors."""
    positions = torch.arange(100_000)
    keys = [0, 1, 2**24, 2**KEY_BITS - 1, draw_key(0), draw_key(1)]
    expected, errors = 1 / 16, 4 * (1 / 16 / len(positions)) ** 0.5
    draws = []
    for key in keys:
        halves = [torch.full((len(positions),), float(half)) for half in key_halves(key)]
        draws.append(uniform(*halves, positions))
        assert draws[-1][[5, 77_777]].tolist() == [
            draw_reference(key, 5),
            draw_reference(key, 77_777),
        ]
        share_B = torch.bincount((draws[-1] * 16).long(), minlength=16) / len(positions)
        assert (share_B - expected).abs().max() < errors
    pairs = [(each[:-1], each[1:]) for each in draws]
    pairs += itertools.pairwise(draws)
    for a, b in pairs:
        both = torch.bincount((a * 4).long() * 4 + (b * 4).long(), minlength=16) / len(a)
        assert (both - expected).abs().max() < errors


def test_a_key_has_key_bits_and_depends_on_every_part():
    keys = {draw_key(*parts) for parts in ((1,), (2,), ("1",), (1, 0), (1, 1), (None,))}
    assert len(keys) == 6
    assert all(0 <= key < 2**KEY_BITS for key in keys)
    assert draw_key("seed", 7) == draw_key("seed", 7)
