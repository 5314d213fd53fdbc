"""Runs programs that a model wrote in isolation: `sandbox.run`."""
