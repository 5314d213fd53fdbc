"""The plug-in's logger, under vLLM's, and a guard for what may fail at every step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.dftserve")

_logged: set[str] = set()


@contextmanager
def logged_once(consequence: str) -> Iterator[None]:
    """Whatever goes wrong in here ends here; the first time in this process it is logged.

    For what must not fail a request or end a server: statistics.
    """
    try:
        yield
    except Exception:
        if consequence not in _logged:
            _logged.add(consequence)
            logger.exception("diversity: a fault; %s", consequence)
