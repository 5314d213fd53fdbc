"""Bounds of what a store keeps, for what is read before anything heavy is imported."""

LARGEST_KEPT = 1024
"""Top entries of a target, and draws."""
