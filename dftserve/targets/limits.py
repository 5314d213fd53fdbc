"""Limits of a store, in a module of their own so that recipes are read without heavy imports."""

LARGEST_KEPT = 1024
"""Most top entries, and most draws, of a target."""
