"""Acme's adapter against Acme's agent: the contract that every adapter keeps, and what is special to this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from acme_server import AcmeServer

from vfiouser_agents.errors import NotFound, ProtocolError
from vfiouser_agents.options import OptionError
from vfiouser_agents.registry import make_agent
from vfiouser_agents.testing import CheckOutcome, check_agent


@pytest.fixture
async def server(tmp_path: Path, nursery: trio.Nursery) -> AcmeServer:
    """An agent at acme.sock."""
    made = AcmeServer()
    await nursery.start(made.serve, str(tmp_path / "acme.sock"))
    return made


def options(tmp_path: Path) -> dict[str, str]:
    """What a configuration would say."""
    return {"address": f"unix://{tmp_path}/acme.sock"}


async def test_contract(server: AcmeServer, tmp_path: Path) -> None:
    """The adapter is found by its kind, and keeps the contract."""
    results = await check_agent(lambda: make_agent("acme", options(tmp_path)))
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    assert sum(result.outcome is CheckOutcome.PASSED for result in results) >= 35


async def test_strange_answers(server: AcmeServer, tmp_path: Path) -> None:
    """A state that nobody knows is a ProtocolError, and a function that is not there NotFound."""
    async with make_agent("acme", options(tmp_path)) as agent:
        session = await agent.open("disk0")
        server.devices["disk0"].state = "melting"
        with pytest.raises(ProtocolError, match="'melting'"):
            await session.status()
        with pytest.raises(NotFound):
            await agent.open("disk1")


def test_options() -> None:
    """Options that cannot be used are refused before anything is connected."""
    for wrong in ({}, {"address": "tcp://192.0.2.1"}, {"address": "unix:///a", "colour": "red"}):
        with pytest.raises(OptionError):
            make_agent("acme", wrong)
