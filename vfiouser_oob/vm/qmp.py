"""QEMU's machine protocol as values: bytes in, messages out, commands out. There is no socket and no clock in here.

The peer is QEMU, or whoever else has found the socket. So every line is bounded, every message is one of those that the
phase allows, and what does not fit ends the conversation: after a line that was not understood nothing can be trusted.

    GREETING ── {"QMP": …} ──► NEGOTIATING ── answer to qmp_capabilities ──► READY

Spec: QEMU, docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, NoReturn

#: Bytes of a line. The longest answer that is asked for here (query-pci of a large machine) is a tenth of it.
LINE_MAX = 1 << 20
#: Commands that QEMU owes an answer to, given up or not.
UNANSWERED_MAX = 64
#: Characters of a peer's words that are kept.
_WORDS_MAX = 500
#: Characters of what was not understood that an error shows.
_SHOWN_MAX = 80
NEGOTIATE = "qmp_capabilities"


class QmpProtocolError(Exception):
    """The peer does not speak QMP, or not now; the conversation is over."""


class TooManyUnansweredError(Exception):
    """QEMU has not answered so many commands that it gets no further one."""


class QmpPhase(Enum):
    """How far the conversation is."""

    GREETING = "greeting"
    NEGOTIATING = "negotiating"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class QmpGreeting:
    """QEMU's first words.

    Args:
        version: major, minor and micro.
        package: the distribution's name for it; may be empty.
        capabilities: what can be negotiated.
    """

    version: tuple[int, int, int]
    package: str = ""
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """Something that QEMU tells by itself.

    Args:
        name: such as STOP.
        data: what belongs to it.
        seconds: when, since 1970, by the clock of QEMU's host; None if it did not say.
    """

    name: str
    data: Mapping[str, Any]
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class QmpAnswer:
    """A command's result.

    Args:
        id: the command's.
        result: whatever the command returns.
    """

    id: int
    result: Any


@dataclass(frozen=True, slots=True)
class QmpRefusal:
    """A command that QEMU did not carry out.

    Args:
        id: the command's.
        kind: the error's class, such as GenericError.
        text: QEMU's own words.
    """

    id: int
    kind: str
    text: str


QmpMessage = QmpGreeting | QmpEvent | QmpAnswer | QmpRefusal


class QmpSession:
    """One conversation, from the greeting on.

    Feed it with `receive_data`, then call `next_message` until it returns None.

    Args:
        line_max: bytes of the longest line that is taken.
    """

    def __init__(self, line_max: int = LINE_MAX) -> None:
        self.phase = QmpPhase.GREETING
        self._line_max = line_max
        self._buffer = bytearray()
        self._searched = 0
        self._next_id = 0
        self._negotiation: int | None = None
        self._awaited: set[int] = set()
        self._given_up: set[int] = set()

    def receive_data(self, data: bytes) -> None:
        """Take bytes of the peer.

        Args:
            data: as they came; all messages before them must have been fetched.
        """
        self._buffer += data

    def next_message(self) -> QmpMessage | None:
        """Return the next message, None if there is no whole one. A late answer to what was given up is none.

        Raises:
            QmpProtocolError: the peer does not speak QMP, or not now.
        """
        while (line := self._next_line()) is not None:
            message = self._read(line)
            if message is not None:
                return message
        return None

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Make a command.

        Args:
            name: such as query-status.
            arguments: its arguments, by the names that QMP has for them.

        Returns:
            The id by which its answer comes, and the bytes to be sent.

        Raises:
            TooManyUnansweredError: QEMU has to answer first.
            ValueError: the phase does not allow it, or the arguments are no JSON.
        """
        if self.phase is QmpPhase.GREETING or (self.phase is QmpPhase.NEGOTIATING) != (name == NEGOTIATE):
            raise ValueError(f"{name} cannot be sent while {self.phase.value}")
        if len(self._awaited) + len(self._given_up) >= UNANSWERED_MAX:
            raise TooManyUnansweredError(f"QEMU has left {UNANSWERED_MAX} commands unanswered")
        number = self._next_id + 1
        request: dict[str, Any] = {"execute": name, "id": number}
        if arguments:
            request["arguments"] = dict(arguments)
        data = json.dumps(request, allow_nan=False).encode("ascii") + b"\n"
        self._next_id = number
        self._awaited.add(number)
        if name == NEGOTIATE:
            self._negotiation = number
        return number, data

    def give_up(self, number: int) -> None:
        """Wait no longer for an answer; when it comes, it is dropped."""
        if number in self._awaited:
            self._awaited.discard(number)
            self._given_up.add(number)

    def _next_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched)
        if not 0 <= end <= self._line_max:
            if len(self._buffer) > self._line_max:
                raise QmpProtocolError(f"a line of more than {self._line_max} bytes")
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _read(self, line: bytes) -> QmpMessage | None:
        try:
            # Told the encoding, json guesses none.
            message = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise QmpProtocolError(f"a line that is not JSON: {_shown(line)}") from None
        if not isinstance(message, dict):
            raise QmpProtocolError(f"a message that is not an object: {_shown(line)}")
        for kind in _ALLOWED[self.phase]:
            if kind in message:
                return _READERS[kind](self, message)
        raise QmpProtocolError(f"not a message for a session that is {self.phase.value}: {_shown(line)}")

    def _greeting(self, message: Mapping[str, Any]) -> QmpGreeting:
        body = _object(message["QMP"], "QMP")
        version = _object(body.get("version"), "version")
        numbers = _object(version.get("qemu"), "qemu")
        found = tuple(numbers.get(part) for part in ("major", "minor", "micro"))
        if not all(isinstance(part, int) and 0 <= part < 1 << 16 for part in found):
            raise QmpProtocolError(f"a greeting without QEMU's version: {_shown(numbers)}")
        capabilities = body.get("capabilities", [])
        if not isinstance(capabilities, list):
            raise QmpProtocolError(f"a greeting whose capabilities are not a list: {_shown(capabilities)}")
        self.phase = QmpPhase.NEGOTIATING
        major, minor, micro = found
        return QmpGreeting(
            (int(major or 0), int(minor or 0), int(micro or 0)),
            _words(version.get("package", "")),
            tuple(_words(each) for each in capabilities[:UNANSWERED_MAX]),
        )

    def _event(self, message: Mapping[str, Any]) -> QmpEvent:
        data = message.get("data", {})
        return QmpEvent(_words(message["event"]), _object(data, "data"), _seconds(message.get("timestamp")))

    def _answer(self, message: Mapping[str, Any]) -> QmpAnswer | None:
        number = self._answered(message)
        if number is None:
            return None
        if number == self._negotiation:
            self.phase = QmpPhase.READY
        return QmpAnswer(number, message["return"])

    def _refusal(self, message: Mapping[str, Any]) -> QmpRefusal | None:
        error = _object(message["error"], "error")
        if "id" not in message:
            raise QmpProtocolError(f"an error that belongs to no command: {_shown(error)}")
        number = self._answered(message)
        return None if number is None else QmpRefusal(number, _words(error.get("class")), _words(error.get("desc")))

    def _answered(self, message: Mapping[str, Any]) -> int | None:
        """The command that this answers; None if it was given up."""
        number = message.get("id")
        # A bool is an int to Python, and would pass for the first command.
        if isinstance(number, int) and not isinstance(number, bool):
            if number in self._given_up:
                self._given_up.discard(number)
                return None
            if number in self._awaited:
                self._awaited.discard(number)
                return number
        raise QmpProtocolError(f"an answer to a command that was not sent: id {_shown(number)}")


#: What may come in which phase. Events may come before the answer that ends the negotiation: QEMU turns them on before
#: it answers, and another thread may have one at that moment.
_ALLOWED: Mapping[QmpPhase, tuple[str, ...]] = MappingProxyType(
    {
        QmpPhase.GREETING: ("QMP",),
        QmpPhase.NEGOTIATING: ("return", "error", "event"),
        QmpPhase.READY: ("event", "return", "error"),
    }
)
_READERS: Mapping[str, Callable[[QmpSession, Mapping[str, Any]], QmpMessage | None]] = MappingProxyType(
    {
        "QMP": QmpSession._greeting,
        "event": QmpSession._event,
        "return": QmpSession._answer,
        "error": QmpSession._refusal,
    }
)


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise QmpProtocolError(f"{name} is not an object: {_shown(value)}")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise QmpProtocolError(f"text was expected: {_shown(value)}")
    return value[:_WORDS_MAX]


def _seconds(value: Any) -> float | None:
    """QEMU says -1 when its clock failed."""
    if not isinstance(value, dict):
        return None
    whole, micro = value.get("seconds"), value.get("microseconds")
    if not isinstance(whole, int) or not isinstance(micro, int) or not 0 <= whole < 1 << 40 or not 0 <= micro < 10**6:
        return None
    return whole + micro / 1e6


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _shown(value: Any) -> str:
    """A peer's words for an error: short, and without control characters."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return ascii(text[:_SHOWN_MAX])
