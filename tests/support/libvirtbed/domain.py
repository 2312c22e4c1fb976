"""A domain whose guest is the bed's: its command channel is a socket on which the test listens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from libvirtbed.host import EMULATOR, SHARED
from vmbed.assets import Assets, bootable
from vmbed.qemu import KERNEL_ARGUMENTS

__all__ = ["COMMANDS", "CONSOLE", "NAME", "Domain"]

NAME = "vm1"
COMMANDS = SHARED / "commands"
CONSOLE = SHARED / "console"

_XML = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <uuid>aaaaaaaa-0000-4000-8000-000000000001</uuid>
  <memory unit='MiB'>{memory}</memory>
  {backing}
  <vcpu>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path='{commands}'/><target port='1'/></serial>
    <memballoon model='none'/>
  </devices>
  {commandline}
</domain>
"""
SHARED_MEMORY = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


@dataclass(frozen=True, slots=True)
class Domain:
    """What a domain is.

    Args:
        arguments: words for QEMU beyond libvirt's own.
        backing: the element `memoryBacking`, if guest memory is to be shared.
        commandline: the element `qemu:commandline`, instead of `arguments`.
        memory_mib: guest memory.
        cpus: the guest's.
        machine: QEMU's machine type.
    """

    arguments: Sequence[str] = ()
    backing: str = SHARED_MEMORY
    commandline: str = ""
    memory_mib: int = 256
    cpus: int = 2
    machine: str = "q35"

    def xml(self, assets: Assets) -> str:
        """The domain as libvirt takes it."""
        words = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in self.arguments)
        commandline = self.commandline or (f"<qemu:commandline>{words}</qemu:commandline>" if words else "")
        return _XML.format(
            name=NAME,
            memory=self.memory_mib,
            cpus=self.cpus,
            backing=self.backing,
            machine=self.machine,
            kernel=bootable(assets.kernel),
            initramfs=assets.initramfs,
            cmdline=escape(KERNEL_ARGUMENTS),
            emulator=EMULATOR,
            console=CONSOLE,
            commands=COMMANDS,
            commandline=commandline,
        )
