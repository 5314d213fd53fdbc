"""How a step's statistics travel with the step's own output: worker → engine core → API process.

    worker       attach(output, report)     with the sampled tokens, in ModelRunnerOutput
    engine core  forward(…)                 in the EngineCoreOutput of each request that ends
    API process  take(engine_core_output)   before vLLM processes it

So statistics are pushed, never requested: no call can block, each of several engines sends its own,
and nothing waits for an engine that has died. The channel is `EngineCoreOutput.kv_transfer_params`,
the one free-form field that vLLM serialises for every request; `take` removes our entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.slots import Snapshot

ATTRIBUTE = "dftserve_report"
"""An attribute of a ModelRunnerOutput, which is pickled for the engine core."""
KEY = "dftserve"
"""Our key in `kv_transfer_params`."""

Array = NDArray[np.int64]
Payload = Mapping[str, Any]


@dataclass(frozen=True)
class StepReport:
    """The statistics of one step's active requests R, on the host: see `Snapshot`."""

    positions: Array
    """int64, each request's position in the batch."""
    reports_each_step: NDArray[np.bool_]
    """Whether a request's row is sent at every step: the request may end at a stop string, which
    only the API process sees, or it is traced."""
    rows: bytes
    """float32 [R, X], see `Snapshot.rows`; as bytes, which are the cheapest to send."""
    faults: int
    """This worker's faults since its start."""
    nan_rows: int
    """This worker's NaN rows since its start."""

    def row(self, index: int) -> list[float]:
        """One request's row, as a list, which msgpack can encode."""
        size = len(self.rows) // len(self.positions)
        return np.frombuffer(self.rows, np.float32, size // 4, index * size).tolist()


@dataclass(frozen=True)
class PendingReport:
    """A report whose copy to the host may still be in progress."""

    positions: Array
    reports_each_step: NDArray[np.bool_]
    slots: Array
    """int64, of the active requests."""
    snapshot: Snapshot
    faults: int

    def resolve(self) -> StepReport:
        """Call it when the step's tokens are on the host: our copy was enqueued before theirs."""
        self.snapshot.copy.wait()
        rows = self.snapshot.rows(self.slots).tobytes()
        counts = self.faults, self.snapshot.invalid
        return StepReport(self.positions, self.reports_each_step, rows, *counts)


def attach(output: Any, pending: PendingReport | None) -> None:
    """Attach a report, if there is one, to the ModelRunnerOutput of its step."""
    if pending is not None:
        setattr(output, ATTRIBUTE, pending.resolve())


class Forwarder:
    """The engine core's part; keeps track of the counts that were forwarded already."""

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._sent = {"faults": 0, "nan_rows": 0}

    def forward(self, model_runner_output: Any, outputs: Mapping[int, Any]) -> None:
        """Move the report from the step's output to the outputs of its requests.

        Args:
            model_runner_output: vLLM's ModelRunnerOutput.
            outputs: EngineCoreOutputs by client.
        """
        report: StepReport | None = getattr(model_runner_output, ATTRIBUTE, None)
        if report is None:
            return
        rises = self._rises(report)
        sends_all = bool(report.reports_each_step.any())
        if not (rises or sends_all or any(map(_some_end, outputs.values()))):
            return
        # It is not known which rows a fault left unchanged: no trace gets statistics for this step.
        failed = {"failed": True} if "faults" in rises else {}
        row_of = {position: row for row, position in enumerate(report.positions.tolist())}
        position_of = model_runner_output.req_id_to_index
        for output in (output for client in outputs.values() for output in client.outputs):
            # Most steps end no request, and most requests end where the engine core sees it.
            if not (rises or sends_all or output.finish_reason is not None):
                continue
            row = row_of.get(position_of.get(output.request_id, -1))
            if row is not None and (
                output.finish_reason is not None or report.reports_each_step[row]
            ):
                put(output, {"row": report.row(row), "engine": self._engine} | rises | failed)
            elif rises:
                put(output, {"engine": self._engine} | rises)
            else:
                continue
            rises = {}
            self._sent = {name: getattr(report, name) for name in self._sent}

    def _rises(self, report: StepReport) -> dict[str, int]:
        """The increase of the worker's counts since they were last sent, if positive."""
        rise = {name: getattr(report, name) - sent for name, sent in self._sent.items()}
        return {name: count for name, count in rise.items() if count > 0}


def _some_end(client: Any) -> bool:
    """Whether one of a client's outputs is its request's last. Without a Python loop, since it runs
    at every step and most steps end no request."""
    return not _NOT_ENDED.issuperset(map(_REASON, client.outputs))


_NOT_ENDED, _REASON = frozenset([None]), attrgetter("finish_reason")


def put(output: Any, payload: Payload) -> None:
    """Add the payload to an EngineCoreOutput, keeping what a KV connector put there."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: payload}


def take(output: Any) -> Payload | None:
    """Remove our payload from an EngineCoreOutput and return it; None if there is none."""
    params = output.kv_transfer_params
    if params is None or KEY not in params:
        return None
    payload = params[KEY]
    output.kv_transfer_params = {k: v for k, v in params.items() if k != KEY} or None
    return payload
