"""The state kept between steps, compared with a plain replay of the accepted tokens only.

test_steps.py compares the kernels with these slots."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.sampling import Controls, Slots, SlotStatistics, Statistics, control_row
from dftserve.sampling.controls import DEFAULT_CONSTANTS
from dftserve.sampling.slots import COLUMNS
from dftserve.spec import parse


def statistics_of(entropies):
    values_R = torch.tensor(entropies)
    ones_R = torch.ones_like(values_R)
    return Statistics(values_R, values_R, ones_R, ones_R * 0.5, ones_R.bool())


def controls_of(target, rows):
    diversity = parse({"law": "budget", "target_entropy": target})
    row = control_row(diversity, temperature=1.0, logits_divisor=1.0, stop_ids=frozenset())
    return Controls.stack([row] * rows)


def replay(entropies, target, constants=DEFAULT_CONSTANTS):
    """The level after these accepted tokens, in plain Python."""
    level = 0.0
    for entropy in entropies:
        level += constants.budget_gain * (target - entropy) / max(target, 0.1)
        level = max(level, constants.budget_lowest_level)
        level = min(level, constants.budget_highest_level)
    return level if len(entropies) >= constants.budget_open_loop else 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.05, 4.0))
def test_only_accepted_tokens_change_the_level_and_the_means(seed, rows_per_request, target):
    """Drafts are rejected at random, requests skip steps, prompts come in chunks."""
    source = random.Random(seed)
    slots = Slots(3, rows_per_request, "cpu")
    accepted = {slot: [] for slot in range(3)}
    waiting = {slot: [] for slot in range(3)}
    position = dict.fromkeys(range(3), 5)
    for slot in range(3):
        slots.open(slot)
    for _ in range(30):
        rows = []
        for slot in source.sample(range(3), source.randint(1, 3)):
            if waiting[slot]:
                count = source.randint(1, len(waiting[slot]))
                accepted[slot] += waiting[slot][:count]
                position[slot] += count
            chunk = not accepted[slot] and not waiting[slot] and source.random() < 0.3
            width = 1 if chunk else source.randint(1, rows_per_request)
            entropies = [source.uniform(0, 5) for _ in range(width)]
            waiting[slot] = [] if chunk else entropies
            rows += [(slot, position[slot] + i, i, not chunk, h) for i, h in enumerate(entropies)]
            position[slot] += chunk * 7
        slot_R, position_R, offset_R = (torch.tensor([row[i] for row in rows]) for i in range(3))
        samples_R = torch.tensor([row[3] for row in rows])
        steered = slots.commit_accepted(
            controls_of(target, len(rows)), slot_R, position_R, offset_R
        )
        expected = [replay(accepted[row[0]], target) for row in rows]
        torch.testing.assert_close(steered.level_R, torch.tensor(expected), atol=1e-4, rtol=1e-4)
        statistics = statistics_of([row[4] for row in rows])
        slots.stage_step(slot_R, position_R, offset_R, samples_R, statistics)
    for slot in range(3):
        total = accepted[slot] + waiting[slot][:1]
        means = slots.read(slot).means(len(total))
        if not total:
            assert means is None
            continue
        assert means[0] == len(total)
        assert means[2] == pytest.approx(sum(total) / len(total), abs=1e-4)


def test_a_resumed_request_keeps_its_statistics_and_starts_open_loop():
    slots, controls = Slots(2, 1, "cpu"), controls_of(3.0, 1)
    slots.open(0)
    zero, one_row = torch.tensor([0]), torch.tensor([True])
    for position in range(40):
        slots.commit_accepted(controls, zero, torch.tensor([position]), zero)
        slots.stage_step(zero, torch.tensor([position]), zero, one_row, statistics_of([1.0]))
    slots.open(1, resumed=slots.read(0), produced=40)
    assert slots.read(1).means(40)[0] == 40
    steered = slots.commit_accepted(controls, torch.tensor([1]), torch.tensor([40]), zero)
    assert steered.level_R.item() == 0.0


def test_requests_opened_together_are_as_if_opened_one_after_another():
    """In used slots. A resumed request keeps the statistics of its accepted waiting tokens."""
    slots, controls = Slots(4, 2, "cpu"), controls_of(3.0, 4)
    slot_R, zeros_R = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    for position in range(DEFAULT_CONSTANTS.budget_open_loop + 2):
        position_R = zeros_R + position
        slots.commit_accepted(controls, slot_R, position_R, zeros_R)
        slots.stage_step(slot_R, position_R, zeros_R, zeros_R == 0, statistics_of([1.0] * 4))
    preempted = SlotStatistics.of_row(slots.snapshot().read(1))
    waiting_KF = torch.arange(2.0 * COLUMNS).reshape(2, COLUMNS)
    drafts = replace(preempted, waiting_KF=waiting_KF)
    slots.open(0)
    slots.open(3, drafts, produced=int(preempted.tokens) + 1)
    slots.open(2, produced=9)
    slots.open(2, produced=5)
    states = [slots.read(slot) for slot in range(4)]
    assert [int(state.tokens) for state in states] == [0, 17, 5, 18]
    assert torch.equal(states[3].sums_F, preempted.sums_F + waiting_KF[0])
    assert torch.equal(states[1].sums_F, preempted.sums_F)
    assert not any(states[slot].sums_F.any() for slot in (0, 2))
    assert [bool(state.waiting_KF.any()) for state in states] == [False, True, False, False]
    # Open-loop at first; then steered only by the tokens since, which are at the target.
    levels_R = slots.commit_accepted(controls, slot_R, zeros_R + 30, zeros_R).level_R
    assert [bool(level) for level in levels_R] == [False, True, False, False]
    for position in range(30, 32 + DEFAULT_CONSTANTS.budget_open_loop):
        steered = slots.commit_accepted(controls, slot_R, zeros_R + position, zeros_R)
        slots.stage_step(
            slot_R, zeros_R + position, zeros_R, zeros_R == 0, statistics_of([3.0] * 4)
        )
    assert [bool(level) for level in steered.level_R] == [False, True, False, False]


READERS = {
    "commit_accepted": lambda slots, *at: slots.commit_accepted(controls_of(1.0, 1), *at).level_R,
    "stage_step": lambda slots, *at: slots.stage_step(*at, at[0] == 0, statistics_of([1.0])),
    "read": lambda slots, *at: slots.read(0),
    "snapshot": lambda slots, *at: slots.snapshot(),
}


@pytest.mark.parametrize("name", list(READERS))
def test_every_method_applies_pending_opens_first(name):
    slots = Slots(1, 1, "cpu")
    slots.open(0, produced=7)
    READERS[name](slots, *torch.zeros(3, 1, dtype=torch.int64))
    assert slots._tokens_S.tolist() == [7]


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_does_not_exist_is_refused(slot):
    slots = Slots(2, 1, "cpu")
    with pytest.raises(IndexError, match=f"got {slot}; accepted: 0 to 1"):
        slots.open(slot)
    assert [int(slots.read(s).tokens) for s in (0, 1)] == [0, 0]


def test_an_invalid_row_has_no_statistics():
    slots, controls = Slots(1, 1, "cpu"), controls_of(3.0, 1)
    slots.open(0)
    zero, position = torch.tensor([0]), torch.tensor([3])
    nan = torch.tensor([float("nan")])
    invalid = Statistics(nan, nan, nan, nan, torch.tensor([False]))
    slots.commit_accepted(controls, zero, position, zero)
    slots.stage_step(zero, position, zero, torch.tensor([True]), invalid)
    slots.commit_accepted(controls, zero, position + 1, zero)
    slots.stage_step(zero, position + 1, zero, torch.tensor([True]), statistics_of([2.0]))
    assert slots.read(0).means(2) == [1.0, 2.0, 2.0, 1.0, 0.5, *[0.0] * (COLUMNS - 5)]
    assert slots.invalid == 1


def test_an_invalid_row_of_a_prompt_is_not_counted():
    """It yields no token: the engine discards it."""
    slots = Slots(1, 1, "cpu")
    slots.open(0)
    zero, nan = torch.tensor([0]), torch.tensor([float("nan")])
    invalid = Statistics(nan, nan, nan, nan, torch.tensor([False]))
    slots.stage_step(zero, zero, zero, torch.tensor([False]), invalid)
    assert slots.invalid == 0


def test_rows_without_a_budget_keep_their_level():
    rows = [
        control_row(parse(d), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset())
        for d in FIXED_AND_BUDGET
    ]
    controls, slots = Controls.stack(rows), Slots(2, 1, "cpu")
    zeros, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    for position in range(DEFAULT_CONSTANTS.budget_open_loop + 5):
        at = torch.tensor([position, position])
        steered = slots.commit_accepted(controls, torch.tensor([0, 1]), at, zeros)
        slots.stage_step(torch.tensor([0, 1]), at, zeros, ones, statistics_of([3.0, 3.0]))
    assert steered.level_R[0] == 0.25
    assert steered.level_R[1] < 0


FIXED_AND_BUDGET = ({"level": 0.25}, {"law": "budget", "target_entropy": 1.0})
