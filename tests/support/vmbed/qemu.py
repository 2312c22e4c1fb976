"""Stock QEMU as a child process, with its vfio-user client attached to given sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vmbed.assets import Assets, bootable
from vmbed.errors import BedError
from vmbed.guest import Guest
from vmbed.lines import LineListener
from vmbed.processes import LoggedProcess, logged_process
from vmbed.qmp import Qmp
from vmbed.qtest import Qtest

__all__ = ["GUEST_QEMU", "TRACE_EVENTS", "Qemu", "QemuConfig", "VfioUserDevice", "machine", "start_qemu"]

#: Where QEMU itself is in a guest that has it.
GUEST_QEMU = Path("/qemu")
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check"
    # Security modules, self tests, and keys that no module of ours is signed by: a quarter of a boot's work.
    " lsm= audit=0 cryptomgr.notests initcall_blacklist=load_system_certificate_list"
)
# Every trapped access, and every mapped area, of a vfio-user region as QEMU sees them: few lines each,
# and independent of what the server counts.
TRACE_EVENTS = ("vfio_region_read", "vfio_region_write", "vfio_region_mmap", "vfio_msix_vector_do_use")


@dataclass(frozen=True, slots=True)
class VfioUserDevice:
    """One `vfio-user-pci` device: the server's socket, and where the device sits in the machine."""

    socket: Path
    id: str = "f0"
    slot: int = 3
    properties: Mapping[str, Any] = field(default_factory=dict)

    def argument(self) -> str:
        """Return the value for `-device`."""
        return json.dumps(
            {
                "driver": "vfio-user-pci",
                "id": self.id,
                "bus": "pcie.0",
                "addr": f"{self.slot:#x}",
                "socket": {"path": str(self.socket), "type": "unix"},
                **self.properties,
            }
        )


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """What machine to run.

    Attributes:
        devices: the vfio-user devices.
        accel: `tcg` boots the guest; `qtest` has no CPU, the test drives the machine's buses.
        shared_memory: guest RAM in a memfd that the server is given; else the server is given none
            and must ask for every byte by message.
        memory_mib: guest RAM.
        cpus: guest CPUs; the nvme driver makes a queue for each.
        trace: trace events of QEMU to log; names and patterns of `-trace`.
        extra: further arguments.
        early: arguments that come before the devices, such as an IOMMU.
        kernel: instead of the assets' own.
        initramfs: instead of the assets' own.
        kernel_arguments: for the guest's kernel, beside the bed's own.
    """

    devices: Sequence[VfioUserDevice]
    accel: Literal["tcg", "qtest"] = "tcg"
    shared_memory: bool = True
    memory_mib: int = 256
    cpus: int = 2
    trace: Sequence[str] = TRACE_EVENTS
    extra: Sequence[str] = ()
    early: Sequence[str] = ()
    kernel: Path | None = None
    initramfs: Path | None = None
    kernel_arguments: str = ""


class Qemu:
    """A running QEMU; made by `start_qemu`."""

    def __init__(self, process: LoggedProcess, qmp: Qmp, guest: Guest | None, qtest: Qtest | None, trace: Path) -> None:
        self.process = process
        self.qmp = qmp
        self._guest = guest
        self._qtest = qtest
        self._trace = trace

    @property
    def guest(self) -> Guest:
        """The booted guest; only with accel `tcg`."""
        if self._guest is None:
            raise BedError("a machine under qtest has no guest")
        return self._guest

    @property
    def qtest(self) -> Qtest:
        """The machine's buses; only with accel `qtest`."""
        if self._qtest is None:
            raise BedError("only a machine under qtest has its buses driven from outside")
        return self._qtest

    def traced(self, event: str) -> list[str]:
        """Return the lines logged so far for a trace event; QEMU writes each one out at once."""
        if not self._trace.exists():
            return []
        text = self._trace.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.startswith(f"{event} ")]

    async def kill(self) -> None:
        """End QEMU as a crash would."""
        await self.process.kill()


@asynccontextmanager
async def start_qemu(assets: Assets, config: QemuConfig, workdir: Path, *, name: str = "qemu") -> AsyncIterator[Qemu]:
    """Start QEMU and connect to it; it is killed at the end.

    Args:
        assets: where QEMU, kernel and initramfs are.
        config: the machine.
        workdir: for sockets and logs; its path must be short (UNIX socket addresses are).
        name: prefix of the files, for tests that start several.

    Raises:
        BedError: QEMU ended at once, for example because it refused the device; with its words.
    """
    trace = workdir / f"{name}.trace"
    async with AsyncExitStack() as stack:
        qmp_listener = await stack.enter_async_context(LineListener(workdir / f"{name}.qmp"))
        drive_listener = await stack.enter_async_context(LineListener(workdir / f"{name}.{config.accel}"))
        console = workdir / f"{name}.console"
        argv = [
            *machine(assets, config),
            *("-chardev", f"socket,id=qmp,path={qmp_listener.path}", "-mon", "chardev=qmp,mode=control"),
            *(_boot(assets, config, console, drive_listener.path) if config.accel == "tcg" else ()),
            *(("-qtest", f"unix:{drive_listener.path}") if config.accel == "qtest" else ()),
            *_tracing(config.trace, trace),
            *config.extra,
        ]
        log = workdir / f"{name}.log"
        process = await stack.enter_async_context(logged_process(name, argv, log, env=assets.qemu_environment))
        qmp = Qmp(await qmp_listener.accept(process), log)
        driver = await drive_listener.accept(process)
        guest = Guest(driver, process, console) if config.accel == "tcg" else None
        qtest = Qtest(driver, log) if config.accel == "qtest" else None
        await qmp.negotiate()
        yield Qemu(process, qmp, guest, qtest, trace)


def machine(assets: Assets, config: QemuConfig) -> list[str]:
    """The command and its arguments for the machine, without anything that drives or watches it.

    Args:
        assets: where QEMU is.
        config: the machine.
    """
    argv = [*assets.qemu_command, "-accel", config.accel, "-machine", "q35", "-cpu", "max"]
    argv += ["-smp", str(config.cpus), "-m", str(config.memory_mib)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none"]
    if config.shared_memory:
        argv += ["-object", f"memory-backend-memfd,id=ram,size={config.memory_mib}M,share=on"]
        argv += ["-machine", "memory-backend=ram"]
    argv += config.early
    for device in config.devices:
        argv += ["-device", device.argument()]
    return argv


def _boot(assets: Assets, config: QemuConfig, console: Path, commands: Path) -> list[str]:
    """The kernel, and two serial ports: the kernel's messages into a file, and the guest's commands."""
    kernel = bootable(config.kernel or assets.kernel)
    argv = ["-kernel", str(kernel), "-initrd", str(config.initramfs or assets.initramfs)]
    argv += ["-append", f"{KERNEL_ARGUMENTS} {config.kernel_arguments}".strip()]
    argv += ["-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=commands,path={commands}", "-serial", "chardev:commands"]
    return argv


def _tracing(events: Sequence[str], log: Path) -> list[str]:
    argv = ["-D", str(log)] if events else []
    for event in events:
        argv += ["-trace", event]
    return argv
