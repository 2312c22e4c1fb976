"""What a VM leaves to the daemon after this one: a journal, and descriptors that the service manager keeps.

As with a function's estate, everything is taken down when it happens, so it does not matter how a daemon ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vfiouser_oob.observability.log import Logger
from vfiouser_oob.persist.journal.journal import Journal
from vfiouser_oob.persist.successor.descriptors import vm_name
from vfiouser_oob.persist.successor.things import Thing
from vfiouser_oob.systemd.fd_store import FdStore
from vfiouser_oob.transport.fds import HasFileno, OwnedFd
from vfiouser_oob.transport.listener import Listener, adopt_socket

T = TypeVar("T", bound=Thing)
#: Gives a descriptor that a process before us has left under a name; None if there is none.
Claim = Callable[[str], "OwnedFd | None"]
JOURNAL = "journal"


class Ledger:
    """What one VM leaves.

    Args:
        vm: its name.
        store: where descriptors are kept.
        journal: its records; owned from now on.
        left: what a process before us has taken down.
        claim: gives what that has kept; only until all units are opened.
        log: a logger.
    """

    def __init__(
        self, vm: str, store: FdStore, journal: Journal, left: Sequence[Thing], claim: Claim, log: Logger
    ) -> None:
        self._vm = vm
        self._store = store
        self._journal = journal
        self._left = left
        self._claim = claim
        self._log = log
        self._lost = False
        self._kept: set[str] = {self._name(JOURNAL)}

    def _name(self, part: str) -> str:
        return vm_name(self._vm, part)

    # What was left

    def left(self, kind: type[T]) -> list[T]:
        """What a process before us has taken down of one kind."""
        return [thing for thing in self._left if isinstance(thing, kind)]

    def claimed(self, part: str) -> OwnedFd | None:
        """A descriptor that a process before us has kept; it stays kept.

        Args:
            part: what it was kept as.

        Returns:
            It, owned by the caller; None if it was not kept.
        """
        name = self._name(part)
        found = self._claim(name)
        if found is not None:
            self._store.adopt(name)
            self._kept.add(name)
        return found

    def listener(self, what: str, path: Path) -> Listener | None:
        """The socket that listens somewhere, if a process before us has left it.

        Args:
            what: which of the VM's.
            path: where it has to be.
        """
        with suppress(OSError):
            status = path.lstat()
            left = self.claimed(_listener_part(what, f"{status.st_dev:x}-{status.st_ino:x}"))
            if left is not None:
                return Listener(adopt_socket(left.detach()), path)
        return None

    # What is left

    def put(self, thing: Thing) -> None:
        """Take something down."""
        try:
            self._journal.put(thing.KIND, thing.key, thing.to_record())
        except OSError as error:
            self._lose(error)

    def remove(self, thing: Thing) -> None:
        """Something is not so any more."""
        try:
            self._journal.drop(thing.KIND, thing.key)
        except OSError as error:
            self._lose(error)

    def forget(self, kind: type[Thing]) -> None:
        """Nothing of a kind is so any more."""
        try:
            self._journal.forget(kind.KIND)
        except OSError as error:
            self._lose(error)

    def keep(self, part: str, fd: HasFileno) -> None:
        """Keep a descriptor, unless it is kept already.

        Args:
            part: what it is kept as; as long as the VM lives it never means two of them.
            fd: the descriptor; it stays the caller's.
        """
        name = self._name(part)
        if name not in self._kept:
            self._store.keep(name, fd)
            self._kept.add(name)

    def drop(self, part: str) -> None:
        """Keep a descriptor no longer."""
        name = self._name(part)
        if name in self._kept:
            self._kept.remove(name)
            self._store.discard(name)

    def keep_listener(self, what: str, listener: Listener) -> None:
        """Keep a socket that listens: who connects meanwhile then waits; one that is not ours is its owner's to keep.

        Args:
            what: which of the VM's.
            listener: the socket; it stays the caller's.
        """
        if listener.identity:
            self.keep(_listener_part(what, listener.identity), listener.sock)

    def _lose(self, error: OSError) -> None:
        """What is in the journal is old from now on, so nobody must go on with it."""
        if not self._lost:
            self._lost = True
            self._store.discard(self._name(JOURNAL))
            self._log.error("a restart in a migration will fail it: nothing can be taken down", error=error.strerror)

    @property
    def usable(self) -> bool:
        """Whether another process could go on with it."""
        return not self._lost and self._name(JOURNAL) in self._store.names

    def abolish(self) -> None:
        """Nobody goes on with the VM: nothing of it is kept any more."""
        for name in self._kept:
            self._store.discard(name)
        self._kept = set()

    def close(self) -> None:
        """Close what is ours; the manager has its own."""
        self._journal.close()


def _listener_part(what: str, identity: str) -> str:
    return f"{what}.listener.{identity}"
