"""dftserve: a `diversity` field for vLLM, and fine-tuning toward a distribution.

Importing this package is free: no torch, no transformers, no engine.
"""

__version__ = "0.1.0"
