"""The law in plain torch, on whole rows: rewrites the logits and returns statistics of each row.

    guard at T=1 → H0 of the plausible tokens → the law's temperature T' → content at T',
    stop tokens at the probability they had at T → one write

This is the reference against which the backends' kernels are tested, and the implementation for
devices without kernels (`backends/plain_torch.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dftserve.sampling import top_n_sigma, words, xtc
from dftserve.sampling.controls import DEFAULT_CONSTANTS, Controls, LawConstants
from dftserve.sampling.entropy import Distribution, exp, is_present, normalise
from dftserve.sampling.guard import Support, guard
from dftserve.sampling.laws import log_guard, temperature
from dftserve.sampling.stops import apply_temperature, rescale_stop_tokens

_Content = tuple[Distribution, tuple[Tensor, Tensor]]
"""The content's distribution, and the log-weights of content and stop tokens."""


@dataclass(frozen=True)
class Statistics:
    """What the transform did to each row.

    entropy_before_R: float32, H0 in nats, of the plausible tokens at temperature 1.
    entropy_after_R: float32, nats, of the final distribution, from which the token is sampled.
    temperature_R: float32, of the content.
    changed_R: float32, total variation distance between the guarded row at T and the final one:
        the share of tokens that differ because of the new temperature.
    valid_R: bool, False for a row left unchanged because it contains NaN or +inf or no finite
        logit.
    """

    entropy_before_R: Tensor
    entropy_after_R: Tensor
    temperature_R: Tensor
    changed_R: Tensor
    valid_R: Tensor

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All fields but `valid_R`, in the order above."""
        return self.entropy_before_R, self.entropy_after_R, self.temperature_R, self.changed_R


def transform(
    logits_XV: Tensor,
    controls: Controls,
    rows_R: Tensor | None = None,
    constants: LawConstants = DEFAULT_CONSTANTS,
    classes_V: Tensor | None = None,
) -> Statistics:
    """As `api.transform`; each step is one torch operation on whole rows.

    `classes_V`: `TokenClasses.packed_V`, required by the law `words`.
    """
    logits_RV = logits_XV if rows_R is None else logits_XV.index_select(0, rows_R)
    log_guard_R = log_guard(controls, constants)
    is_sigma_R = top_n_sigma.is_top_n_sigma(controls)
    if bool(is_sigma_R.any()):
        by_sigma_R = top_n_sigma.log_guard(logits_RV, controls)
        log_guard_R = torch.where(is_sigma_R, by_sigma_R, log_guard_R)
    support, valid_R = guard(
        logits_RV,
        log_guard_R=log_guard_R,
        logits_divisor_R=controls.logits_divisor_R,
        stop_ids_RE=controls.stop_ids_RE,
    )
    entropy_before_R, plausible_R = base_entropy(support)
    wanted_R = temperature(controls, entropy_before_R, plausible_R, constants)
    cool = normalise(support.content_RV / controls.temperature_R[:, None])
    temperature_R, hot = apply_temperature(support, controls.temperature_R, wanted_R, cool)
    weights = rescale_stop_tokens(support, controls.temperature_R, temperature_R, cool, hot)
    is_words_R = words.is_words(controls)
    if bool(is_words_R.any()):
        mean_R, by_class, by_class_weights = _by_class(
            support, controls, cool, constants, classes_V
        )
        temperature_R = torch.where(is_words_R, mean_R, temperature_R)
        hot, weights = _replace_rows(is_words_R, (by_class, by_class_weights), (hot, weights))
    is_xtc_R = xtc.is_xtc(controls)
    if bool(is_xtc_R.any()):
        rest = xtc.without_top_choices(support, controls, cool)
        hot, weights = _replace_rows(is_xtc_R, rest, (hot, weights))
    final = normalise(torch.cat(weights, dim=1))
    statistics = Statistics(
        entropy_before_R=entropy_before_R,
        entropy_after_R=final.entropy(),
        temperature_R=temperature_R,
        changed_R=_changed(cool, hot, final),
        valid_R=valid_R,
    )
    scale_R1 = (controls.temperature_R / controls.logits_divisor_R)[:, None]
    rewritten_RK = final.log_p_RK * scale_R1
    rewritten_RK.masked_fill_(~is_present(final.log_p_RK), -torch.inf)
    _write(logits_XV, logits_RV, rows_R, controls.stop_ids_RE, rewritten_RK, valid_R)
    return statistics


def _by_class(
    support: Support,
    controls: Controls,
    cool: Distribution,
    constants: LawConstants,
    classes_V: Tensor | None,
) -> tuple[Tensor, Distribution, tuple[Tensor, Tensor]]:
    """The law `words`: its temperature, the content, and the log-weights of content and stop
    tokens."""
    if classes_V is None:
        raise ValueError(
            "the law 'words': got a backend without token classes; create it with `token_classes`."
        )
    rows, width = support.content_RV.shape
    class_RV = words.row_classes(classes_V, controls.last_token_R, rows, width)
    mean_R, hot = words.heat_by_class(support, class_RV, controls, cool, constants)
    content_RV = hot.log_p_RK + hot.log_z_R[:, None]
    return mean_R, hot, (content_RV, support.stop_RE / controls.temperature_R[:, None])


def _replace_rows(is_law_R: Tensor, replacement: _Content, other: _Content) -> _Content:
    """`other`, with the rows of a law taken from `replacement`."""
    hot, weights = other
    log_p_RK = torch.where(is_law_R[:, None], replacement[0].log_p_RK, hot.log_p_RK)
    content_RK, stop_RE = (
        torch.where(is_law_R[:, None], a, b) for a, b in zip(replacement[1], weights, strict=True)
    )
    return (
        Distribution(log_p_RK, torch.where(is_law_R, replacement[0].log_z_R, hot.log_z_R)),
        (content_RK, stop_RE),
    )


def base_entropy(support: Support) -> tuple[Tensor, Tensor]:
    """H0 in nats and the number of plausible tokens, including plausible stop tokens."""
    plausible_RV = support.plausible()
    count_R = is_present(plausible_RV).sum(dim=1, dtype=torch.float32)
    return normalise(plausible_RV).entropy(), count_R


def _changed(cool: Distribution, hot: Distribution, final: Distribution) -> Tensor:
    """Σ max(p_before − p_after, 0) over the content: stop tokens keep their probability."""
    content_share_R = exp(hot.log_z_R - final.log_z_R)
    moved_RV = exp(cool.log_p_RK) - exp(hot.log_p_RK)
    return content_share_R * moved_RV.clamp_min(0.0).sum(dim=1)


def _write(
    logits_XV: Tensor,
    logits_RV: Tensor,
    rows_R: Tensor | None,
    stop_ids_RE: Tensor,
    rewritten_RK: Tensor,
    valid_R: Tensor,
) -> None:
    """The final write. Stop tokens are combined by `amax`, so that absent ones, whose value is
    -inf, have no effect wherever they are written."""
    vocabulary = logits_XV.shape[1]
    content_RV, stop_RE = rewritten_RK.split((vocabulary, stop_ids_RE.shape[1]), dim=1)
    new_RV = content_RV.scatter_reduce(1, stop_ids_RE.clamp(0, vocabulary - 1), stop_RE, "amax")
    new_RV = torch.where(valid_R[:, None], new_RV, logits_RV)
    if rows_R is None:
        logits_XV.copy_(new_RV)
    else:
        logits_XV.index_copy_(0, rows_R, new_RV)
