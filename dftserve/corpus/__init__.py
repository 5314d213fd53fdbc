"""Texts from files: read, cleaned, filtered, and split into training and held-out ones."""
