"""Two hosts on one machine, which share a disk: each has a simulated SoC, an agent, and a daemon that serves a VM."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.vm.carriers.dbus_vmstate import vmstate_object
from vfiouser_oob.vm.carriers.vhost_user_fs import companion_arguments
from vmbed.assets import Assets
from vmbed.errors import BedError
from vmbed.processes import LoggedProcess, deadline, stop_keeper, tail
from vmbed.qemu import Qemu, QemuConfig, VfioUserDevice, start_qemu
from vmbed.stack import MIB, PROGRAM, environment, service

__all__ = [
    "FINAL",
    "Carrier",
    "Host",
    "HostConfig",
    "capability",
    "finished",
    "host",
    "make_disk",
    "migrate",
    "shown",
    "status",
]

Carrier = Literal["dbus-vmstate", "vhost-user-fs"]
STATUS_S = 20.0
#: Seconds after which somebody who watches notices that nobody waits for it any more.
_BEAT_S = 0.5
HOP_S = 120.0
DISK_MIB = 64
MEMORY_MIB = 128
#: How a migration can end.
FINAL = ("completed", "failed", "cancelled")
SLOT = 0x10


@dataclass(frozen=True, slots=True)
class HostConfig:
    """A host.

    Attributes:
        carrier: what takes the functions' state along.
        functions: how many functions the VM has.
        behind: how many of them, the last ones, are behind a root port each.
        cpus: of the VM.
        listens: whether QEMU listens on the companion's socket, so that a lost connection can be made anew.
        prefix: of the functions' names, before their numbers.
        soc: further options of the simulated SoC.
        omits: what of a migration its daemon leaves out; see `vmbed.omissions`.
        accel: what runs the VM's guest, if it has one.
        kernel_arguments: for the guest's kernel.
        more: further lines of the VM's table in the configuration.
        keep: the daemon is a keeper's child, which starts it again; what is called the daemon is the keeper.
    """

    carrier: Carrier = "dbus-vmstate"
    functions: int = 1
    behind: int = 0
    cpus: int = 1
    listens: bool = False
    prefix: str = "f"
    soc: tuple[str, ...] = ()
    omits: str = ""
    accel: Literal["tcg", "qtest"] = "tcg"
    kernel_arguments: str = ""
    more: str = ""
    keep: bool = False

    @property
    def names(self) -> list[str]:
        """The functions'."""
        return [f"{self.prefix}{number}" for number in range(self.functions)]


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

    async def stood_ms(self, direction: Literal["out", "in"]) -> float:
        """How long the functions stood on this host's part, in milliseconds, in the last migration from or to here."""

        def ask() -> float:
            with ControlClient(self.folder / "control", STATUS_S) as client:
                last = {each["function"]: each for each in client.migrations() if each["direction"] == direction}
            return max((each["downtime_s"] or 0.0 for each in last.values()), default=0.0) * 1000

        return await trio.to_thread.run_sync(ask)

    async def phase(self, *wanted: str, seconds: float = 30.0) -> str:
        """Wait until the VM is in one of some phases; returns which."""
        given_up = threading.Event()

        def watch() -> str:
            while True:
                with ControlClient(self.folder / "control", STATUS_S) as client:
                    for told in client.watch(_BEAT_S):
                        now = str(told["status"]["vms"][0]["phase"] if "status" in told else told.get("phase", ""))
                        if now in wanted or given_up.is_set():
                            return now
                        if "lost" in told:  # perhaps the one that is waited for
                            break
                    else:
                        raise BedError(f"the daemon has ended\n{tail(self.daemon.log)}")

        with deadline(seconds, f"phase {' or '.join(wanted)}", self.daemon.log):
            try:
                return await trio.to_thread.run_sync(watch, abandon_on_cancel=True)
            finally:
                given_up.set()
        raise AssertionError("a deadline that has passed raises")

    @property
    def carrier_socket(self) -> Path:
        """Where QEMU's end of the carrier is met."""
        return self.folder / ("vmstate" if self.config.carrier == "dbus-vmstate" else "vhost")

    def signal_daemon(self, signum: signal.Signals) -> None:
        """Send a signal to the daemon that the keeper runs."""
        keeper = self.daemon.pid
        (daemon,) = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        os.kill(int(daemon), signum)

    @property
    def lives(self) -> int:
        """How many daemons were ready so far."""
        return self.daemon.log.read_text(errors="replace").count(" ready ")

    @asynccontextmanager
    async def replaced(self, *, kill: bool) -> AsyncIterator[None]:
        """Have another daemon take the place of the one that runs; it is ready at the end of the block.

        Args:
            kill: the first is killed, else it ends in order.
        """
        before = self.lives
        if kill:
            self.signal_daemon(signal.SIGKILL)
        else:
            self.daemon.send_signal(signal.SIGUSR2)
        yield
        with deadline(HOP_S, "next daemon", self.daemon.log):
            while self.lives == before:  # noqa: ASYNC110 - a file tells nobody
                await trio.sleep(0.02)

    def carrier_arguments(self) -> Sequence[str]:
        """What QEMU is told of the carrier."""
        if self.config.carrier == "dbus-vmstate":
            return "-object", json.dumps(vmstate_object(self.folder / "vmstate", "oobvmstate"))
        return companion_arguments(self.folder / "vhost", addr="0x1c", listens=self.config.listens)

    @property
    def _behind(self) -> range:
        return range(self.config.functions - self.config.behind, self.config.functions)

    def _device(self, number: int, name: str) -> VfioUserDevice:
        properties: dict[str, Any] = {"bus": f"rp{number}", "addr": "0x0"} if number in self._behind else {}
        if self.config.keep:
            # A start of the daemon takes a second, and longer on a machine that is busy; stock QEMU waits for five.
            properties["x-msg-timeout"] = 30_000
        return VfioUserDevice(self.folder / f"{name}.sock", id=name, slot=SLOT + number, properties=properties)

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
        config = QemuConfig(
            [self._device(number, name) for number, name in enumerate(self.config.names)],
            accel=self.config.accel,
            cpus=self.config.cpus,
            memory_mib=MEMORY_MIB,
            trace=(),
            extra=extra,
            early=[word for number in self._behind for word in ("-device", _root_port(number))],
            kernel_arguments=self.config.kernel_arguments,
        )
        name = f"qemu{self._machines}"
        async with start_qemu(assets, config, self.folder, name=name) as qemu:
            on = [{"capability": each, "state": True} for each in ("events", "return-path")]
            await qemu.qmp.execute("migrate-set-capabilities", capabilities=on)
            yield qemu


def _root_port(number: int) -> str:
    return f"pcie-root-port,id=rp{number},chassis={number},slot={number},bus=pcie.0,addr={SLOT + number:#x}"


def make_disk(workdir: Path, functions: int = 1) -> Path:
    """The disk that both hosts see; several functions have one each."""
    image = workdir / "disk"
    for name in [image] if functions == 1 else [workdir / f"disk.{number}" for number in range(functions)]:
        with name.open("wb") as file:
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
    device = [
        "--functions",
        str(config.functions),
        "--image",
        str(disk),
        "--shared-image",
        "--device-only",
        *config.soc,
    ]
    program = (sys.executable, "-m", "vmbed.omissions", config.omits) if config.omits else PROGRAM
    async with AsyncExitStack() as stack:
        simulator = (sys.executable, "-m", "vmbed.patient") if config.keep else PROGRAM
        await stack.enter_async_context(service(folder, "soc", [*simulate, *device, *config.soc], simulator))
        agent = await stack.enter_async_context(
            service(folder, "agent", [*simulate, "--agent-only", f"--agent-listen={address}"])
        )
        keeper = ["keep", "--max-starts", "100", "--", *PROGRAM] if config.keep else []
        serve = [*keeper, "serve", "--config", str(file)]
        daemon = await stack.enter_async_context(service(folder, "daemon", serve, program))
        if config.keep:
            stack.push_async_callback(stop_keeper, daemon)
        yield Host(folder, config, daemon, agent)


def _configuration(folder: Path, agent: str, config: HostConfig) -> str:
    listens = "qemu" if config.listens else "daemon"
    functions = [
        f'[[function]]\nname = "{name}"\nsocket = "{folder / name}.sock"\n'
        f'device = {{ kind = "vfio-user", socket = "{folder / "soc" / f"f{number}"}.sock" }}\n'
        f'agent = {{ kind = "msgpack-rpc", address = "{agent}", function = "f{number}" }}\n'
        for number, name in enumerate(config.names)
    ]
    return (
        f'[daemon]\ncontrol_socket = "{folder / "control"}"\nlog_level = "info"\n'
        + "".join(functions)
        + f'[[vm]]\nname = "guest"\nfunctions = {json.dumps(config.names)}\nmonitor = "{folder / "monitor"}"\n'
        + f'dbus_vmstate = "{folder / "vmstate"}"\nvhost_user_fs = "{folder / "vhost"}"\n'
        + f'vhost_user_fs_listens = "{listens}"\n{config.more}'
    )


async def capability(qemu: Qemu, name: str, state: bool) -> None:
    """Switch one of a QEMU's capabilities for migrations."""
    await qemu.qmp.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])


async def migrate(source: Qemu, destination: Qemu, stream: Path, *, bandwidth: int = 1 << 30) -> None:
    """Begin a migration: by `migrate`, and nothing else."""
    await destination.qmp.execute("migrate-incoming", uri=f"unix:{stream}")
    await source.qmp.execute("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=300)
    await source.qmp.execute("migrate", uri=f"unix:{stream}")


async def status(qemu: Qemu, *wanted: str, seconds: float = HOP_S) -> str:
    """Wait until a QEMU's migration is in one of some states; returns which."""
    while (now := (await qemu.qmp.event("MIGRATION", seconds))["data"]["status"]) not in wanted:
        pass
    return str(now)


async def finished(qemu: Qemu) -> str:
    """Wait until a QEMU's migration is over; returns how it ended."""
    return await status(qemu, *FINAL)


async def shown(qemu: Qemu) -> str:
    """What a QEMU says that its VM does."""
    return str((await qemu.qmp.execute("query-status"))["status"])
