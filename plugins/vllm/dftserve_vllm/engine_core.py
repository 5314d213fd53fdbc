"""The engine core's part: what its worker reported goes on with the requests' outputs."""

from collections.abc import Mapping
from typing import Any

from dftserve_vllm.log import logged_once
from dftserve_vllm.step_report import Forwarder

_ATTRIBUTE = "dftserve_forwarder"


def forward(scheduler: Any, model_runner_output: Any, outputs: Mapping[int, Any]) -> None:
    """Let the outputs of one step carry its statistics.

    Args:
        scheduler: vLLM's Scheduler; it keeps what was sent on already.
        model_runner_output: what its worker returned.
        outputs: EngineCoreOutputs by client, as the scheduler made them.
    """
    with logged_once("statistics are not sent on, and answers carry null"):
        forwarder = getattr(scheduler, _ATTRIBUTE, None)
        if forwarder is None:
            parallel = scheduler.vllm_config.parallel_config
            forwarder = Forwarder(int(parallel.data_parallel_index))
            setattr(scheduler, _ATTRIBUTE, forwarder)
        forwarder.forward(model_runner_output, outputs)
