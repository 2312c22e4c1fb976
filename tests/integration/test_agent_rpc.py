"""The reference protocol end to end: every transport, losses, many sessions, cancelled calls."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agentbed import TRANSPORTS, served
from vfiouser_agents.api import AgentState, Outcome, Phase, Role, Session
from vfiouser_agents.memory import MemoryAgent, MemoryFunction


async def migrate(source: Session, target: Session, limit: int = 1 << 20) -> None:
    """Move a function's state from one session to the other, with one pass of pre-copy."""
    await source.begin(Role.SOURCE, "m")
    await target.begin(Role.DESTINATION, "m")
    await target.check(await source.describe())
    await target.stop()
    await target.load_begin(None)
    digest, offset = hashlib.sha256(), 0
    phase = Phase.PRECOPY
    while True:
        chunk = await source.save(offset, limit, phase)
        await target.load(offset, chunk.data)
        digest.update(chunk.data)
        offset += len(chunk.data)
        if chunk.eof:
            break
        if chunk.drained:
            await source.stop()
            phase = Phase.FINAL
    await target.load_commit(offset, digest.digest())
    await target.resume()
    await source.end(Outcome.SUCCESS)
    await target.end(Outcome.SUCCESS)


def pair(count: int, **options: int) -> tuple[MemoryAgent, MemoryAgent]:
    """Two agents with functions that fit each other."""
    return tuple(  # type: ignore[return-value]
        MemoryAgent([MemoryFunction(f"f{index}", seed=index + seed, **options) for index in range(count)])
        for seed in (1, 1000)
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_migration_over_every_transport(transport: str, tmp_path: Path) -> None:
    """A function's state arrives over UNIX sockets, TCP, TLS and mTLS."""
    here, there = pair(1, state_size=3 << 20, churn=10000)
    async with (
        served(here, transport, tmp_path / "a") as first,
        served(there, transport, tmp_path / "b") as second,
        first.client() as source,
        second.client() as target,
    ):
        assert "memory agent" == (await source.connect()).product
        assert ["f0"] == [function.function_id for function in await source.functions()]
        await migrate(await source.open("f0"), await target.open("f0"))
    assert here.by_id["f0"].digest() == there.by_id["f0"].digest()
    assert (AgentState.STOPPED, AgentState.RUNNING) == (here.by_id["f0"].state, there.by_id["f0"].state)
