"""Adapters: what each protocol costs to carry a state, beside a plain copy of the same bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from xxhash import xxh3_128_digest

from vfiouser_agents.api import Outcome, Phase, Role, Session
from vfiouser_agents.extras import KIND_EXTRAS, missing
from vfiouser_agents.registry import make_agent
from vfiouser_agents.rpc.protocols import PROTOCOLS
from vfiouser_oob.lab.bench.results import Result
from vfiouser_oob.lab.bench.streams import plain_copy
from vfiouser_oob.lab.demo.children import running_command

_FUNCTION = "f0"


async def measure_adapters(
    directory: Path, state_size: int, rounds: int, progress: Callable[[str], None]
) -> list[Result]:
    """Measure saving and loading by each adapter, without a daemon.

    Args:
        directory: for sockets and logs.
        state_size: bytes of the state.
        rounds: how often; the best counts.
        progress: takes one line per step.

    Returns:
        A saving and a loading rate for each protocol whose packages are installed.

    Raises:
        ChildFailed: a process did not start.
    """
    await trio.Path(directory).mkdir()
    async with plain_copy(directory) as plain:
        copies = []
        for _ in range(rounds):
            began = time.perf_counter()
            await trio.to_thread.run_sync(plain.move, state_size)
            copies.append(state_size / (time.perf_counter() - began) / 1e6)
    results = []
    for protocol in usable_protocols():
        progress(f"adapter {protocol}: saving and loading")
        for way, rates in (await _measure(directory, protocol, state_size, rounds)).items():
            results.append(Result(f"adapter {protocol}, {way}", max(rates), "MB/s", max(copies), "copy"))
    return results


def usable_protocols() -> Sequence[str]:
    """The protocols whose packages are installed."""
    return [name for name in PROTOCOLS if name not in KIND_EXTRAS or missing(KIND_EXTRAS[name]) is None]


async def _measure(directory: Path, protocol: str, state_size: int, rounds: int) -> dict[str, list[float]]:
    where = directory / protocol
    command = [sys.executable, "-m", "vfiouser_oob.lab.bench.agent", str(where), "1", str(state_size), protocol]
    rates: dict[str, list[float]] = {"save": [], "load": []}
    async with running_command(f"agent-{protocol}", command, directory):
        options: dict[str, Any] = {"address": await trio.Path(where).read_text()}
        if protocol == "legacy-tcp":
            options |= {"device": _FUNCTION, "max_state": state_size}
        async with make_agent(protocol, options) as agent:
            session = await agent.open(_FUNCTION)
            for _ in range(rounds):
                began = time.perf_counter()
                pieces = await _save(session)
                middle = time.perf_counter()
                rates["save"].append(state_size / (middle - began) / 1e6)
                await session.resume()
                await session.end(Outcome.SUCCESS)
                digest = xxh3_128_digest(b"".join(pieces))
                began = time.perf_counter()
                await _load(session, pieces, digest)
                rates["load"].append(state_size / (time.perf_counter() - began) / 1e6)
                await session.resume()
                await session.end(Outcome.SUCCESS)
    return rates


async def _save(session: Session) -> list[bytes]:
    await session.begin(Role.SOURCE, "bench")
    await session.stop()
    pieces: list[bytes] = []
    offset, eof = 0, False
    while not eof:
        chunk = await session.save(offset, session.caps.max_chunk, Phase.FINAL)
        pieces.append(chunk.data)
        offset, eof = offset + len(chunk.data), chunk.eof
    return pieces


async def _load(session: Session, pieces: Sequence[bytes], digest: bytes) -> None:
    await session.begin(Role.DESTINATION, "bench")
    await session.stop()
    await session.load_begin(None)
    offset = 0
    for piece in pieces:
        await session.load(offset, piece)
        offset += len(piece)
    await session.load_commit(offset, digest)
