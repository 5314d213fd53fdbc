"""Subtracts the penalties from the rows, before a style and the law; in plain torch, on any device,
without blocking.

    content   L'_v = L_v − nats_v             the largest of a token's penalties, over the divisor
    stop      L'_e = L_e + T·(ln Z' − ln Z)   Z, Z': the guarded content at T, before and after

Thus a stop token keeps the probability that it has without DRY, if the content leads: the guard
before uses the whole row's maximum, and the guard after uses the content's. A row without penalties
is bitwise unchanged.

On a CPU only the relevant tokens are processed (`compact.py`); on other devices, determining their
number would block.
"""

import torch
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import laws, top_n_sigma
from dftserve.sampling.controls import LAW_CODES, Controls, LawConstants
from dftserve.sampling.dry.compact import CompactRows
from dftserve.sampling.entropy import exp, is_present
from dftserve.sampling.guard import Support, guard
from dftserve.sampling.step import Penalties, Step

ELEMENTS = 1 << 22
"""Number of logits processed at once; with about 34 bytes of temporaries each, 142 MB."""


def penalise(logits_XV: Tensor, step: Step, penalties: Penalties, constants: LawConstants) -> None:
    """Rewrite, in place, the rows of the step that have penalties. Penalties of stop tokens and of
    tokens beyond the vocabulary are ignored."""
    if _is_on_host(logits_XV):
        penalties = _only_present(penalties)
    for part in penalties.split(max(ELEMENTS // logits_XV.shape[1], 1)):
        if len(part.place_P):
            _penalise(logits_XV, step, part, constants)


def _penalise(logits_XV: Tensor, step: Step, penalties: Penalties, constants: LawConstants) -> None:
    place_P = penalties.place_P
    row_P = place_P if step.rows_R is None else step.rows_R[place_P]
    controls = step.controls.select(step.slot_R[place_P])
    log_guard_P = _log_guard(logits_XV, row_P, controls, constants)
    if _is_on_host(logits_XV):
        compact = CompactRows.of(logits_XV, row_P, penalties, controls, log_guard_P)
        compact.write(
            logits_XV,
            *_lowered(compact.logits_PJ, compact.penalties, compact.controls, log_guard_P),
        )
        return
    logits_PV = logits_XV[row_P]
    lower_PV, changes_P = _lowered(logits_PV, penalties, controls, log_guard_P)
    logits_XV.index_copy_(0, row_P, torch.where(changes_P[:, None], lower_PV, logits_PV))


def _lowered(
    logits_PV: Tensor, penalties: Penalties, controls: Controls, log_guard_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows after subtracting their penalties, and which of them change: bool [P]."""
    stop_PE, known_PE = _stops(controls.stop_ids_RE, logits_PV)
    lower_PV = _less(logits_PV, penalties, controls)
    lower_PV = _put(lower_PV, stop_PE, torch.where(known_PE, -torch.inf, torch.inf), "amin")
    shift_P, valid_P = _stop_shift(logits_PV, lower_PV, controls, log_guard_P)
    moved_PE = logits_PV.gather(1, stop_PE) + shift_P[:, None]
    lower_PV = _put(lower_PV, stop_PE, torch.where(known_PE, moved_PE, -torch.inf), "amax")
    return lower_PV, (penalties.nats_PK > 0).any(dim=1) & valid_P


def _is_on_host(logits_XV: Tensor) -> bool:
    """Whether the host can read the tensor without waiting for a device."""
    return logits_XV.device.type == "cpu"


def _only_present(penalties: Penalties) -> Penalties:
    has_P = (penalties.nats_PK > 0).any(dim=1)
    if has_P.all():
        return penalties
    return Penalties(penalties.token_PK[has_P], penalties.nats_PK[has_P], penalties.place_P[has_P])


def _stops(stop_ids_PE: Tensor, logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    """The stop tokens, with 0 for padding, and which of them are real tokens."""
    known_PE = (stop_ids_PE >= 0) & (stop_ids_PE < logits_PV.shape[1])
    return torch.where(known_PE, stop_ids_PE, 0), known_PE


def _put(logits_PV: Tensor, token_PE: Tensor, value_PE: Tensor, reduce: str) -> Tensor:
    """Combine values into the columns of tokens. Padding has a value that is neutral for `reduce`,
    so token 0 is not changed by it."""
    return logits_PV.scatter_reduce(1, token_PE, value_PE, reduce)


def _less(logits_PV: Tensor, penalties: Penalties, controls: Controls) -> Tensor:
    """The penalised logits. For a repeated token the minimum is taken: its largest penalty."""
    token_PK = penalties.token_PK
    is_known_PK = token_PK < logits_PV.shape[1]
    token_PK = torch.where(is_known_PK, token_PK, 0)
    nats_PK = torch.where(is_known_PK, penalties.nats_PK, 0.0)
    lowered_PK = logits_PV.gather(1, token_PK) - nats_PK / controls.logits_divisor_R[:, None]
    return _put(logits_PV, token_PK, lowered_PK, "amin")


def _stop_shift(
    logits_PV: Tensor, lower_PV: Tensor, controls: Controls, log_guard_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The shift of the stop tokens' logits, and which rows are valid; in `lower_PV` stop tokens are
    -inf."""
    before, valid_P = _support(logits_PV, controls, log_guard_P)
    after, _ = _support(lower_PV, controls, log_guard_P)
    temperature_P, divisor_P = controls.temperature_R, controls.logits_divisor_R
    cool_P, less_P = (_log_z(support, temperature_P) for support in (before, after))
    peaks_P = (lower_PV.amax(dim=1) - logits_PV.amax(dim=1)) * divisor_P / temperature_P
    fall_P = peaks_P + less_P - cool_P
    # Without plausible content, there is nothing relative to which stop tokens would shift.
    exists_P = is_present(cool_P) & is_present(less_P) & valid_P
    return torch.where(exists_P, fall_P * temperature_P / divisor_P, 0.0), valid_P


def _support(logits_PV: Tensor, controls: Controls, log_guard_P: Tensor) -> tuple[Support, Tensor]:
    return guard(
        logits_PV,
        log_guard_R=log_guard_P,
        logits_divisor_R=controls.logits_divisor_R,
        stop_ids_RE=controls.stop_ids_RE,
    )


def _log_z(support: Support, temperature_P: Tensor) -> Tensor:
    """ln Z of the content at T. Does not use `normalise`, whose softmax is slow if most of a row
    underflows."""
    weight_PV = support.content_RV / temperature_P[:, None]
    peak_P = weight_PV.amax(dim=1)
    return peak_P + exp(weight_PV - peak_P[:, None]).sum(dim=1).log()


def _log_guard(
    logits_XV: Tensor, row_P: Tensor, controls: Controls, constants: LawConstants
) -> Tensor:
    """ln a of the guard that follows: the style's, or the law's. Under `budget`, whose level
    changes from step to step, it is that of level 1, as before a style."""
    is_budget_P = controls.law_R == LAW_CODES["budget"]
    level_P = torch.where(is_budget_P, 1.0, controls.level_R)
    by_law_P = laws.log_guard(controls.with_level(level_P), constants)
    is_sigma_P = top_n_sigma.is_top_n_sigma(controls)
    if not _is_on_host(logits_XV) or is_sigma_P.any():
        by_sigma_P = top_n_sigma.log_guard(logits_XV[row_P], controls)
        by_law_P = torch.where(is_sigma_P, by_sigma_P, by_law_P)
    has_style_P = controls.style_R != columns.NO_STYLE
    return torch.where(has_style_P, controls.style_log_guard_R, by_law_P)
