"""A small client of QEMU's machine protocol.

Spec: QEMU, docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from vmbed.errors import BedError
from vmbed.lines import LineStream
from vmbed.processes import deadline

__all__ = ["Qmp", "QmpError"]

REPLY_S = 30.0


class QmpError(BedError):
    """QEMU refused a command."""


class Qmp:
    """One QMP session. Events that arrive while a reply is awaited are kept for `event`."""

    def __init__(self, stream: LineStream, log: Path) -> None:
        self._stream = stream
        self._log = log
        self._lock = trio.Lock()
        self._next_id = 0
        self._events: list[dict[str, Any]] = []
        self.greeting: dict[str, Any] = {}

    async def negotiate(self) -> None:
        """Take QEMU's greeting and leave negotiation mode."""
        with deadline(REPLY_S, "QMP greeting", self._log):
            self.greeting = json.loads(await self._stream.receive())["QMP"]
        await self.execute("qmp_capabilities")

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's own version."""
        version = self.greeting["version"]["qemu"]
        return version["major"], version["minor"], version["micro"]

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its result; `_` in an argument's name stands for `-`.

        Raises:
            QmpError: with QEMU's own words.
        """
        async with self._lock:
            self._next_id += 1
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            request = {"execute": command, "arguments": named, "id": self._next_id}
            with deadline(REPLY_S, f"answer to QMP {command}", self._log):
                await self._stream.send(json.dumps(request))
                while "id" not in (message := json.loads(await self._stream.receive())):
                    self._events.append(message)
        if "error" in message:
            raise QmpError(f"QMP {command}: {message['error']['desc']}")
        return message["return"]

    async def hmp(self, command: str) -> str:
        """Run a command of the human monitor and return its output."""
        return str(await self.execute("human-monitor-command", command_line=command))

    async def event(self, name: str, seconds: float = REPLY_S) -> dict[str, Any]:
        """Wait for an event of this name, also one that came already; it is then taken."""
        async with self._lock:
            with deadline(seconds, f"QMP event {name}", self._log):
                while True:
                    for index, event in enumerate(self._events):
                        if event["event"] == name:
                            return self._events.pop(index)
                    self._events.append(json.loads(await self._stream.receive()))
