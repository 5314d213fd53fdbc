"""Forwarding of a step's statistics: all arrive exactly once, and nothing else changes."""

from types import SimpleNamespace

import numpy as np
from dftserve_vllm import step_report
from dftserve_vllm.step_report import Forwarder, PendingReport
from hypothesis import given
from hypothesis import strategies as st

from dftserve.sampling.host_copy import HostCopy
from dftserve.sampling.slots import COLUMNS, Snapshot, StatisticsLayout

SLOTS, ROWS = 8, 2
CONNECTORS = st.none() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=3)


def snapshot(nan_rows: int = 0) -> Snapshot:
    """Every statistic of slot s is s, so that a row identifies its slot."""
    layout = StatisticsLayout(SLOTS, ROWS)
    block = layout.zeros("cpu").numpy()
    invalid, tokens_S, sums_SF, _ = layout.arrays(block)
    invalid[...] = nan_rows
    tokens_S[:] = np.arange(SLOTS)
    sums_SF[:] = np.arange(SLOTS)[:, None]
    return Snapshot(layout, HostCopy(block))


def output(request_id: str, *, ends: bool, params=None):
    return SimpleNamespace(
        request_id=request_id, finish_reason="stop" if ends else None, kv_transfer_params=params
    )


def step(active, ends, always, *, faults=0, nan_rows=0, clients=1, params=None):
    """One step of SLOTS requests "0", "1", …, request i at batch position i, in slot SLOTS-1-i."""
    pending = PendingReport(
        positions=np.array(active, dtype=np.int64),
        reports_each_step=np.array([i in always for i in active], dtype=bool),
        slots=np.array([SLOTS - 1 - i for i in active], dtype=np.int64),
        snapshot=snapshot(nan_rows),
        faults=faults,
    )
    model_output = SimpleNamespace(req_id_to_index={str(i): i for i in range(SLOTS)})
    step_report.attach(model_output, pending)
    outputs = {c: SimpleNamespace(outputs=[]) for c in range(clients)}
    for i in range(SLOTS):
        outputs[i % clients].outputs.append(output(str(i), ends=i in ends, params=params))
    return model_output, outputs


some = st.lists(st.integers(0, SLOTS - 1), unique=True)


@given(active=some, ends=st.sets(st.integers(0, SLOTS - 1)), always=st.sets(st.integers(0, 7)))
def test_only_ending_or_always_reported_requests_get_their_statistics(active, ends, always):
    model_output, outputs = step(active, ends, always, clients=2)
    Forwarder(engine=3).forward(model_output, outputs)
    for client in outputs.values():
        for one in client.outputs:
            index = int(one.request_id)
            payload = step_report.take(one)
            if index in active and (index in ends or index in always):
                slot = SLOTS - 1 - index
                waiting = [0] * ROWS * COLUMNS
                assert payload["row"] == [slot] * (1 + COLUMNS) + waiting
                assert payload["engine"] == 3
            else:
                assert payload is None
            assert one.kv_transfer_params is None


@given(
    rises=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), some), min_size=1, max_size=12),
    clients=st.integers(1, 3),
)
def test_each_count_arrives_once_at_any_client(rises, clients):
    """Over any number of steps, requests and API processes; also if no request is active."""
    forwarder = Forwarder(engine=0)
    total = {"faults": 0, "nan_rows": 0}
    arrived = {"faults": 0, "nan_rows": 0}
    for faults, nan_rows, active in rises:
        total["faults"] += faults
        total["nan_rows"] += nan_rows
        model_output, outputs = step(active, set(), set(), clients=clients, **total)
        forwarder.forward(model_output, outputs)
        for client in outputs.values():
            for one in client.outputs:
                payload = step_report.take(one) or {}
                for name in arrived:
                    arrived[name] += payload.get(name, 0)
    assert arrived == total


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_step_with_a_fault_marks_all_of_its_rows_as_failed(faulty):
    forwarder, faults = Forwarder(engine=0), 0
    for fails in faulty:
        faults += fails
        model_output, outputs = step([0, 3], set(), {0, 3}, faults=faults)
        forwarder.forward(model_output, outputs)
        payloads = [step_report.take(one) for one in outputs[0].outputs]
        assert [("failed" in each) for each in payloads if each is not None] == [fails] * 2


@given(connector=CONNECTORS)
def test_the_values_of_a_kv_connector_are_preserved(connector):
    one = output("a", ends=True, params=connector)
    step_report.put(one, {"tokens": 1})
    assert step_report.take(one) == {"tokens": 1}
    assert one.kv_transfer_params == (connector or None)


def test_an_output_without_our_statistics_is_unchanged():
    params = {"do_remote_prefill": True}
    one = output("a", ends=True, params=params)
    assert step_report.take(one) is None
    assert one.kv_transfer_params is params


def test_a_step_without_a_report_changes_nothing():
    _, outputs = step([], {1}, set())
    Forwarder(engine=0).forward(SimpleNamespace(req_id_to_index={}), outputs)
    assert all(one.kv_transfer_params is None for one in outputs[0].outputs)
