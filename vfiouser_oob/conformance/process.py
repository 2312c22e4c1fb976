"""The server's process, when the run starts it: noticed when it dies, started again."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time

_POLL_S = 0.02
_END_S = 2.0


class ServerProcess:
    """Starts a server and keeps it there.

    Args:
        command: its command line, in which ``{socket}`` stands for the socket's path.
        socket_path: where it will listen.
        start_s: how long it may take to listen, in seconds.
    """

    def __init__(self, command: str, socket_path: str, start_s: float = 10.0) -> None:
        self._arguments = [part.replace("{socket}", socket_path) for part in shlex.split(command)]
        self._path = socket_path
        self._start_s = start_s
        self._process: subprocess.Popen[bytes] | None = None
        #: How often it was started.
        self.starts = 0

    def ensure(self) -> str:
        """Start the server unless it runs, and wait until it listens.

        Returns:
            Why it does not; empty if it does.
        """
        if self._process is not None and self._process.poll() is None:
            return ""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # a socket file that a dead server left would be taken for a living one
        try:
            self._process = subprocess.Popen(self._arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except OSError as error:
            return f"the server cannot be started: {error}"
        self.starts += 1
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return f"the server ended at once with status {self._process.returncode}"
            if self._listens():
                return ""
            time.sleep(_POLL_S)
        return f"the server does not listen on {self._path} after {self._start_s:g} s"

    def crashed(self, wait_s: float = 0.0) -> str:
        """How the server ended, if it ended as it should not: a server may end when its client leaves.

        Args:
            wait_s: how long to wait for its end, in seconds.
        """
        if self._process is not None and wait_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(wait_s)
        status = self._process.poll() if self._process is not None else None
        if status is None or status == 0:
            return ""
        if status < 0:
            return f"the server was killed by {signal.Signals(-status).name}"
        return f"the server ended with status {status}"

    def stop(self) -> None:
        """End the server."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        self._process = None

    def _listens(self) -> bool:
        # A look at the kernel's table, not a connection: a server that serves one client only would take it for that.
        with open("/proc/net/unix", encoding="ascii", errors="replace") as table:
            for line in table:
                fields = line.split()
                if len(fields) >= 8 and fields[7] == self._path and int(fields[3], 16) & _ACCEPTS:
                    return True
        return False


#: The flag of listening sockets in /proc/net/unix.
_ACCEPTS = 1 << 16
