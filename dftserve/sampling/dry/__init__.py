"""DRY, "don't repeat yourself": before the law, penalises tokens that would continue a sequence
that already occurs in the text (docs/maths.md, "Repeats").

    repeats       the penalised tokens and their penalties, for a text on the host
    on_device     the same for texts on the logits' device, without blocking
    breakers      maps sequence breakers (strings) to the tokens that end a sequence
    breaker_sets  sets of such tokens on the device
    stage         subtracts the penalties from the rows; stop tokens keep their probability

Shapes: P rows with penalties, K their penalised tokens, N tokens of a text, W of a window of it, B
sets of breakers.
"""

from dftserve.sampling.dry.breakers import NO_BREAKERS, Breakers
from dftserve.sampling.dry.on_device import SlotRepeats
from dftserve.sampling.dry.repeats import DryControls, TextRepeats, together
from dftserve.sampling.dry.stage import penalise

__all__ = [
    "NO_BREAKERS",
    "Breakers",
    "DryControls",
    "SlotRepeats",
    "TextRepeats",
    "penalise",
    "together",
]
