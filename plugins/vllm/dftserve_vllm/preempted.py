"""What each request had in its slot as it was preempted, for when it comes back to one.

vLLM does not say why a request leaves its slot, so that of each which has a name is kept a while.
It is read out of the snapshot of its last step, when that is there.
"""

from collections import OrderedDict, deque
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dftserve.sampling.host_copy import HostCopy

MOST = 4096
"""Requests that are out of their slots and whose state is kept."""

State = TypeVar("State", bound=NDArray[Any])
ReadState = TypeVar("ReadState", covariant=True)


class Snapshot(Protocol[ReadState]):
    """All slots' states after one step."""

    @property
    def copy(self) -> HostCopy: ...

    def read(self, slot: int) -> ReadState:
        """One slot's state, in memory of its own; after the copy is there."""
        ...


class Preempted(Generic[State]):
    """States of requests by identity, which names a request across preemptions. Those of one
    engine have one shape and type."""

    def __init__(self) -> None:
        self._identity: dict[int, str] = {}
        self._slot: dict[str, int] = {}
        self._unseen: dict[int, State | None] = {}
        """Of slots whose request is in no snapshot yet: the state it came back with."""
        self._leaving: deque[tuple[str, Snapshot[State], int]] = deque()
        self._kept = _Kept[State]()
        self._snapshot: Snapshot[State] | None = None

    def slot(self, identity: str) -> int | None:
        """Where the request is."""
        return self._slot.get(identity)

    def enter(self, slot: int, identity: str | None, produced: int) -> State | None:
        """A request enters a slot, which is free.

        Args:
            identity: None for a request without one, of which nothing is kept.
            produced: its tokens that are there already.

        Returns:
            Its state as it left its slot before, where it had tokens then.
        """
        if identity is None:
            return None
        resumed = None
        if produced:
            self._collect(wait=True)
            resumed = self._kept.take(identity)
        self._identity[slot], self._slot[identity] = identity, slot
        self._unseen[slot] = resumed
        return resumed

    def leave(self, slot: int) -> None:
        """The slot's request has left it: it has ended, or was preempted."""
        identity = self._identity.pop(slot, None)
        if identity is None:
            return
        del self._slot[identity]
        if slot in self._unseen:
            if (state := self._unseen.pop(slot)) is not None:
                self._kept.put(identity, state)
        elif self._snapshot is not None:
            self._leaving.append((identity, self._snapshot, slot))

    def saw(self, snapshot: Snapshot[State]) -> None:
        """After a step."""
        self._snapshot = snapshot
        self._unseen.clear()
        self._collect(wait=False)

    def _collect(self, *, wait: bool) -> None:
        """Take what left its slot out of the snapshots, so that these can go."""
        while self._leaving:
            identity, snapshot, slot = self._leaving[0]
            if wait:
                snapshot.copy.wait()
            elif not snapshot.copy.is_there():
                break
            self._leaving.popleft()
            self._kept.put(identity, snapshot.read(slot))


class _Kept(Generic[State]):
    """The last `MOST` states that were put, in one array: thousands of small ones, each as old as
    another request, would lie scattered over the heap, so that what is freed between them could
    not be given back (40 MB of a worker over 7,500 requests)."""

    def __init__(self) -> None:
        self._states: NDArray[Any] = np.empty(0)
        """[MOST, …] once there is a state, whose shape and type it has."""
        self._place: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(MOST))

    def put(self, identity: str, state: State) -> None:
        if not len(self._states):
            self._states = np.empty((MOST, *state.shape), state.dtype)
        place = self._place.pop(identity, None)
        if place is None:
            place = self._free.pop() if self._free else self._place.popitem(last=False)[1]
        self._states[place] = state
        self._place[identity] = place

    def take(self, identity: str) -> State | None:
        """A state, which is no longer kept."""
        place = self._place.pop(identity, None)
        if place is None:
            return None
        self._free.append(place)
        return self._states[place].copy()
