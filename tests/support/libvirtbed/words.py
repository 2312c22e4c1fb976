"""Domains as libvirt hands them to a hook, and statuses as a daemon has them, of which tests change a part."""

from __future__ import annotations

import json
from typing import Any
from xml.sax.saxutils import quoteattr

__all__ = ["domain_of", "status_of"]

_DOMAIN = """\
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <metadata><nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'><nova:name>a &amp; b</nova:name>
  </nova:instance></metadata>
  <qemu:commandline>{words}</qemu:commandline>
</domain>
"""


def domain_of(
    folder: str = "/run/vfio-user", functions: tuple[str, ...] = ("nvme0",), *, monitor: bool = True, carrier: str = "V"
) -> str:
    """A domain as it comes from its source.

    Args:
        folder: where its sockets are there.
        functions: its functions.
        monitor: whether it has one.
        carrier: V, F, both or none.
    """
    words = []
    for name in functions:
        device = {"driver": "vfio-user-pci", "id": name, "socket": {"type": "unix", "path": f"{folder}/{name}.sock"}}
        words += ["-device", json.dumps(device)]
    words += ["-device", '{"driver":"edu","id":"other"}', "-chardev", f"socket,id=console,path={folder}/console"]
    if monitor:
        words += ["-chardev", f"socket,id=oobmonitor,path={folder}/web.monitor,server=off,reconnect-ms=500"]
    if "V" in carrier:
        address = f"unix:path={folder}/web.vmstate"
        words += ["-object", json.dumps({"qom-type": "dbus-vmstate", "id": "oobvmstate", "addr": address})]
    if "F" in carrier:
        words += ["-chardev", f"socket,id=oobvhost,path={folder}/web.vhost"]
    return _DOMAIN.format(words="".join(f"<qemu:arg value={quoteattr(word)}/>" for word in words))


def status_of(vm: dict[str, Any] | None = None, function: dict[str, Any] | None = None, **migration: Any) -> Any:
    """A daemon's status in which all is well and no QEMU has connected.

    Args:
        vm: what is otherwise with the VM `web`.
        function: what is otherwise with its function `nvme0`.
        migration: what is otherwise with the function's migration.
    """
    well = {"migratable": True, "blocked": None, "agent_away_since": None}
    return {
        "daemon": {"version": "0", "pid": 1, "started": "", "functions": 1},
        "functions": [{"name": "nvme0", "client": None, "migration": well | migration, **(function or {})}],
        "vms": [
            {
                "name": "web",
                "phase": "absent",
                "qemu": None,
                "carrier": "dbus-vmstate",
                "carriers": [],
                "functions": [{"name": "nvme0"}],
                **(vm or {}),
            }
        ],
    }
