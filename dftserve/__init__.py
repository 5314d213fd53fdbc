"""dftserve: open models that write like many people, and stay right.

Importing this package is free: no torch, no transformers, no engine.
"""

__version__ = "0.1.0"
