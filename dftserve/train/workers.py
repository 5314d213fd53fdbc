"""The processes that read a run's batches, where the setting `workers` is above 0.

A signal may reach all processes of a run at once, as from a job scheduler or from `timeout`. The
run then finishes its step and saves (`trainer.StopOnSignal`). For that it needs its workers: torch
ends a run with an error as soon as one of them has died.
"""

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


def end_with_the_run(loader: Any) -> None:
    """Let a DataLoader's workers end only by a SIGTERM from the run's own process, or after it.

    Args:
        loader: torch's, or accelerate's wrapper of one.
    """
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(_start, inner.worker_init_fn)


def _start(initialise: Callable[[int], None] | None, number: int) -> None:
    if initialise is not None:
        initialise(number)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_run_asks, daemon=True).start()


def _end_when_the_run_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
