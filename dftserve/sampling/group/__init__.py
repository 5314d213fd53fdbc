"""Texts that are drawn together: n choices whose random numbers are spread evenly."""

from dftserve.sampling.group.codes import GroupRow, first_code
from dftserve.sampling.group.stage import CodesSnapshot, GroupCodes

__all__ = ["CodesSnapshot", "GroupCodes", "GroupRow", "first_code"]
