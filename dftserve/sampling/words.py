"""The law `words`: heats the choice of the next word and cools its spelling.

The content is divided into the classes of `token_classes.py`: tokens that begin a word, tokens
inside one, others. Each class c has its own temperature T_c and keeps the probability M_c that it
has on the guarded support at the request's T:

    q(v) = M_c · exp(L_v/T_c) / Σ_{w∈c} exp(L_w/T_c)

    T_start = min(T·(1 + 2·level), max(T, max_temperature))
    T_inside = T·(1 − .3·level)
    T_other = T

Thus the probabilities of a word's end, a sentence's end and the text's end remain those of the
model; stop tokens, which are not content, keep their probability at T. The most similar method is
AdapT (arXiv 2309.02772), which heats the first token of a code block and cools the others, with one
temperature per step.
"""

import torch
from torch import Tensor

from dftserve.sampling.controls import LAW_CODES, Controls, LawConstants
from dftserve.sampling.entropy import ABSENT, Distribution, exp, is_present, normalise
from dftserve.sampling.guard import Support
from dftserve.sampling.token_classes import (
    CLASS_MASK,
    INSIDE,
    OTHER,
    START,
    STATE_SHIFT,
)

COOLEST = 0.01
"""T_inside is at least this share of T."""


def is_words(controls: Controls) -> Tensor:
    """bool [R]."""
    return controls.law_R == LAW_CODES["words"]


def class_temperatures(controls: Controls, constants: LawConstants) -> dict[int, Tensor]:
    """T_c for each row, by class."""
    temperature_R, level_R = controls.temperature_R, controls.level_R
    start_R = temperature_R * (1.0 + constants.word_start_rise * level_R)
    ceiling_R = torch.maximum(temperature_R, controls.max_temperature_R)
    inside_R = temperature_R * (1.0 - constants.word_inside_fall * level_R).clamp_min(COOLEST)
    return {OTHER: temperature_R, START: start_R.minimum(ceiling_R), INSIDE: inside_R}


def row_classes(packed_V: Tensor, last_token_R: Tensor | None, rows: int, width: int) -> Tensor:
    """uint8 [rows, width]: the class of each token after each row's last one.

    Args:
        packed_V: `TokenClasses.packed_V`; tokens beyond it have the class `other`, and a text that
            ends in one of them ends outside a word.
    """
    packed_V = torch.nn.functional.pad(packed_V, (0, max(width - len(packed_V), 0)))
    if last_token_R is None:
        state_R = torch.zeros(rows, dtype=torch.uint8, device=packed_V.device)
    else:
        is_known_R = (last_token_R >= 0) & (last_token_R < len(packed_V))
        last_R = packed_V[torch.where(is_known_R, last_token_R, 0)]
        state_R = torch.where(is_known_R, last_R >> STATE_SHIFT, 0)
    return (packed_V[None, :width] >> (2 * state_R)[:, None]) & CLASS_MASK


def heat_by_class(
    support: Support,
    class_RV: Tensor,
    controls: Controls,
    cool: Distribution,
    constants: LawConstants,
) -> tuple[Tensor, Distribution]:
    """The content with each class at its own temperature and with its probability unchanged.

    `cool` is the content at T; ln Z over the content does not change.

    Returns:
        The mean of the classes' temperatures, weighted by their probabilities, and the content.
    """
    weight_RV = torch.full_like(support.content_RV, ABSENT)
    mean_R = torch.zeros_like(controls.temperature_R)
    for class_, temperature_R in class_temperatures(controls, constants).items():
        of_class_RV = torch.where(class_RV == class_, support.content_RV, ABSENT)
        before = normalise(of_class_RV / controls.temperature_R[:, None])
        after = normalise(of_class_RV / temperature_R[:, None])
        is_member_RV = is_present(of_class_RV)
        log_p_RV = after.log_p_RK + before.log_z_R[:, None]
        weight_RV = torch.where(is_member_RV, log_p_RV, weight_RV)
        mean_R += exp((before.log_z_R - cool.log_z_R).clamp_max(0.0)) * temperature_R
    exists_R = is_present(cool.log_z_R)
    return torch.where(exists_R, mean_R, controls.temperature_R), normalise(weight_RV)
