"""Keeps the state of preempted requests until they are resumed, possibly in another slot.

vLLM does not report why a request leaves its slot, so the state of each request with an identity is
kept for a while. It is read from the snapshot of the request's last step once that is on the host.
"""

from collections import OrderedDict, deque
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.host_copy import HostCopy

MOST = 4096
"""Maximum number of requests without a slot whose state is kept."""

State = TypeVar("State", bound=NDArray[Any])
ReadState = TypeVar("ReadState", covariant=True)


class Snapshot(Protocol[ReadState]):
    """The states of all slots after one step."""

    @property
    def copy(self) -> HostCopy: ...

    def read(self, slot: int) -> ReadState:
        """A copy of one slot's state; call it when the copy to the host is complete."""
        ...


class PreemptedStates(Generic[State]):
    """States of requests by identity, which is stable across preemptions. All states of one engine
    have the same shape and type."""

    def __init__(self) -> None:
        self._identity: dict[int, str] = {}
        self._slot: dict[str, int] = {}
        self._not_in_snapshot: dict[int, State | None] = {}
        """By slot, for requests that are in no snapshot yet: the state they resumed with."""
        self._leaving: deque[tuple[str, Snapshot[State], int]] = deque()
        self._store = _Store[State]()
        self._snapshot: Snapshot[State] | None = None

    def slot(self, identity: str) -> int | None:
        """The request's slot; None if it has none."""
        return self._slot.get(identity)

    def enter(self, slot: int, identity: str | None, produced: int) -> State | None:
        """A request enters a free slot.

        Args:
            identity: None for a request without one, whose state is not kept.
            produced: how many tokens it has already.

        Returns:
            The state with which it left its previous slot, if it has tokens and the state is kept.
        """
        if identity is None:
            return None
        resumed = None
        if produced:
            self._collect(wait=True)
            resumed = self._store.take(identity)
        self._identity[slot], self._slot[identity] = identity, slot
        self._not_in_snapshot[slot] = resumed
        return resumed

    def leave(self, slot: int) -> None:
        """The slot's request has left: it has ended, or was preempted."""
        identity = self._identity.pop(slot, None)
        if identity is None:
            return
        del self._slot[identity]
        if slot in self._not_in_snapshot:
            if (state := self._not_in_snapshot.pop(slot)) is not None:
                self._store.put(identity, state)
        elif self._snapshot is not None:
            self._leaving.append((identity, self._snapshot, slot))

    def record(self, snapshot: Snapshot[State]) -> None:
        """Keep the snapshot after a step, from which the states of requests that leave are read."""
        self._snapshot = snapshot
        self._not_in_snapshot.clear()
        self._collect(wait=False)

    def _collect(self, *, wait: bool) -> None:
        """Move the states of requests that left from snapshots to the store, to free snapshots."""
        while self._leaving:
            identity, snapshot, slot = self._leaving[0]
            if wait:
                snapshot.copy.wait()
            elif not snapshot.copy.is_there():
                break
            self._leaving.popleft()
            self._store.put(identity, snapshot.read(slot))


class _Store(Generic[State]):
    """The last `MOST` states, in one array. Thousands of small arrays of different ages would
    fragment the heap, and the memory freed between them would not be returned to the system (40 MB
    in a worker over 7,500 requests)."""

    def __init__(self) -> None:
        self._states: NDArray[Any] = np.empty(0)
        """[MOST, …], allocated with the shape and type of the first state."""
        self._index: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(MOST))

    def put(self, identity: str, state: State) -> None:
        if not len(self._states):
            self._states = np.empty((MOST, *state.shape), state.dtype)
        index = self._index.pop(identity, None)
        if index is None:
            index = self._free.pop() if self._free else self._index.popitem(last=False)[1]
        self._states[index] = state
        self._index[identity] = index

    def take(self, identity: str) -> State | None:
        """Remove a state from the store and return it; None if it is not there."""
        index = self._index.pop(identity, None)
        if index is None:
            return None
        self._free.append(index)
        return self._states[index].copy()
