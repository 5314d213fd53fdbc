"""The processes of one training, on one machine or on several, as torchrun starts them.

If one process stops with an error before the first step, all stop with it: otherwise the others
would wait for it. Before there is a process group, they communicate through torchrun's store.
"""

import functools
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import DistStoreError
from torch.distributed.rendezvous import rendezvous


def count() -> int:
    """Number of processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among those of all machines."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def may_restart() -> bool:
    """Whether torchrun restarts all processes if one has died."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def check_restarts() -> None:
    """Refuse a torchrun whose restarted processes would look for those of the first start.

    By default it keeps one store of addresses for all starts
    (github.com/pytorch/pytorch/issues/135712).

    Raises:
        ValueError: says how to start it.
    """
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun's --max-restarts: got one store of addresses for all starts, in which "
            "restarted processes find those that died; accepted: one for each start. Start it as "
            "`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --max-restarts …`, on "
            "several machines with `--rdzv-backend c10d` instead of --standalone."
        )


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank. All must make the same calls in the same order.

    Args:
        value: serialisable as JSON.

    Raises:
        RuntimeError: a process did not answer within the store's timeout of 30 minutes.
    """
    if count() == 1:
        return [value]
    store, prefix = _store(), _publish(value)
    keys = [f"{prefix}/{each}" for each in range(count())]
    _wait(store, keys)
    values = [json.loads(store.get(key)) for key in keys]
    store.set(f"{prefix}/read/{rank()}", "")
    if is_first():
        # The store may be part of this process, which must not end before all have read.
        _wait(store, [f"{prefix}/read/{each}" for each in range(count())])
    return values


def _publish(value: Any) -> str:
    """Write this process's value to the store; returns the key prefix of all processes' values."""
    prefix = f"dftserve/{next(_exchanges)}"
    _store().set(f"{prefix}/{rank()}", json.dumps(value))
    return prefix


def _wait(store: Any, keys: list[str]) -> None:
    try:
        store.wait(keys)
    except DistStoreError:
        silent = [key.rpartition("/")[2] for key in keys if not store.check([key])]
        raise RuntimeError(
            f"the processes {', '.join(silent)} did not answer for {store.timeout}; see what they "
            "wrote before."
        ) from None


@contextmanager
def together() -> Iterator[None]:
    """If one process raises an error in the block, all processes raise it.

    Raises:
        ValueError: the error of another process, which is named; a process's own error is raised
            unchanged.
    """
    own = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again, after the others are informed
        own = error
    except BaseException as error:
        # Ctrl-C, or a signal's exit: inform the others and leave without waiting for them.
        if count() > 1:
            _publish(f"{own_name()}: {type(error).__name__}")
        raise
    errors = gather(None if own is None else f"{own_name()}: {own}")
    if own is not None:
        raise own
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise ValueError(first)


def own_name() -> str:
    """The name of this process in messages."""
    return f"process {rank()} on {socket.gethostname()}"


@functools.cache
def _store() -> Any:
    """Cached, because the store may be part of the first process and must stay alive."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store


_exchanges = itertools.count()
"""Numbers the exchanges, for separate keys in the store."""


def print_once(line: str) -> None:
    """Print to standard error, in the first process only."""
    if is_first():
        print(line, file=sys.stderr, flush=True)
