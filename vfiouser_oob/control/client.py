"""The client's side of the control socket: plain blocking calls, for command-line tools."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, cast

from vfiouser_oob.control import protocol
from vfiouser_oob.observability.measured import Measured
from vfiouser_oob.observability.status import MigrationEntry, StatusReport

DEFAULT_TIMEOUT_S = 5.0
# A daemon of many functions answers with a long line; a stranger on that socket must still not fill our
# memory.
ANSWER_MAX = 64 << 20


class ControlError(Exception):
    """The daemon cannot be asked, or it refused."""


class ControlClient:
    """A connection to a running daemon; a context manager.

    Args:
        path: its control socket.
        timeout_s: seconds to wait for the connection and for each answer.

    Raises:
        ControlError: no daemon answers there, or it speaks another protocol.
    """

    def __init__(self, path: Path, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._path = path
        self._next_id = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout_s)
        self._buffer = bytearray()
        try:
            self._connect()
        except ControlError:
            self._sock.close()
            raise

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def status(self) -> StatusReport:
        """The daemon's state.

        Raises:
            ControlError: no answer, or a refusal.
        """
        return cast("StatusReport", self._call("status"))

    def ask(self, verb: str, *, patient: bool = False, **params: Any) -> Any:
        """Ask for anything that the daemon offers.

        Args:
            verb: what; the daemon may be older than this program and not know it.
            patient: wait for the answer as long as it takes.
            params: its parameters.

        Returns:
            The result.

        Raises:
            ControlError: no answer, or a refusal.
        """
        timeout = self._sock.gettimeout()
        if patient:
            self._sock.settimeout(None)
        try:
            return self._call(verb, params)
        finally:
            self._sock.settimeout(timeout)

    def migrations(self) -> list[MigrationEntry]:
        """The last migrations of each function, the oldest first.

        Raises:
            ControlError: no answer, or a refusal.
        """
        return cast("list[MigrationEntry]", self._call("migrations"))

    def metrics(self) -> Measured:
        """What the daemon has measured.

        Raises:
            ControlError: no answer, or a refusal.
        """
        return cast("Measured", self._call("metrics"))

    def watch(self, beat_s: float | None = None) -> Iterator[dict[str, Any]]:
        """The daemon's state, as ``{"status": …}``, then its changes as they happen; ends with the daemon.

        Args:
            beat_s: seconds of silence after which ``{}`` is given; None = silence is silence.

        Raises:
            ControlError: no answer, or a refusal.
        """
        yield {"status": self._call("watch")}
        # From now on silence is normal.
        self._sock.settimeout(None)
        while True:
            if beat_s is not None and b"\n" not in self._buffer and not select.select([self._sock], [], [], beat_s)[0]:
                yield {}
                continue
            if (message := self._receive()) is None:
                return
            event = message.get("event")
            if isinstance(event, dict):
                yield event

    def _connect(self) -> None:
        try:
            self._sock.connect(str(self._path))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ControlError(f"no daemon answers at {self._path}: {reason}") from error
        hello = self._receive()
        if hello is None:
            raise ControlError(f"the daemon at {self._path} closed the connection")
        self._refuse_error(hello)
        if hello.get("hello") != protocol.NAME:
            raise ControlError(f"the server at {self._path} is not {protocol.NAME}")
        if hello.get("protocol") != protocol.PROTOCOL:
            raise ControlError(
                f"the daemon at {self._path} speaks control protocol {hello.get('protocol')!r}, "
                f"this program {protocol.PROTOCOL}"
            )

    def _call(self, method: str, params: Mapping[str, Any] = MappingProxyType({})) -> Any:
        self._next_id += 1
        request = {"id": self._next_id, "method": method} | ({"params": dict(params)} if params else {})
        try:
            self._sock.sendall(protocol.encode(request))
        except OSError as error:
            raise ControlError(f"cannot ask the daemon at {self._path}: {error}") from error
        answer = self._receive()
        if answer is None:
            raise ControlError(f"the daemon at {self._path} closed the connection")
        self._refuse_error(answer)
        if answer.get("id") != self._next_id or "result" not in answer:
            raise ControlError(f"the daemon at {self._path} gave an answer that does not fit the request")
        return answer["result"]

    def _refuse_error(self, message: dict[str, Any]) -> None:
        error = message.get("error")
        if isinstance(error, dict):
            raise ControlError(f"the daemon at {self._path} refused: {error.get('message', 'no reason given')}")

    def _receive(self) -> dict[str, Any] | None:
        try:
            line = self._line()
        except TimeoutError as error:
            raise ControlError(f"the daemon at {self._path} does not answer") from error
        except OSError as error:
            raise ControlError(f"the connection to {self._path} broke: {error.strerror or error}") from error
        if line is None:
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"the server at {self._path} does not speak JSON") from error
        if not isinstance(message, dict):
            raise ControlError(f"the server at {self._path} is not {protocol.NAME}")
        return message

    def _line(self) -> bytes | None:
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            if start > ANSWER_MAX:
                raise ControlError(f"the answer at {self._path} is longer than {ANSWER_MAX} bytes")
            data = self._sock.recv(65536)
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
