"""Styles at decode time: phrase rates and a tilt of word choice, before the law of the diversity.

tables.py    the profiles of an engine, packed for kernels
stage.py     the stage in plain torch: guard, phrase factors, tilt, one write
strength.py  how far a row may be tilted
"""

from dftserve.sampling.style.stage import PlainStyleStage, StyleStage
from dftserve.sampling.style.tables import ProfileArrays, StyleTables, depth_of

__all__ = ["PlainStyleStage", "ProfileArrays", "StyleStage", "StyleTables", "depth_of"]
