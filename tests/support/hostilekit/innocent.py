"""The innocent client, a process: reads a register of its function all the time, and notes what each read took.

    python -m hostilekit.innocent SOCKET test|nvme INTERVAL

The first line on standard input names processes, by their ids, and has the client attach. Each other line begins a
phase with that name; the end ends the client, which then prints what it found. The processes named are those that its
reads go through. The kernel accounts how long the threads of each of them, and of this one, were ready to run and
waited for a processor; that is the machine's doing and is taken off, and what is left is the time in which the daemon
was busy with others, or blocked by them.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hostilekit.waits import Waits, waited
from hostilekit.wire import Peer
from rawmessages import CONFIG, memfd

MEMORY = 1 << 20
BASE = 0x10_0000
PAGE = 4096
#: Reads between two looks at whether the device still reaches this client's memory, and no other.
DMA_EVERY = 40
#: Seconds after which a read counts as never answered.
PATIENCE = 12.0


class Innocent:
    """The client.

    Args:
        path: its function's socket.
        kind: what the function is: "test" or "nvme".
        waits: of this process and those on the way.
    """

    def __init__(self, path: str, kind: str, waits: Waits) -> None:
        self.kind = kind
        self.waits = waits
        self.samples: list[tuple[float, float]] = []
        self.harm: list[str] = []
        self.peer = Peer(path, timeout=PATIENCE)
        self.peer.negotiate()
        self.memory = memfd(MEMORY, "innocent")
        self.contents = secrets.token_bytes(MEMORY)
        os.pwrite(self.memory, self.contents, 0)
        self.peer.dma_map(BASE, MEMORY, self.memory)
        self.peer.write(CONFIG, 4, b"\x06\x00")
        self.page = 0
        self.read_so_far = 0
        self.register = 4 if kind == "test" else 8
        if kind == "test":
            self.peer.write(0, 4, secrets.token_bytes(4))
        self.expected = self.peer.read(0, self.register, 4)

    def timed_read(self, region: int, offset: int, count: int) -> bytes:
        """Read, and note what it took."""
        with self.timed():
            return self.peer.read(region, offset, count)

    def timed_write(self, offset: int, data: bytes) -> None:
        """Write to the device's registers, and note what it took."""
        with self.timed():
            self.peer.write(0, offset, data)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note what the access in the block takes: a stall may fall into any of them."""
        before = self.waits.look()
        begin = time.monotonic()
        try:
            yield
        finally:
            latency = time.monotonic() - begin
            self.samples.append((latency, max(0.0, latency - waited(before, self.waits.look()))))

    def step(self) -> None:
        """One read, and now and then a look at memory through the device."""
        value = self.timed_read(0, self.register, 4)
        if value != self.expected:
            self.harm.append(f"register {self.register:#x} reads {value.hex()}, not {self.expected.hex()}")
            self.expected = value
        self.read_so_far += 1
        if self.kind == "test" and self.read_so_far % DMA_EVERY == 0:
            self.look_at_memory()

    def look_at_memory(self) -> None:
        """Let the device read a page of this client's memory, and compare what it got."""
        self.page = (self.page + PAGE) % MEMORY
        self.timed_write(0x18, struct.pack("<Q", BASE + self.page))
        self.timed_write(0x20, struct.pack("<I", PAGE))
        self.timed_write(0x24, struct.pack("<I", 1))
        while (status := int.from_bytes(self.timed_read(0, 0x28, 4), "little")) == 1:
            time.sleep(0.001)
        if status != 2:
            self.harm.append(f"the device could not read this client's memory: status {status}")
        elif self.timed_read(1, 0, PAGE) != self.contents[self.page : self.page + PAGE]:
            self.harm.append("the device read something else than this client's memory")

    def leave(self) -> None:
        """Compare memory, and go."""
        if os.pread(self.memory, MEMORY, 0) != self.contents:
            self.harm.append("this client's memory was written")
        self.peer.close()


def _line() -> str:
    """The next line of standard input, empty at its end; whoever writes it writes it at once."""
    return os.read(0, 256).decode()


def main() -> None:
    """Run until standard input ends."""
    path, kind, interval = sys.argv[1:]
    pids = _line().split()
    if not pids:
        return  # there is nothing to attach to
    innocent = Innocent(path, kind, Waits([os.getpid(), *map(int, pids)]))
    phases: dict[str, list[tuple[float, float]]] = {}
    print("ready", flush=True)  # noqa: T201  the parent waits for it
    try:
        while True:
            if select.select([0], [], [], float(interval))[0]:
                line = _line()
                if not line:
                    break
                phase = line.split()[-1]
                innocent.samples = phases.setdefault(phase, [])
                print(phase, flush=True)  # noqa: T201  what comes from now on belongs to it
            innocent.step()
        innocent.leave()
    except (OSError, EOFError, AssertionError) as error:
        what = "had no answer" if isinstance(error, socket.timeout) else "was not served"
        innocent.harm.append(f"the innocent client {what}: {type(error).__name__}: {error}")
    print(json.dumps({"phases": phases, "harm": innocent.harm[:10]}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
