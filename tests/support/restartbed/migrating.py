"""A source and a destination in one daemon under a keeper, before devices and agents that outlive each daemon.

So each restart disturbs both sides at once. Who runs is asked of the agents, never of a daemon.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from killbed.hosts import Host
from restartbed import KeptDaemon
from vfiouser_agents.api import AgentState

_FUNCTION = """\
[[function]]
name = "{name}"
socket = "{place}/{name}.sock"
device = {{ kind = "vfio-user", socket = "{place}/{name}/soc/f0.sock" }}
agent = {{ kind = "msgpack-rpc", address = "unix://{place}/{name}/agent.sock", function = "f0" }}
migration = {{ v1_data_size = "64K", retry_s = 0.02 }}
"""


class MigratingBed:
    """Two hosts' devices and agents, and the keeper with its daemon.

    Args:
        place: a directory of its own.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._starts = 1
        (place / "disk").write_bytes(bytes(1 << 20))
        self.source, self.destination = self.hosts = Host(place, "a"), Host(place, "b")
        self._services = [service for host in self.hosts for service in (host.device, host.agent)]
        for kind in ("device", "agent"):
            begun = [(service, service.begin()) for service in (getattr(host, kind) for host in self.hosts)]
            for service, notify in begun:
                service.await_ready(notify)
        (place / "daemon.toml").write_text("".join(_FUNCTION.format(place=place, name=name) for name in "ab"))
        self.daemon = KeptDaemon(place, None, serve=["--config", str(place / "daemon.toml")])

    async def ready(self) -> None:
        """Wait until both sides can be used."""
        await self.daemon.lives(1)

    def socket(self, host: Host) -> Path:
        """Where the client of a host's function connects."""
        return self._place / ("a.sock" if host is self.source else "b.sock")

    async def disturb(self, *, kill: bool) -> None:
        """Restart the daemon in order, or kill it; returns when the next one is ready."""
        if kill:
            self.daemon.kill()
        else:
            self.daemon.restart()
        await self.again()

    async def again(self) -> None:
        """Wait until the daemon after this one is ready."""
        self._starts += 1
        await self.daemon.lives(self._starts)

    def freeze(self, host: Host) -> None:
        """The host's agent does nothing more, so no step ends."""
        os.kill(host.agent.pid, signal.SIGSTOP)

    def thaw(self, host: Host) -> None:
        """It goes on."""
        os.kill(host.agent.pid, signal.SIGCONT)

    async def running(self) -> tuple[bool, bool]:
        """Whether source and destination run."""
        states = [(await host.status()).state for host in self.hosts]
        return states[0] is AgentState.RUNNING, states[1] is AgentState.RUNNING

    def close(self) -> str:
        """End all of it; returns what the daemons logged."""
        log = self.daemon.close()
        for service in reversed(self._services):
            service.close()
        return log
