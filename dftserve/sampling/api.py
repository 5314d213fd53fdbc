"""The entry points of every adapter (transformers, vLLM's V1 and V2 runners): they validate the
arguments and call a backend. Adapters contain no maths of their own."""

from dataclasses import replace

import torch
from torch import Tensor

from dftserve.sampling.backends import get_backend
from dftserve.sampling.backends.base import Backend
from dftserve.sampling.controls import Controls
from dftserve.sampling.dry import penalise
from dftserve.sampling.slots import Slots
from dftserve.sampling.step import Step
from dftserve.sampling.style import StyleStage
from dftserve.sampling.transform import Statistics


def transform(
    logits_XV: Tensor,
    controls: Controls,
    rows_R: Tensor | None = None,
    backend: Backend | None = None,
) -> Statistics:
    """Rewrite rows of logits, in place, so that sampling from them follows each row's law.

    A row is given as L/divisor and returned as y·T/divisor, where softmax(y) is the distribution to
    sample from: a caller that divided by T before, or divides afterwards, samples from softmax(y).
    The former argmax still attains the maximum (under the law `words`, each class's former argmax
    does so within its class; under `xtc` it may be excluded), -inf stays -inf, and other rows are
    bitwise unchanged.

    Args:
        logits_XV: float32, each row contiguous, changed in place. May be a slice of wider rows, as
            in an engine that pads its vocabulary.
        controls: one row of controls for each row to change.
        rows_R: int64, distinct indices of the rows to change; None for all of them, in order.
        backend: from `get_backend` for the logits' device. Reuse it between calls, since it owns
            buffers; None creates one for this call, with the laws' default constants.

    Returns:
        The statistics of each row; valid until the next call of the same backend. All checks
        precede the first write: if this raises, nothing was changed.

    Raises:
        ValueError: the logits are not a float32 matrix of contiguous rows; `rows_R` is not a 1-D
            int64 tensor, or its length differs from the number of rows of controls; or the controls
            have last tokens (for the law `words`) but the backend has no token classes.
    """
    _check_logits(logits_XV)
    if rows_R is not None and (rows_R.dtype != torch.int64 or rows_R.dim() != 1):
        raise ValueError(
            f"rows: got {rows_R.dtype}, shape {tuple(rows_R.shape)}; accepted: a list of int64."
        )
    rows, control_rows = len(logits_XV if rows_R is None else rows_R), len(controls.stop_ids_RE)
    if rows != control_rows:
        raise ValueError(
            f"rows: got {rows} and {control_rows} rows of controls; accepted: one for each."
        )
    backend = backend or get_backend(logits_XV.device)
    _check_classes(controls.last_token_R, backend)
    return backend(logits_XV, controls, rows_R)


def transform_step(
    logits_XV: Tensor,
    step: Step,
    slots: Slots,
    backend: Backend,
    style_stage: StyleStage | None = None,
) -> Statistics:
    """`transform` for a step's rows, with the state that slots keep between steps: commits the
    previous step's rows whose tokens were accepted, steers by them, rewrites this step's rows, and
    stages their statistics.

    Args:
        logits_XV: as in `transform`.
        slots: from `backend.create_slots`; the step's slot indices refer to them.
        style_stage: from `get_style_stage`; required for a step with `texts`, whose styles are
            applied before the law. The styles' statistics are staged with the law's.

    Returns:
        As `transform`; an idle row is reported as invalid.

    Raises:
        ValueError: as `transform`, or texts without a style stage. If the law fails after a style
            or penalties were applied, the rows keep those changes. The CPU backend checks the slots
            and raises IndexError before it writes anything; the GPU backend does not check them.
    """
    _check_logits(logits_XV)
    rows, slots_given = logits_XV.shape[0], step.slot_R.shape[0]
    if step.rows_R is None and slots_given != rows:
        raise ValueError(f"rows: got {rows} and {slots_given} slots; accepted: one for each.")
    _check_classes(step.last_token_R, backend)
    if step.texts is not None and style_stage is None:
        raise ValueError("texts: got some, and no style stage; pass one from `get_style_stage`.")
    for part in step.penalties:
        penalise(logits_XV, step, part, backend.constants)
    if step.texts is not None and style_stage is not None:
        style_stats_RF = style_stage(logits_XV, step, slots)
        step = replace(step, style_stats_RF=style_stats_RF, finite_tokens=style_stage.finite_tokens)
    return backend.step(logits_XV, step, slots)


def _check_logits(logits_XV: Tensor) -> None:
    if logits_XV.dtype != torch.float32 or logits_XV.dim() != 2 or logits_XV.stride(1) != 1:
        raise ValueError(
            f"logits: got {logits_XV.dtype}, shape {tuple(logits_XV.shape)}, strides "
            f"{logits_XV.stride()}; accepted: a float32 matrix whose rows are contiguous."
        )


def _check_classes(last_token_R: Tensor | None, backend: Backend) -> None:
    if last_token_R is not None and backend.token_classes is None:
        raise ValueError(
            "last tokens: got some, and a backend without token classes; give `get_backend` the "
            "`TokenClasses` of the model's tokenizer, which the law 'words' needs."
        )
