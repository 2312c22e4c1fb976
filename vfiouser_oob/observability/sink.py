"""Where log lines go: to a descriptor that may stop taking them, without anybody waiting for that.

A pipe that nobody reads, a terminal that was stopped, a full disk: a `write` to any of them can block for ever, and
the descriptor is often shared with other processes, so that it cannot be made non-blocking either. A thread writes
instead. What it cannot write in time is dropped and counted, and the count is the next line that gets through.
"""

from __future__ import annotations

import abc
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

#: Bytes of lines that may wait; a reader that pauses for a moment loses nothing.
MOST_WAITING = 1 << 20
#: Seconds that the end of the process may wait for the last lines.
LAST_WORDS_S = 1.0


class Backlog(abc.ABC):
    """Delivers entries from a thread of its own; the thread starts with the first one.

    Args:
        most_waiting: bytes of entries that may wait.
    """

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        self._lost = 0
        self._writing = False
        self._closed = False
        self._thread: threading.Thread | None = None

    @abc.abstractmethod
    def _deliver(self, entries: Sequence[bytes]) -> int:
        """Deliver, waiting for room as long as it takes; returns how many could not be."""

    @abc.abstractmethod
    def _lost_entry(self, count: int) -> bytes:
        """The entry that tells how many were lost."""

    def put(self, data: bytes) -> None:
        """Take an entry; never waits.

        Args:
            data: the entry.
        """
        with self._changed:
            if self._closed or self._waiting + len(data) > self._most_waiting:
                self._lost += 1
                return
            self._lines.append(data)
            self._waiting += len(data)
            if self._thread is None:
                # It must not keep the process from ending while it is stuck.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = LAST_WORDS_S) -> bool:
        """Wait until everything was written, or not much longer.

        Args:
            timeout_s: longest wait in seconds.

        Returns:
            Whether everything was written.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, timeout_s)

    def close(self) -> None:
        """Write what is left, as far as that takes no time, and take no more."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    return
                entries = list(self._lines)
                self._lines.clear()
                self._waiting = 0
                lost, self._lost = self._lost, 0
                self._writing = True
            missed = self._deliver(entries)
            # The lost ones came after those that waited.
            if lost and self._deliver([self._lost_entry(lost)]):
                missed += lost
            if missed:
                with self._changed:
                    self._lost += missed


class Sink(Backlog):
    """Writes lines to a descriptor from a thread of its own; the thread starts with the first line.

    Args:
        stream: whose descriptor; it stays the caller's, and its flags are left alone.
        tell_lost: makes the line that says how many were dropped.
        most_waiting: bytes of lines that may wait.
    """

    def __init__(self, stream: TextIO, tell_lost: Callable[[int], str], most_waiting: int = MOST_WAITING) -> None:
        super().__init__(most_waiting)
        self._stream = stream
        self._tell_lost = tell_lost

    def write(self, line: str) -> None:
        """Take a line; never waits.

        Args:
            line: its text, without the line break.
        """
        self.put(f"{line}\n".encode(errors="backslashreplace"))

    def _lost_entry(self, count: int) -> bytes:
        return f"{self._tell_lost(count)}\n".encode(errors="backslashreplace")

    def _deliver(self, entries: Sequence[bytes]) -> int:
        return self._write(memoryview(b"".join(entries))).count(b"\n")

    def _write(self, data: memoryview) -> bytes:
        """Write, waiting for room as long as it takes.

        Args:
            data: whole lines.

        Returns:
            What could not be written: whoever read has gone, say, or the disk is full.
        """
        try:
            while data:
                fd = self._stream.fileno()
                try:
                    data = data[os.write(fd, data) :]
                except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
                    room = select.poll()
                    room.register(fd, select.POLLOUT)
                    room.poll()
        except (OSError, ValueError):
            return bytes(data)
        return b""
