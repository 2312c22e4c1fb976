"""Every protocol that the simulated SoC speaks, as real processes: the contract, and VMs that migrate between them."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from vfiouser_agents.api import Agent
from vfiouser_agents.registry import make_agent
from vfiouser_agents.rpc.kinds import SERVED_KINDS
from vfiouser_agents.rpc.protocols import PROTOCOLS
from vfiouser_agents.testing import CheckOutcome, check_agent
from vfiouser_oob.cli import demo
from vfiouser_oob.client.nursery import background_nursery
from vfiouser_oob.lab.demo.children import running
from vfiouser_oob.lab.demo.hosts import HostOptions, two_hosts
from vfiouser_oob.lab.demo.workload import Workload
from vfiouser_oob.lab.vmm.live import LiveOptions
from vfiouser_oob.lab.vmm.side import Generation
from vfiouser_oob.lab.vmm.voyage import Voyage

pytestmark = pytest.mark.slow


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path leaves room for socket names."""
    with tempfile.TemporaryDirectory(prefix="vt-") as name:
        yield Path(name)


def test_the_simulator_offers_every_protocol() -> None:
    """What the simulator's option lists is what can be served."""
    assert set(PROTOCOLS) == set(SERVED_KINDS)


@pytest.mark.parametrize("protocol", SERVED_KINDS)
async def test_contract_of_the_simulator(protocol: str, place: Path) -> None:
    """The simulated SoC keeps the contract in every protocol, as far as the protocol goes."""
    command = ["simulate-soc", f"--socket-dir={place}", "--size=1M", f"--agent-protocol={protocol}"]
    async with running("soc", command, place):
        options: dict[str, Any] = {"address": json.loads((place / "agent.json").read_text())["addresses"][0]}
        if protocol == "legacy-tcp":
            options["device"] = "f0"

        def make() -> Agent:
            return make_agent(protocol, options)

        results = await check_agent(make, function_id="f0")
    assert [] == [(result.name, result.detail) for result in results if result.outcome is CheckOutcome.FAILED]
    least = 30 if protocol == "legacy-tcp" else 44
    assert sum(result.outcome is CheckOutcome.PASSED for result in results) >= least


#: Seconds between commands of a writer: most of the processor is left for the migration.
PAUSE_S = 0.02
PAIRS = [("grpc", "jsonrpc"), ("jsonrpc", "msgpack-rpc"), ("msgpack-rpc", "grpc"), ("legacy-tcp", "legacy-tcp")]


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
async def test_migration_between_adapters(pair: tuple[str, str], place: Path) -> None:
    """A VM under I/O goes there and back, whatever the two agents speak, since the stream is the same."""
    options = HostOptions(size=1 << 20, tls=False, agents=pair)
    async with (
        two_hosts(place, options, lambda line: None) as hosts,
        Voyage.open(hosts.socket("A", "f0"), memory_size=2 << 20, pool_pages=128) as voyage,
    ):
        counted = await voyage.driver.counted_commands()
        workload = Workload(voyage.driver, "together", pause_s=PAUSE_S)
        async with background_nursery() as nursery:
            await nursery.start(workload.run)
            for host, generation in (("B", Generation.V1), ("A", Generation.V2)):
                with trio.fail_after(30):
                    progress = await voyage.migrate(
                        hosts.socket(host, "f0"), generation, options=LiveOptions(compare=True)
                    )
                assert progress.memory_equal
                await workload.next_write()
            await workload.finish()
        await workload.verify()
        assert 0 == workload.counts.mismatches
        done = (counted[0] + workload.counts.reads, counted[1] + workload.counts.writes)
        assert done == await voyage.driver.counted_commands()


def parser() -> argparse.ArgumentParser:
    """The options of the demo."""
    made = argparse.ArgumentParser()
    demo.add_arguments(made)
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [("grpc", ("grpc", "grpc")), ("grpc,jsonrpc", ("grpc", "jsonrpc")), ("legacy-tcp", ("legacy-tcp", "legacy-tcp"))],
)
def test_the_demo_takes_agents(text: str, expected: tuple[str, str]) -> None:
    """One kind is for both hosts, two are for one each."""
    assert expected == parser().parse_args(["--agent", text]).agent


@pytest.mark.parametrize("text", ["rest", "grpc,grpc,grpc", "legacy-tcp,grpc", ""])
def test_the_demo_refuses_agents(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds that are none, or do not go together, are refused with the reason."""
    with pytest.raises(SystemExit):
        parser().parse_args(["--agent", text])
    assert "legacy-tcp" in capsys.readouterr().err
