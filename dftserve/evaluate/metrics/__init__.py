"""Measures of sets of texts, with their intervals."""
