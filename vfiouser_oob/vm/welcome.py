"""Whether a VM that is about to come to this host would be welcome, from the domain and the daemon's status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfiouser_oob.config.vms import VmConfig
from vfiouser_oob.vm.domain_xml import DomainSockets

#: What keys of the configuration are called in QEMU.
CARRIERS: Mapping[str, str] = {"dbus_vmstate": "dbus-vmstate", "vhost_user_fs": "vhost-user-fs-pci"}
_NEXT = "see `vfiouser-oob snippet libvirt`"


def missing_parts(sockets: DomainSockets, vm: VmConfig) -> str:
    """What a domain lacks without which its functions' state would be lost; empty if nothing.

    Args:
        sockets: all that its QEMU is told of.
        vm: the VM on this host.
    """
    if "monitor" not in sockets.others:
        return f"the domain has no monitor for the daemon, so its functions would be lost in a migration; {_NEXT}"
    theirs = [kind for kind in CARRIERS if kind in sockets.others]
    if not theirs:
        kinds = " or ".join(CARRIERS.values())
        return f"the domain has no carrier ({kinds}), so its functions would be lost in a migration; {_NEXT}"
    if not set(theirs) & vm.sockets.keys():
        ours = ", ".join(CARRIERS[kind] for kind in CARRIERS if kind in vm.sockets)
        return f"the domain has {CARRIERS[theirs[0]]}, and VM {vm.name} on this host takes {ours} only"
    return ""


def host_refusal(status: Mapping[str, Any], name: str) -> str:
    """Why a VM cannot come, as far as the daemon knows; empty if it can.

    Args:
        status: the daemon's.
        name: the VM's.
    """
    vm = _vm(status, name)
    if vm is None:
        return f"the daemon on this host does not serve VM {name} yet: it was started with another configuration"
    if vm["qemu"] is not None:
        return f"VM {name} has a QEMU on this host already (process {vm['qemu']['pid']}, it is {vm['phase']})"
    functions = {each["name"]: each for each in status.get("functions", [])}
    for each in vm["functions"]:
        refusal = _function_refusal(each["name"], functions.get(each["name"]))
        if refusal:
            return refusal
    return ""


def _function_refusal(name: str, function: Mapping[str, Any] | None) -> str:
    if function is None:
        return f"this host does not serve function {name}"
    if function.get("client") is not None:
        return f"process {function['client']['pid']} uses function {name} on this host"
    migration = function.get("migration")
    if migration is None:
        return f"function {name} has no agent on this host, so it cannot take a state"
    if migration["blocked"]:
        return f"function {name} cannot take a state on this host: {migration['blocked']}"
    if migration["agent_away_since"]:
        return f"the agent of function {name} on this host has not answered since {migration['agent_away_since']}"
    return "" if migration["migratable"] else f"function {name} cannot take a state on this host"


def arrival_refusal(status: Mapping[str, Any], name: str) -> str:
    """Why a QEMU that waits for a VM cannot be given it yet; empty if it can.

    Args:
        status: the daemon's.
        name: the VM's.
    """
    vm = _vm(status, name)
    if vm is None:
        return f"the daemon on this host does not serve VM {name}"
    if vm["qemu"] is None:
        return f"QEMU has not connected the monitor of VM {name}"
    return "" if vm["carriers"] else f"QEMU has not connected a carrier of VM {name}"


def _vm(status: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((vm for vm in status.get("vms", []) if vm["name"] == name), None)
