"""Applies the style to rows, in plain torch, before the law of the diversity.

    guard at T=1 → the phrases' factors → the largest strength of the tilt that its bound on the
    divergence allows → content at its new probabilities, stop tokens at the old ones → one write

With p the content of the guarded row at the request's T, u the text's last token and s the
strength, the content becomes

    q(v) ∝ p(v)·[(1 − s) + s·F(v)]·exp(s'·δ(v|u)),   F(v) = Π_k [1 − (1 − e^−λ_k)·h_k(state·v)]

h_k is the probability that phrase k is completed: this is Doob's transform, which lowers each token
by the phrases that it makes likely. With s < 1, a phrase's rate is (1 − s) times the model's plus s
times the human one. s' ≤ s is the largest strength within the allowance: the request's bound for
this token, plus the unused part of the bounds of its previous tokens.

The stop tokens keep their probability at T, since Z at T does not change. Tokens cut by the guard
become -inf here, and the law that follows keeps every token (`controls.control_row`).

This is the reference against which the kernels are tested. Shapes: see `tables.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling.controls import Controls
from dftserve.sampling.entropy import ABSENT, exp, is_present, normalise
from dftserve.sampling.guard import Support, guard
from dftserve.sampling.slots import COLUMNS, COUNT, KL, TILT_KL, Slots
from dftserve.sampling.step import FiniteTokens, Step, Texts
from dftserve.sampling.style.strength import largest_strength
from dftserve.sampling.style.tables import StyleTables

WEAKEST = 0.01
"""Lower limit of the strength as a divisor: below it the quotient would consist of rounding errors.
"""


class StyleStage(Protocol):
    """The interface of a backend's style stage."""

    finite_tokens: FiniteTokens | None
    """The finite tokens of each row after the last call, if the stage lists them; valid until the
    next call."""

    def __call__(self, logits_XV: Tensor, step: Step, slots: Slots) -> Tensor:
        """Rewrite, in place, the rows of the step whose requests have a style.

        Returns:
            float32 [R, 4], in the order of the columns from `slots.KL` on; valid until the next
            call. 0 for rows without a style and for rows that are not valid:

            - KL(q‖p) in nats, of the whole distribution, stop tokens included;
            - the tilt's part of it, which the bound limits;
            - E_q[F] − E_p[F], with q after the phrases' factors only: the reduction in expected
              phrases. Summed over a text it is the number of completions avoided, each weighted by
              (1 − e^−λ), since h is a martingale under p;
            - s', the strength of the tilt.
        """
        ...


class PlainStyleStage:
    """`StyleStage` in plain torch, on any device; allocates memory, and blocks until the device has
    counted the rows with a style."""

    finite_tokens: FiniteTokens | None = None

    def __init__(self, tables: StyleTables) -> None:
        self._tables = tables

    def __call__(self, logits_XV: Tensor, step: Step, slots: Slots) -> Tensor:
        numbers_RF = step.controls.numbers_RF[step.slot_R]
        has_style_R = numbers_RF[:, columns.LAW] != columns.NO_LAW
        has_style_R &= numbers_RF[:, columns.STYLE] != columns.NO_STYLE
        style_stats_RF = numbers_RF.new_zeros(len(numbers_RF), COLUMNS - KL)
        chosen_R = has_style_R.nonzero().flatten()
        if len(chosen_R):
            row_R = chosen_R if step.rows_R is None else step.rows_R[chosen_R]
            state_R = states_before(step, self._tables)[chosen_R]
            logits_RV, stats_RF = restyled(
                logits_XV[row_R],
                step.controls.select(step.slot_R[chosen_R]),
                state_R,
                _texts(step).input_R[chosen_R].long(),
                allowances(step, slots)[chosen_R],
                self._tables,
            )
            logits_XV.index_copy_(0, row_R, logits_RV)
            style_stats_RF[chosen_R] = stats_RF
        return style_stats_RF


def _texts(step: Step) -> Texts:
    if step.texts is None:
        raise ValueError("styles: got a step without `texts`; the text before each row is needed.")
    return step.texts


def states_before(step: Step, tables: StyleTables) -> Tensor:
    """int64 [R]: the automaton's state before each row's token; undefined for rows without a style.
    The automaton starts at the root where the answer begins."""
    texts, rows_R = _texts(step), torch.arange(len(step.slot_R), device=step.slot_R.device)
    profile_R = step.controls.numbers_RF[step.slot_R, columns.STYLE].long()
    profile_R = profile_R.clamp(0, len(tables.root_P) - 1)
    state_R = tables.root_P[profile_R].long()
    for back in reversed(range(tables.depth)):
        place_R = texts.at_R - back
        is_text_R = place_R >= texts.begin_S[step.slot_R]
        known_R = texts.tokens_SL[step.slot_R, place_R.clamp(0, texts.tokens_SL.shape[1] - 1)]
        # The inputs of this step are the last token and the drafts that follow it.
        is_input_R = step.offset_R >= back
        input_R = texts.input_R[(rows_R - back).clamp_min(0)]
        token_R = torch.where(is_input_R, input_R, known_R).long()
        next_R, _ = tables.step(profile_R, state_R, token_R)
        state_R = torch.where(is_text_R, next_R, state_R)
    return state_R


def allowances(step: Step, slots: Slots) -> Tensor:
    """float32 [R]: the upper limit of each row's tilt divergence, in nats: the request's bound for
    one token, plus the unused part of its previous tokens' bounds. The rows of one request in a
    step share that part evenly, since they are computed independently."""
    max_kl_R = step.controls.numbers_RF[step.slot_R, columns.STYLE_MAX_KL]
    sums_RF = slots.sums_before(step.slot_R, step.position_R, step.offset_R.long())
    unused_R = max_kl_R * sums_RF[:, COUNT] - sums_RF[:, TILT_KL]
    return (max_kl_R + unused_R / slots.rows_per_request).clamp_min(0.0)


def restyled(
    logits_RV: Tensor,
    controls: Controls,
    state_R: Tensor,
    last_token_R: Tensor,
    allowance_R: Tensor,
    tables: StyleTables,
) -> tuple[Tensor, Tensor]:
    """The rows after the style, and their statistics: see `StyleStage`.

    Args:
        controls: of each row, all with a style.
        state_R: int64, from `states_before`.
        last_token_R: int64.
        allowance_R: from `allowances`.
    """
    support, valid_R = guard(
        logits_RV,
        log_guard_R=controls.style_log_guard_R,
        logits_divisor_R=controls.logits_divisor_R,
        stop_ids_RE=controls.stop_ids_RE,
    )
    profile_R1 = controls.style_R.long()[:, None]
    token_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)[None]
    _, log_factor_RV = tables.step(profile_R1, state_R[:, None], token_V)
    delta_RV = tables.delta(profile_R1, last_token_R[:, None], token_V)
    strength_R = controls.style_strength_R
    tilted = tilt(support, controls.temperature_R, log_factor_RV, delta_RV, strength_R, allowance_R)
    scale_R1 = (controls.temperature_R / controls.logits_divisor_R)[:, None]
    kept_RV = is_present(support.content_RV)
    new_RV = torch.where(kept_RV, logits_RV + tilted.bias_RV * scale_R1, -torch.inf)
    _keep_stops(new_RV, logits_RV, controls.stop_ids_RE)
    new_RV = torch.where(valid_R[:, None], new_RV, logits_RV)
    return new_RV, torch.where(valid_R[:, None], tilted.style_stats_RF, 0.0)


@dataclass(frozen=True)
class Tilted:
    """A style's effect on rows: ln q − ln p of the content, and its statistics."""

    bias_RV: Tensor
    style_stats_RF: Tensor


def tilt(
    support: Support,
    temperature_R: Tensor,
    log_factor_RV: Tensor,
    delta_RV: Tensor,
    strength_R: Tensor,
    allowance_R: Tensor,
) -> Tilted:
    """The formulas of the module's docstring, applied to guarded rows."""
    kept_RV = is_present(support.content_RV)
    exists_R = kept_RV.any(dim=1)
    weight_RV = torch.where(kept_RV, support.content_RV / temperature_R[:, None], ABSENT)
    p = normalise(weight_RV)
    share_R = _content_share(p.log_z_R, support.stop_RE / temperature_R[:, None])

    # The phrases.
    s_R1 = strength_R[:, None]
    weaker_RV = torch.log1p(s_R1 * torch.expm1(log_factor_RV))
    log_factor_RV = torch.where(s_R1 < 1, weaker_RV, log_factor_RV)
    # All sums have the same form, so that factors of 1 change no bit.
    after = normalise(torch.where(kept_RV, weight_RV + log_factor_RV, ABSENT))
    log_mean_R = after.log_z_R - p.log_z_R
    squares = normalise(torch.where(kept_RV, weight_RV + 2.0 * log_factor_RV, ABSENT))
    held_back_R = exp(squares.log_z_R - after.log_z_R) - exp(log_mean_R)
    held_back_R = held_back_R / strength_R.clamp_min(WEAKEST)

    # The tilt.
    divergence = partial(_divergence, after.log_p_RK, torch.where(kept_RV, delta_RV, 0.0))
    reached_R = largest_strength(
        lambda s_R: divergence(s_R)[0], strength_R, allowance_R / share_R.clamp_min(1e-30)
    )
    tilt_kl_R, log_rise_R = divergence(reached_R)
    bias_RV = log_factor_RV + reached_R[:, None] * delta_RV
    bias_RV = bias_RV - (log_mean_R + log_rise_R)[:, None]
    kl_R = (exp(p.log_p_RK + torch.where(kept_RV, bias_RV, 0.0)) * bias_RV * kept_RV).sum(dim=1)
    stats = (
        share_R * kl_R.clamp_min(0.0),
        share_R * tilt_kl_R,
        share_R * held_back_R.clamp_min(0.0),
    )
    stats = [torch.where(exists_R, each_R, 0.0) for each_R in stats]
    return Tilted(bias_RV, torch.stack((*stats, reached_R), dim=1))


def _content_share(log_z_R: Tensor, stop_RE: Tensor) -> Tensor:
    """The content's share of the probability of content and stop tokens together, at T."""
    both = torch.cat((log_z_R[:, None], stop_RE), dim=1)
    return exp(log_z_R - torch.logsumexp(both, dim=1))


def _divergence(log_p_RV: Tensor, delta_RV: Tensor, s_R: Tensor) -> tuple[Tensor, Tensor]:
    """K(s) of the content, and ln E_p[e^{sδ}]."""
    q = normalise(log_p_RV + s_R[:, None] * delta_RV)
    log_rise_R = q.log_z_R - normalise(log_p_RV).log_z_R
    mean_R = (exp(q.log_p_RK) * delta_RV).sum(dim=1)
    return (s_R * mean_R - log_rise_R).clamp_min(0.0), log_rise_R


def _keep_stops(new_RV: Tensor, logits_RV: Tensor, stop_ids_RE: Tensor) -> None:
    """Restore the logits of stop tokens; padding leaves column 0 unchanged."""
    known_RE = (stop_ids_RE >= 0) & (stop_ids_RE < logits_RV.shape[1])
    ids_RE = torch.where(known_RE, stop_ids_RE, 0)
    value_RE = torch.where(known_RE, logits_RV.gather(1, ids_RE), -torch.inf)
    # `amax`, since padding (-inf) may be written to the column of a stop token.
    new_RV.scatter_reduce_(1, ids_RE, value_RE, "amax")
