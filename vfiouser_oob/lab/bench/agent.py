"""An agent that costs as little as it can: its state is one megabyte again and again, and is never looked at.

Run as ``python -m vfiouser_oob.lab.bench.agent PORT_FILE FUNCTIONS STATE_SIZE [PROTOCOL]``.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import trio

from vfiouser_agents.api import AgentState, Chunk, Estimate, Phase
from vfiouser_agents.errors import CorruptState, InvalidArgument
from vfiouser_agents.memory import ALL_CAPABILITIES, MemoryAgent, MemoryFunction, MemorySession
from vfiouser_agents.rpc.endpoint import parse_address
from vfiouser_agents.rpc.protocols import serve_at
from vfiouser_oob.systemd.notify import Notifier

#: Bytes of state that it gives and takes at once.
_CHUNK = 4 << 20
#: A view, so that a part of it is no copy.
_PATTERN = memoryview(random.Random(1).randbytes(1 << 20) * (_CHUNK >> 20))


class StreamSession(MemorySession):
    """A session whose state is a pattern of a given size, given and taken without being looked at."""

    loaded = 0
    takes_views = True

    async def estimate(self) -> Estimate:
        """All of it."""
        await trio.lowlevel.checkpoint()
        return Estimate(self.function.state_size, self.function.state_size, 0, exact=True)

    async def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """The next piece."""
        await trio.lowlevel.checkpoint()
        left = self.function.state_size - offset
        if phase is Phase.PRECOPY and left <= len(_PATTERN):
            return Chunk(b"", drained=True)
        count = min(limit, len(_PATTERN), left)
        return Chunk(cast("bytes", _PATTERN[:count]), eof=phase is not Phase.PRECOPY and count == left)

    async def load(self, offset: int, data: bytes) -> None:
        """Count it."""
        await trio.lowlevel.checkpoint()
        if offset == 0:
            self.loaded = 0
        if offset != self.loaded:
            raise InvalidArgument(f"load at {offset} where {self.loaded} was due")
        self.loaded += len(data)

    async def load_commit(self, total: int, digest: bytes) -> None:
        """Check the count."""
        await trio.lowlevel.checkpoint()
        if total != self.loaded:
            raise CorruptState(f"{self.loaded} bytes came, {total} were announced")
        self.function.spoiled = False
        self.function.move(AgentState.LOADED)


class StreamAgent(MemoryAgent):
    """An agent with such sessions."""

    async def open(self, function_id: str) -> MemorySession:
        """A session for a function."""
        await super().open(function_id)
        return StreamSession(self.by_id[function_id])


async def _serve(port_file: Path, functions: int, state_size: int, protocol: str) -> None:
    caps = replace(ALL_CAPABILITIES, max_chunk=_CHUNK)
    agent = StreamAgent([MemoryFunction(f"f{number}", state_size, caps=caps) for number in range(functions)])
    address = parse_address("tcp://127.0.0.1:0")
    async with agent, trio.open_nursery() as nursery:
        address = await nursery.start(serve_at, protocol, agent, address)
        await trio.Path(port_file).write_text(str(address), encoding="utf-8")
        Notifier.from_environment().ready()


def main(arguments: Sequence[str]) -> None:
    """Serve until killed."""
    port_file, functions, state_size, protocol = [*arguments, "msgpack-rpc"][:4]
    gc.freeze()
    trio.run(_serve, Path(port_file), int(functions), int(state_size), protocol)


if __name__ == "__main__":
    main(sys.argv[1:])
