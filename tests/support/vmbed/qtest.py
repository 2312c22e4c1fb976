"""A client of QEMU's qtest protocol: port, memory and PCI accesses without any CPU.

Spec: QEMU, system/qtest.c, "QTest Protocol"; one command a line, `OK ...` or `FAIL ...` in answer, and
`IRQ ...` lines in between.
"""

from __future__ import annotations

from pathlib import Path

import trio

from vmbed.errors import BedError
from vmbed.lines import LineStream
from vmbed.processes import deadline

__all__ = ["Qtest"]

REPLY_S = 30.0
PORT_SUFFIX = {1: "b", 2: "w", 4: "l"}
MEMORY_SUFFIX = {1: "b", 2: "w", 4: "l", 8: "q"}


class Qtest:
    """The machine's buses. Commands are answered in order, so one lock serialises them."""

    def __init__(self, stream: LineStream, log: Path) -> None:
        self._stream = stream
        self._log = log
        self._lock = trio.Lock()

    async def command(self, line: str) -> list[str]:
        """Run one command and return the words after `OK`.

        Raises:
            BedError: QEMU said FAIL or something unknown, or nothing in time.
        """
        async with self._lock:
            with deadline(REPLY_S, f"answer to qtest {line[:60]!r}", self._log):
                await self._stream.send(line)
                while (reply := await self._stream.receive()).startswith("IRQ "):
                    pass
        status, *words = reply.split()
        if status != "OK":
            raise BedError(f"qtest {line[:60]!r}: {reply[:200]}")
        return words

    async def port_in(self, port: int, size: int = 4) -> int:
        """Read an I/O port; `size` is 1, 2 or 4 bytes."""
        return int((await self.command(f"in{PORT_SUFFIX[size]} {port:#x}"))[0], 0)

    async def port_out(self, port: int, value: int, size: int = 4) -> None:
        """Write an I/O port; `size` is 1, 2 or 4 bytes."""
        await self.command(f"out{PORT_SUFFIX[size]} {port:#x} {value:#x}")

    async def load(self, address: int, size: int = 4) -> int:
        """Read physical memory, RAM or device, with one access of 1, 2, 4 or 8 bytes."""
        return int((await self.command(f"read{MEMORY_SUFFIX[size]} {address:#x}"))[0], 0)

    async def store(self, address: int, value: int, size: int = 4) -> None:
        """Write physical memory, RAM or device, with one access of 1, 2, 4 or 8 bytes."""
        await self.command(f"write{MEMORY_SUFFIX[size]} {address:#x} {value:#x}")

    async def read(self, address: int, length: int) -> bytes:
        """Read a range of physical memory; `length` in bytes."""
        return bytes.fromhex((await self.command(f"read {address:#x} {length:#x}"))[0].removeprefix("0x"))

    async def write(self, address: int, data: bytes) -> None:
        """Write a range of physical memory."""
        await self.command(f"write {address:#x} {len(data):#x} 0x{data.hex()}")

    async def fill(self, address: int, length: int, value: int = 0) -> None:
        """Set a range of physical memory to one byte; `length` in bytes."""
        await self.command(f"memset {address:#x} {length:#x} {value:#x}")
