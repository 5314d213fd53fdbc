"""The worker's end of the statistics: each step's report goes out with the step's output."""

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from dftserve_vllm import processor, step_report
from dftserve_vllm.request_stats import RequestStats
from dftserve_vllm.step_report import PendingReport


def with_report(worker: Any, output: Any) -> Any:
    """What a worker returns for a step, carrying the step's report if there is one.

    Args:
        worker: vLLM's WorkerWrapperBase.
        output: ModelRunnerOutput, AsyncModelRunnerOutput, or None where sampling is still to come.
    """
    stats = processor.stats_of(getattr(worker, "vllm_config", None))
    if stats is None:
        return output
    with stats.isolated():
        if isinstance(output, AsyncModelRunnerOutput):
            pending = stats.take_report()
            return output if pending is None else ReportingOutput(output, pending, stats)
        # One without requests is an object that vLLM shares among all such steps.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            step_report.attach(output, stats.take_report())
    return output


class ReportingOutput(AsyncModelRunnerOutput):
    """An output that vLLM will wait for; the report is there when it is."""

    def __init__(
        self, output: AsyncModelRunnerOutput, pending: PendingReport, stats: RequestStats
    ) -> None:
        self._output = output
        self._pending = pending
        self._stats = stats

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        with self._stats.isolated():
            step_report.attach(output, self._pending)
        return output
