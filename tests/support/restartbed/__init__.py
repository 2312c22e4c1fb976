"""A daemon that is restarted and killed under its clients: a keeper with the daemon, and a device that counts.

The device is in the test's process, behind the daemon's `vfio-user` backend, and outlives each daemon. It counts what
it is told, so it shows whether anything was lost or done twice.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from fakeserver import Answer, Handler
from upstreambed import REGION_SIZE, upstream
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import Command, IrqInfoFlags
from vfiouser_protocol.messages import (
    DmaMap,
    DmaUnmap,
    IrqInfo,
    RegionRead,
    RegionReadReply,
    RegionWrite,
    RegionWriteReply,
    SetIrqs,
)
from vfiouser_protocol.session import CommandReceived

#: Registers in region 0: each write to the first has to be one more than the one before, each read of the second gives
#: one more; the rest is memory.
COUNTED, COUNTING = 0, 8
VECTORS = 8


#: A daemon that answers late rather than not: a busy machine takes seconds for a burst of maps.
PATIENT = ("--reply-budget", "60")


class CountingDevice:
    """A device that takes down what it is told."""

    def __init__(self) -> None:
        self.written: list[int] = []
        self.reads = 0
        self.config = bytearray(REGION_SIZE)
        self.maps: dict[int, int] = {}
        self.odd: list[str] = []
        self.eventfds: dict[int, int] = {}
        #: Interrupts that it has raised, by vector.
        self.raised: Counter[int] = Counter()
        #: Seconds that each access takes.
        self.slow_s = 0.0
        self.handlers: dict[int, Handler] = {
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.DMA_MAP: self._map,
            Command.DMA_UNMAP: self._unmap,
            Command.DEVICE_SET_IRQS: self._irqs,
            Command.DEVICE_GET_IRQ_INFO: self._irq,
        }

    async def _read(self, event: CommandReceived) -> Answer:
        offset, region, count = decode(RegionRead, event.payload)
        if self.slow_s:
            await trio.sleep(self.slow_s)
        data = bytes(self.config[offset : offset + count])
        if (region, offset) == (0, COUNTING):
            self.reads += 1
            data = struct.pack("<I", self.reads)
        return Answer(encode(RegionReadReply(offset, region, count, data)))

    async def _write(self, event: CommandReceived) -> Answer:
        offset, region, count, data = decode(RegionWrite, event.payload)
        if self.slow_s:
            await trio.sleep(self.slow_s)
        if (region, offset) == (0, COUNTED):
            self.written.append(int.from_bytes(data, "little"))
        return Answer(encode(RegionWriteReply(offset, region, count)))

    def _map(self, event: CommandReceived) -> Answer:
        request = decode(DmaMap, event.payload)
        if len(event.fds) != 1 or request.address in self.maps:
            self.odd.append(f"DMA_MAP {request.address:#x} with {len(event.fds)} descriptors")
        self.maps[request.address] = request.size
        return Answer()

    def _unmap(self, event: CommandReceived) -> Answer:
        request = decode(DmaUnmap, event.payload)
        if self.maps.pop(request.address, None) != request.size:
            self.odd.append(f"DMA_UNMAP {request.address:#x}")
        return Answer(event.payload[:24])

    def _irqs(self, event: CommandReceived) -> Answer:
        request = decode(SetIrqs, event.payload)
        for vector, fd in enumerate(event.fds, request.start):
            old = self.eventfds.pop(vector, None)
            if old is not None:
                os.close(old)
            self.eventfds[vector] = os.dup(fd.fileno())
        return Answer()

    def _irq(self, event: CommandReceived) -> Answer:
        index = decode(IrqInfo, event.payload).index
        count = VECTORS if index == 2 else 0
        return Answer(encode(IrqInfo(16, IrqInfoFlags.EVENTFD, index, count)))

    async def storm(self) -> None:
        """Raise interrupts without a pause, as many as other tasks leave time for, until cancelled."""
        while True:
            for vector, fd in self.eventfds.items():
                os.eventfd_write(fd, 1)
                self.raised[vector] += 1
            await trio.sleep(0.001)

    def close(self) -> None:
        """Close what it was given."""
        for fd in self.eventfds.values():
            os.close(fd)


class KeptDaemon:
    """A keeper, and the daemon that it keeps running.

    Args:
        place: a directory of its own.
        device: of its one function; None: `serve` names a file that says what it serves.
        options: more options of the keeper.
        serve: more options of the daemon.
    """

    def __init__(self, place: Path, device: str | None, options: Sequence[str] = (), serve: Sequence[str] = ()) -> None:
        self.socket = place / "f0.sock"
        self.log = place / "log"
        one = [] if device is None else ["--socket-path", str(self.socket), "--device", device]
        command = [sys.executable, "-m", "vfiouser_oob"]
        with open(self.log, "wb") as log:
            self.keeper = subprocess.Popen(
                [*command, "keep", "--max-starts", "100", "--socket", f"unix:{place}/notify", *options,
                 "--", *command, "serve", "--control-socket", "none", *one, *serve],
                stderr=log,
            )  # fmt: skip

    @property
    def daemon(self) -> int | None:
        """The daemon's process id; None while there is none."""
        found = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        return int(found[0]) if found else None

    def kill(self) -> None:
        """Kill the daemon as it is."""
        pid = self.daemon
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def restart(self) -> None:
        """Restart the daemon in order."""
        self.keeper.send_signal(signal.SIGUSR2)

    async def lives(self, count: int) -> None:
        """Wait until so many daemons were ready."""
        with trio.fail_after(60):
            while self.log.read_text().count(" ready ") < count:  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.01)

    def close(self) -> str:
        """End both; returns what they logged."""
        self.keeper.terminate()
        self.keeper.wait(60)
        return self.log.read_text()


@asynccontextmanager
async def restarting(
    place: Path, *options: str, serve: Sequence[str] = PATIENT
) -> AsyncIterator[tuple[KeptDaemon, CountingDevice]]:
    """A daemon under a keeper, in front of a device that counts."""
    device = CountingDevice()
    async with upstream(place / "device.sock", device.handlers):
        kept = KeptDaemon(place, f"vfio-user:{place}/device.sock", options, serve)
        try:
            await kept.lives(1)
            yield kept, device
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(kept.close)
            device.close()


def memory(size: int) -> int:
    """A memory file of so many bytes."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd


__all__ = ["COUNTED", "COUNTING", "PATIENT", "CountingDevice", "KeptDaemon", "memory", "restarting", "socket"]
