"""The page of the agent protocol is enough: an agent that was written from it alone is as good as ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemonkit import function, serving
from migrationkit import FAST, PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, Vmm
from rawclient import connect
from vendors.msgpackbare import CAPABILITIES, BareAgent, BareFunction
from vfiouser_agents.api import Agent
from vfiouser_agents.registry import make_agent
from vfiouser_agents.testing import CheckOutcome, check_agent
from vfiouser_oob.cli.main import main
from vfiouser_oob.config.schema import AgentConfig


@pytest.fixture
def agent() -> Iterator[BareAgent]:
    """Two functions with different memories."""
    bare = BareAgent({name: BareFunction(bytes([number]) * 100_000) for number, name in enumerate(("src", "dst"))})
    yield bare
    bare.close()


def reach(agent: BareAgent) -> Agent:
    """The daemon's way to it."""
    return make_agent("msgpack-rpc", {"address": agent.address})


async def test_it_keeps_the_contract(agent: BareAgent) -> None:
    """Every check passes, those of pre-copy and of the dirty log included; none is left out."""
    results = await check_agent(lambda: reach(agent), function_id="src")
    assert {} == {item.name: item.detail for item in results if item.outcome is CheckOutcome.FAILED}
    assert CAPABILITIES["precopy"]
    assert CAPABILITIES["dirty"]
    assert {CheckOutcome.PASSED} == {item.outcome for item in results}


def test_it_passes_the_command(agent: BareAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """What a vendor runs says so, and exits with 0."""
    assert 0 == main(["agent-check", "--agent", f"msgpack-rpc:{agent.address},function=dst"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.endswith(" passed, 0 failed, 0 n/a")


async def test_it_migrates(agent: BareAgent, tmp_path: Path) -> None:
    """A daemon moves a state through it, with a pass of pre-copy, and the other function goes on with it."""
    source, target = agent.functions["src"], agent.functions["dst"]
    configs = [
        function(tmp_path, name, agent=AgentConfig(kind="test", function=name), migration=FAST)
        for name in agent.functions
    ]
    async with serving(*configs, agents={"test": reach(agent)}):
        src, dst = [Vmm((await connect(tmp_path / f"{name}.sock")).sock) for name in agent.functions]
        await src.negotiate()
        await dst.negotiate()
        await src.set_state(PRE_COPY)
        stream = await src.data_read(1 << 20)
        assert 100_000 < len(stream)
        source.memory = b"changed since".ljust(100_000)
        await src.set_state(STOP_COPY)
        stream += await src.read_stream()
        await src.set_state(STOP)
        await dst.set_state(RESUMING)
        await dst.write_stream(stream)
        await dst.set_state(RUNNING)
        assert source.memory == target.memory
        assert ("stopped", "running") == (source.state, target.state)
        src.close()
        dst.close()
