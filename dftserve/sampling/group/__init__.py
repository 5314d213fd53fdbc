"""Groups of texts that are sampled jointly: n choices whose random numbers are evenly spaced."""

from dftserve.sampling.group.codes import GroupRow, first_code
from dftserve.sampling.group.stage import CodesSnapshot, GroupCodes

__all__ = ["CodesSnapshot", "GroupCodes", "GroupRow", "first_code"]
