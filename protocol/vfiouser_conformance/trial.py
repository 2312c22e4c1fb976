"""What a case works with: connections, memory, eventfds and facts, all given back when it ends."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vfiouser_conformance import vectors, wire
from vfiouser_conformance.case import CaseFailed, NotApplicable, check, same
from vfiouser_conformance.facts import ServerFacts
from vfiouser_conformance.link import Closed, NotThere, RawLink, Transcript
from vfiouser_protocol.constants import Command, RegionIndex

if TYPE_CHECKING:
    from vfiouser_conformance.process import ServerProcess
    from vfiouser_conformance.stimulus.base import Stimulus

#: How long nothing has to come before we say that nothing comes, in seconds.
SILENCE_S = 0.1
#: A case may take so many times as long as an answer, and as long again to give everything back.
CASE_TIMEOUTS = 8
#: How often a server that is not there yet is looked for, in seconds.
_LOOK_S = 0.005
#: A server that leaves with its client is given so long for it before we connect, in seconds.
_LEAVE_S = 0.5
#: A server that is about to listen, or to take its next client: `connect` says so with these.
_NOT_YET = (errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT, errno.EINTR)


@dataclass(frozen=True, slots=True)
class Seen:
    """Which of several allowed behaviours was seen.

    Args:
        topic: where specification and implementations differ.
        value: what was seen.
        recommended: whether it is what this project recommends.
    """

    topic: str
    value: str
    recommended: bool


@dataclass(frozen=True, slots=True)
class Target:
    """The server under test, and how it is reached and stirred.

    Args:
        socket_path: of the server.
        destination_path: of a second server with a device of the same kind, to migrate to.
        timeout: how long to wait for any answer, in seconds.
        stimulus: what makes the device do things; None = nothing can.
        process: the server's process, if we start it.
    """

    socket_path: str
    destination_path: str | None = None
    timeout: float = 5.0
    stimulus: Stimulus | None = None
    process: ServerProcess | None = None


class Trial:
    """One run of one case: what the case may use, all of which is given back at the end.

    Args:
        target: what is tested.
        facts: what is known of it.
    """

    def __init__(self, target: Target, facts: ServerFacts) -> None:
        self.target = target
        self.facts = facts
        self.timeout = target.timeout
        self.transcript = Transcript()
        self.transcript.ends = self.transcript.started + CASE_TIMEOUTS * target.timeout
        self.seen: list[Seen] = []
        #: The connection of table-driven cases, for the functions of their rows.
        self.link: RawLink
        self._stack = ExitStack()
        self._links: list[RawLink] = []
        #: How many there were.
        self.connections = 0
        self._restore: list[Callable[[], object]] = []

    # Connections

    def connect(self, path: str | None = None) -> RawLink:
        """Connect without saying anything yet.

        A server may serve one client at a time, and it may exit when a client leaves: it is waited for, and started
        again if we started it.
        """
        deadline = self.transcript.deadline(self.timeout)
        self._awaken(path)
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # With a time to send, and blocking, the kernel wakes us as soon as there is room for another client.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(max(_LOOK_S, deadline - time.monotonic())))
            try:
                sock.connect(path or self.target.socket_path)
                break
            except OSError as error:
                sock.close()
                if error.errno not in _NOT_YET or time.monotonic() >= deadline:
                    raise NotThere(f"cannot connect: {error.strerror or error}") from None
            self._awaken(path)
            time.sleep(_LOOK_S)
        self.connections += 1
        link = RawLink(sock, self.transcript, self.timeout, str(self.connections))
        self._links.append(link)
        return link

    def attach(
        self, data: bytes = vectors.QEMU_CAPABILITIES, *, minor: int = 0, path: str | None = None, twin: bool = False
    ) -> RawLink:
        """Connect and negotiate.

        Args:
            data: VERSION's JSON with its NUL.
            minor: proposed minor version.
            path: the server's socket; None = the one under test.
            twin: whether a granted twin socket is taken into use.
        """
        link, reply = self.negotiate(data, minor, path)
        if twin:
            if not reply.fds:
                raise NotApplicable("the server grants no twin socket")
            link.adopt_twin(reply.fds[0])
        return link

    def negotiate(
        self, data: bytes = vectors.QEMU_CAPABILITIES, minor: int = 0, path: str | None = None
    ) -> tuple[RawLink, wire.Received]:
        """Connect and negotiate, again and again while it is the last server's end that we ran into.

        Returns:
            The connection, and the VERSION reply.
        """
        deadline = self.transcript.deadline(self.timeout)
        while True:
            link = self.connect(path)
            try:
                return link, link.ok(Command.VERSION, wire.version(data, minor=minor))
            except Closed:
                process = self.target.process
                gone = path is None and process is not None and process.left(deadline - time.monotonic())
                if not gone or time.monotonic() >= deadline:
                    raise
                self.drop(link)

    def _awaken(self, path: str | None) -> None:
        """Have a server that listens, if we start it and no client of this case keeps the last one."""
        process = self.target.process
        if process is None or path is not None or self._links:
            return
        if self.connections and process.leaves:
            process.left(min(_LEAVE_S, self.timeout))
        trouble = process.crashed() or process.ensure()
        if trouble:
            raise CaseFailed(trouble)

    def attach_with(self, members: Mapping[str, Any], *, minor: int = 0, twin: bool = False) -> RawLink:
        """Connect and negotiate with these capabilities."""
        return self.attach(wire.capabilities(members), minor=minor, twin=twin)

    def destination(self) -> str:
        """The second server's socket.

        Raises:
            NotApplicable: there is none.
        """
        if self.target.destination_path is None:
            raise NotApplicable("no second server was given (--destination-socket)")
        return self.target.destination_path

    def drop(self, link: RawLink) -> None:
        """Close a connection now."""
        self._links.remove(link)
        self._close(link)

    # Things to send

    def memfd(self, size: int, *, content: bytes = b"") -> int:
        """A file of memory that is closed with the case."""
        fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        if content:
            os.pwrite(fd, content, 0)
        return fd

    def read_only(self, fd: int) -> int:
        """The same file, opened for reading only."""
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, other)
        return other

    def eventfd(self, count: int = 0) -> int:
        """A new eventfd."""
        fd = os.eventfd(count, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stack.callback(os.close, fd)
        return fd

    def map(self, fd: int, size: int, offset: int = 0) -> mmap.mmap:
        """Map a file for reading and writing."""
        mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._stack.callback(mapped.close)
        return mapped

    def witness(self, copies: int = 1) -> Witness:
        """Descriptors to give away, of which it can be told whether the receiver has closed them all."""
        witness = Witness(copies, self.timeout)
        self._stack.callback(witness.close)
        return witness

    def locked_file(self, size: int) -> LockedFile:
        """A file of memory to give away, of which it can be told whether the receiver still has or maps it."""
        found = LockedFile(self.memfd(size), self.timeout)
        self._stack.callback(found.close)
        return found

    # The device

    @property
    def stimulus(self) -> Stimulus:
        """What makes the device do things.

        Raises:
            NotApplicable: the run has none.
        """
        if self.target.stimulus is None:
            raise NotApplicable("it needs a device that it can control (--device-profile)")
        return self.target.stimulus

    def scratch(self) -> tuple[int, int]:
        """Offset and width of a place in config space that holds what is written; it is put back afterwards."""
        if self.facts.scratch is None:
            self.facts.known("GET_INFO", "config space", "a register that holds what is written")
            raise NotApplicable("no register was found that holds what is written to it")
        return self.facts.scratch

    def read(self, link: RawLink, region: int, offset: int, count: int) -> bytes:
        """REGION_READ that has to succeed, whole."""
        reply = link.ok(Command.REGION_READ, wire.access(region, offset, count))
        same((offset, region, count), wire.ACCESS.unpack_from(reply.payload), "offset, region, count of REGION_READ")
        same(count, len(reply.payload) - 16, "bytes that REGION_READ gave")
        return reply.payload[16:]

    def write(self, link: RawLink, region: int, offset: int, data: bytes) -> None:
        """REGION_WRITE that has to succeed."""
        link.ok(Command.REGION_WRITE, wire.access(region, offset, len(data), data))

    def read_config(self, link: RawLink, offset: int, count: int) -> bytes:
        """Read config space."""
        return self.read(link, RegionIndex.CONFIG, offset, count)

    def saw(self, topic: str, value: str, *, recommended: bool) -> None:
        """Report which of several allowed behaviours was seen."""
        self.seen.append(Seen(topic, value, recommended))

    def at_end(self, action: Callable[[], object]) -> None:
        """Do something while the case's connections still exist, last thing first."""
        self._restore.append(action)

    def end(self) -> None:
        """Give everything back."""
        self.transcript.ends = time.monotonic() + CASE_TIMEOUTS * self.timeout
        try:
            while self._restore:
                self._restore.pop()()
        finally:
            for link in self._links:
                self._close(link)
            self._links.clear()
            self._stack.close()

    def _close(self, link: RawLink) -> None:
        if not link.short_errors:
            self.saw("error replies", "with a payload", recommended=False)
        link.close()


def _timeval(seconds: float) -> bytes:
    """A `struct timeval` that is not zero, which would mean for ever."""
    return struct.pack("@ll", int(seconds), max(1, int(seconds % 1 * 1_000_000)))


@dataclass(slots=True)
class Witness:
    """The writing ends of a pipe, given away; the pipe's other end tells when they are all closed.

    Args:
        copies: how many descriptors.
        timeout: how long to wait, in seconds.
    """

    copies: int
    timeout: float
    fds: Sequence[int] = ()
    _read: int = -1

    def __post_init__(self) -> None:
        self._read, first = os.pipe2(os.O_CLOEXEC)
        self.fds = [first, *(os.dup(first) for _ in range(self.copies - 1))]

    def given(self) -> None:
        """Our own copies are closed: the receiver's are the only ones."""
        for fd in self.fds:
            os.close(fd)
        self.fds = ()

    def closed(self) -> bool:
        """Whether the receiver closes all of them in time."""
        poller = select.poll()
        poller.register(self._read, 0)
        return bool(poller.poll(self.timeout * 1000))

    def check_closed(self, when: str) -> None:
        """Fail the case unless the receiver closes all of them in time."""
        self.given()
        check(self.closed(), f"the server still has a descriptor open that it should have closed {when}")

    def close(self) -> None:
        """Give everything back."""
        self.given()
        os.close(self._read)


@dataclass(slots=True)
class LockedFile:
    """A file with a lock that goes with the descriptor: it stays while the receiver has it open or mapped.

    Args:
        fd: the file; stays the caller's.
        timeout: how long to wait for its release, in seconds.
    """

    fd: int
    timeout: float
    to_give: int = -1
    _own: int = field(default=-1)

    def __post_init__(self) -> None:
        path = f"/proc/self/fd/{self.fd}"
        self.to_give = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self.to_give, fcntl.LOCK_EX)

    def given(self) -> None:
        """Our own copy is closed: the receiver's is the only one."""
        if self.to_give >= 0:
            os.close(self.to_give)
            self.to_give = -1

    def held(self) -> bool:
        """Whether the receiver has it at this moment."""
        try:
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._own, fcntl.LOCK_UN)
        return False

    def check_released(self, when: str) -> None:
        """Fail the case unless the receiver has closed and unmapped it in time."""
        self.given()
        poller = select.poll()
        for _ in range(max(1, int(self.timeout * 100))):
            if not self.held():
                return
            poller.poll(10)
        raise CaseFailed(f"the server still has a file open or mapped that it should have released {when}")

    def close(self) -> None:
        """Give everything back."""
        self.given()
        os.close(self._own)


def signalled(fd: int, timeout: float) -> int:
    """The count of an eventfd once it is signalled; 0 if it is not, in time."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(timeout * 1000):
        return 0
    data = os.read(fd, 8)
    return int(struct.unpack("=Q", data)[0])
