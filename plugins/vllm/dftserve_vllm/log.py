"""The plug-in's logger, under vLLM's; the library's warnings; a guard for what may fail."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.dftserve")

_logged: set[str] = set()


def show_library_messages() -> None:
    """What `dftserve.*` logs (a kernel that fell back) is shown as vLLM's own messages are.

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
    """Whatever goes wrong in here ends here; the first time in this process it is logged.

    For what must not fail a request or end a server: statistics.
    """
    try:
        yield
    except Exception:
        if consequence not in _logged:
            _logged.add(consequence)
            logger.exception("diversity: a fault; %s", consequence)
