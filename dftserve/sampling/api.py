"""The entry points of every adapter (transformers, vLLM's V1 and V2 runners): arguments are checked
here, and a backend does the work. No adapter repeats the maths."""

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

    A row comes as L/divisor and leaves as y·T/divisor, where softmax(y) is the distribution to
    sample from: whoever divided by T before, or does so afterwards, draws from softmax(y). The
    former argmax still attains the maximum (under the law `words`: that of each token class does
    within its class; not under `xtc`, which may exclude it), -inf stays -inf, other rows keep their
    bits.

    Args:
        logits_XV: float32, each row contiguous, changed in place. An engine that pads its
            vocabulary gives a part of wider rows.
        controls: one row of controls for each row to change.
        rows_R: int64, the rows to change, each once; None for all of them, in order.
        backend: from `get_backend` for the logits' device, kept from call to call, since it owns
            buffers; None makes one for this call, with the laws' default constants.

    Returns:
        What was done; valid until the next call of the same backend. Every check precedes the
        first write: if this raises, nothing was changed.

    Raises:
        ValueError: the logits are not a float32 matrix of contiguous rows, the rows not a list of
            int64, or not as many as rows of controls; or these have last tokens, which the law
            `words` reads, and the backend has no token classes.
    """
    _check_logits(logits_XV)
    if rows_R is not None and (rows_R.dtype != torch.int64 or rows_R.dim() != 1):
        raise ValueError(
            f"rows: got {rows_R.dtype}, shape {tuple(rows_R.shape)}; accepted: a list of int64."
        )
    rows, asked = len(logits_XV if rows_R is None else rows_R), len(controls.stop_ids_RE)
    if rows != asked:
        raise ValueError(f"rows: got {rows} and {asked} rows of controls; accepted: one for each.")
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
    """`transform` of a step's rows with what is remembered of their requests between steps: counts
    the rows of the step before whose tokens turned out accepted, steers by them, rewrites this
    step's rows, and stages their statistics.

    Args:
        logits_XV: as in `transform`.
        slots: of `backend.create_slots`; a slot of the step's is one of these.
        style_stage: of `get_style_stage`; needed for a step with `texts`, whose styles it applies
            first. The figures of the styles are staged with the statistics.

    Returns:
        As `transform`; an idle row counts as invalid.

    Raises:
        ValueError: as `transform`, or texts without a style stage. Where the law fails behind a
            style or penalties, the rows are as these left them. A backend that checks the slots
            raises IndexError before it writes anything; a GPU's does not look at them.
    """
    _check_logits(logits_XV)
    rows, slots_given = logits_XV.shape[0], step.slot_R.shape[0]
    if step.rows_R is None and slots_given != rows:
        raise ValueError(f"rows: got {rows} and {slots_given} slots; accepted: one for each.")
    _check_classes(step.last_token_R, backend)
    if step.texts is not None and style_stage is None:
        raise ValueError("texts: got some, and no style stage; give one of `get_style_stage`.")
    for part in step.penalties:
        penalise(logits_XV, step, part, backend.constants)
    if step.texts is not None and style_stage is not None:
        figures_RF = style_stage(logits_XV, step, slots)
        step = replace(step, figures_RF=figures_RF, left=style_stage.left)
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
