"""How a step's statistics travel with the step's own output: worker → engine core → API process.

    worker       attach(output, report)     beside the sampled tokens, in ModelRunnerOutput
    engine core  forward(…)                 in the EngineCoreOutput of each request that ends
    API process  take(engine_core_output)   before vLLM looks at it

So no statistic is ever asked for: there is no call that could wait, with several engines each
sends its own, and what an engine that is gone did not send is not waited for. The channel is
`EngineCoreOutput.kv_transfer_params`, the one free-form field that vLLM serialises for every
request; `take` removes what was put there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.slots import Snapshot

ATTRIBUTE = "dftserve_report"
"""On a ModelRunnerOutput, which is pickled on its way to the engine core."""
KEY = "dftserve"
"""In `kv_transfer_params`."""

Array = NDArray[np.int64]
Payload = Mapping[str, Any]


@dataclass(frozen=True)
class StepReport:
    """The statistics of one step's active requests R, on the host: see `Snapshot`."""

    positions: Array
    """int64, each request's position in the batch."""
    always: NDArray[np.bool_]
    """Whether it is sent now, whatever becomes of the request: this may end in the API process, at
    a stop string, or is traced."""
    rows: bytes
    """float32 [R, X], see `Snapshot.rows`; as bytes, which are cheapest to send."""
    faults: int
    """Of this worker, since its start."""
    nan_rows: int
    """Likewise."""

    def row(self, index: int) -> list[float]:
        """One request's part, as msgpack knows it."""
        size = len(self.rows) // len(self.positions)
        return np.frombuffer(self.rows, np.float32, size // 4, index * size).tolist()


@dataclass(frozen=True)
class PendingReport:
    """A report whose copy to the host may still be under way."""

    positions: Array
    always: NDArray[np.bool_]
    slots: Array
    """int64, of the active requests."""
    snapshot: Snapshot
    faults: int

    def resolve(self) -> StepReport:
        """Call it when the step's tokens are on the host: the copy was enqueued before theirs."""
        self.snapshot.copy.wait()
        rows = self.snapshot.rows(self.slots).tobytes()
        counts = self.faults, self.snapshot.invalid
        return StepReport(self.positions, self.always, rows, *counts)


def attach(output: Any, pending: PendingReport | None) -> None:
    """Put a report, if there is one, on the ModelRunnerOutput of its step."""
    if pending is not None:
        setattr(output, ATTRIBUTE, pending.resolve())


class Forwarder:
    """One engine core's side: which counts it has sent on already."""

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
        news = self._news(report)
        sends_all = bool(report.always.any())
        if not (news or sends_all or any(map(_some_end, outputs.values()))):
            return
        # Which rows a fault has passed through is not known: no trace has figures of this step.
        failed = {"failed": True} if "faults" in news else {}
        row_of = {position: row for row, position in enumerate(report.positions.tolist())}
        position_of = model_runner_output.req_id_to_index
        for output in (output for client in outputs.values() for output in client.outputs):
            # Most steps end no request, and most requests end where the engine core sees it.
            if not (news or sends_all or output.finish_reason is not None):
                continue
            row = row_of.get(position_of.get(output.request_id, -1))
            if row is not None and (output.finish_reason is not None or report.always[row]):
                put(output, {"row": report.row(row), "engine": self._engine} | news | failed)
            elif news:
                put(output, {"engine": self._engine} | news)
            else:
                continue
            news = {}
            self._sent = {name: getattr(report, name) for name in self._sent}

    def _news(self, report: StepReport) -> dict[str, int]:
        """How far the worker's counts have risen since they were last sent; only what has."""
        rise = {name: getattr(report, name) - sent for name, sent in self._sent.items()}
        return {name: count for name, count in rise.items() if count > 0}


def _some_end(client: Any) -> bool:
    """Whether one of a client's outputs is its request's last; no loop of Python's, since most
    steps end none."""
    return not _GOES_ON.issuperset(map(_REASON, client.outputs))


_GOES_ON, _REASON = frozenset([None]), attrgetter("finish_reason")


def put(output: Any, payload: Payload) -> None:
    """Let an EngineCoreOutput carry the payload, beside what a connector put there."""
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: payload}


def take(output: Any) -> Payload | None:
    """What an EngineCoreOutput carries of ours; it is as if it had never been there."""
    params = output.kv_transfer_params
    if params is None or KEY not in params:
        return None
    payload = params[KEY]
    output.kv_transfer_params = {k: v for k, v in params.items() if k != KEY} or None
    return payload
