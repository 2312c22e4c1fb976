"""The `vm` tables: VMs whose QEMU has no migration of its own for vfio-user functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.tables import key, section
from vfiouser_oob.config.values import (
    ABSOLUTE_SOCKET_PATH,
    GROUP,
    MODE,
    NAME,
    NAMES,
    SOCKET_PATH_MAX,
    UIDS,
    Word,
    one_of,
    size_of,
)

#: Where the sockets of a VM are unless something else was asked for.
RUNTIME_DIRECTORY = Path("/run/vfio-user")


class CarrierChoice(Word):
    """What carries the functions' state in QEMU's migration stream."""

    AUTO = "auto", "the one of the two with which QEMU was started"
    DBUS_VMSTATE = "dbus-vmstate", "an object in QEMU that the guest does not see; for states up to 256M"
    VHOST_USER_FS = "vhost-user-fs", "a companion device next to the functions; for large states and hardware DMA"


class Listens(Word):
    """Who listens on a socket."""

    DAEMON = "daemon", "QEMU connects"
    QEMU = "qemu", "the daemon connects, even if it restarts under a running VM"


@section
class VmConfig:
    """One VM that is migrated by the `migrate` of a QEMU that knows nothing of it."""

    name: str = key(NAME, "its name in logs and in status; unique")
    functions: tuple[str, ...] = key(
        NAMES,
        "names of the functions that it uses, which are also the ids of their devices in QEMU; a function belongs "
        "to at most one VM",
    )
    monitor: Path | None = key(
        ABSOLUTE_SOCKET_PATH,
        "path of the socket to which QEMU connects a monitor for the daemon; unique",
        default=None,
        unset=f"`{RUNTIME_DIRECTORY}/NAME.monitor`",
    )
    carrier: CarrierChoice = key(
        one_of(CarrierChoice),
        "what carries the functions' state in QEMU's migration stream",
        default=CarrierChoice.AUTO,
    )
    dbus_vmstate: Path | None = key(
        ABSOLUTE_SOCKET_PATH,
        "path of the socket to which QEMU's `dbus-vmstate` object connects; unique",
        default=None,
        unset=f"`{RUNTIME_DIRECTORY}/NAME.vmstate`",
    )
    vhost_user_fs: Path | None = key(
        ABSOLUTE_SOCKET_PATH,
        "path of the socket of QEMU's `vhost-user-fs-pci` device; unique",
        default=None,
        unset=f"`{RUNTIME_DIRECTORY}/NAME.vhost`",
    )
    vhost_user_fs_listens: Listens = key(
        one_of(Listens), "who listens on the socket of the `vhost-user-fs-pci` device", default=Listens.DAEMON
    )
    socket_mode: int = key(MODE, "permission bits of the VM's socket files", default=0o660)
    socket_group: str | None = key(
        GROUP,
        "group of the VM's socket files",
        default=None,
        unset="`kvm`, if the daemon runs as root and that group exists; else the daemon's own",
    )
    allow_uids: tuple[int, ...] | None = key(
        UIDS,
        "users who may run the VM's QEMU, regardless of the files' permissions",
        default=None,
        unset="everyone whom the permissions let in",
    )
    state_max: int = key(
        size_of(64 << 10, 1 << 30),
        "most bytes of state that a VM may bring for all its functions together; `dbus-vmstate` carries at most "
        "256M, and takes seconds for 64M",
        default=64 << 20,
    )
    untracked_max: int = key(
        size_of(0, 256 << 20),
        "most bytes of guest memory that may travel with the state, because the functions wrote them without QEMU's "
        "knowledge; the daemon refuses a migration that needs more",
        default=16 << 20,
    )
    #: Where the VM stands in its configuration file, for messages.
    line: int | None = None

    @property
    def monitor_socket(self) -> Path:
        """Where QEMU connects its monitor."""
        return self.monitor or self._default("monitor")

    @property
    def dbus_vmstate_socket(self) -> Path | None:
        """Where QEMU connects its `dbus-vmstate` object; None if the VM has no use for one."""
        if self.carrier is CarrierChoice.VHOST_USER_FS:
            return None
        return self.dbus_vmstate or self._default("vmstate")

    @property
    def vhost_user_fs_socket(self) -> Path | None:
        """Where QEMU's companion device is met; None if the VM has no use for one."""
        if self.carrier is CarrierChoice.DBUS_VMSTATE:
            return None
        return self.vhost_user_fs or self._default("vhost")

    def _default(self, what: str) -> Path:
        return RUNTIME_DIRECTORY / f"{self.name}.{what}"

    @property
    def sockets(self) -> Mapping[str, Path]:
        """The paths of its sockets, by what they are."""
        paths = {
            "monitor": self.monitor_socket,
            "dbus_vmstate": self.dbus_vmstate_socket,
            "vhost_user_fs": self.vhost_user_fs_socket,
        }
        return {name: path for name, path in paths.items() if path is not None}

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: a function stands there twice, or a path that follows from the name is too long.
        """
        twice = next((name for name in self.functions if self.functions.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"functions names {twice!r} twice")
        for what, path in self.sockets.items():
            if len(str(path).encode()) > SOCKET_PATH_MAX:
                raise ValueError(f"{what} must be given: {path} is too long for the path of a socket")


def check_vms(vms: tuple[VmConfig, ...], functions: frozenset[str], source: str | None) -> None:
    """Refuse VMs that are not apart from each other, or that use functions which there are not.

    Args:
        vms: the VMs.
        functions: the names of all functions.
        source: their origin, for messages.

    Raises:
        ConfigError: there are such.
    """
    owners: dict[str, str] = {}
    names: set[str] = set()
    for vm in vms:
        if vm.name in names:
            raise ConfigError(f"two VMs are named {vm.name!r}", source, vm.line)
        names.add(vm.name)
        for function in vm.functions:
            if function not in functions:
                known = ", ".join(sorted(functions))
                raise ConfigError(
                    f"VM {vm.name!r}: there is no function {function!r} (functions: {known})", source, vm.line
                )
            if function in owners:
                raise ConfigError(
                    f"VM {vm.name!r}: function {function!r} is that of VM {owners[function]!r} already", source, vm.line
                )
            owners[function] = vm.name


def vm_sockets(vms: tuple[VmConfig, ...]) -> Iterator[tuple[VmConfig, str, Path]]:
    """All sockets of VMs: whose, what it is, and where."""
    for vm in vms:
        for what, path in vm.sockets.items():
            yield vm, what, path
