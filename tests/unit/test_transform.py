"""Properties of the transform on rows of every kind, and its agreement with fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, control_row, transform
from dftserve.spec import parse
from tests.reference import reference
from tests.rows import KINDS, make_rows

LOG_PROBABILITY = 2e-4
NATS = 1e-3


@st.composite
def requests(draw):
    """A diversity object, a temperature, a few stop tokens."""
    law = draw(st.sampled_from(["gated", "dynatemp"]))
    diversity = {"law": law, "level": draw(st.floats(0.01, 1.0))}
    if law == "dynatemp":
        diversity["dynatemp_range"] = draw(st.floats(0.05, 2.0))
        diversity["dynatemp_exponent"] = draw(st.floats(0.3, 3.0))
    elif draw(st.booleans()):
        diversity["max_temperature"] = draw(st.floats(0.5, 6.0))
    if draw(st.integers(0, 3)) == 0:
        diversity["min_p"] = draw(st.floats(0.001, 0.5))
    return diversity, draw(st.floats(0.2, 2.0)), draw(st.frozensets(st.integers(0, 20), max_size=3))


@st.composite
def batches(draw, max_rows=6):
    seed = draw(st.integers(0, 2**32 - 1))
    vocabulary = draw(st.sampled_from([2, 3, 17, 64, 257, 1024]))
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=max_rows))
    requested = [draw(requests()) for _ in kinds]
    return make_rows(kinds, vocabulary, seed), requested


def controls_of(requested, *, divide=False):
    rows = [
        control_row(
            parse(diversity), temperature=t, logits_divisor=t if divide else 1.0, stop_ids=stops
        )
        for diversity, t, stops in requested
    ]
    return Controls.stack(rows)


def temperatures(requested):
    return torch.tensor([t for _, t, _ in requested], dtype=torch.float64)[:, None]


@settings(max_examples=300, deadline=None)
@given(batches(), st.booleans())
def test_the_sampled_distribution_is_the_law_in_fp64(batch, divide):
    logits_RV, requested = batch
    T_R1 = temperatures(requested)
    divided_R1 = T_R1 if divide else torch.ones_like(T_R1)
    rows_RV = (logits_RV.double() / divided_R1).float()
    # fp32 rounds large logits when the engine divides them: the reference gets the rounded ones.
    arrived_RV = rows_RV.double() * divided_R1
    statistics = transform(rows_RV, controls_of(requested, divide=divide))
    for r, (diversity, t, stops) in enumerate(requested):
        law = reference(arrived_RV[r].numpy(), temperature=t, stop_ids=stops, **diversity)
        # The guard's threshold is a sum in float32: tokens within its last digit may go either way.
        largest = arrived_RV[r].abs().nan_to_num(0, 0, 0).max().item()
        if law.margin < max(1e-4, np.spacing(np.float32(largest))):
            continue
        divisor = 1.0 if divide else t
        got_V = torch.log_softmax(rows_RV[r].double() / divisor, dim=0).numpy()
        assert (np.isinf(got_V) == np.isinf(law.log_p_V)).all()
        likely_V = law.log_p_V > -30
        np.testing.assert_allclose(got_V[likely_V], law.log_p_V[likely_V], atol=LOG_PROBABILITY)
        assert statistics.entropy_before_R[r] == pytest.approx(law.entropy_before, abs=NATS)
        assert statistics.entropy_after_R[r] == pytest.approx(law.entropy_after, abs=NATS)


@settings(max_examples=300, deadline=None)
@given(batches())
def test_argmax_infinities_and_stop_tokens_are_kept(batch):
    logits_RV, requested = batch
    check_properties(logits_RV, requested)


def check_properties(logits_RV, requested):
    after_RV = logits_RV.clone()
    transform(after_RV, controls_of(requested))
    assert not after_RV.isnan().any()
    assert (after_RV[logits_RV == -torch.inf] == -torch.inf).all()
    best_R = logits_RV.argmax(dim=1, keepdim=True)
    assert (after_RV.gather(1, best_R) == after_RV.amax(dim=1, keepdim=True)).all()
    for r, (_, t, stops) in enumerate(requested):
        stops = [i for i in stops if i < logits_RV.shape[1] and logits_RV[r, i] > -torch.inf]
        if not stops:
            continue
        kept_V = after_RV[r] > -torch.inf
        assert kept_V[stops].all(), "a stop token was cut"
        before_V = torch.softmax((logits_RV[r].double() / t).masked_fill(~kept_V, -torch.inf), 0)
        after_V = torch.softmax(after_RV[r].double() / t, dim=0)
        torch.testing.assert_close(after_V[stops], before_V[stops], atol=2e-5, rtol=1e-3)


@settings(max_examples=150, deadline=None)
@given(batches(max_rows=3), st.lists(st.floats(0.001, 1.0), min_size=2, max_size=6))
def test_entropy_does_not_fall_as_the_level_rises(batch, levels):
    logits_RV, requested = batch
    entropies = []
    for level in sorted(levels):
        controls = controls_of([({"level": level}, t, stops) for _, t, stops in requested])
        entropies.append(transform(logits_RV.clone(), controls).entropy_after_R)
    rises_R = torch.stack(entropies).diff(dim=0)
    assert (rises_R >= -1e-4).all(), rises_R.min()


@settings(max_examples=100, deadline=None)
@given(batches())
def test_the_gated_temperature_stays_in_its_interval(batch):
    logits_RV, requested = batch
    requested = [({"level": d["level"], "max_temperature": 2.5}, t, s) for d, t, s in requested]
    statistics = transform(logits_RV.clone(), controls_of(requested))
    low_R = temperatures(requested)[:, 0].float()
    high_R = low_R.clamp_min(2.5)
    assert (statistics.temperature_R >= low_R * (1 - 1e-6)).all()
    assert (statistics.temperature_R <= high_R * (1 + 1e-6)).all()


@settings(max_examples=100, deadline=None)
@given(batches(), st.data())
def test_rows_that_are_not_selected_keep_their_bits(batch, data):
    logits_RV, requested = batch
    chosen = data.draw(st.lists(st.integers(0, len(requested) - 1), unique=True))
    alone_RV = logits_RV.clone()
    transform(alone_RV, controls_of(requested))
    mixed_RV = logits_RV.clone()
    if chosen:
        rows = torch.tensor(chosen)
        transform(mixed_RV, controls_of([requested[r] for r in chosen]), rows)
    for r in range(len(requested)):
        source_RV = alone_RV if r in chosen else logits_RV
        # Reductions over another padded width may round differently; untouched rows are equal.
        tolerance = 1e-5 if r in chosen else 0.0
        torch.testing.assert_close(mixed_RV[r], source_RV[r], rtol=tolerance, atol=tolerance)


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 70), st.booleans())
def test_a_slice_of_wider_rows_is_rewritten_like_contiguous_rows(batch, padding, some):
    """An engine that pads its vocabulary passes such slices."""
    logits_RV, requested = batch
    rows_R = torch.arange(0, len(requested), 2) if some else None
    requested = requested[::2] if some else requested
    wide_RW = torch.cat((logits_RV, torch.full((len(logits_RV), padding), 7.0)), dim=1)
    vocabulary = logits_RV.shape[1]
    statistics = transform(wide_RW[:, :vocabulary], controls_of(requested), rows_R)
    alone = transform(logits_RV, controls_of(requested), rows_R)
    assert torch.equal(wide_RW[:, :vocabulary], logits_RV)
    assert (wide_RW[:, vocabulary:] == 7).all()
    assert torch.equal(statistics.temperature_R, alone.temperature_R)


@pytest.mark.parametrize("poison", [math.nan, math.inf, "nothing finite"])
def test_a_row_with_nan_or_inf_is_unchanged_and_reported(poison):
    logits_RV = make_rows(["peaky", "flat", "peaky"], 64, seed=1)
    logits_RV[1] = -torch.inf if poison == "nothing finite" else logits_RV[1]
    if poison != "nothing finite":
        logits_RV[1, 5] = poison
    before_RV = logits_RV.clone()
    requested = [({"level": 0.5}, 1.0, frozenset({0}))] * 3
    statistics = transform(logits_RV, controls_of(requested))
    assert statistics.valid_R.tolist() == [True, False, True]
    torch.testing.assert_close(logits_RV[1], before_RV[1], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(logits_RV[0], before_RV[0])


def test_a_single_plausible_token_is_the_only_one_left():
    logits_RV = torch.full((1, 100), -20.0)
    logits_RV[0, 7] = 0.0
    transform(logits_RV, controls_of([({"level": 1.0}, 1.0, frozenset())]))
    assert (logits_RV[0] > -torch.inf).nonzero().flatten().tolist() == [7]


def test_a_hundred_equal_tokens_are_heated_far_more_than_two():
    logits_RV = torch.full((2, 100), -torch.inf)
    logits_RV[0, :2] = 0.0
    logits_RV[1] = 0.0
    statistics = transform(logits_RV, controls_of([({"level": 1.0}, 1.0, frozenset())] * 2))
    two, hundred = statistics.temperature_R.tolist()
    assert two == pytest.approx(math.exp(2 * (math.log(2) / (math.log(2) + 1)) ** 2), rel=1e-5)
    assert two < 1.4 < 3.5 < hundred <= 4.0


def test_temperature_0_is_refused():
    with pytest.raises(ValueError, match="above 0"):
        control_row(parse(0.5), temperature=0.0, logits_divisor=1.0, stop_ids=frozenset())


@pytest.mark.long
def test_properties_on_a_million_rows():
    check_random_rows(rows=1_000_000, vocabularies=(2, 17, 64, 257, 1024), batch=500)


@pytest.mark.long
def test_properties_at_the_largest_vocabulary():
    check_random_rows(rows=1_000, vocabularies=(131_072,), batch=20)


def test_properties_on_a_hundred_thousand_rows():
    check_random_rows(rows=100_000, vocabularies=(2, 17, 64, 257, 1024), batch=500)


def check_random_rows(*, rows: int, vocabularies, batch: int) -> None:
    random = np.random.default_rng(0)
    for start in range(0, rows, batch):
        vocabulary = vocabularies[(start // batch) % len(vocabularies)]
        kinds = random.choice(sorted(KINDS), size=batch)
        logits_RV = make_rows(kinds, vocabulary, seed=start)
        requested = [_random_request(random) for _ in range(batch)]
        check_properties_vectorised(logits_RV, requested)


def _random_request(random):
    diversity = {"level": random.uniform(0.01, 1.0)}
    if random.random() < 0.3:
        diversity |= {"law": "dynatemp", "dynatemp_range": random.uniform(0.05, 2.0)}
    return diversity, random.uniform(0.2, 2.0), frozenset(random.integers(0, 20, size=2).tolist())


def check_properties_vectorised(logits_RV, requested):
    """`check_properties`, vectorised."""
    controls = controls_of(requested)
    after_RV = logits_RV.clone()
    passive_R = torch.arange(len(requested)) % 7 == 0
    active_R = (~passive_R).nonzero().flatten()
    controls = controls_of([requested[r] for r in active_R.tolist()])
    transform(after_RV, controls, active_R)
    assert not after_RV.isnan().any()
    assert torch.equal(after_RV[passive_R], logits_RV[passive_R])
    assert (after_RV[logits_RV == -torch.inf] == -torch.inf).all()
    best_R = logits_RV.argmax(dim=1, keepdim=True)
    assert (after_RV.gather(1, best_R) == after_RV.amax(dim=1, keepdim=True)).all()
    T_R1 = temperatures(requested)[active_R]
    before_RV, after_RV = logits_RV[active_R].double() / T_R1, after_RV[active_R].double() / T_R1
    kept_RV = after_RV > -torch.inf
    p_before_RV = torch.softmax(before_RV.masked_fill(~kept_RV, -torch.inf), dim=1)
    p_after_RV = torch.softmax(after_RV, dim=1)
    stops_RE = controls.stop_ids_RE.clamp(0, logits_RV.shape[1] - 1)
    is_stop_RE = (controls.stop_ids_RE >= 0) & (controls.stop_ids_RE < logits_RV.shape[1])
    is_stop_RE &= before_RV.gather(1, stops_RE) > -torch.inf
    assert kept_RV.gather(1, stops_RE)[is_stop_RE].all()
    torch.testing.assert_close(
        p_after_RV.gather(1, stops_RE)[is_stop_RE],
        p_before_RV.gather(1, stops_RE)[is_stop_RE],
        atol=2e-5,
        rtol=1e-3,
    )
