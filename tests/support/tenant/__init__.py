"""A tenant of a function: a process that writes secrets, maps a BAR, and leaves behind a child that keeps the mapping.

    python -m tenant SOCKET REGION WRITES

WRITES is JSON: a list of [region, offset, hexadecimal bytes]. The child takes lines on standard input: `fill BYTE`
writes the whole mapping, `count BYTE` only says how many bytes of it have that value, as `fill` does too. It lives
until standard input ends, whatever becomes of its parent.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import trio

from rawclient import REGION_INFO, attached


class Tenant:
    """A tenant process, as a test sees it.

    Args:
        process: the process.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _line(self) -> str:
        output: IO[str] | None = self._process.stdout
        assert output is not None
        return output.readline().strip()

    def await_ready(self) -> None:
        """Wait until everything is written and mapped."""
        assert "ready" == self._line()

    def kill(self) -> None:
        """SIGKILL; the child with the mapping stays."""
        self._process.kill()
        self._process.wait()

    def ask(self, line: str) -> str:
        """Have the child do something with the mapping of the tenant that is gone."""
        entry: IO[str] | None = self._process.stdin
        assert entry is not None
        entry.write(line + "\n")
        entry.flush()
        return self._line()


@contextmanager
def tenant(path: Path, region: int, writes: Sequence[tuple[int, int, bytes]]) -> Iterator[Tenant]:
    """Start a tenant; its child is gone with the block."""
    text = json.dumps([(where, offset, data.hex()) for where, offset, data in writes])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        [sys.executable, "-m", "tenant", str(path), str(region), text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
    ) as process:
        try:
            yield Tenant(process)
        finally:
            process.kill()


async def main(path: str, region: int, writes: str) -> None:
    """Be the tenant."""
    async with attached(path) as client:
        request = struct.pack("<IIIIQQ", 4096, 0, region, 0, 0, 0)
        answer = await client.succeed(REGION_INFO, request)
        offset = struct.unpack_from("<Q", answer.payload, 24)[0]
        # The chain begins at 32 with the sparse areas; the first one will do.
        start, size = struct.unpack_from("<QQ", answer.payload, 48)
        mapping = mmap.mmap(answer.fds[0], size, mmap.MAP_SHARED, offset=offset + start)
        mapping[:] = b"\xa5" * size
        for where, at, data in json.loads(writes):
            await client.write(where, at, bytes.fromhex(data))
        if not os.fork():
            client.close()
            haunt(mapping)
        say("ready")
        await trio.sleep_forever()


def say(line: str) -> None:
    """Tell the test something."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def haunt(mapping: mmap.mmap) -> None:
    """Keep the mapping, and use it as told."""
    for line in sys.stdin:
        what, value = line.split()
        if what == "fill":
            mapping[:] = bytes([int(value)]) * len(mapping)
        say(str(mapping[:].count(int(value))))
    os._exit(0)
