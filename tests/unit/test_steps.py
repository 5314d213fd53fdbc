"""A step of an engine: every backend computes the same rows and slots as plain torch.

Plain torch itself is tested against a replay of the accepted tokens (test_slots.py). Triton decides
at its import whether it interprets, so the last test runs its kernels in a process of their own.
"""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dftserve.sampling import (
    LawConstants,
    SlotControls,
    SlotStatistics,
    Step,
    TokenClasses,
    control_row,
    transform_step,
)
from dftserve.sampling.backends.numba import NumbaBackend
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.backends.triton import TritonBackend
from dftserve.sampling.draws import draw_key
from dftserve.sampling.slots import COLUMNS
from dftserve.spec import parse
from tests import interpreted
from tests.rows import make_rows

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KIND = TritonBackend if INTERPRETED else NumbaBackend
V = 150
OPEN_LOOP = 3
SEEDS = [(1, 3)] if INTERPRETED else [(0, 1), (1, 3)]
CLASSES = TokenClasses((np.arange(V - 5) % 3 * 0b01_00_01 + 0b01_00).astype(np.uint8))
DIVERSITIES = (
    {"law": "budget", "target_entropy": 0.4},
    {"law": "words", "level": 0.8},
    {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.02},
    {"law": "budget", "target_entropy": 3.0},
)
STOPS = ({3}, {1, 4, 7}, set(), {140})


def row_of(slot):
    diversity = parse(DIVERSITIES[slot])
    return control_row(
        diversity,
        temperature=0.9,
        logits_divisor=1.0,
        stop_ids=frozenset(STOPS[slot]),
        draw_key=draw_key(slot),
    )


class Engine:
    """Requests in slots 0 to 3 of five, with different laws or targets; the one in slot 1 begins
    with a chunk of its prompt, whose rows do not sample."""

    def __init__(self, seed, rows_per_request):
        self.source = random.Random(seed)
        self.rows_per_request = rows_per_request
        self.position = [5, 9, 2, 7]
        self.known_S = torch.tensor([6, 14, 3, 8, 0], dtype=torch.int32)
        self.controls = SlotControls(5, CPU)
        for slot in range(4):
            self.controls.put(slot, row_of(slot))

    def step(self):
        """Some requests with some of their drafts, and a row of slot 4, which has no request."""
        rows = []
        for slot in self.source.sample(range(5), self.source.randint(1, 5)):
            if slot == 4:
                rows.append((4, 0, 0))
                continue
            drafts = self.source.randint(1, self.rows_per_request)
            rows += [(slot, self.position[slot] + k, k) for k in range(drafts)]
            self.position[slot] += self.source.choice([0, *range(1, drafts + 1), drafts, drafts])
        slots, positions, offsets = (torch.tensor(column) for column in zip(*rows, strict=True))
        some = self.source.random() < 0.3
        logits_XV = make_rows(["gaussian", "few", "zipf"] * 8, V, self.source.randrange(2**31))
        rows_R = torch.randperm(24, generator=torch.Generator().manual_seed(len(rows)))[: len(rows)]
        if self.source.random() < 0.2:
            logits_XV[rows_R[0], 11] = torch.nan
        last = [self.source.randint(-1, V) for _ in rows]
        step = Step(
            self.controls.on_device(),
            slots,
            positions,
            offsets.int(),
            torch.tensor(last, dtype=torch.int32),
            rows_R=rows_R if some else None,
            known_S=self.known_S,
            has_idle_rows=True,
        )
        return logits_XV if some else logits_XV[: len(rows)].contiguous(), step


@pytest.mark.parametrize(("seed", "rows_per_request"), SEEDS)
def test_every_step_equals_that_of_plain_torch(seed, rows_per_request):
    engine = Engine(seed, rows_per_request)
    constants = LawConstants(budget_open_loop=OPEN_LOOP)
    backends = [kind(CPU, constants, CLASSES) for kind in (TorchBackend, KIND)]
    both = [backend.create_slots(5, rows_per_request) for backend in backends]
    waiting_KF = torch.arange(float(COLUMNS) * rows_per_request).reshape(-1, COLUMNS)
    resumed = SlotStatistics(torch.tensor(3), torch.ones(COLUMNS), waiting_KF)
    for slots in both:
        for slot in (0, 1, 3):
            slots.open(slot, produced=slot)
        slots.open(2, resumed, produced=4)
    idle = 0
    for at in range(14):
        if at == 5:
            for slots in both:
                slots.open(1, SlotStatistics.of_row(slots.snapshot().read(1)), produced=6)
        before_XV, step = engine.step()
        idle += int((~step.samples_R() & (step.slot_R == 1)).sum())
        expected_XV, got_XV = before_XV.clone(), before_XV.clone()
        pairs = zip(backends, (expected_XV, got_XV), both, strict=True)
        _, statistics = (
            transform_step(logits_XV, step, slots, backend) for backend, logits_XV, slots in pairs
        )
        torch.testing.assert_close(got_XV, expected_XV, rtol=1e-4, atol=2e-3, equal_nan=True)
        _check_untouched(before_XV, got_XV, step, statistics)
        for expected, got in zip(*(slots.state() for slots in both), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)
    level_S, steered_S, tokens_S, *_ = both[1].state()
    assert steered_S[0] > OPEN_LOOP
    assert level_S[0] < 0 < level_S[3]
    assert tokens_S[2] > 4
    assert idle > 0


def _check_untouched(before_XV, after_XV, step, statistics):
    """Rows without a request keep their bits; valid rows of a request change."""
    rows = step.rows_R if step.rows_R is not None else torch.arange(len(before_XV))
    for x in set(range(len(before_XV))) - set(rows[step.slot_R != 4].tolist()):
        assert torch.equal(before_XV[x].view(torch.int32), after_XV[x].view(torch.int32))
    is_valid_R = before_XV[rows].isfinite().any(dim=1) & ~before_XV[rows].isnan().any(dim=1)
    for x in rows[(step.slot_R != 4) & is_valid_R].tolist():
        assert not torch.equal(before_XV[x], after_XV[x])


@pytest.mark.skipif(INTERPRETED, reason="a GPU's slots are not looked at")
@pytest.mark.parametrize("kind", [NumbaBackend])
@pytest.mark.parametrize(("slot", "offset"), [(-1, 0), (5, 0), (0, 1), (0, -1)])
def test_a_slot_or_offset_that_does_not_exist_is_refused(kind, slot, offset):
    """The kernels check no other index."""
    backend, controls = kind(CPU), SlotControls(5, CPU)
    controls.put(0, row_of(2))
    step = Step(
        controls.on_device(),
        torch.tensor([slot]),
        torch.tensor([3]),
        torch.tensor([offset], dtype=torch.int32),
    )
    logits_XV = torch.randn(1, V)
    before_XV = logits_XV.clone()
    with pytest.raises(IndexError):
        transform_step(logits_XV, step, backend.create_slots(5, 1), backend)
    assert torch.equal(logits_XV, before_XV)


def test_tensors_of_another_type_or_length_are_refused():
    _, step = Engine(0, 1).step()
    with pytest.raises(ValueError, match=r"offset_R: got torch.int64.*accepted: .*torch.int32"):
        replace(step, offset_R=step.offset_R.long())
    with pytest.raises(ValueError, match="position_R: got 9 and"):
        replace(step, position_R=torch.zeros(9, dtype=torch.int64))
    backend, whole = TorchBackend(CPU, token_classes=CLASSES), replace(step, rows_R=None)
    slots = backend.create_slots(5, 1)
    with pytest.raises(ValueError, match="rows: got 24 and"):
        transform_step(torch.zeros(24, V), whole, slots, backend)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_triton_kernels_pass_the_same_tests_interpreted():
    assert "2 passed, 5 skipped" in interpreted.run(__file__)
