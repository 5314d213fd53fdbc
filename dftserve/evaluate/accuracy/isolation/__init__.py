"""Where a program that a model wrote is run: `sandbox.run`."""
