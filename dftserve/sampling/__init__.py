"""Decode-time maths on logits: guard, entropy, control laws, one transform. Torch only.

Shapes by suffix: R logits rows, V padded vocabulary, K support (in slots.py: rows of one request),
E stop tokens, S slots, F figures.
"""

from dftserve.sampling.laws import ControlRow, Controls, control_row
from dftserve.sampling.slots import Account, Slots
from dftserve.sampling.transform import Statistics, transform

__all__ = ["Account", "ControlRow", "Controls", "Slots", "Statistics", "control_row", "transform"]
