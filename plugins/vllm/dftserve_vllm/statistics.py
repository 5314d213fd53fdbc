"""The API process's end of the statistics: from the engine's outputs to their requests."""

from collections.abc import Sequence
from typing import Any

from dftserve_vllm import metrics, request_context, seals, step_report
from dftserve_vllm.extra_args import IDENTITY, renamed
from dftserve_vllm.log import logged_once
from dftserve_vllm.request_context import ChoiceStatistics

_ATTRIBUTE = "dftserve_choice"
"""On vLLM's own state of a request, which goes when the request does."""

Ended = tuple[str, ChoiceStatistics, bool]


def note(output_processor: Any, request: Any) -> None:
    """Remember whose statistics an engine request's outputs will carry.

    A name that some client sent, or that another request has, is replaced: the workers tell
    requests apart by it.

    Args:
        output_processor: vLLM's OutputProcessor, which has just taken the request.
        request: vLLM's EngineCoreRequest, which goes to the engine next.
    """
    with logged_once("statistics are not noted, and the answer carries null"):
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
    """Take ours out of the engine's outputs before vLLM sees them.

    Returns:
        Of each choice among them: its request's id, its statistics, whether it was aborted.
    """
    found: list[Ended] = []
    for output in outputs:
        with logged_once("statistics are not collected, and answers carry null"):
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
                known = None if payload is None or "failed" in payload else row
                choice.trace.add(known, len(output.new_token_ids))
            found.append((output.request_id, choice, str(output.finish_reason) == "abort"))
    return found


def count_ended(output_processor: Any, choices: Sequence[Ended]) -> None:
    """Count the choices that ended with these outputs, at a stop string too."""
    with logged_once("statistics are not counted"):
        for request_id, choice, is_aborted in choices:
            if request_id not in output_processor.request_states and not is_aborted:
                metrics.metrics().count_choice(choice)
