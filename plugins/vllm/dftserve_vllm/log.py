"""The plug-in's logger, under vLLM's; the library's warnings; a context that logs exceptions."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.dftserve")

_logged: set[str] = set()


def show_library_messages() -> None:
    """Show the log messages of `dftserve.*` (such as a kernel fallback) like vLLM's own.

    The root logger cannot be relied on: importing vLLM's server sets its level and its handlers'
    to ERROR (model_hosting_container_standards), which hides every other library's warnings.
    """
    library = logging.getLogger("dftserve")
    library.setLevel(logger.getEffectiveLevel())
    if not library.handlers:
        library.handlers[:] = logging.getLogger("vllm").handlers
        library.propagate = False


@contextmanager
def logged_once(consequence: str) -> Iterator[None]:
    """Suppress exceptions in the block; the first one with this consequence in a process is logged.

    For code that must not fail a request or end the server, such as statistics.
    """
    try:
        yield
    except Exception:
        if consequence not in _logged:
            _logged.add(consequence)
            logger.exception("diversity: a fault; %s", consequence)
