"""Two hosts on one machine, which share a disk: each has a simulated SoC, an agent, and a daemon that serves a VM."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from vfiouser_oob.vm.carriers.dbus_vmstate import vmstate_object
from vfiouser_oob.vm.carriers.vhost_user_fs import companion_arguments
from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.processes import LoggedProcess, deadline
from vmbed.qemu import Qemu, QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import MIB, PROGRAM, environment, service

__all__ = ["Carrier", "Host", "HostConfig", "finished", "host", "make_disk", "migrate", "shown"]

Carrier = Literal["dbus-vmstate", "vhost-user-fs"]
STATUS_S = 20.0
HOP_S = 120.0
DISK_MIB = 64
MEMORY_MIB = 128
FINAL = frozenset({"completed", "failed", "cancelled"})
SLOT = 0x10


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host.

    Attributes:
        carrier: what takes the functions' state along.
        functions: how many functions the VM has.
        cpus: of the VM.
        more: further lines of the VM's table in the configuration.
    """

    carrier: Carrier = "dbus-vmstate"
    functions: int = 1
    cpus: int = 1
    more: str = ""


class Host:
    """One of the hosts; made by `host`."""

    def __init__(self, folder: Path, config: HostConfig, daemon: LoggedProcess, agent: LoggedProcess) -> None:
        self.folder = folder
        self.config = config
        self.daemon = daemon
        self.agent = agent
        self._machines = 0

    async def status(self) -> dict[str, Any]:
        """What `vfiouser-oob status --json` says."""
        argv = [*PROGRAM, "status", "--json", "--control-socket", str(self.folder / "control")]
        with deadline(STATUS_S, "answer to status", self.daemon.log):
            done = await trio.run_process(
                argv, env=environment(), capture_stdout=True, capture_stderr=True, check=False
            )
        if done.returncode != 0:
            raise BedError(f"status ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    async def vm(self) -> dict[str, Any]:
        """What of it is about the VM."""
        vm: dict[str, Any] = (await self.status())["vms"][0]
        return vm

    async def phase(self, *wanted: str, seconds: float = 30.0) -> str:
        """Wait until the VM is in one of some phases; returns which."""
        with deadline(seconds, f"phase {' or '.join(wanted)}", self.daemon.log):
            while (now := (await self.vm())["phase"]) not in wanted:
                pass  # each look is a process of its own, and so takes its time
        return str(now)

    def carrier_arguments(self) -> Sequence[str]:
        """What QEMU is told of the carrier."""
        if self.config.carrier == "dbus-vmstate":
            return "-object", json.dumps(vmstate_object(self.folder / "vmstate", "oobvmstate"))
        return companion_arguments(self.folder / "vhost", addr="0x1c")

    @asynccontextmanager
    async def machine(
        self, assets: Assets, *, incoming: Sequence[str] = (), carrier: bool = True
    ) -> AsyncIterator[Qemu]:
        """Start the VM's QEMU.

        Args:
            assets: where it is.
            incoming: what has it wait for a VM; else it boots.
            carrier: whether it has its carrier.
        """
        self._machines += 1
        extra = [
            *("-chardev", f"socket,id=oob,path={self.folder / 'monitor'},server=off,reconnect-ms=100"),
            *("-object", "monitor-qmp,id=oobmon,chardev=oob"),
            *(self.carrier_arguments() if carrier else ()),
            *incoming,
        ]
        devices = [
            VfioUserDevice(self.folder / f"f{number}.sock", id=f"f{number}", slot=SLOT + number)
            for number in range(self.config.functions)
        ]
        config = QemuConfig(devices, cpus=self.config.cpus, memory_mib=MEMORY_MIB, trace=(), extra=extra)
        name = f"qemu{self._machines}"
        async with start_qemu(assets, config, self.folder, name=name) as qemu:
            on = [{"capability": each, "state": True} for each in ("events", "return-path")]
            await qemu.qmp.execute("migrate-set-capabilities", capabilities=on)
            yield qemu


def make_disk(workdir: Path) -> Path:
    """The disk that both hosts see."""
    image = workdir / "disk"
    with image.open("wb") as file:
        file.truncate(DISK_MIB * MIB)
    return image


@asynccontextmanager
async def host(workdir: Path, name: str, disk: Path, config: HostConfig) -> AsyncIterator[Host]:
    """Start a host; everything works when this yields.

    Args:
        workdir: for its folder; its path must be short.
        name: the folder's.
        disk: what is behind its functions.
        config: what it is.
    """
    folder = workdir / name
    (folder / "soc").mkdir(parents=True)
    address = f"unix://{folder / 'agent'}"
    file = folder / "config.toml"
    file.write_text(_configuration(folder, address, config))
    simulate = ["simulate-soc", "--socket-dir", str(folder / "soc")]
    device = ["--functions", str(config.functions), "--image", str(disk), "--shared-image", "--device-only"]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(service(folder, "soc", [*simulate, *device]))
        agent = await stack.enter_async_context(
            service(folder, "agent", [*simulate, "--agent-only", f"--agent-listen={address}"])
        )
        daemon = await stack.enter_async_context(service(folder, "daemon", ["serve", "--config", str(file)]))
        yield Host(folder, config, daemon, agent)


def _configuration(folder: Path, agent: str, config: HostConfig) -> str:
    names = [f"f{number}" for number in range(config.functions)]
    functions = [
        f'[[function]]\nname = "{name}"\nsocket = "{folder / name}.sock"\n'
        f'device = {{ kind = "vfio-user", socket = "{folder / "soc" / name}.sock" }}\n'
        f'agent = {{ kind = "msgpack-rpc", address = "{agent}", function = "{name}" }}\n'
        for name in names
    ]
    return (
        f'[daemon]\ncontrol_socket = "{folder / "control"}"\nlog_level = "info"\n'
        + "".join(functions)
        + f'[[vm]]\nname = "guest"\nfunctions = {json.dumps(names)}\nmonitor = "{folder / "monitor"}"\n'
        + f'dbus_vmstate = "{folder / "vmstate"}"\nvhost_user_fs = "{folder / "vhost"}"\n{config.more}'
    )


async def migrate(source: Qemu, destination: Qemu, stream: Path) -> None:
    """Begin a migration: by `migrate`, and nothing else."""
    await destination.qmp.execute("migrate-incoming", uri=f"unix:{stream}")
    await source.qmp.execute("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=300)
    await source.qmp.execute("migrate", uri=f"unix:{stream}")


async def finished(qemu: Qemu, seconds: float = HOP_S) -> str:
    """Wait until a QEMU's migration is over; returns how it ended."""
    while (now := (await qemu.qmp.event("MIGRATION", seconds))["data"]["status"]) not in FINAL:
        pass
    return str(now)


async def shown(qemu: Qemu) -> str:
    """What a QEMU says that its VM does."""
    return str((await qemu.qmp.execute("query-status"))["status"])
