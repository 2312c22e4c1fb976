"""A host: libvirtd in namespaces of its own, with the bed's QEMU.

Nothing of the machine is changed. What libvirtd writes to /etc, /var and /run is in memory, and goes with it; so does
every process that it has started. One folder is the same place to all hosts, and another one to each: below `/run/oob`
a host finds what `Host.shared` is to the test, as two machines have different files under the same name.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT

import trio

from vmbed.assets import Assets
from vmbed.assets.libvirt import LIBRARIES, Libvirt
from vmbed.errors import BedError
from vmbed.notify import NotifySocket
from vmbed.processes import LoggedProcess, deadline, logged_process, tail
from vmbed.stack import CHECKOUT, PROGRAM, environment

__all__ = ["CONFIG", "EMULATOR", "SHARED", "Host", "HostConfig", "Said", "libvirt_host", "why_not"]

#: Where every host has its sockets, as its QEMU sees them.
SHARED = Path("/run/oob")
#: Where a host's hook finds the daemon's configuration.
CONFIG = SHARED / "config.toml"
#: Where libvirt looks for it by itself.
EMULATOR = Path("/usr/bin/qemu-system-x86_64")
#: What libvirt writes files with.
HELPER = Path("/usr/lib/libvirt/libvirt_iohelper")
START_S = 60.0
COMMAND_S = 120.0

_QEMU_CONF = """\
user = "{user}"
group = "{group}"
dynamic_ownership = {dynamic}
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
_LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
log_filters = "1:qemu.qemu_monitor 1:qemu.qemu_migration 1:util.hook 3:*"
log_outputs = "1:file:/var/log/libvirt/libvirtd.log"
unix_sock_rw_perms = "0777"
auth_unix_rw = "none"
auth_unix_ro = "none"
"""
# Debian's libvirtd does not start without the accounts of its package.
# The shell stays: it is the namespace's first process, and so the one that buries QEMUs whose parents have ended.
_SCRIPT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs {scratch}
for tree in etc var usr; do
    mkdir {scratch}/$tree {scratch}/$tree.work
    mount -t overlay -o lowerdir=/$tree,upperdir={scratch}/$tree,workdir={scratch}/$tree.work overlay /$tree
done
mount -t tmpfs tmpfs /run
getent group kvm >/dev/null || echo 'kvm:x:64056:' >>/etc/group
getent group libvirt-qemu >/dev/null || echo 'libvirt-qemu:x:64055:' >>/etc/group
kvm=$(getent group kvm | cut -d: -f3)
getent passwd libvirt-qemu >/dev/null || echo "libvirt-qemu:x:64055:$kvm::/:/bin/false" >>/etc/passwd
mkdir -p /etc/libvirt /var/log/libvirt /run/libvirt {shared} /{libraries}/libvirt /usr/share/libvirt
mount --bind {host}/etc /etc/libvirt
mount --bind {host}/log /var/log/libvirt
mount --bind {host}/run /run/libvirt
mount --bind {host}/oob {shared}
cp {host}/qemu {emulator}
mkdir -p {helper.parent}
cp {host}/helper {helper}
echo VFIOUSER_OOB={shared}/vfiouser-oob VFIOUSER_OOB_CONFIG={config} >/etc/default/vfiouser-oob-libvirt
mount --bind {root}/{libraries}/libvirt /{libraries}/libvirt
mount --bind {root}/usr/share/libvirt /usr/share/libvirt
{libvirtd} &
wait $!
"""


def why_not() -> str | None:
    """Why there can be no such host here; None if there can."""
    if os.geteuid():
        return "a libvirtd of its own needs root"
    if shutil.which("unshare") is None:
        return "there is no unshare (util-linux)"
    probe = ["unshare", "--mount", "--uts", "--pid", "--fork", "sh", "-c", "mount -t tmpfs none /mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces with mounts of their own cannot be made"
    return None


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How a host's libvirtd is set up.

    Args:
        user: runs QEMU.
        group: likewise.
        hook: whether our hook is installed.
    """

    user: str = "root"
    group: str = "root"
    hook: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """What virsh said.

    Args:
        status: its exit status.
        text: its output and errors, in order.
    """

    status: int
    text: str


class Host:
    """A running host; made by `libvirt_host`."""

    def __init__(self, name: str, place: Path, libvirt: Libvirt, process: LoggedProcess) -> None:
        self.name = name
        self.process = process
        self._place = place
        self._libvirt = libvirt

    @property
    def shared(self) -> Path:
        """What `/run/oob` is there."""
        return self._place / "oob"

    @property
    def uri(self) -> str:
        """How to connect to its libvirtd, from anywhere on this machine."""
        return f"qemu+unix:///system?socket={self._place}/run/libvirt-sock"

    @property
    def log(self) -> Path:
        """What its libvirtd wrote."""
        return self._place / "log/libvirtd.log"

    def qemu_log(self, domain: str) -> Path:
        """What a domain's QEMU wrote."""
        return self._place / f"log/qemu/{domain}.log"

    async def ask(self, *arguments: str, seconds: float = COMMAND_S) -> Said:
        """Run virsh on this host to its end, whatever its status."""
        argv = [*self._libvirt.command("usr/bin/virsh"), "-q", "-c", self.uri, *arguments]
        with deadline(seconds, f"end of virsh {shlex.join(arguments)[:60]}", self.log):
            done = await trio.run_process(argv, capture_stdout=True, check=False, stderr=STDOUT)
        return Said(done.returncode, done.stdout.decode(errors="replace").strip())

    async def virsh(self, *arguments: str, seconds: float = COMMAND_S) -> str:
        """Run virsh on this host; returns what it says.

        Raises:
            BedError: it failed.
        """
        said = await self.ask(*arguments, seconds=seconds)
        if said.status != 0:
            logs = [*(self._place / "log/qemu").glob("*.log"), self.log]
            ends = "\n".join(map(tail, logs))
            raise BedError(f"{self.name}: virsh {shlex.join(arguments)}: {said.text}\n{ends}")
        return said.text


@asynccontextmanager
async def libvirt_host(
    name: str, assets: Assets, libvirt: Libvirt, workdir: Path, config: HostConfig | None = None
) -> AsyncIterator[Host]:
    """Start a host; it is killed at the end, with every QEMU that it runs.

    Args:
        name: its name, and its folder's.
        assets: the bed's, for QEMU.
        libvirt: libvirt's tree.
        workdir: for its files; its path must be short (UNIX socket addresses are).
        config: how it is set up.
    """
    place = workdir / name
    for folder in ("etc/hooks/qemu.d", "log", "run", "oob", "scratch"):
        (place / folder).mkdir(parents=True)
    _write(place, assets, libvirt, config or HostConfig())
    async with NotifySocket(place / "notify") as notify:
        argv = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
        argv.append(_script(name, place, libvirt))
        async with logged_process(name, argv, place / "libvirtd.out", env=notify.environment) as process:
            await notify.ready(process, START_S)
            yield Host(name, place, libvirt, process)


def _write(place: Path, assets: Assets, libvirt: Libvirt, config: HostConfig) -> None:
    dynamic = int(config.user != "root")
    (place / "etc/qemu.conf").write_text(_QEMU_CONF.format(user=config.user, group=config.group, dynamic=dynamic))
    (place / "etc/libvirtd.conf").write_text(_LIBVIRTD_CONF.format(uuid=uuid.uuid4()))
    if config.hook:
        hook = place / "etc/hooks/qemu.d/vfiouser-oob"
        shutil.copy(CHECKOUT / "packaging/libvirt/vfiouser-oob", hook)
        program = place / "oob/vfiouser-oob"
        program.write_text(f'#!/bin/sh\nPYTHONPATH={environment()["PYTHONPATH"]} exec {shlex.join(PROGRAM)} "$@"\n')
        program.chmod(0o755)
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in assets.qemu_environment.items())
    emulator = place / "qemu"
    emulator.write_text(f'#!/bin/sh\n{exports}exec {shlex.join(assets.qemu_command)} "$@"\n')
    emulator.chmod(0o755)
    helper = place / "helper"
    helper.write_text(f'#!/bin/sh\nexec {shlex.join(libvirt.command(str(HELPER.relative_to("/"))))} "$@"\n')
    helper.chmod(0o755)


def _script(name: str, place: Path, libvirt: Libvirt) -> str:
    libvirtd = [*libvirt.command("usr/sbin/libvirtd"), "-f", "/etc/libvirt/libvirtd.conf"]
    return _SCRIPT.format(
        name=name,
        scratch=place / "scratch",
        host=place,
        shared=SHARED,
        emulator=EMULATOR,
        helper=HELPER,
        config=CONFIG,
        root=libvirt.root,
        libraries=LIBRARIES,
        libvirtd=shlex.join(libvirtd),
    )
