"""Descriptors that outlive this process: the service manager keeps them, and gives them to the next one.

The manager's part is that of sd_notify(3): FDSTORE=1 keeps a descriptor under a name, FDSTOREREMOVE=1 gives it up, and
when the service is started again they come behind the sockets of its units (`listen`). `vfiouser-oob keep` plays the
same part.

Rule 1: *a name stands for one descriptor.* What is kept twice under one name is kept until it was dropped twice.
        systemd keeps one open file once, under the first name that it hears, so what several functions share needs one
        name.
Rule 2: *nothing tells that a descriptor was not kept*: not permitted (NotifyAccess=), not wanted
        (FileDescriptorStoreMax=0, the default), or full. So we ask by a descriptor of which we can see whether the
        manager has closed it; that one comes last, so what came before it has been kept.
Rule 3: *names have little room*. The next process gets all of them in one variable, which the kernel limits to 128 KiB;
        a service whose variable is longer cannot be started at all. So what does not fit is not kept.
Rule 4: *nobody waits for the manager* but who asks by `barrier` or `check`, and they wait as long as they want to.
"""

from __future__ import annotations

import os
import select
from collections import Counter
from collections.abc import Mapping

import trio

from vfiouser_oob.observability import log
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.transport.fds import HasFileno, OwnedFd

#: What says how many descriptors are kept for us at most: systemd 254 and later, or the unit for an older one.
LIMIT_VARIABLE = "FDSTORE"
#: What systemd (248 and later) says which process it has started itself.
STARTED_VARIABLE = "SYSTEMD_EXEC_PID"
MAX_NAME = 255
#: What the names of our descriptors begin with, to tell them from sockets that units have opened.
PREFIX = "vfu/"
#: Bytes of all names together, each with a colon; the rest of 128 KiB is for sockets of units.
MAX_NAMES_SIZE = 120_000
_PROBE = f"{PREFIX}probe"
#: Seconds after a barrier within which a manager closes what it has not kept; newer ones do so in a thread.
_CLOSED_S = 0.1


class StoreLost(Exception):
    """What should be kept did not reach the service manager; the text says how much of it."""


class FdStore:
    """Keeps descriptors at the service manager.

    Args:
        mailbox: of the manager; somebody runs it.
        limit: how many it keeps at most; None if it does not say.
        offered: whether there is a reason to expect that it keeps any.
    """

    def __init__(self, mailbox: Mailbox, limit: int | None = None, *, offered: bool = True) -> None:
        self._mailbox = mailbox
        self._limit = limit
        self._offered = offered
        self._uses: Counter[str] = Counter()
        self._names_size = 0
        self._refused: set[str] = set()
        self._log = log.get("systemd.fd-store")
        self._said = False
        self._checks = 0
        self._lost = mailbox.lost

    @classmethod
    def from_environment(cls, mailbox: Mailbox, environ: Mapping[str, str] = os.environ) -> FdStore:
        """The store of the manager that started us.

        Only systemd and who says a limit are expected to keep anything: other managers that listen for our readiness
        need not understand more than that.

        Args:
            mailbox: of the manager.
            environ: the environment that may say its limit, or that it is systemd.
        """
        text = environ.get(LIMIT_VARIABLE, "")
        limit = int(text) if text.isdecimal() and len(text) < 10 else None
        return cls(mailbox, limit, offered=limit is not None or environ.get(STARTED_VARIABLE) == str(os.getpid()))

    @property
    def names(self) -> frozenset[str]:
        """What is kept, as far as we know."""
        return frozenset(self._uses) - self._refused

    @property
    def offered(self) -> bool:
        """Whether there is somebody who may keep descriptors."""
        return self._offered and self._mailbox.address is not None

    async def run(self) -> None:
        """Send what the manager did not take at once, until cancelled."""
        await self._mailbox.run()

    @property
    def limit(self) -> int | None:
        """How many descriptors are kept at most, if the manager says so."""
        return self._limit

    def keep(self, name: str, fd: HasFileno, *, watched: bool = False) -> None:
        """Keep a descriptor; unless this name is kept already, then it only has one use more.

        Args:
            name: begins with `PREFIX`; printable ASCII without a colon, 255 characters at most.
            fd: the descriptor; it stays the caller's and may be closed at once.
            watched: whether the manager may drop it when its peer hangs up.

        Raises:
            ValueError: the name is none.
        """
        if not is_name(name):
            raise ValueError(f"{name!r} cannot be the name of a kept descriptor")
        if self._uses[name]:
            self._uses[name] += 1
            return
        self._add(name, 1)
        if self._names_size > MAX_NAMES_SIZE:
            self._refused.add(name)
            self._say(
                "a restart would lose clients: there is no room for the names of what the daemon must keep",
                MAX_NAMES_SIZE,
            )
            return
        if self._limit is not None and len(self._uses) > self._limit:
            self._say(
                "a restart would lose clients: systemd keeps too few descriptors (FileDescriptorStoreMax=)", self._limit
            )
        poll = "" if watched else "\nFDPOLL=0"
        self._mailbox.send(f"FDSTORE=1\nFDNAME={name}{poll}".encode(), (fd,))

    def drop(self, name: str) -> None:
        """Give up one use of a name; with the last one the descriptor is kept no more.

        Args:
            name: what it was kept as; one that is not kept is left alone.
        """
        if self._uses[name] > 1:
            self._uses[name] -= 1
        elif self._uses[name]:
            self.discard(name)
        else:
            del self._uses[name]

    def adopt(self, name: str, uses: int = 1) -> None:
        """Know of a descriptor that the manager has kept since another process.

        Args:
            name: what it is kept as.
            uses: by how many it will be dropped.
        """
        self._add(name, uses)

    def discard(self, name: str) -> None:
        """Give up a name, however many uses it has.

        Args:
            name: what it is kept as; also what came from another process and nobody uses.
        """
        if self._uses.pop(name, 0):
            self._names_size -= len(name) + 1
        if name in self._refused:
            self._refused.discard(name)
        else:
            self._mailbox.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())

    def _add(self, name: str, uses: int) -> None:
        if not self._uses[name]:
            self._names_size += len(name) + 1
        self._uses[name] += uses

    def _say(self, event: str, limit: int) -> None:
        """Say once what is too little."""
        if not self._said:
            self._said = True
            self._log.warning(event, limit=limit, descriptors=len(self._uses))

    async def barrier(self) -> None:
        """Wait until the manager has done everything that was asked of it.

        Raises:
            StoreLost: some of that, since the last barrier, did not reach it.
        """
        if self._mailbox.address is None:
            raise StoreLost("no service manager keeps descriptors here")
        reader, writer = _pipe()
        with reader:
            with writer:
                self._mailbox.send(b"BARRIER=1", (writer,))
            await _hung_up(reader)
        before, self._lost = self._lost, self._mailbox.lost
        if self._lost != before:
            raise StoreLost(f"{self._lost - before} messages did not reach the service manager")

    async def check(self) -> bool:
        """Find out whether the manager has kept everything so far; takes a moment.

        Returns:
            Whether it has, and would keep one more.

        Raises:
            StoreLost: some of it did not reach it.
        """
        if self._refused:
            return False
        self._checks += 1
        name = f"{_PROBE}-{self._checks}"
        reader, writer = _pipe()
        with reader:
            with writer:
                self._mailbox.send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode(), (writer,))
            try:
                await self.barrier()
                with trio.move_on_after(_CLOSED_S):
                    await _hung_up(reader)
                    return False
            finally:
                self._mailbox.send(f"FDSTOREREMOVE=1\nFDNAME={name}".encode())
        return True


def is_name(text: str) -> bool:
    """Whether something can be the name of a kept descriptor, by systemd's rules and ours."""
    return (
        text.startswith(PREFIX) and len(text) <= MAX_NAME and text.isascii() and text.isprintable() and ":" not in text
    )


def _pipe() -> tuple[OwnedFd, OwnedFd]:
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    return OwnedFd(reader), OwnedFd(writer)


async def _hung_up(reader: OwnedFd) -> None:
    """Wait until nobody has the other end of a pipe any more; nobody ever writes to it."""
    poll = select.poll()
    poll.register(reader.fileno(), 0)
    while True:
        await trio.lowlevel.wait_readable(reader.fileno())
        if poll.poll(0):
            return
