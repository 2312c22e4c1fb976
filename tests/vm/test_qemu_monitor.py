"""Our monitor of real QEMUs: it comes and comes back, and tells of a migration what the VM's machine expects.

No guest is booted, and the vCPUs do nothing: two QEMUs under qtest migrate into each other in a tenth of a second.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm.monitor import Found, GoneError, Monitor, MonitorPort, RefusedError
from vfiouser_oob.vm.topology import Bdf, Slot, bridge_of, early_master, parse_slot, port_read, read_value
from vmbed.assets import Assets
from vmbed.qemu import Qemu, QemuConfig, start_qemu

pytestmark = pytest.mark.vm
WAIT_S = 30.0
INCOMING = ("-incoming", "defer")
PAUSED = ("-S",)


class Watch:
    """One VM's monitor, and all that it told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[str] = []
        self._came, self._come = trio.open_memory_channel[Monitor](10)
        self._changed = trio.Event()
        self.port = MonitorPort(path.name, self._attend)

    async def _attend(self, monitor: Monitor) -> None:
        self._came.send_nowait(monitor)
        try:
            while True:
                event = await monitor.next_event()
                self._note(" ".join([event.name, *([event.data["status"]] if event.name == "MIGRATION" else ())]))
        except GoneError:
            self._note("gone")

    def _note(self, what: str) -> None:
        if not what.startswith("MIGRATION_PASS"):
            self.told.append(what)
        self._changed.set()
        self._changed = trio.Event()

    async def next(self) -> Monitor:
        """The next QEMU that comes."""
        with trio.fail_after(WAIT_S):
            return await self._come.receive()

    async def until(self, last: str) -> list[str]:
        """All that was told since the last time, once `last` was; it is taken."""
        with trio.fail_after(WAIT_S):
            while last not in self.told:
                await self._changed.wait()
        end = self.told.index(last) + 1
        told, self.told = self.told[:end], self.told[end:]
        return told


def machine(watch: Watch, *extra: str) -> QemuConfig:
    """A machine whose monitor connects to us."""
    monitor = ("-chardev", f"socket,id=oob,path={watch.path},server=off,reconnect-ms=100")
    return QemuConfig(
        [],
        accel="qtest",
        memory_mib=64,
        trace=(),
        extra=[*monitor, "-object", "monitor-qmp,id=oobmon,chardev=oob", *extra],
    )


@asynccontextmanager
async def watched(workdir: Path, *names: str) -> AsyncIterator[list[Watch]]:
    """Ports that listen before any QEMU is there."""
    watches = [Watch(workdir / f"{name}.oob") for name in names]
    async with trio.open_nursery() as nursery:
        for watch in watches:
            await nursery.start(watch.port.serve, listen_on_path(watch.path))
        yield watches
        nursery.cancel_scope.cancel()


class Pair:
    """A source and a destination that wait for `migrate`."""

    def __init__(self, source: Qemu, destination: Qemu, watches: list[Watch], ours: list[Monitor], uri: str) -> None:
        self.source, self.destination, self.uri = source, destination, uri
        self.at_source, self.at_destination = watches
        self.our_source, self.our_destination = ours

    async def migrate(self, *, hold: bool = False) -> None:
        """Begin, by the monitors that are a user's.

        Args:
            hold: pause before the switchover.
        """
        wanted = {"return-path": True, "pause-before-switchover": hold}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        for qemu in (self.source, self.destination):
            await qemu.qmp.execute("migrate-set-capabilities", capabilities=capabilities)
        await self.destination.qmp.execute("migrate-incoming", uri=self.uri)
        await self.source.qmp.execute("migrate", uri=self.uri)


@asynccontextmanager
async def pair(
    assets: Assets, workdir: Path, *, source: tuple[str, ...] = (), destination: tuple[str, ...] = ()
) -> AsyncIterator[Pair]:
    """Two QEMUs, one of them incoming."""
    async with watched(workdir, "src", "dst") as watches:
        configs = [machine(watches[0], *source), machine(watches[1], *INCOMING, *destination)]
        async with (
            start_qemu(assets, configs[0], workdir, name="src") as first,
            start_qemu(assets, configs[1], workdir, name="dst") as second,
        ):
            ours = [await watch.next() for watch in watches]
            yield Pair(first, second, watches, ours, f"unix:{workdir / 'mig'}")


async def test_comes_and_comes_back(assets: Assets, workdir: Path) -> None:
    """QEMU connects by itself, also after we have sent it away; its end and its successor are told."""
    async with watched(workdir, "vm") as [watch]:
        async with start_qemu(assets, machine(watch, *PAUSED), workdir, name="first") as qemu:
            monitor = await watch.next()
            assert monitor.found == Found("prelaunch")
            assert monitor.greeting.version == qemu.qmp.version
            assert monitor.peer is not None
            assert monitor.peer.pid == qemu.process.pid
            await qemu.qmp.execute("cont")
            assert ["RESUME"] == await watch.until("RESUME")
            # As if a flood had been ours to refuse: QEMU tries again by itself.
            monitor._wire.lose("the test has had enough")
            assert ["gone"] == await watch.until("gone")
            again = await watch.next()
            assert again.found == Found("running")
            await qemu.qmp.execute("stop")
            assert ["STOP"] == await watch.until("STOP")
            await qemu.kill()
            assert ["gone"] == await watch.until("gone")
        async with start_qemu(assets, machine(watch, *INCOMING), workdir, name="second"):
            assert (await watch.next()).found == Found("inmigrate")


async def test_second_qemu_waits_for_the_first(assets: Assets, workdir: Path) -> None:
    """A second QEMU on the same path is not served while the first one lives, and is right after."""
    async with (
        watched(workdir, "vm") as [watch],
        start_qemu(assets, machine(watch), workdir, name="first") as first,
    ):
        monitor = await watch.next()
        async with start_qemu(assets, machine(watch, *PAUSED), workdir, name="second") as second:
            await first.qmp.execute("stop")
            assert ["STOP"] == await watch.until("STOP")
            assert watch.port.current is monitor
            await first.kill()
            assert ["gone"] == await watch.until("gone")
            served = (await watch.next()).peer
            assert served is not None
            assert served.pid == second.process.pid


async def test_daemon_comes_later(assets: Assets, workdir: Path) -> None:
    """QEMU does not need us to start: it connects when we are there, and waits when nobody accepts."""
    path = workdir / "vm.oob"
    watch = Watch(path)
    async with start_qemu(assets, machine(watch), workdir):
        listen_on_path(path).close()  # somebody who does not even accept, and ends
        async with trio.open_nursery() as nursery:
            await nursery.start(watch.port.serve, listen_on_path(path))
            assert (await watch.next()).found == Found("running")
            nursery.cancel_scope.cancel()


async def test_late_answers_of_a_busy_qemu(assets: Assets, workdir: Path) -> None:
    """A QEMU that stands still answers late, and nothing is mixed up."""
    async with watched(workdir, "vm") as [watch], start_qemu(assets, machine(watch), workdir) as qemu:
        monitor = await watch.next()
        qemu.process.send_signal(signal.SIGSTOP)
        for _ in range(20):
            with pytest.raises(Exception, match="did not answer"):
                await monitor.execute("query-memdev", seconds=0.01)
        qemu.process.send_signal(signal.SIGCONT)
        assert {"status": "running", "running": True} == await monitor.execute("query-status")
        with pytest.raises(RefusedError, match="has not been found"):
            await monitor.execute("no-such-command")


async def test_migration_completes(assets: Assets, workdir: Path) -> None:
    """The events of both sides, in order; the destination runs before it says `completed`."""
    async with pair(assets, workdir) as both:
        assert both.our_destination.found == Found("inmigrate")
        await both.migrate()
        assert await both.at_source.until("MIGRATION completed") == [
            *("MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION device", "MIGRATION completed")
        ]
        assert await both.at_destination.until("MIGRATION completed") == [
            *("MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed")
        ]
        # QEMU says `completed` before it gets to that state itself, and nothing tells when it does.
        with trio.fail_after(30):
            while (status := await both.our_source.execute("query-status"))["status"] == "finish-migrate":
                pass
        assert {"status": "postmigrate", "running": False} == status
        # Whoever takes the source back says `cont`; nothing else tells it.
        await both.source.qmp.execute("cont")
        assert ["RESUME"] == await both.at_source.until("RESUME")


async def test_paused_destination(assets: Assets, workdir: Path) -> None:
    """With `-S`, as libvirt starts it, the destination is complete first, and runs when it is told to."""
    async with pair(assets, workdir, destination=PAUSED) as both:
        await both.migrate()
        assert await both.at_destination.until("MIGRATION completed") == [
            *("MIGRATION setup", "MIGRATION active", "MIGRATION completed")
        ]
        assert "paused" == (await both.our_destination.execute("query-status"))["status"]
        await both.destination.qmp.execute("cont")
        assert ["RESUME"] == await both.at_destination.until("RESUME")


async def test_paused_source(assets: Assets, workdir: Path) -> None:
    """A VM that is paused already does not say STOP: only the status and the carrier tell that it goes."""
    async with pair(assets, workdir) as both:
        await both.source.qmp.execute("stop")
        assert ["STOP"] == await both.at_source.until("STOP")
        await both.migrate()
        told = await both.at_source.until("MIGRATION completed")
        assert "STOP" not in told
        told = await both.at_destination.until("MIGRATION completed")
        assert "RESUME" not in told


@pytest.mark.parametrize("paused", [False, True])
async def test_cancelled_at_the_switchover(assets: Assets, workdir: Path, paused: bool) -> None:
    """A cancelled source says RESUME between `cancelling` and `cancelled`, unless it was paused before."""
    async with pair(assets, workdir) as both:
        if paused:
            await both.source.qmp.execute("stop")
        await both.migrate(hold=True)
        await both.at_source.until("MIGRATION pre-switchover")
        assert "finish-migrate" == (await both.our_source.execute("query-status"))["status"]
        await both.our_source.execute("migrate_cancel")
        resumed = [] if paused else ["RESUME"]
        told = await both.at_source.until("MIGRATION cancelled")
        assert told == ["MIGRATION cancelling", *resumed, "MIGRATION cancelled"]
        status = (await both.our_source.execute("query-status"))["status"]
        assert status == ("paused" if paused else "running")
        assert "gone" in await both.at_destination.until("gone")


async def test_cancelled_early(assets: Assets, workdir: Path) -> None:
    """A source that is cancelled while it still runs says no RESUME."""
    async with pair(assets, workdir) as both:
        await both.source.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
        await both.migrate()
        await both.at_source.until("MIGRATION active")
        with pytest.raises(RefusedError):  # what our side needs is set before, or not at all
            await both.our_source.execute(
                "migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]}
            )
        await both.our_source.execute("migrate_cancel")
        assert ["MIGRATION cancelling", "MIGRATION cancelled"] == await both.at_source.until("MIGRATION cancelled")


async def test_destination_killed_at_the_switchover(assets: Assets, workdir: Path) -> None:
    """A source whose destination died says `failing`, RESUME, `failed`."""
    async with pair(assets, workdir) as both:
        await both.migrate(hold=True)
        await both.at_source.until("MIGRATION pre-switchover")
        await both.destination.kill()
        await both.at_destination.until("gone")
        await both.our_source.execute("migrate-continue", {"state": "pre-switchover"})
        assert await both.at_source.until("MIGRATION failed") == [
            *("MIGRATION device", "MIGRATION failing", "RESUME", "MIGRATION failed")
        ]


async def test_source_paused_and_resumed_on_the_way(assets: Assets, workdir: Path) -> None:
    """`stop` and `cont` in the middle say STOP and RESUME while the migration goes on."""
    async with pair(assets, workdir) as both:
        await both.source.qmp.execute("migrate-set-parameters", max_bandwidth=4096)
        await both.migrate()
        await both.at_source.until("MIGRATION active")
        await both.source.qmp.execute("stop")
        await both.source.qmp.execute("cont")
        assert ["STOP", "RESUME"] == await both.at_source.until("RESUME")
        assert "active" == (await both.our_source.execute("query-migrate"))["status"]
        await both.source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30)
        assert ["STOP", "MIGRATION device", "MIGRATION completed"] == await both.at_source.until("MIGRATION completed")


@pytest.mark.parametrize("bridges", [0, 1, 2])
async def test_early_dma(assets: Assets, workdir: Path, bridges: int) -> None:
    """A function is found and may do DMA while its QEMU waits for its state, on the root bus and behind bridges."""
    ports = ["pcie-root-port,id=b0,bus=pcie.0,addr=4,chassis=1", "pcie-pci-bridge,id=b1,bus=b0"][:bridges]
    bus, address = [("pcie.0", 5), ("b0", 0), ("b1", 3)][bridges]
    devices = [argument for port in ports for argument in ("-device", port)]
    devices += ["-device", f"virtio-rng-pci,id=f0,bus={bus},addr={address:#x}"]
    async with watched(workdir, "vm") as [watch], start_qemu(assets, machine(watch, *devices, *INCOMING), workdir):
        monitor = await watch.next()
        path: list[Slot] = []
        name = "f0"
        while True:
            place = {"path": f"/machine/peripheral/{name}"}
            path.insert(0, parse_slot(await monitor.execute("qom-get", {**place, "property": "addr"})))
            above = bridge_of(await monitor.execute("qom-get", {**place, "property": "parent_bus"}))
            if above is None:
                break
            name = above
        assert len(path) == bridges + 1
        for line in early_master(path):
            assert "" == await monitor.hmp(line)
        function = Bdf(0x70 + bridges - 1 if bridges else 0, path[-1].device, path[-1].function)
        *before, last = port_read(function, 0x04, 2)
        for line in before:
            await monitor.hmp(line)
        assert 0x0004 == read_value(await monitor.hmp(last)) & 0x0007
        assert "inmigrate" == (await monitor.execute("query-status"))["status"]
