"""dftserve for vLLM: a `diversity` field per request. Install, restart, done.

vLLM loads this through two entry points: `processor:DiversityProcessor` (the logits processor, in
every worker) and `register` (the field, its answer and its metrics, in every process).
"""

import os


def is_disabled() -> bool:
    """`DFTSERVE_DISABLE=1` makes everything inert, as if the plug-in were not installed."""
    return os.environ.get("DFTSERVE_DISABLE", "") not in ("", "0")


def register() -> None:
    """vLLM's general plug-in: nothing is imported from vLLM before vLLM imports it itself."""
    from dftserve_vllm import log

    if is_disabled():
        log.logger.info("dftserve is disabled: DFTSERVE_DISABLE is set")
        return
    from dftserve_vllm import hooks

    log.show_library_messages()
    hooks.install()
