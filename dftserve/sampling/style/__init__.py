"""Styles at decode time: phrase rates and a tilt of word choice, applied before the law.

tables.py    the profiles of an engine, packed for kernels
stage.py     the stage in plain torch: guard, phrase factors, tilt, one write
strength.py  the largest strength of the tilt that the bound on its divergence allows
"""

from dftserve.sampling.style.stage import PlainStyleStage, StyleStage
from dftserve.sampling.style.tables import ProfileArrays, StyleTables, depth_of

__all__ = ["PlainStyleStage", "ProfileArrays", "StyleStage", "StyleTables", "depth_of"]
