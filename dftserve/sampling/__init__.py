"""Decode-time maths on logits: guard, entropy, control laws, one transform. Torch only.

Shapes by suffix: R logits rows, V padded vocabulary, K support, E stop tokens, S slots.
"""

from dftserve.sampling.laws import Controls, control_row
from dftserve.sampling.transform import Statistics, transform

__all__ = ["Controls", "Statistics", "control_row", "transform"]
