"""Which way is chosen on a device, and that an engine starts whatever its kernels do."""

import logging
import sys

import pytest
import torch

from dftserve.sampling import Slots, fastest, fastest_slots
from dftserve.sampling.fused_numba import NumbaTransform
from dftserve.sampling.kernels import kernels
from dftserve.sampling.slots_numba import NumbaSlots
from dftserve.sampling.transform import transform as plain

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def undecided():
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def test_each_engine_has_buffers_of_its_own():
    one, other = fastest(CPU), fastest(CPU)
    assert isinstance(one, NumbaTransform)
    assert isinstance(fastest_slots(1, 1, CPU), NumbaSlots)
    assert one is not other


def test_a_device_without_kernels_takes_the_plain_way(caplog):
    assert fastest(torch.device("meta")) is plain
    assert not caplog.records


def test_without_a_compiler_it_is_the_plain_way(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dftserve.sampling.fused_numba", None)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "no kernels" in caplog.text


@pytest.mark.parametrize(
    "spoil", [lambda row_XV: row_XV.mul_(1.01), lambda row_XV: row_XV.fill_(0)], ids=["1 %", "all"]
)
def test_kernels_that_are_wrong_are_not_used(spoil, monkeypatch, caplog):
    def wrong(self, logits_XV, controls, rows_R=None):
        done = plain(logits_XV, controls, rows_R)
        spoil(logits_XV)
        return done

    monkeypatch.setattr(NumbaTransform, "__call__", wrong)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "disagree" in caplog.text
    assert type(fastest_slots(1, 1, CPU)) is Slots


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
    """In the last row only: one row is not enough to see it."""
    calls = []

    def wrong(self, logits_XV, controls, rows_R=None):
        calls.append(self)
        done = plain(logits_XV, controls, rows_R)
        if case(logits_XV, controls, rows_R, calls.count(self)):
            logits_XV[2].mul_(1.01)
        return done

    monkeypatch.setattr(NumbaTransform, "__call__", wrong)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "disagree" in caplog.text


def test_kernels_that_touch_an_unsound_row_are_not_used(monkeypatch, caplog):
    def wrong(self, logits_XV, controls, rows_R=None):
        done = plain(logits_XV, controls, rows_R)
        logits_XV.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        return done

    monkeypatch.setattr(NumbaTransform, "__call__", wrong)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "disagree" in caplog.text


def test_slots_that_forget_what_a_resumed_request_had_are_not_used(monkeypatch, caplog):
    opens = NumbaSlots.open
    monkeypatch.setattr(NumbaSlots, "open", lambda self, slot, *_, **__: opens(self, slot))
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "disagree" in caplog.text


def test_slots_that_are_wrong_are_not_used(monkeypatch, caplog):
    """They steer, and count nothing."""
    monkeypatch.setattr(NumbaSlots, "remember", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "disagree" in caplog.text


def test_kernels_that_fail_are_not_used(monkeypatch, caplog):
    def failing(self, logits_XV, controls, rows_R=None):
        raise RuntimeError("a compiler that fails")

    monkeypatch.setattr(NumbaTransform, "__call__", failing)
    with caplog.at_level(logging.WARNING):
        assert fastest(CPU) is plain
    assert "a compiler that fails" in caplog.text
