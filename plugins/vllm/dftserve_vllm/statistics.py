"""The API process's end of the statistics: assigns them from the engine's outputs to requests."""

from collections.abc import Sequence
from typing import Any

from dftserve_vllm import metrics, request_context, seals, step_report
from dftserve_vllm.extra_args import IDENTITY, renamed
from dftserve_vllm.log import logged_once
from dftserve_vllm.request_context import ChoiceStatistics

_ATTRIBUTE = "dftserve_choice"
"""An attribute of vLLM's own request state, which is deleted with the request."""

Ended = tuple[str, ChoiceStatistics, bool]


def note(output_processor: Any, request: Any) -> None:
    """Record which choice an engine request's statistics belong to.

    An identity that a client sent, or that another request has, is replaced: the workers
    distinguish requests by it.

    Args:
        output_processor: vLLM's OutputProcessor, to which the request has just been added.
        request: vLLM's EngineCoreRequest, which is sent to the engine next.
    """
    with logged_once("statistics are not recorded, and the answer has null"):
        params = request.sampling_params
        identity = ((params and params.extra_args) or {}).get(IDENTITY)
        if identity is None:
            return
        choice = request_context.take_choice(identity)
        if choice is None:
            choice = request_context.next_turn(identity)
            request.sampling_params = renamed(params, seals.fresh_name())
        if choice is not None:
            setattr(output_processor.request_states[request.request_id], _ATTRIBUTE, choice)


def collect(output_processor: Any, outputs: Sequence[Any]) -> list[Ended]:
    """Remove our payloads from the engine's outputs before vLLM processes them.

    Returns:
        For each choice among them: its request's id, its statistics, whether it was aborted.
    """
    with_choice: list[Ended] = []
    for output in outputs:
        with logged_once("statistics are not collected, and answers have null"):
            payload = step_report.take(output)
            if payload is not None:
                metrics.metrics().count_engine(payload)
            state = output_processor.request_states.get(output.request_id)
            choice = getattr(state, _ATTRIBUTE, None)
            if choice is None:
                continue
            choice.produced += len(output.new_token_ids)
            row = None if payload is None else payload.get("row")
            if row is not None:
                choice.payload = payload
            if choice.trace is not None:
                traced = None if payload is None or "failed" in payload else row
                choice.trace.add(traced, len(output.new_token_ids))
            with_choice.append((output.request_id, choice, str(output.finish_reason) == "abort"))
    return with_choice


def count_ended(output_processor: Any, choices: Sequence[Ended]) -> None:
    """Count the choices that ended with these outputs, including those ended by a stop string."""
    with logged_once("statistics are not counted"):
        for request_id, choice, is_aborted in choices:
            if request_id not in output_processor.request_states and not is_aborted:
                metrics.metrics().count_choice(choice)
