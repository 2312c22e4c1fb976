"""The server's process, when the run starts it: noticed when it dies, started again."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from typing import IO

_POLL_S = 0.005
_END_S = 2.0
#: Of what the server said last: lines, and bytes that are looked at.
_LAST_LINES, _LAST_BYTES = 3, 4096
#: What the server writes beyond this is cut off when it is started again, in bytes.
_WORDS_MAX = 1 << 20


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
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._silent_before = 0
        #: How often it was started.
        self.starts = 0
        #: Whether it is known to exit when its client leaves, which the specification allows.
        self.leaves = False
        #: Statuses with which it does so.
        self._farewells = {0}

    def ensure(self) -> str:
        """Start the server unless it runs, and wait until it listens.

        Returns:
            Why it does not; empty if it does.
        """
        if self._process is not None and self._process.poll() is None:
            return ""
        with contextlib.suppress(OSError):
            os.unlink(self._path)  # a socket file that a dead server left would be taken for a living one
        self._silent_before = self._words.seek(0, os.SEEK_END)
        if self._silent_before > _WORDS_MAX:
            self._words.truncate(0)
            self._silent_before = self._words.seek(0)
        try:
            self._process = subprocess.Popen(
                self._arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._words
            )
        except OSError as error:
            return f"the server cannot be started: {error}"
        self.starts += 1
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline:
            if self._listens():
                return ""
            if self._process.poll() is not None:
                return f"the server ended at once with status {self._process.returncode}{self.last_words()}"
            time.sleep(_POLL_S)
        return f"the server does not listen on {self._path} after {self._start_s:g} s{self.last_words()}"

    def crashed(self, wait_s: float = 0.0) -> str:
        """How the server ended, if it ended as it should not: a server may end when its client leaves.

        Args:
            wait_s: how long to wait for its end, in seconds.
        """
        status = self._status(wait_s)
        if status is None or status in self._farewells:
            return ""
        if status < 0:
            return f"the server was killed by {signal.Signals(-status).name}{self.last_words()}"
        return f"the server ended with status {status}{self.last_words()}"

    def left(self, wait_s: float) -> bool:
        """Whether the server ends, as it may, within this time."""
        status = self._status(wait_s)
        if status in self._farewells:
            self.leaves = True
        return status in self._farewells

    def learn_farewell(self, wait_s: float) -> None:
        """A client that did nothing but negotiate has left: see whether the server leaves, too, and with what status.

        Args:
            wait_s: how long to wait for its end, in seconds.
        """
        status = self._status(wait_s)
        if status is not None and status >= 0:
            self.leaves = True
            self._farewells.add(status)

    def last_words(self) -> str:
        """What the server wrote last, behind a colon; empty if it wrote nothing."""
        size = os.fstat(self._words.fileno()).st_size
        data = os.pread(self._words.fileno(), _LAST_BYTES, max(self._silent_before, size - _LAST_BYTES))
        lines = [line.strip() for line in data.decode(errors="replace").splitlines() if line.strip()]
        return f": {' / '.join(lines[-_LAST_LINES:])}" if lines else ""

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

    def close(self) -> None:
        """End the server, and forget what it said."""
        self.stop()
        self._words.close()

    def _status(self, wait_s: float) -> int | None:
        if self._process is None:
            return None
        if wait_s > 0 and self._process.poll() is None:
            end = os.pidfd_open(self._process.pid)
            try:
                poller = select.poll()
                poller.register(end, select.POLLIN)
                poller.poll(wait_s * 1000)
            finally:
                os.close(end)
        return self._process.poll()

    def _listens(self) -> bool:
        if not os.path.exists(self._path):
            return False  # and no need to read the table, which is long on some machines
        # A look at the kernel's table, not a connection: a server that serves one client only would take it for that.
        with open("/proc/net/unix", encoding="ascii", errors="replace") as table:
            for line in table:
                fields = line.split()
                if len(fields) >= 8 and fields[7] == self._path and int(fields[3], 16) & _ACCEPTS:
                    return True
        return False


#: The flag of listening sockets in /proc/net/unix.
_ACCEPTS = 1 << 16
