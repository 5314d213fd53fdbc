"""What each request had in its slot as it was preempted, for when it comes back to one.

vLLM does not say why a request leaves its slot, so that of each which has a name is kept a while.
It is read out of the snapshot of its last step, when that is there.
"""

from collections import OrderedDict, deque
from typing import Generic, Protocol, TypeVar

from dftserve.sampling.host_copy import HostCopy

MOST = 4096
"""Requests that are out of their slots and whose state is kept."""

State = TypeVar("State")
ReadState = TypeVar("ReadState", covariant=True)


class Snapshot(Protocol[ReadState]):
    """All slots' states after one step."""

    @property
    def copy(self) -> HostCopy: ...

    def read(self, slot: int) -> ReadState:
        """One slot's state, in memory of its own; after the copy is there."""
        ...


class Preempted(Generic[State]):
    """States of requests by identity, which names a request across preemptions."""

    def __init__(self) -> None:
        self._identity: dict[int, str] = {}
        self._slot: dict[str, int] = {}
        self._unseen: dict[int, State | None] = {}
        """Of slots whose request is in no snapshot yet: the state it came back with."""
        self._leaving: deque[tuple[str, Snapshot[State], int]] = deque()
        self._kept: OrderedDict[str, State] = OrderedDict()
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
            resumed = self._kept.pop(identity, None)
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
                self._keep(identity, state)
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
            self._keep(identity, snapshot.read(slot))

    def _keep(self, identity: str, state: State) -> None:
        self._kept[identity] = state
        while len(self._kept) > MOST:
            self._kept.popitem(last=False)
