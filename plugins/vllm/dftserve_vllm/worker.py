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
            if pending is not None:
                _report_when_ready(output, pending, stats)
            return output
        # One without requests is an object that vLLM shares among all such steps.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            step_report.attach(output, stats.take_report())
    return output


def _report_when_ready(
    output: AsyncModelRunnerOutput, pending: PendingReport, stats: RequestStats
) -> None:
    """Let what vLLM waits for carry the report once it is there.

    The output stays vLLM's own object: which other methods it has, and has to have, differs
    between versions.
    """

    def get_output() -> ModelRunnerOutput:
        # It is called once; and the output and this function would keep each other in memory.
        del vars(output)["get_output"]
        ready = output.get_output()
        with stats.isolated():
            step_report.attach(ready, pending)
        return ready

    vars(output)["get_output"] = get_output
