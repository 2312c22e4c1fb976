"""Child processes whose output goes to a file and whose death ends every wait for them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from vmbed.errors import BedError

__all__ = ["LoggedProcess", "deadline", "logged_process", "tail"]

T = TypeVar("T")

TAIL_LINES = 25
STOP_S = 10.0  # how long a peer may take to obey SIGTERM


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the end of a log for a failure message; says so when there is none."""
    if not path.is_file():
        return f"--- {path.name}: not written"
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    shown = "\n".join(text[-lines:]) or "(empty)"
    return f"--- {path.name}, last {min(lines, len(text))} of {len(text)} lines:\n{shown}"


@contextmanager
def deadline(seconds: float, what: str, *logs: Path) -> Iterator[None]:
    """Give a `with` block so many seconds, and turn their end into a `BedError` with the logs' ends.

    Args:
        seconds: the most that the block may take.
        what: what is waited for, as in "no X within 5 s".
        logs: files whose ends belong in the message.
    """
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        ends = "\n".join(tail(log) for log in logs)
        raise BedError(f"no {what} within {seconds:g} s\n{ends}")


class LoggedProcess:
    """One child process; made by `logged_process`."""

    def __init__(self, name: str, process: trio.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        return self._process.poll()

    def send_signal(self, signum: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(signum)

    async def wait(self, seconds: float = STOP_S) -> int:
        """Wait for the process to end by itself; returns its exit status."""
        with deadline(seconds, f"end of {self.name}", self.log):
            await self._process.wait()
        status = self.returncode
        assert status is not None
        return status

    async def kill(self) -> None:
        """Kill the process as a crash would: SIGKILL, then wait until it is gone."""
        if self.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """Ask the process to end (SIGTERM) and wait for it; returns its exit status."""
        if self.returncode is None:
            self._process.terminate()
        return await self.wait()

    async def gone(self, while_doing: str) -> BedError:
        """Return the error for a process that closed its connection, which it does a moment before it ends."""
        with trio.move_on_after(STOP_S):
            await self._process.wait()
        return self.died(while_doing)

    def died(self, while_doing: str) -> BedError:
        """Return the error for a process that is gone, or is not talking any more."""
        state = "is still running" if self.returncode is None else f"ended with status {self.returncode}"
        return BedError(f"{self.name} {state} ({while_doing})\n{tail(self.log)}")

    async def unless_it_ends(self, work: Callable[[], Awaitable[T]], while_doing: str) -> T:
        """Run `work`, but fail at once, with the log's end, when the process ends first."""
        done: list[T] = []

        async def watch(scope: trio.CancelScope) -> None:
            await self._process.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            done.append(await work())
            nursery.cancel_scope.cancel()
        if not done:
            raise self.died(while_doing)
        return done[0]


@asynccontextmanager
async def logged_process(
    name: str, argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None
) -> AsyncIterator[LoggedProcess]:
    """Run a program with its output in `log`; killed, and waited for, at the end.

    Args:
        name: how messages call it.
        argv: the command line.
        log: file for both stdout and stderr; appended to.
        env: set on top of this process's environment.
    """
    with log.open("ab") as sink:
        process = await trio.lowlevel.open_process(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
    logged = LoggedProcess(name, process, log)
    try:
        yield logged
    finally:
        with trio.CancelScope(shield=True):
            await logged.kill()


async def stop_keeper(keeper: LoggedProcess) -> None:
    """Ask a keeper to end, which ends its command first; a keeper that is killed leaves its command behind."""
    with trio.CancelScope(shield=True):
        await keeper.stop()
