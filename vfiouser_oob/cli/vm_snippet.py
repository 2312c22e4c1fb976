"""What a VM's QEMU is to be started with, as its own options and as a libvirt domain.

| part | why |
|---|---|
| shared guest memory | functions reach it without a message for each transfer |
| functions under their names, at slots high up | a name is how one is found again; libvirt gives out low slots |
| a monitor that connects to the daemon, again and again | the daemon hears of a migration, whoever began it |
| the carrier | takes the functions' state along in QEMU's own stream |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from xml.sax.saxutils import escape, quoteattr

from vfiouser_oob.cli.function_snippet import memory_locked, qemu_client, qemu_memory
from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.config.schema import DaemonConfig, FunctionConfig
from vfiouser_oob.config.vms import CarrierChoice, Listens, VmConfig
from vfiouser_oob.vm.carriers.dbus_vmstate import vmstate_object
from vfiouser_oob.vm.carriers.vhost_user_fs import companion_arguments
from vfiouser_oob.vm.domain_xml import MONITOR_CHARDEV, VMSTATE_ID

#: The slots of the root bus that functions are given. Libvirt fills it from below and does not know of them; the last
#: one is the chipset's, and the one before is kept for a companion.
SLOTS = range(0x10, 0x1E)
COMPANION_SLOT = 0x1E
#: Milliseconds after which QEMU connects its monitor again.
RECONNECT_MS = 500
ROOT_BUS = "pcie.0"
#: For each kind of domain, the CPU that moves with it.
CPUS: Mapping[str, str] = MappingProxyType({"kvm": "host-model", "qemu": "maximum"})

_DOMAIN = """\
<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='b'>{memory}</memory>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>{allocation}
  </memoryBacking>
  <vcpu>2</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <cpu mode='{cpu}'/>
  <devices>
    <!-- disks, networks and consoles as usual -->
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
{arguments}
  </qemu:commandline>
</domain>"""


def functions_of(config: DaemonConfig, vm: VmConfig) -> tuple[FunctionConfig, ...]:
    """The functions of a VM, in its order."""
    found = (config.function(name) for name in vm.functions)
    return tuple(function for function in found if function is not None)


def carrier_of(vm: VmConfig, functions: Sequence[FunctionConfig]) -> CarrierChoice:
    """What is to carry the state: as configured, else the one that fits.

    Args:
        vm: the VM.
        functions: its functions; a real one writes guest memory where QEMU does not see it, and needs the companion.
    """
    if vm.carrier is not CarrierChoice.AUTO:
        return vm.carrier
    real = any(memory_locked(function) for function in functions)
    return CarrierChoice.VHOST_USER_FS if real else CarrierChoice.DBUS_VMSTATE


def qemu_words(vm: VmConfig, functions: Sequence[FunctionConfig], budget_s: float) -> list[list[str]]:
    """QEMU's options for the functions, the monitor and the carrier, one list of words per option.

    Args:
        vm: the VM.
        functions: its functions.
        budget_s: seconds that the daemon takes at most for a reply.

    Raises:
        ConfigError: they are too many for one bus.
    """
    if len(functions) > len(SLOTS):
        raise ConfigError(
            f"VM {vm.name!r} has {len(functions)} functions, and {len(SLOTS)} fit beside each other on the root bus: "
            f"give the others to another VM, or write the options for them by hand, behind root ports"
        )
    words = [
        ["-device", qemu_client(function, budget_s, id=function.name, bus=ROOT_BUS, addr=f"{slot:#x}")]
        for slot, function in zip(SLOTS, functions, strict=False)
    ]
    path = str(vm.monitor_socket).replace(",", ",,")  # as a chardev's options have it
    words += [
        ["-chardev", f"socket,id={MONITOR_CHARDEV},path={path},server=off,reconnect-ms={RECONNECT_MS}"],
        ["-object", json.dumps({"qom-type": "monitor-qmp", "id": "oobmon", "chardev": MONITOR_CHARDEV})],
    ]
    return words + _carrier_words(vm, carrier_of(vm, functions))


def _carrier_words(vm: VmConfig, carrier: CarrierChoice) -> list[list[str]]:
    if carrier is CarrierChoice.VHOST_USER_FS and vm.vhost_user_fs_socket is not None:
        listens = vm.vhost_user_fs_listens is Listens.QEMU
        words = companion_arguments(vm.vhost_user_fs_socket, listens=listens, bus=ROOT_BUS, addr=f"{COMPANION_SLOT:#x}")
        return [list(words[:2]), list(words[2:])]
    assert vm.dbus_vmstate_socket is not None
    return [["-object", json.dumps(vmstate_object(vm.dbus_vmstate_socket, VMSTATE_ID))]]


def qemu_options(config: DaemonConfig, vm: VmConfig, memory: int, budget_s: float) -> list[list[str]]:
    """All of QEMU's options that a VM needs for its functions.

    Args:
        config: the daemon's configuration.
        vm: the VM.
        memory: bytes of guest memory.
        budget_s: seconds that the daemon takes at most for a reply.
    """
    functions = functions_of(config, vm)
    locked = any(map(memory_locked, functions))
    return [*qemu_memory(memory, locked=locked), *qemu_words(vm, functions, budget_s)]


def libvirt_domain(config: DaemonConfig, vm: VmConfig, memory: int, budget_s: float, *, kind: str) -> str:
    """A domain that has a VM's functions and nothing else; the user's own gets its parts.

    Args:
        config: the daemon's configuration.
        vm: the VM.
        memory: bytes of guest memory.
        budget_s: seconds that the daemon takes at most for a reply.
        kind: of the domain, such as kvm.
    """
    functions = functions_of(config, vm)
    words = [word for option in qemu_words(vm, functions, budget_s) for word in option]
    return _DOMAIN.format(
        kind=kind,
        name=escape(vm.name),
        memory=memory,
        allocation="\n    <allocation mode='immediate'/>" if any(map(memory_locked, functions)) else "",
        cpu=CPUS[kind],
        arguments="\n".join(f"    <qemu:arg value={_quoted(word)}/>" for word in words),
    )


def _quoted(word: str) -> str:
    # JSON is full of double quotes: in single ones it stays readable.
    return quoteattr(word) if "'" in word else f"'{escape(word)}'"
