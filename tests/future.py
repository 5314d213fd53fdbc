"""Checks that nothing is used that transformers will remove, by its FutureWarnings."""

import pytest

ALLOWED = "`is_gradient_checkpointing` is deprecated"
"""peft 0.21 reads this attribute of every model that it wraps; transformers warns since 5.23."""

no_future_warnings = pytest.mark.filterwarnings(
    "error::FutureWarning", f"ignore:{ALLOWED}:FutureWarning"
)
"""For modules whose tests train or generate."""

FOR_CHILDREN = f"error::FutureWarning,ignore:{ALLOWED}:FutureWarning"
"""The same as PYTHONWARNINGS."""
