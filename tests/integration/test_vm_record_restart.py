"""A daemon in a process of its own is killed and restarted under a QEMU, which the test plays by its monitor."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from carrierbed.busclient import BusClient
from restartbed import KeptDaemon
from upstreambed import upstream
from vfiouser_oob.control.client import ControlClient

GREETING = {"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": []}}
PATIENCE_S = 60
CONFIG = """
[[function]]
name = "f0"
socket = "{place}/f0.sock"
device = {{ kind = "vfio-user", socket = "{place}/device.sock" }}
[[vm]]
name = "guest"
functions = ["f0"]
monitor = "{place}/monitor"
carrier = "dbus-vmstate"
dbus_vmstate = "{place}/vmstate"
"""


class PlayedQemu:
    """A QEMU: it answers by its monitor, connects it again when it is lost, and makes its end of the carrier when told.

    Args:
        place: where the daemon's sockets are.
        runstate: what it does.
    """

    def __init__(self, place: Path, runstate: str) -> None:
        self.runstate, self.migration = runstate, "none"
        self.buses: list[BusClient] = []
        self.heard: list[str] = []
        self._place = place

    async def attach(self) -> None:
        """Connect its end of the carrier."""
        self.buses.append(await (await BusClient.connect(self._place / "vmstate")).open())

    async def run(self) -> None:
        """Live until cancelled."""
        while True:
            try:
                async with await trio.open_unix_socket(str(self._place / "monitor")) as stream:
                    await self._answer(stream)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.05)

    async def _answer(self, stream: trio.SocketStream) -> None:
        await stream.send_all(json.dumps(GREETING).encode() + b"\n")
        buffer = b""
        while data := await stream.receive_some(65536):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in filter(None, lines):
                request = json.loads(line)
                self.heard.append(request["execute"])
                answer = {"return": await self._do(request), "id": request["id"]}
                await stream.send_all(json.dumps(answer).encode() + b"\n")

    async def _do(self, request: dict[str, Any]) -> Any:
        arguments = request.get("arguments", {})
        match request["execute"]:
            case "query-status":
                return {"status": self.runstate}
            case "query-migrate":
                return {"status": self.migration}
            case "qom-list":
                kinds = {"/objects": "dbus-vmstate", "/machine/peripheral": "vfio-user-pci"}
                return [{"name": "f0", "type": f"child<{kinds[arguments['path']]}>"}]
            case "qom-get":
                return {"addr": 40, "parent_bus": "/machine/q35/pcie.0", "MCFG": 1 << 31}[arguments["property"]]
            case "object-add":
                await self.attach()
            case "query-migrate-capabilities":
                return [{"capability": each, "state": True} for each in ("events", "return-path")]
            case "human-monitor-command":
                return ""
        return {}


class Succession:
    """A VM, its QEMU, and its daemons, one after the other.

    Args:
        place: where their sockets are.
        kept: the daemon under its keeper.
        nursery: where QEMU lives.
    """

    def __init__(self, place: Path, kept: KeptDaemon, nursery: trio.Nursery) -> None:
        self._place = place
        self._kept = kept
        self._nursery = nursery
        self._lives = 1

    def _look(self) -> dict[str, Any]:
        with ControlClient(self._place / "control", PATIENCE_S) as client:
            return dict(client.status()["vms"][0])

    async def until(self, phase: str, *, carriers: int = 1) -> None:
        """Wait for a phase, with so many carriers connected."""
        with trio.fail_after(PATIENCE_S):
            while True:
                vm = await trio.to_thread.run_sync(self._look)
                if vm["phase"] == phase and len(vm["carriers"]) == carriers:
                    return
                await trio.sleep(0.02)

    async def qemu(self, runstate: str) -> PlayedQemu:
        """A QEMU is started."""
        qemu = PlayedQemu(self._place, runstate)
        await qemu.attach()
        self._nursery.start_soon(qemu.run)
        return qemu

    async def replace(self, *, kill: bool) -> None:
        """Another daemon takes the place of the one that runs."""
        (self._kept.kill if kill else self._kept.restart)()
        self._lives += 1
        await self._kept.lives(self._lives)


@asynccontextmanager
async def succession(place: Path) -> AsyncIterator[Succession]:
    """A daemon under a keeper, and a device behind it."""
    (place / "config.toml").write_text(CONFIG.format(place=place))
    serve = ["--config", str(place / "config.toml"), "--control-socket", str(place / "control")]
    async with upstream(place / "device.sock"):
        kept = await trio.to_thread.run_sync(lambda: KeptDaemon(place, None, serve=serve))
        try:
            await kept.lives(1)
            async with trio.open_nursery() as nursery:
                yield Succession(place, kept, nursery)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(kept.close)


async def test_what_is_known_of_a_vm_outlives_the_daemon(tmp_path: Path) -> None:
    """A VM that waits for its state goes on waiting; one that never got any is barred, whoever saw its beginning."""
    async with succession(tmp_path) as daemons:
        qemu = await daemons.qemu("inmigrate")
        await daemons.until("incoming")
        await daemons.replace(kill=True)
        await daemons.until("incoming")  # and it has made its end of the carrier anew
        assert len(qemu.buses) == 2
        qemu.runstate, qemu.migration = "running", "completed"
        await daemons.replace(kill=True)
        await daemons.until("barred", carriers=0)
        for bus in qemu.buses:
            bus.stream.socket.close()


async def test_a_migration_that_was_under_way_is_given_up(tmp_path: Path) -> None:
    """The daemon that follows tells QEMU so, and has the end of the carrier made anew when that is over."""
    async with succession(tmp_path) as daemons:
        qemu = await daemons.qemu("running")
        await daemons.until("running")
        qemu.migration = "active"
        await daemons.replace(kill=True)
        await daemons.until("armed", carriers=0)
        with trio.fail_after(PATIENCE_S):
            while "migrate_cancel" not in qemu.heard:  # noqa: ASYNC110 - it is looked at from outside
                await trio.sleep(0.02)
        assert len(qemu.buses) == 1
        qemu.migration = "cancelled"
        await daemons.replace(kill=False)
        await daemons.until("running")
        for bus in qemu.buses:
            bus.stream.socket.close()
