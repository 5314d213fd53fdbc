"""Decode-time maths on logits: guard, entropy, control laws, one transform. Torch and numpy only.

Shapes by suffix: R logits rows, V padded vocabulary, K support (in slots.py: rows of one request),
E stop tokens, S slots, F figures.
"""

from dftserve.sampling.fused import fastest, fastest_slots, transform
from dftserve.sampling.kernels import Way
from dftserve.sampling.laws import ControlRow, Controls, control_row
from dftserve.sampling.slots import Account, Slots
from dftserve.sampling.transform import Statistics

__all__ = [
    "Account",
    "ControlRow",
    "Controls",
    "Slots",
    "Statistics",
    "Way",
    "control_row",
    "fastest",
    "fastest_slots",
    "transform",
]
