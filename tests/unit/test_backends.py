"""The choice of a backend for a device, the fallback from faulty kernels, and the laws' constants
in every backend."""

import logging
import sys
from dataclasses import replace

import pytest
import torch

from dftserve.sampling import Controls, LawConstants, Slots, Step, control_row, get_backend
from dftserve.sampling.backends import checked_class
from dftserve.sampling.backends.numba import NumbaBackend
from dftserve.sampling.backends.numba_slots import NumbaSlots
from dftserve.sampling.backends.plain_torch import TorchBackend
from dftserve.sampling.controls import CONSTANTS
from dftserve.spec import parse
from tests.rows import make_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def clear_choice():
    checked_class.cache_clear()
    yield
    checked_class.cache_clear()


def assert_plain_torch_is_used(caplog, reason):
    with caplog.at_level(logging.WARNING):
        assert isinstance(get_backend(CPU), TorchBackend)
    assert reason in caplog.text


def test_each_engine_has_its_own_buffers():
    one, other = get_backend(CPU), get_backend(CPU)
    assert isinstance(one, NumbaBackend)
    assert isinstance(one.create_slots(1, 1), NumbaSlots)
    assert one is not other


def test_a_device_without_kernels_uses_plain_torch(caplog):
    assert isinstance(get_backend("meta"), TorchBackend)
    assert not caplog.records


def test_without_a_compiler_plain_torch_is_used(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dftserve.sampling.backends.numba", None)
    assert_plain_torch_is_used(caplog, "no kernels")


@pytest.mark.parametrize(
    "spoil", [lambda row_XV: row_XV.mul_(1.01), lambda row_XV: row_XV.fill_(0)], ids=["1 %", "all"]
)
def test_wrong_kernels_are_not_used(spoil, monkeypatch, caplog):
    def wrong(self, logits_XV, controls, rows_R=None):
        done = _plain(self, logits_XV, controls, rows_R)
        spoil(logits_XV)
        return done

    monkeypatch.setattr(NumbaBackend, "__call__", wrong)
    with caplog.at_level(logging.WARNING):
        backend = get_backend(CPU)
    assert isinstance(backend, TorchBackend)
    assert "disagree" in caplog.text
    assert type(backend.create_slots(1, 1)) is Slots


def _plain(backend, logits_XV, controls, rows_R):
    """The result of plain torch."""
    plain = TorchBackend(backend.device, backend.constants, backend.token_classes)
    return plain(logits_XV, controls, rows_R)


def _many_stops(logits_XV, controls, rows_R, calls):
    return controls.stop_ids_RE.shape[1] == 128


def _padded_rows(logits_XV, controls, rows_R, calls):
    return logits_XV.stride(0) != logits_XV.shape[1]


def _a_later_call(logits_XV, controls, rows_R, calls):
    return calls > 1


def _some_rows(logits_XV, controls, rows_R, calls):
    return rows_R is not None


@pytest.mark.parametrize("case", [_many_stops, _padded_rows, _a_later_call, _some_rows])
def test_kernels_that_are_wrong_in_one_case_are_not_used(case, monkeypatch, caplog):
    """Wrong in the last row only, which a check of one row would miss."""
    calls = []

    def wrong(self, logits_XV, controls, rows_R=None):
        calls.append(self)
        done = _plain(self, logits_XV, controls, rows_R)
        if case(logits_XV, controls, rows_R, calls.count(self)):
            logits_XV[2].mul_(1.01)
        return done

    monkeypatch.setattr(NumbaBackend, "__call__", wrong)
    assert_plain_torch_is_used(caplog, "disagree")


def test_kernels_that_change_an_invalid_row_are_not_used(monkeypatch, caplog):
    def wrong(self, logits_XV, controls, rows_R=None):
        done = _plain(self, logits_XV, controls, rows_R)
        logits_XV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        return done

    monkeypatch.setattr(NumbaBackend, "__call__", wrong)
    assert_plain_torch_is_used(caplog, "disagree")


def test_kernels_that_ignore_token_classes_are_not_used(monkeypatch, caplog):
    """Wrong under the law `words` only."""
    call = NumbaBackend.__call__

    def wrong(self, logits_XV, controls, rows_R=None):
        self._classes_V[:] = 0
        return call(self, logits_XV, controls, rows_R)

    monkeypatch.setattr(NumbaBackend, "__call__", wrong)
    assert_plain_torch_is_used(caplog, "disagree")


def test_slots_that_lose_the_statistics_of_a_resumed_request_are_not_used(monkeypatch, caplog):
    open_slot = NumbaSlots.open
    monkeypatch.setattr(NumbaSlots, "open", lambda self, slot, *_, **__: open_slot(self, slot))
    assert_plain_torch_is_used(caplog, "disagree")


def test_wrong_slots_are_not_used(monkeypatch, caplog):
    """They steer but count nothing."""
    original_step = NumbaBackend.step

    def forgetting(self, logits_XV, step, slots):
        done = original_step(self, logits_XV, step, slots)
        slots._waiting_SKF.zero_()
        return done

    monkeypatch.setattr(NumbaBackend, "step", forgetting)
    assert_plain_torch_is_used(caplog, "disagree")


def test_kernels_that_fail_are_not_used(monkeypatch, caplog):
    def failing(self, logits_XV, controls, rows_R=None):
        raise RuntimeError("a compiler that fails")

    monkeypatch.setattr(NumbaBackend, "__call__", failing)
    assert_plain_torch_is_used(caplog, "a compiler that fails")


COOLED = {"law": "dynatemp", "dynatemp_range": 1.0, "dynatemp_exponent": 10.0}
# Another value of each constant of the transform, and a request that it affects.
OTHERS = {
    "guard_start": (0.3, {"level": 0.1}),
    "guard_end": (0.3, {"level": 1.0}),
    "strength": (0.0, {"level": 1.0}),
    "gate_power": (0.0, {"level": 1.0}),
    "lowest_temperature": (0.5, COOLED),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_constant_reaches_the_kernels(name):
    """The result is that of plain torch with the constant, and not that of the default."""
    value, diversity = OTHERS[name]
    constants = replace(LawConstants(), **{name: value})
    row = control_row(
        parse(diversity), temperature=1.0, logits_divisor=1.0, stop_ids=frozenset({3})
    )
    source_RV = make_rows(["gaussian", "zipf", "few"], 300, seed=1)
    controls = Controls.stack([row] * 3)
    after = {}
    for kind, given in ((NumbaBackend, constants), (TorchBackend, constants), (TorchBackend, None)):
        logits_RV = source_RV.clone()
        backend = kind(CPU, given) if given is not None else kind(CPU)
        entropy_R = backend(logits_RV, controls).entropy_after_R.clone()
        after[kind, given] = logits_RV, entropy_R
    got, expected, by_default = after.values()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(expected[1], by_default[1], rtol=1e-2)


@pytest.mark.parametrize(
    "changed",
    [
        {"budget_rate": 0.05},
        {"strength": 4.0},
        {"budget_lowest_level": -0.01},
        {"budget_highest_level": 0.01},
        {"budget_open_loop": 30},
    ],
    ids=str,
)
def test_a_constant_of_the_controller_reaches_the_kernels(changed):
    constants = replace(LawConstants(), **changed)
    got = _steered(NumbaBackend(CPU, constants))
    torch.testing.assert_close(got, _steered(TorchBackend(CPU, constants)))
    assert not torch.allclose(got, _steered(TorchBackend(CPU)))


def _steered(backend):
    """The temperatures of two requests after twenty tokens: one above its target, one below."""
    diversities = [parse({"law": "budget", "target_entropy": target}) for target in (0.5, 3.0)]
    rows = [
        control_row(d, temperature=1.0, logits_divisor=1.0, stop_ids=frozenset())
        for d in diversities
    ]
    controls, slots = Controls.stack(rows), backend.create_slots(2, 1)
    slot_R, zero_R = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    for at in range(20):
        step = Step(controls, slot_R, zero_R + at, zero_R.int())
        statistics = backend.step(make_rows(["gaussian"] * 2, 100, seed=at), step, slots)
    return statistics.temperature_R.clone()


def test_constants_are_packed_in_the_order_of_their_columns():
    constants = LawConstants(strength=3.0, budget_open_loop=7)
    assert constants.packed == tuple(getattr(constants, name) for name in CONSTANTS)
    assert constants.packed[CONSTANTS.index("budget_open_loop")] == 7.0
