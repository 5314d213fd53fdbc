"""What a configuration of transformers says about how a model computes, under the names that the
families use."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Configuration attributes that multiply or divide logits, depending on the family."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""Configuration attributes that bound the tokens read at once, under the names that families use
(`n_positions` is also available under the first one); the first one present is used."""
CHUNK, ORIGINAL = "attention_chunk_size", "original_max_position_embeddings"
"""Configuration attributes with lengths beyond which a text is processed differently."""
AUXILIARY_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def rescalings(config: Any) -> Iterator[tuple[float, float | None]]:
    """Possible (scale, cap) of a configuration; those that use everything it names come first."""
    caps = [
        cap for name in CAPS if (cap := positive_number(getattr(config, name, None))) is not None
    ]
    factors = [[1.0]]
    for name in SCALES:
        value = getattr(config, name, None)
        if value == "inv_sqrt_d_model":  # MPT
            value = getattr(config, "d_model", config.hidden_size) ** -0.5
        if (number := positive_number(value)) is not None and number != 1.0:
            factors.append([number, 1 / number, 1.0])
    for cap in (*caps, None):
        for each in itertools.product(*factors):
            scale = 1.0
            for factor in each:
                scale *= factor
            yield scale, cap


def positions_of(config: Any) -> int | None:
    """The most tokens that a model can read at once; None if its configuration sets no bound."""
    named = (positive_number(getattr(config, name, None)) for name in POSITIONS)
    positions = next((number for number in named if number is not None), None)
    return None if positions is None else int(positions)  # XLNet uses −1 for no bound.


def attention_chunk(config: Any) -> int | None:
    """Chunk length in tokens, across which attention does not reach; None without chunks."""
    number = positive_number(getattr(config, CHUNK, None))
    return None if number is None else int(number)


def rescaled_beyond(config: Any) -> int | None:
    """Length of a text beyond which all positions of its batch are rescaled, if there is one."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # A family may have separate parameters for each type of layer.
    sets = (parameters, *(each for each in parameters.values() if isinstance(each, Mapping)))
    named = [
        positive_number(each.get(ORIGINAL)) for each in sets if each.get("rope_type") == "longrope"
    ]
    return min((int(number) for number in named if number is not None), default=None)


def original_length(config: Any) -> str:
    """The original context length in the configuration, in parentheses for a message; or empty."""
    parameters = getattr(config, "rope_parameters", None)
    number = parameters.get(ORIGINAL) if isinstance(parameters, Mapping) else None
    return "" if number is None else f" ({ORIGINAL}: {number:,})"


def positive_number(value: Any) -> float | None:
    """The value if it is a number above 0, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and value > 0 else None
