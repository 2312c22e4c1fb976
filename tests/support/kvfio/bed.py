"""Daemons and clients as processes of the guest, and the devices that they are about."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from vfiouser_oob.cli.main import main as command
from vfiouser_oob.config.schema import (
    AgentConfig,
    DaemonConfig,
    FunctionConfig,
    KernelVfioDevice,
    LogLevel,
    RegionPolicy,
    VfioInterface,
)
from vfiouser_oob.control.client import ControlClient, ControlError
from vfiouser_oob.control.server import serve_control
from vfiouser_oob.observability import log
from vfiouser_oob.server.daemon import run_daemon

SYSFS = Path("/sys")
RUN = Path("/run/kvfio")
#: The machine's devices, as the test that boots it puts them.
NVME = "0000:00:04.0"
SHARED = ("0000:00:06.0", "0000:00:06.1")
EDU = "0000:00:09.0"
IGB = "0000:01:00.0"
#: A device like that, behind a root complex that the IOMMU leaves alone. Its interrupts would not arrive.
BYPASSED = "0000:41:00.0"
#: By which interface daemons open their function; whoever started this program says so.
INTERFACE = VfioInterface(os.environ.get("KVFIO_INTERFACE", "group"))
#: What daemons log. Whoever started this program says so; "debug" costs an emulated processor as much as serving does.
LOGGED = LogLevel(os.environ.get("KVFIO_LOG", "info"))
IOMMU_NODE = Path("/dev/iommu")
NOBODY = 65534
START_S = 20.0


def prepare() -> None:
    """Make the folder of sockets and logs."""
    RUN.mkdir(parents=True, exist_ok=True)
    RUN.chmod(0o1777)


def collect_children() -> None:
    """Take the exit status of children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@dataclass
class Daemon:
    """A running daemon."""

    pid: int
    socket: Path
    control: Path
    log: Path

    def status(self) -> dict[str, Any]:
        """What `status` says of its function."""
        with ControlClient(self.control) as client:
            function: dict[str, Any] = dict(client.status()["functions"][0])
            return function

    def kill(self) -> None:
        """End it as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@contextmanager
def daemon(
    function: str,
    *,
    policy: RegionPolicy = RegionPolicy.AUTO,
    interface: VfioInterface = INTERFACE,
    migrates: bool = False,
    uid: int = 0,
    memlock: int | None = None,
    name: str = "f0",
    reply_budget_s: float = 4.0,
    logged: LogLevel = LOGGED,
) -> Iterator[Daemon]:
    """Run a daemon that serves one function, named by address or UUID, and has it migrated by its driver if that is
    wanted; it must end with status 0 unless the block has killed it.
    """
    socket, control, log_file = RUN / f"{name}.sock", RUN / f"{name}.control", RUN / f"{name}.log"
    for path in (socket, control, log_file):
        path.unlink(missing_ok=True)
    kind = "bdf" if ":" in function else "mdev"
    config = DaemonConfig(
        functions=(
            FunctionConfig(
                name=name,
                device=KernelVfioDevice(**{kind: function}, region_policy=policy, interface=interface),
                agent=AgentConfig(kind="kernel-vfio", function=function) if migrates else None,
                socket=socket,
                socket_mode=0o666,
                socket_group=None,
            ),
        ),
        control_socket=control,
        log_level=logged,
        reply_budget_s=reply_budget_s,
    )
    pid = os.fork()
    if pid == 0:
        os._exit(_serve(config, log_file, uid, memlock))
    running = Daemon(pid, socket, control, log_file)
    _wait_for(running)
    yield running
    if _is_alive(pid):
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
        assert 0 == os.waitstatus_to_exitcode(status), "the daemon did not end well"


def _serve(config: DaemonConfig, log_file: Path, uid: int, memlock: int | None) -> int:
    fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    if memlock is not None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    _become(uid)
    log.configure(config.log_level)
    try:
        trio.run(partial(run_daemon, config, control=serve_control))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _become(uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def _wait_for(running: Daemon) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            running.status()
            return
        except ControlError:
            assert time.monotonic() < until, "the daemon does not answer"
            assert _is_alive(running.pid), "the daemon ended at once"
            time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


def client(work: Callable[[Path], Awaitable[None]], served: Daemon, *, uid: int = NOBODY) -> None:
    """Run a client in a process of its own, as another user; it must succeed."""
    with background_client(work, served, uid=uid):
        pass


@contextmanager
def background_client(work: Callable[[Path], Awaitable[None]], served: Daemon, *, uid: int = NOBODY) -> Iterator[None]:
    """Run a client beside the block; it must have succeeded at the end."""
    pid = _start_client(work, served, uid)
    yield
    _, status = os.waitpid(pid, 0)
    assert 0 == os.waitstatus_to_exitcode(status), "the client failed"


@contextmanager
def doomed_client(work: Callable[[Path], Awaitable[None]], served: Daemon, *, uid: int = NOBODY) -> Iterator[int]:
    """Run a client beside the block, which has to kill it; gives its process id."""
    pid = _start_client(work, served, uid)
    yield pid
    _, status = os.waitpid(pid, 0)
    assert -signal.SIGKILL == os.waitstatus_to_exitcode(status), "the client ended by itself"


def _start_client(work: Callable[[Path], Awaitable[None]], served: Daemon, uid: int) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _become(uid)
        status = 0
        try:
            trio.run(work, served.socket)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return pid


def bind(*bdfs: str) -> None:
    """Bind functions to vfio-pci by our own command."""
    for bdf in bdfs:
        assert 0 == command(["bind", bdf]), f"binding {bdf} failed"


def unbind(*bdfs: str) -> None:
    """Give functions back by our own command."""
    for bdf in bdfs:
        assert 0 == command(["unbind", bdf]), f"unbinding {bdf} failed"


def driver_of(bdf: str) -> str | None:
    """The driver that a function is bound to."""
    link = SYSFS / "bus/pci/devices" / bdf / "driver"
    return os.path.basename(os.readlink(link)) if link.exists() else None


def group_node(bdf: str) -> Path:
    """The node of a function's IOMMU group."""
    group = os.path.basename(os.readlink(SYSFS / "bus/pci/devices" / bdf / "iommu_group"))
    return Path("/dev/vfio") / group


def own_node(bdf: str) -> Path:
    """The function's own node."""
    names = [path.name for path in (SYSFS / "bus/pci/devices" / bdf / "vfio-dev").iterdir()]
    return Path("/dev/vfio/devices") / names[0]


@contextmanager
def given_away(bdf: str) -> Iterator[None]:
    """Let nobody's daemon open the function, by the interface that this run is about."""
    nodes = [own_node(bdf), IOMMU_NODE] if INTERFACE is VfioInterface.CDEV else [group_node(bdf)]
    for node in nodes:
        os.chown(node, NOBODY, NOBODY)
    try:
        yield
    finally:
        for node in nodes:
            os.chown(node, 0, 0)


def config_space(bdf: str) -> bytes:
    """The first 256 bytes of a function's config space, as the hardware has them."""
    with (SYSFS / "bus/pci/devices" / bdf / "config").open("rb") as config:
        return config.read(256)


def command_register(bdf: str) -> int:
    """The function's command register, as the hardware has it."""
    return int.from_bytes(config_space(bdf)[4:6], "little")
