"""A VM of a daemon costs nothing while no client uses its function, and finds the client that comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from daemonkit import function, serving
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.client.client import Client
from vfiouser_oob.config.schema import AgentConfig, CarrierChoice, DaemonConfig, FunctionConfig, VmConfig
from vfiouser_oob.server.daemon import Daemon
from vfiouser_oob.server.function import Function
from vfiouser_oob.vm.hosted import HostedFunction
from vmkit import MemoryMonitor

#: Seconds; whoever sets an alarm earlier than this polls.
SOON_S = 5.0


def migratable(directory: Path, agent: str | None = "memory") -> FunctionConfig:
    """A function that has an agent, or none."""
    return function(directory, agent=None if agent is None else AgentConfig(kind=agent, function="f0"))


@asynccontextmanager
async def hosting(directory: Path, config: FunctionConfig, *vms: VmConfig) -> AsyncIterator[Daemon]:
    """A daemon with one function."""
    agents = {"memory": MemoryAgent([MemoryFunction()])}
    async with serving(config=DaemonConfig(functions=(config,), vms=vms), agents=agents) as daemon:
        yield daemon


async def falls_asleep() -> None:
    """Wait until nothing in the event loop has an alarm set, but for us."""
    with trio.fail_after(4 * SOON_S):
        while trio.lowlevel.current_statistics().seconds_to_next_deadline < SOON_S:
            await trio.testing.wait_all_tasks_blocked(0.01)


def served(daemon: Daemon) -> Function | None:
    """The function, as its VM finds it."""
    return next(iter(daemon.functions), None)


async def test_an_idle_vm_sets_no_alarm(tmp_path: Path) -> None:
    """The VM's QEMU has not come, and nothing looks for it again and again."""
    vm = VmConfig(
        name="vm",
        functions=("f0",),
        monitor=tmp_path / "monitor",
        carrier=CarrierChoice.DBUS_VMSTATE,
        dbus_vmstate=tmp_path / "vmstate",
    )
    async with hosting(tmp_path, migratable(tmp_path), vm):
        await falls_asleep()


@pytest.mark.parametrize("agent", ["memory", None])
async def test_a_client_that_leaves_is_not_looked_for(tmp_path: Path, agent: str | None) -> None:
    """Neither before a client comes nor when it has gone, nor while one is there for a function without an agent."""
    async with hosting(tmp_path, migratable(tmp_path, agent)) as daemon, trio.open_nursery() as nursery:
        first = served(daemon)
        assert first is not None
        first.recorded = True
        hosted = HostedFunction("f0", lambda name: served(daemon), 1 << 20)
        nursery.start_soon(lambda: hosted.watch(coming=True))
        await falls_asleep()
        async with Client.connect(tmp_path / "f0.sock"):
            if agent is None:
                await falls_asleep()
            else:
                await watched(hosted)
        nursery.cancel_scope.cancel()


async def watched(hosted: HostedFunction) -> None:
    """Wait until it is known what the function writes."""
    with trio.fail_after(10):
        while hosted._now is None:  # noqa: ASYNC110 - it is looked at from outside
            await trio.sleep(0.01)


async def test_a_function_that_comes_again_is_found(tmp_path: Path) -> None:
    """It was removed and added while the VM waited for its client."""
    config = migratable(tmp_path)
    async with hosting(tmp_path, config) as daemon, trio.open_nursery() as nursery:
        hosted = HostedFunction("f0", lambda name: served(daemon), 1 << 20)
        nursery.start_soon(lambda: hosted.watch(coming=True))
        await falls_asleep()
        await daemon.registry.remove("f0")
        await daemon.registry.add(config)
        again = served(daemon)
        assert again is not None
        again.recorded = True
        async with Client.connect(tmp_path / "f0.sock"):
            await watched(hosted)
        nursery.cancel_scope.cancel()


async def test_a_function_is_armed_once_it_is_watched(tmp_path: Path) -> None:
    """A daemon that begins in the middle of a migration is told of that before it has begun to watch."""
    async with hosting(tmp_path, migratable(tmp_path)) as daemon, trio.open_nursery() as nursery:
        first = served(daemon)
        assert first is not None
        first.recorded = True
        async with Client.connect(tmp_path / "f0.sock"):
            await first.settled()
            hosted = HostedFunction("f0", lambda name: served(daemon), 1 << 20)
            armed = trio.Event()

            @nursery.start_soon
            async def arms() -> None:
                await hosted.arm(MemoryMonitor(), None)
                armed.set()

            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not armed.is_set()
            nursery.start_soon(lambda: hosted.watch(coming=False))
            with trio.fail_after(10):
                await armed.wait()
            nursery.cancel_scope.cancel()


async def test_an_agent_is_asked_whether_it_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was started anew may not know yet what it can do; without its log a migration would be refused."""
    async with hosting(tmp_path, migratable(tmp_path)) as daemon, trio.open_nursery() as nursery:
        first = served(daemon)
        assert first is not None
        assert first.migration is not None
        first.recorded = True
        async with Client.connect(tmp_path / "f0.sock"):
            await first.settled()
            assert first.migration.steps.device is not None
            monkeypatch.setattr(type(first.migration.steps.device.session), "device_seen", False)
            first.migration.link.close()
            first.migration.link.facts = None
            hosted = HostedFunction("f0", lambda name: served(daemon), 1 << 20)
            nursery.start_soon(lambda: hosted.watch(coming=False))
            await watched(hosted)
            assert first.migration.steps.device.dirty.lent
            nursery.cancel_scope.cancel()


class _Log:
    """QEMU's log, played."""

    def mark(self, address: int, length: int) -> None:
        """Nobody writes."""


async def test_a_log_is_used_that_was_there_before(tmp_path: Path) -> None:
    """A daemon that was started anew finds it before it has begun to watch."""
    async with hosting(tmp_path, migratable(tmp_path)) as daemon, trio.open_nursery() as nursery:
        first = served(daemon)
        assert first is not None
        assert first.migration is not None
        first.recorded = True
        async with Client.connect(tmp_path / "f0.sock"):
            await first.settled()
            hosted = HostedFunction("f0", lambda name: served(daemon), 1 << 20)
            log = _Log()
            hosted.use_log(log)
            nursery.start_soon(lambda: hosted.watch(coming=False))
            await watched(hosted)
            assert first.migration.steps.device is not None
            recorder = first.migration.steps.device.session.memory.recorder
            assert recorder is not None
            assert recorder.mark == log.mark
            nursery.cancel_scope.cancel()
