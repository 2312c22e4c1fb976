"""Many clients that attach at once: what a host feels whose VMs all start, or all come back, in the same moment."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from vfiouser_oob.lab.bench.raw import BenchFailed, attach_commands, message
from vfiouser_protocol.constants import HEADER_SIZE
from vfiouser_protocol.header import command_name, unpack_header

#: Seconds that a storm may take.
STORM_TIMEOUT_S = 60.0
#: More than any reply to what is asked.
_ROOM = 4096


class Newcomer:
    """One client that attaches, a question after the other, without waiting.

    Args:
        path: where its server listens.
        questions: whole messages.
    """

    def __init__(self, path: Path, questions: Sequence[bytes]) -> None:
        self._questions = questions
        self._asked = 0
        self._received = b""
        self.took_ms = 0.0
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._began = time.perf_counter()
        try:
            self.sock.settimeout(STORM_TIMEOUT_S)
            self.sock.connect(str(path))
            self.sock.send(questions[0])
        except OSError as error:
            self.sock.close()
            raise BenchFailed(f"no client can attach at {path}: {error.strerror or error}") from error

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.sock.fileno()

    def go_on(self) -> bool:
        """Take what has come, and ask the next question; returns whether that was the last one.

        Raises:
            BenchFailed: the server refused, or left.
        """
        # Descriptors that come along are closed by the kernel, since no room is offered for them.
        data = self.sock.recv(_ROOM)
        if not data:
            raise BenchFailed("the server closed the connection of a client that attached")
        self._received += data
        if len(self._received) < HEADER_SIZE:
            return False
        header = unpack_header(self._received[:HEADER_SIZE])
        if header.is_error:
            words = os.strerror(header.error)
            raise BenchFailed(f"a client in a storm was refused {command_name(header.command)}: {words}")
        if len(self._received) < HEADER_SIZE + header.payload_size:
            return False
        self._received = b""
        self._asked += 1
        if self._asked == len(self._questions):
            self.took_ms = 1000 * (time.perf_counter() - self._began)
            return True
        self.sock.send(self._questions[self._asked])
        return False


def attach_storm(paths: Sequence[Path]) -> list[float]:
    """Attach one client to each server at the same moment, and leave again when all are attached.

    Args:
        paths: where they listen.

    Returns:
        Milliseconds of each, sorted: from its connect() to the end of what a VMM asks before its guest runs.

    Raises:
        BenchFailed: one could not attach, or not in time.
    """
    questions = [message(command, payload) for command, payload in attach_commands()]
    newcomers: list[Newcomer] = []
    try:
        with selectors.DefaultSelector() as selector:
            for path in paths:
                newcomer = Newcomer(path, questions)
                newcomers.append(newcomer)
                selector.register(newcomer, selectors.EVENT_READ, newcomer)
            _weather(selector)
    finally:
        for newcomer in newcomers:
            newcomer.sock.close()
    return sorted(newcomer.took_ms for newcomer in newcomers)


def _weather(selector: selectors.BaseSelector) -> None:
    deadline = time.monotonic() + STORM_TIMEOUT_S
    while left := len(selector.get_map()):
        ready = selector.select(max(0.0, deadline - time.monotonic()))
        if not ready:
            raise BenchFailed(f"{left} clients were not attached after {STORM_TIMEOUT_S:g} s")
        for key, _ in ready:
            newcomer: Newcomer = key.data
            if newcomer.go_on():
                selector.unregister(newcomer)
