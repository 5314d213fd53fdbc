"""The engine core's part: forwards the worker's reports with the requests' outputs."""

from collections.abc import Mapping
from typing import Any

from dftserve_vllm.log import logged_once
from dftserve_vllm.step_report import Forwarder

_ATTRIBUTE = "dftserve_forwarder"


def forward(scheduler: Any, model_runner_output: Any, outputs: Mapping[int, Any]) -> None:
    """Add one step's statistics to its outputs.

    Args:
        scheduler: vLLM's Scheduler; stores which counts were forwarded already.
        model_runner_output: the worker's output of the step.
        outputs: the scheduler's EngineCoreOutputs, by client.
    """
    with logged_once("statistics are not forwarded, and answers have null"):
        forwarder = getattr(scheduler, _ATTRIBUTE, None)
        if forwarder is None:
            parallel = scheduler.vllm_config.parallel_config
            forwarder = Forwarder(int(parallel.data_parallel_index))
            setattr(scheduler, _ATTRIBUTE, forwarder)
        forwarder.forward(model_runner_output, outputs)
