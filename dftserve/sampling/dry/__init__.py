"""DRY, "don't repeat yourself": before the law, what would continue a sequence that the text
already has is made less likely (docs/maths.md, "Repeats").

    repeats       which tokens, and by how much: of a text on the host
    on_device     likewise of texts on the logits' device, without a wait
    breakers      texts that end a sequence → the tokens that do
    breaker_sets  these, by set, on the device
    stage         the rows, less their penalties; stop tokens keep their probability

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
