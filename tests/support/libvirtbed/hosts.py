"""Two hosts, and the guest that is on one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from libvirtbed.domain import COMMANDS, CONSOLE, NAME, Domain
from libvirtbed.host import Host, HostConfig, Said, libvirt_host
from vmbed.assets import Assets
from vmbed.assets.libvirt import Libvirt
from vmbed.guest import Guest
from vmbed.lines import LineListener

__all__ = ["Place", "place", "start_domain"]

#: The flags that every live migration here has.
LIVE = ("--live", "--p2p")


@dataclass(frozen=True, slots=True)
class Place:
    """A host, and where a guest on it has its command channel.

    Args:
        host: the host.
        commands: where the guest's QEMU connects.
    """

    host: Host
    commands: LineListener

    async def guest(self) -> Guest:
        """The guest of the next QEMU that comes, or has come, to this host."""
        channel = await self.commands.accept(self.host.process)
        return Guest(channel, self.host.process, self.host.shared / CONSOLE.name)

    async def migrate(self, to: Place, *flags: str) -> Said:
        """Have libvirt move the domain, over a socket instead of a network.

        Args:
            to: the destination.
            flags: beside `LIVE`.
        """
        channel = to.host.shared / "migration"
        channel.unlink(missing_ok=True)
        uri = f"unix://{channel}"
        return await self.host.ask("migrate", NAME, to.host.uri, *LIVE, "--migrateuri", uri, *flags)


@asynccontextmanager
async def place(
    name: str, assets: Assets, libvirt: Libvirt, workdir: Path, config: HostConfig | None = None
) -> AsyncIterator[Place]:
    """Start a host that waits for guests.

    Args:
        name: its name, and its folder's.
        assets: the bed's.
        libvirt: libvirt's tree.
        workdir: for its files; its path must be short.
        config: how it is set up.
    """
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(libvirt_host(name, assets, libvirt, workdir, config))
        commands = await stack.enter_async_context(LineListener(host.shared / COMMANDS.name))
        commands.path.chmod(0o777)
        yield Place(host, commands)


async def start_domain(at: Place, assets: Assets, domain: Domain) -> Guest:
    """Define a domain and start it; returns its guest once it takes commands."""
    description = at.host.shared / "domain.xml"
    description.write_text(domain.xml(assets), encoding="utf-8")
    await at.host.virsh("define", str(description))
    await at.host.virsh("start", NAME)
    guest = await at.guest()
    await guest.ready()
    return guest
