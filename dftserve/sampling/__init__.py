"""Decode-time maths on logits: guard, entropy, control laws, one transform. Torch and numpy only.

Shapes by suffix: R logits rows, V padded vocabulary, K support (in slots.py: rows of one request),
E stop tokens, S slots, F columns (of controls, or of statistics).
"""

from dftserve.sampling.api import transform, transform_step
from dftserve.sampling.backends import get_backend, get_style_stage
from dftserve.sampling.backends.base import Backend
from dftserve.sampling.controls import (
    ControlRow,
    Controls,
    LawConstants,
    StyleControls,
    control_row,
)
from dftserve.sampling.slot_controls import SlotControls
from dftserve.sampling.slots import Slots, SlotStatistics
from dftserve.sampling.step import Step, Texts
from dftserve.sampling.style import StyleStage, StyleTables
from dftserve.sampling.token_classes import TokenClasses
from dftserve.sampling.transform import Statistics

__all__ = [
    "Backend",
    "ControlRow",
    "Controls",
    "LawConstants",
    "SlotControls",
    "SlotStatistics",
    "Slots",
    "Statistics",
    "Step",
    "StyleControls",
    "StyleStage",
    "StyleTables",
    "Texts",
    "TokenClasses",
    "control_row",
    "get_backend",
    "get_style_stage",
    "transform",
    "transform_step",
]
