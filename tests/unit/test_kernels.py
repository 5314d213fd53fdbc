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
