"""The side of the tests: ask for a program, and hold what came of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio

from forkserver.wire import REPORT, Request
from vfiouser_oob.lab.demo import children
from vfiouser_oob.lab.demo.children import Process

#: Seconds for the server's imports, on a machine that has other things to do.
_START_S = 60.0


@dataclass
class _Server:
    """The fork server of this process; started for the first program that is asked for.

    Args:
        requests: where it takes requests.
        process: the server.
    """

    requests: socket.socket
    process: subprocess.Popen[bytes]
    owner: int = field(default_factory=os.getpid)

    @classmethod
    def start(cls) -> _Server:
        """Start one; it ends with its socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "forkserver.server", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        server = cls(ours, process)
        atexit.register(server.stop)
        return server

    def stop(self) -> None:
        """Let it end."""
        if os.getpid() == self.owner:
            self.requests.close()
            self.process.wait(_START_S)


#: Before tests put ours in its place.
_start_process = children.start_process
_server: list[_Server] = []


def fork_program(
    module: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stdout: int,
    stderr: int,
    stdin: int | None = None,
    pass_fds: Sequence[int] = (),
) -> Forked:
    """Run a module as ``python -m`` does, in a session of its own.

    Args:
        module: the module.
        arguments: its arguments.
        env: its whole environment.
        stdout: descriptor; stays the caller's, as all of them do.
        stderr: descriptor.
        stdin: descriptor; None = nothing to read.
        pass_fds: more descriptors, which it has under the same numbers.
    """
    if not _server:
        _server.append(_Server.start())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack:
        stack.enter_context(theirs)
        if stdin is None:
            stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, stdin)
        request = Request(
            module=module, arguments=arguments, environ=env, cwd=os.getcwd(), numbers=[0, 1, 2, *pass_fds]
        )
        fds = [stdin, stdout, stderr, *pass_fds, theirs.fileno()]
        socket.send_fds(_server[0].requests, [request.encode()], fds)
    ours.settimeout(_START_S)
    (pid,) = REPORT.unpack(ours.recv(REPORT.size))
    ours.setblocking(False)
    return Forked(pid, ours)


async def start_process(
    command: Sequence[str], environ: Mapping[str, str], output: int, pass_fds: Sequence[int]
) -> Process:
    """Stand in for `vfiouser_oob.lab.demo.children.start_process`; what is none of our programs is started as ever.

    Args:
        command: the program and its arguments.
        environ: its whole environment.
        output: descriptor that takes its output.
        pass_fds: descriptors that it inherits.
    """
    interpreter, option, module, *arguments = command
    if (interpreter, option) != (sys.executable, "-m"):
        return await _start_process(command, environ, output, pass_fds)
    return AsyncForked(fork_program(module, arguments, env=environ, stdout=output, stderr=output, pass_fds=pass_fds))


class Forked:
    """A program that was forked.

    Args:
        pid: its process.
        report: tells how it ended.
    """

    def __init__(self, pid: int, report: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._report = report

    def poll(self) -> int | None:
        """How it ended, as `subprocess.Popen` says it; None while it runs."""
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                (self.returncode,) = REPORT.unpack(self._report.recv(REPORT.size))
                self._report.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Args:
            timeout: seconds; None = as long as it takes.

        Raises:
            subprocess.TimeoutExpired: it runs still.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._report], [], [], left)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            # It is not reaped before the server has told us, or is about to: then nobody else has its number yet.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def wait_readable(self) -> None:
        """Wait under trio until `poll` has something new to say."""
        if self.returncode is None:
            await trio.lowlevel.wait_readable(self._report)


class AsyncForked:
    """A program that was forked, for those that run under trio.

    Args:
        forked: the program.
    """

    def __init__(self, forked: Forked) -> None:
        self.pid = forked.pid
        self._forked = forked
        self.poll = forked.poll
        self.send_signal = forked.send_signal
        self.terminate = forked.terminate
        self.kill = forked.kill

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return self._forked.poll()

    async def wait(self) -> int:
        """Wait until it has ended, and return how."""
        while (code := self._forked.poll()) is None:
            await self._forked.wait_readable()
        return code
