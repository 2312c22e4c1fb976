"""Our own sub-commands as real separate processes: started, awaited until ready, and always cleaned up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import trio

from vfiouser_oob.client.nursery import background_nursery
from vfiouser_protocol.errors import VfioUserError

#: A process that was just started imports some hundred modules; on a busy machine that takes seconds.
READY_TIMEOUT_S = 60.0
#: How long a process may take to end after SIGTERM before it is killed.
STOP_TIMEOUT_S = 5.0
#: How long to wait, after a failure, for the news that one of the processes has died.
_BLAME_TIMEOUT_S = 1.0
_READY = b"READY=1"
#: Variables that systemd gives to one process only; a child must not take them for its own.
_NOT_INHERITED = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


class ChildFailed(Exception):
    """A process ended, or did not become ready, when it should be serving."""


class Process(Protocol):
    """What is needed of a process: the part of `trio.Process` that is used here."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""

    def poll(self) -> int | None:
        """Look whether it has ended, and return how."""

    async def wait(self) -> int:
        """Wait until it has ended, and return how."""

    def send_signal(self, sig: signal.Signals) -> None:
        """Send a signal, unless it has ended."""

    def terminate(self) -> None:
        """Send SIGTERM."""

    def kill(self) -> None:
        """Send SIGKILL."""


class Child:
    """A running process.

    Args:
        name: what to call it in messages.
        process: the process.
        log: the file that takes its output.
    """

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def last_words(self) -> str:
        """The last line of its output."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "nothing"

    def died(self) -> ChildFailed:
        """The error that says how the process ended, or that it is not ready."""
        status = self.process.returncode
        if status is not None and status < 0:
            return ChildFailed(f"{self.name} was killed by {signal.Signals(-status).name}")
        how = "did not become ready" if status is None else f"ended with status {status}"
        return ChildFailed(f"{self.name} {how}; it last said: {self.last_words()}")


@asynccontextmanager
async def running(name: str, arguments: Sequence[str], directory: Path) -> AsyncIterator[Child]:
    """Run one of our sub-commands until the block ends; the block begins when it is ready, as systemd sees
    it.

    Args:
        name: what to call it.
        arguments: the sub-command and its options.
        directory: for its log and the socket on which it reports.

    Raises:
        ChildFailed: it ended or did not become ready in time.
    """
    async with running_command(name, [sys.executable, "-m", "vfiouser_oob", *arguments], directory) as child:
        yield child


@asynccontextmanager
async def running_command(
    name: str, command: Sequence[str], directory: Path, *, pass_fds: Sequence[int] = ()
) -> AsyncIterator[Child]:
    """Run any command that reports its readiness as systemd's services do; see `running`.

    Args:
        name: what to call it.
        command: the program and its arguments.
        directory: for its log and the socket on which it reports.
        pass_fds: descriptors that it inherits.
    """
    log = directory / f"{name}.log"
    with _NotifySocket(directory / f"{name}.notify") as notify, log.open("wb") as output:
        environ = _environment({"NOTIFY_SOCKET": str(notify.path)})
        process = await start_process(command, environ, output.fileno(), pass_fds)
        child = Child(name, process, log)
        try:
            await _await_ready(child, notify)
            yield child
        finally:
            await stop(child)


async def start_process(
    command: Sequence[str], environ: Mapping[str, str], output: int, pass_fds: Sequence[int]
) -> Process:
    """Start a process that reads nothing.

    Args:
        command: the program and its arguments.
        environ: its whole environment.
        output: descriptor that takes its output.
        pass_fds: descriptors that it inherits.
    """
    return await trio.lowlevel.open_process(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environ,
        pass_fds=list(pass_fds),
        # Ctrl-C on a terminal goes to its whole process group; only we shall get it, and end the others in order.
        start_new_session=True,
    )


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    # The child finds our packages where we found them, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return {**environment, **extra}


async def _await_ready(child: Child, notify: _NotifySocket) -> None:
    async def watch() -> None:
        await child.process.wait()
        nursery.cancel_scope.cancel()

    ready = False
    with trio.move_on_after(READY_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await notify.wait_ready()
            ready = True
            nursery.cancel_scope.cancel()
    if not ready:
        raise child.died()


async def stop(child: Child) -> None:
    """End a process: SIGTERM, and SIGKILL when it does not go; cancellation does not interrupt this."""
    process = child.process
    with trio.CancelScope(shield=True):
        if process.poll() is None:
            process.terminate()
            with trio.move_on_after(STOP_TIMEOUT_S):
                await process.wait()
        if process.poll() is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def blaming(children: Sequence[Child]) -> AsyncIterator[None]:
    """Let an error of the block pass, unless one of the processes has died: that is the cause, and tells
    more.

    Raises:
        ChildFailed: the block failed, and a process had ended.
    """
    try:
        yield
    except (VfioUserError, OSError, ChildFailed, ExceptionGroup):
        with trio.move_on_after(_BLAME_TIMEOUT_S):
            async with background_nursery() as nursery:
                for child in children:
                    nursery.start_soon(watch, child)
                await trio.sleep_forever()
        raise


async def watch(child: Child) -> None:
    """Wait until a process ends, which it should not.

    Raises:
        ChildFailed: it has.
    """
    await child.process.wait()
    raise child.died()


class _NotifySocket:
    """The service manager's end of sd_notify(3).

    Args:
        path: where to listen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._sock.bind(os.fspath(path))

    async def wait_ready(self) -> None:
        """Wait for READY=1."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            if _READY in self._sock.recv(4096).split(b"\n"):
                return

    def __enter__(self) -> _NotifySocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
        self.path.unlink(missing_ok=True)
