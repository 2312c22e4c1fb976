"""The keeper at work: a socket, a child, and what the child gave it to keep.

    child ──FDSTORE──► socket ──► store ──LISTEN_FDS──► next child

Rule 1: *only the child is heard*, by the credentials that the kernel adds to each message.
Rule 2: *all that a child has said is read before the next one is started*: it may have said something with its last
        breath.
Rule 3: *what is kept belongs to others*, so it is closed by the reaper, and only sockets are asked for anything.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.keeper.handover import environment, start
from vfiouser_oob.keeper.lives import STARTS, Ending, Lives
from vfiouser_oob.keeper.store import MAX_MESSAGE, KeeperLimits, Kept, Store
from vfiouser_oob.observability import log
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.transport.fds import ForeignFd, OwnedFd, close_fds
from vfiouser_oob.transport.reaper import Account

_CREDENTIALS = struct.Struct("iII")
_ANCILLARY_SIZE = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
#: Messages read in a row before anything else gets its turn.
_TURN = 64
#: As many times when a child has ended: a socket holds fewer messages, and somebody else may send more meanwhile.
_LAST_TURNS = 64
_HUNG_UP = select.POLLHUP | select.POLLERR | select.POLLNVAL
#: Signals that end the keeper with the daemon, that restart the daemon, and that are the daemon's.
STOP = (signal.SIGTERM, signal.SIGINT)
RESTART = (signal.SIGUSR2,)
PASSED_ON = (signal.SIGHUP, signal.SIGUSR1)


class Keeper:
    """Starts a command, and starts it again with what it has given to be kept.

    Args:
        command: program and arguments.
        address: path of the socket on which it hears the command's messages.
        limits: what is kept at most.
        stop_s: seconds that the command has to end when it is told to, before it is killed.
        inherited: sockets that we were given for it, by name; taken.
        environ: ours.
        most_starts: so many within ten seconds, and the command is given up.
    """

    def __init__(
        self,
        command: Sequence[str],
        address: Path,
        limits: KeeperLimits,
        stop_s: float,
        inherited: Sequence[tuple[str, OwnedFd]] = (),
        environ: Mapping[str, str] = os.environ,
        most_starts: int = STARTS,
    ) -> None:
        self._command = tuple(command)
        self._limits = limits
        self._stop_s = stop_s
        self._inherited = [(name, fd.take()) for name, fd in inherited]
        self._environ = environ
        self._address = address
        self._above = Mailbox(environ.get("NOTIFY_SOCKET") or None)
        self._log = log.get("keeper")
        self._noise = log.RateLimited(self._log)
        self._account = Account("kept")
        self._store: Store[ForeignFd] = Store(limits)
        self._lives = Lives(most_starts)
        self._child = 0
        self._stopping = self._restarting = False
        self._killing: trio.CancelScope | None = None
        self._sock = _listen(address)

    async def run(self) -> int:
        """Keep until the command has ended for good; returns the exit code."""
        with trio.open_signal_receiver(*STOP, *RESTART, *PASSED_ON) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._above.run)
                nursery.start_soon(self._listen_to_signals, signals, nursery)
                nursery.start_soon(self._listen)
                code = await self._live()
                nursery.cancel_scope.cancel()
        return code

    async def _live(self) -> int:
        while True:
            self._restarting = False
            self._start()
            ending = await self._ended()
            self._child = 0
            now = time.monotonic()
            verdict = self._lives.after(ending, now, stopping=self._stopping, restarting=self._restarting)
            if verdict.code is not None:
                if verdict.reason is not None:
                    self._log.error("the command is not started again", reason=verdict.reason)
                return verdict.code
            self._log.warning("the command is started again", ended=str(ending), descriptors=len(self._store))

    def _start(self) -> None:
        self._let_go_of_the_dead()
        given = [*self._inherited, *((kept.name, kept.handle) for kept in self._store)]
        names = [name for name, _ in given]
        environ = environment(self._environ, names, str(self._address), self._limits.descriptors)
        self._lives.started(time.monotonic())
        self._child = start(self._command, [fd for _, fd in given], environ)
        self._log.info("started", pid=self._child, descriptors=len(given))

    async def _ended(self) -> Ending:
        """Wait for the child, and read everything that it has said."""
        pid = self._child
        with OwnedFd(os.pidfd_open(pid)) as process:
            await trio.lowlevel.wait_readable(process.fileno())
        for _ in range(_LAST_TURNS):
            if not self._take_some():
                break
            await trio.lowlevel.checkpoint()
        if self._killing is not None:
            self._killing.cancel()
        return _reaped(pid)

    # What it is told

    async def _listen_to_signals(self, signals: Any, nursery: trio.Nursery) -> None:
        async for number in signals:
            self._log.info("signal", signal=signal.Signals(number).name)
            if number in PASSED_ON:
                self._signal(number)
                continue
            self._stopping = self._stopping or number in STOP
            self._restarting = True
            self._signal(signal.SIGTERM)
            nursery.start_soon(self._kill_later, self._child)

    async def _kill_later(self, child: int) -> None:
        with trio.CancelScope() as self._killing:
            await trio.sleep(self._stop_s)
            if child == self._child:
                self._log.warning("the command did not end in time and was killed", pid=child, waited_s=self._stop_s)
                self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # The child is not waited for before its end was noticed, so its number is nobody else's.
        if self._child:
            os.kill(self._child, number)

    async def _listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            self._take_some()

    def _take_some(self) -> bool:
        """Read messages, a turn's worth; returns whether there may be more."""
        for _ in range(_TURN):
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(MAX_MESSAGE + 1, _ANCILLARY_SIZE, _RECEIVE)
            except BlockingIOError:
                return False
            except OSError as error:  # what one sender did is no reason to hear no other
                self._noise.warning("a message could not be read", error=error.strerror)
                return False
            self._take(data, ancillary, flags)
        return True

    def _take(self, data: bytes, ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> None:
        pid = uid = -1
        fds: list[ForeignFd] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, uid, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
            elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = memoryview(content)[: len(content) - len(content) % 4]
                fds += [ForeignFd(number, self._account) for number in whole.cast("i")]
        if pid != self._child or not self._child:
            close_fds(fds)
            self._noise.warning("ignored a message from an unknown process", pid=pid, uid=uid)
            return
        if flags & socket.MSG_CTRUNC:
            close_fds(fds)
            self._noise.warning("ignored a message: some of its descriptors were lost (LimitNOFILE=)")
            return
        outcome = self._store.take(data, fds)
        close_fds(outcome.released)
        if outcome.refused is not None:
            self._noise.warning("the command asked for something that the keeper does not do", asked=outcome.refused)
        lines = [f"{key}={value}" for key, value in outcome.forwarded.items() if key != "STOPPING" or self._stopping]
        if lines:
            self._above.send("\n".join(lines).encode())

    # What it keeps

    def _let_go_of_the_dead(self) -> None:
        """Give up sockets whose peer has hung up: the next child could do nothing with them."""
        poll = select.poll()
        sockets: dict[int, Kept[ForeignFd]] = {}
        for kept in self._store:
            if kept.watched and _is_socket(kept.handle):
                sockets[kept.handle.fileno()] = kept
                poll.register(kept.handle.fileno(), 0)
        gone = [sockets[number] for number, events in poll.poll(0) if events & _HUNG_UP]
        close_fds(self._store.release(gone))

    def close(self) -> None:
        """Close everything, and remove the socket."""
        close_fds(self._store.release(tuple(self._store)))
        close_fds(fd for _, fd in self._inherited)
        self._above.close()
        self._sock.close()
        with suppress(OSError):
            self._address.unlink()


def _reaped(pid: int) -> Ending:
    """How a child ended; it has."""
    _, status = os.waitpid(pid, 0)
    return Ending.of(status)


def _is_socket(fd: OwnedFd) -> bool:
    """Whether a descriptor is a socket; the kernel answers, whoever owns it."""
    return os.readlink(f"/proc/self/fd/{fd.fileno()}").startswith("socket:")


def _listen(address: Path) -> socket.socket:
    """Make the socket for the command's messages.

    Raises:
        ConfigError: that is not possible.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(address.lstat().st_mode) and not _is_used(address):
                address.unlink()
        sock.bind(str(address))
        address.chmod(0o600)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{address}: {error.strerror}", "--socket") from error
    return sock


def _is_used(address: Path) -> bool:
    """Whether somebody listens there, or whether a keeper before us left it behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(address))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
