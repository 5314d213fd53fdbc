"""Requesting answers from a server, and storing them."""
