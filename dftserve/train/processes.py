"""The processes of one training, on one machine or on several, as torchrun starts them.

If one process stops with an error before the first step, all stop with it: one that ended alone
would leave the others waiting for it. They talk through the store that torchrun made for them,
before there is a process group.
"""

import functools
import itertools
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import DistStoreError
from torch.distributed.rendezvous import rendezvous


def count() -> int:
    """Of all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among those of all machines."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def may_restart() -> bool:
    """Whether torchrun starts all processes again where one has died."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def check_restarts() -> None:
    """Refuse a torchrun whose second start would look for the processes of its first one.

    It keeps one store of addresses for all starts (github.com/pytorch/pytorch/issues/135712),
    unless it is told not to.

    Raises:
        ValueError: says how to start it.
    """
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun's --max-restarts: got one store of addresses for all starts, where processes "
            "that are started again find those that died; accepted: one for each start. Start it "
            "as `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --max-restarts …`, on "
            "several machines with `--rdzv-backend c10d` in place of --standalone."
        )


def gathered(value: Any) -> list[Any]:
    """What each process gives, by rank. All must ask, in the same order.

    Args:
        value: as JSON takes it.

    Raises:
        RuntimeError: a process said nothing until the store's time was up, which is 30 minutes.
    """
    if count() == 1:
        return [value]
    store, place = _store(), _tell(value)
    keys = [f"{place}/{each}" for each in range(count())]
    _wait(store, keys)
    values = [json.loads(store.get(key)) for key in keys]
    store.set(f"{place}/read/{rank()}", "")
    if is_first():
        # It may hold the store, and must not end before all have read.
        _wait(store, [f"{place}/read/{each}" for each in range(count())])
    return values


def _tell(value: Any) -> str:
    """Where in the store each process says the next thing; this one has said it."""
    place = f"dftserve/{next(_places)}"
    _store().set(f"{place}/{rank()}", json.dumps(value))
    return place


def _wait(store: Any, keys: list[str]) -> None:
    try:
        store.wait(keys)
    except DistStoreError:
        silent = [key.rpartition("/")[2] for key in keys if not store.check([key])]
        raise RuntimeError(
            f"the processes {', '.join(silent)} said nothing for {store.timeout}; see what they "
            "wrote before."
        ) from None


@contextmanager
def together() -> Iterator[None]:
    """An error of one process is every process's.

    Raises:
        ValueError: another process's, which is named; a process's own is raised as it is.
    """
    own = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again, once it is told
        own = error
    except BaseException as error:
        # Ctrl-C, or a signal's exit: said to the others, and left at once.
        if count() > 1:
            _tell(f"{named()}: {type(error).__name__}")
        raise
    told = gathered(None if own is None else f"{named()}: {own}")
    if own is not None:
        raise own
    first = next((error for error in told if error is not None), None)
    if first is not None:
        raise ValueError(first)


def named() -> str:
    """This process, as others call it."""
    return f"process {rank()} on {socket.gethostname()}"


@functools.cache
def _store() -> Any:
    """Kept: the first process may be where it is."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store


_places = itertools.count()
"""In the store, for each time that something is told."""
