"""The worker's end of the statistics: sends each step's report with the step's output."""

from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from dftserve_vllm import processor, step_report
from dftserve_vllm.step_report import PendingReport
from dftserve_vllm.worker_state import WorkerState


def with_report(worker: Any, output: Any) -> Any:
    """A worker's output of a step, with the step's report added if there is one.

    Args:
        worker: vLLM's WorkerWrapperBase.
        output: ModelRunnerOutput, AsyncModelRunnerOutput, or None if sampling is still to come.
    """
    state = processor.state_of(getattr(worker, "vllm_config", None))
    if state is None:
        return output
    with state.isolated():
        if isinstance(output, AsyncModelRunnerOutput):
            pending = state.take_report()
            if pending is not None:
                _report_when_ready(output, pending, state)
            return output
        # The output of a step without requests is an object that vLLM shares among such steps.
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            step_report.attach(output, state.take_report())
    return output


def _report_when_ready(
    output: AsyncModelRunnerOutput, pending: PendingReport, state: WorkerState
) -> None:
    """Add the report when vLLM fetches the output.

    Patches vLLM's own object rather than wrapping it: which other methods it must have differs
    between versions.
    """

    def get_output() -> ModelRunnerOutput:
        # vLLM calls this once. Removing it breaks the reference cycle with the output.
        del vars(output)["get_output"]
        ready = output.get_output()
        with state.isolated():
            step_report.attach(ready, pending)
        return ready

    vars(output)["get_output"] = get_output
