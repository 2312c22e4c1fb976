"""Functions come, are used, migrate and go, again and again, while others serve: nothing is left of them."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from daemonkit import function, serving
from migrationkit import RESUMING, RUNNING, STOP_COPY, Side, Vmm
from openfds import open_fds
from rawclient import attached, connect
from vfiouser_agents.faults import FaultyAgent
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import AgentConfig, DaemonConfig, FunctionConfig, MigrationConfig
from vfiouser_oob.observability import levels
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.server.trim import resident

MAGIC = 0x75666F76
_STATE = 16 << 10
#: This is not about time, and the machine may be busy with other tests.
PATIENT = MigrationConfig(call_s=8.0)
BUDGET_S = 10.0


class Crowd:
    """Functions that come and go, in pairs that migrate to each other.

    Args:
        directory: of their sockets.
        count: how many; even.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.names = [f"n{number}" for number in range(count)]
        # One that stays keeps the agent entered: this one is the same object for each who enters it.
        names = [*self.names, "stays0"]
        self.devices = {name: MemoryFunction(name, _STATE, seed) for seed, name in enumerate(names)}
        self.agent = FaultyAgent(MemoryAgent(list(self.devices.values())))
        self.configs = {name: self._config(name) for name in self.names}

    def _config(self, name: str) -> FunctionConfig:
        agent = AgentConfig(kind="test", function=name)
        return function(self.directory, name, agent=agent, migration=PATIENT)

    @property
    def halves(self) -> tuple[Sequence[FunctionConfig], Sequence[FunctionConfig]]:
        """Those that the configuration names, and those that commands add."""
        configs = list(self.configs.values())
        return configs[: len(configs) // 2], configs[len(configs) // 2 :]

    def side(self, daemon: Daemon, name: str) -> Side:
        """One of them."""
        return Side(name, self.directory / f"{name}.sock", self.devices[name], daemon, self.agent)

    async def migrate_all(self, daemon: Daemon) -> None:
        """Each pair at the same time, eight pairs side by side."""
        limit = trio.CapacityLimiter(8)
        async with trio.open_nursery() as nursery:
            for source, destination in zip(self.names[::2], self.names[1::2], strict=True):
                nursery.start_soon(self._migrate, daemon, source, destination, limit)

    async def _migrate(self, daemon: Daemon, source: str, destination: str, limit: trio.CapacityLimiter) -> None:
        one, two = self.side(daemon, source), self.side(daemon, destination)
        async with limit, one.vmm() as src, two.vmm() as dst:
            await src.set_state(STOP_COPY)
            stream = await src.read_stream()
            await dst.set_state(RESUMING)
            await dst.write_stream(stream)
            await dst.set_state(RUNNING)
            assert one.device.digest() == two.device.digest()


class Residents:
    """Clients that do I/O all the time, on functions that nobody touches."""

    def __init__(self, directory: Path, count: int) -> None:
        agent = AgentConfig(kind="test", function="stays0")
        self.configs = [function(directory, f"stays{number}") for number in range(count)]
        self.configs[0] = replace(self.configs[0], agent=agent)
        self.accesses = 0
        self.slowest_s = 0.0

    async def work(self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write and read a register that nobody else writes."""
        async with attached(path) as client:
            task_status.started()
            while True:
                before = trio.current_time()
                self.accesses += 1
                await client.write32(0, 4, self.accesses)
                mine = self.accesses
                await client.write32(0, 4, mine)
                assert mine == await client.read32(0, 4)
                assert MAGIC == await client.read32(0, 0)
                self.slowest_s = max(self.slowest_s, trio.current_time() - before)
                await trio.sleep(0.002)


async def one_round(daemon: Daemon, crowd: Crowd, wanted: list[DaemonConfig], residents: Residents) -> None:
    """Come by the file and by commands, migrate, go by the file and by commands."""
    file, commands = crowd.halves
    base = wanted[-1]
    wanted.append(replace(base, functions=(*residents.configs, *file)))
    answer = await daemon.administration.reload(force=False)
    assert {"done"} == {change["state"] for change in answer["changes"]}
    assert len(file) == len(answer["changes"])
    for config in commands:
        await daemon.registry.add(config)
    assert len(residents.configs) + len(crowd.names) == len(daemon.functions)
    await crowd.migrate_all(daemon)
    for config in commands:
        # Its client left a moment ago, and may still be leaving.
        await daemon.administration.drain(config.name, undo=False)
        await daemon.administration.remove(config.name, force=False)
    wanted.append(replace(base, functions=tuple(residents.configs)))
    answer = await daemon.administration.reload(force=True)
    assert {"done"} == {change["state"] for change in answer["changes"]}
    assert len(residents.configs) == len(daemon.functions)


def footprint() -> tuple[int, list[str]]:
    """What the process has: bytes of memory, and descriptors."""
    gc.collect()
    return resident(), sorted(open_fds().values())


async def soak(directory: Path, functions: int, clients: int, rounds: int) -> tuple[int, float]:
    """Do it all; returns bytes of memory that the later rounds cost, and the slowest turn of a resident."""
    crowd, residents = Crowd(directory, functions), Residents(directory, clients)
    start = DaemonConfig(functions=tuple(residents.configs), source=Path("in memory"), reply_budget_s=BUDGET_S)
    wanted = [start]
    async with (
        serving(config=start, reread=lambda: wanted[-1], agents={"test": crowd.agent}) as daemon,
        trio.open_nursery() as nursery,
    ):
        for config in residents.configs:
            assert config.socket is not None
            await nursery.start(residents.work, config.socket)
        memory, fds, later = 0, [""], list[int]()
        for number in range(rounds):
            await one_round(daemon, crowd, wanted, residents)
            if number <= 1:
                memory, fds = footprint()
            measured, there = footprint()
            assert fds == there, number
            later.append(measured)
            assert all(levels.chosen(name) is None for name in crowd.names)
        assert residents.accesses > rounds
        assert all(each.last_error is None for each in daemon.functions)
        # The C library keeps pieces for a while and gives them back: the floor tells whether something stays for good.
        grown = min(later[rounds // 2 :]) - memory
        nursery.cancel_scope.cancel()
    return grown, residents.slowest_s


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Records that pytest keeps would be memory that grows."""
    caplog.set_level(logging.CRITICAL, "vfiouser_oob")


async def test_functions_come_and_go_beside_others(tmp_path: Path) -> None:
    """A few of them, for every day."""
    grown, _ = await soak(tmp_path, functions=8, clients=2, rounds=4)
    assert grown < 4 << 20


@pytest.mark.long
async def test_256_functions_come_and_go_beside_eight_clients(tmp_path: Path) -> None:
    """Memory and descriptors stay flat, and none of the eight notices more than a pause."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    try:
        grown, slowest_s = await soak(tmp_path, functions=256, clients=8, rounds=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"memory grew by {grown >> 10} KiB in 6 rounds; the slowest turn took {slowest_s * 1e3:.0f} ms")  # noqa: T201
    assert grown < 8 << 20
    assert slowest_s < 2.0


async def test_two_reloads_at_once_are_made_one_after_the_other(tmp_path: Path) -> None:
    """Each finds what the one before it left."""
    crowd, residents = Crowd(tmp_path, 4), Residents(tmp_path, 1)
    start = DaemonConfig(functions=tuple(residents.configs), source=Path("in memory"))
    configs = [replace(start, functions=(*start.functions, *crowd.configs.values())), start] * 3
    taken = iter(configs)
    async with serving(config=start, reread=lambda: next(taken), agents={"test": crowd.agent}) as daemon:
        async with trio.open_nursery() as nursery:
            for _ in configs:
                nursery.start_soon(partial(daemon.administration.reload, force=False))
        assert ["stays0"] == [each.name for each in daemon.functions]
        client = Vmm((await connect(tmp_path / "stays0.sock")).sock)
        assert 1 == (await client.negotiate()).flags
        client.close()
