"""The processes: per host a device, its agent and a daemon; and clients."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import trio

from forkserver import Forked, fork_program
from vfiouser_agents.adapters.msgpack_rpc import MsgpackRpcAgent
from vfiouser_agents.api import AgentState, Status
from vfiouser_agents.errors import AgentError
from vfiouser_agents.rpc.endpoint import parse_address
from vfiouser_oob.control.client import ControlClient

_READY_S = 60.0
_STATE_SIZE = 1 << 20
_CONFIG = """\
[daemon]
control_socket = "{place}/control.sock"
reply_budget_s = 1.5
[[function]]
name = "f0"
socket = "{place}/f0.sock"
device = {{ kind = "vfio-user", socket = "{place}/soc/f0.sock" }}
agent = {{ kind = "msgpack-rpc", address = "unix://{place}/agent.sock", function = "f0" }}
migration = {{ v1_data_size = "64K", call_s = 0.5, stop_s = 1.0, data_s = 1.0, retry_s = 0.05 }}
"""


class Service:
    """A process that reports its readiness as systemd's services do.

    Args:
        name: what to call it.
        module: run as ``python -m`` does.
        arguments: its arguments.
        directory: for its log and the socket on which it reports.
        environment: what it is told beside our own environment.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self._environment = environment
        self._module = module
        self._arguments = arguments
        self._directory = directory
        self._process: Forked | None = None

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self._directory / f"{self.name}.log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def begin(self) -> socket.socket:
        """Start it; returns the socket on which it will report."""
        path = self._directory / f"{self.name}.notify"
        path.unlink(missing_ok=True)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        notify.bind(str(path))
        notify.settimeout(_READY_S)
        search = os.pathsep.join(path for path in sys.path if path)
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = fork_program(
                self._module,
                self._arguments,
                env={**os.environ, **self._environment, "PYTHONPATH": search, "NOTIFY_SOCKET": str(path)},
                stdout=log.fileno(),
                stderr=log.fileno(),
            )
        return notify

    def await_ready(self, notify: socket.socket) -> None:
        """Wait for the report."""
        with notify:
            try:
                while b"READY=1" not in notify.recv(4096).split(b"\n"):
                    pass
            except TimeoutError:
                raise AssertionError(f"{self.name} is not ready; it said: {self.log}") from None

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        await trio.to_thread.run_sync(lambda: self.await_ready(self.begin()))

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self._process is not None
        assert self._process.poll() is None, f"{self.name} had ended before: {self.log}"
        self._process.kill()
        assert -signal.SIGKILL == self._process.wait()

    def close(self) -> None:
        """End it, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Host:
    """One host.

    Args:
        directory: of both hosts.
        name: "a" or "b".
    """

    def __init__(self, directory: Path, name: str) -> None:
        place = directory / name
        (place / "soc").mkdir(parents=True)
        (place / "daemon.toml").write_text(_CONFIG.format(place=place))
        self._address = f"unix://{place}/agent.sock"
        self._control = place / "control.sock"
        self.socket = place / "f0.sock"
        ours = "vfiouser_oob"
        soc = ["simulate-soc", f"--socket-dir={place / 'soc'}"]
        image = [f"--image={directory / 'disk'}", "--shared-image", "--size=1M"]
        state = [f"--state-size={_STATE_SIZE}", "--state-churn=0"]
        self.device = Service("device", ours, [*soc, "--device-only", *image, *state], place)
        self.agent = Service("agent", ours, [*soc, "--agent-only", f"--agent-listen={self._address}"], place)
        self.daemon = Service("daemon", ours, ["serve", f"--config={place / 'daemon.toml'}"], place)
        self.services = (self.device, self.agent, self.daemon)

    async def status(self) -> Status:
        """What the agent says of the function, without the daemon; asked until it answers."""
        with trio.fail_after(20):
            while True:
                try:
                    async with MsgpackRpcAgent(parse_address(self._address)) as agent:
                        return await (await agent.open("f0")).status()
                except AgentError:
                    await trio.sleep(0.02)

    async def until(self, state: AgentState) -> Status:
        """Wait until the function does this."""
        seen: Status | None = None
        with trio.move_on_after(10):
            while True:
                seen = await self.status()
                if seen.state is state:
                    return seen
                await trio.sleep(0.02)
        raise AssertionError(f"{state} was awaited; last seen: {seen}; the daemon said: {self.daemon.log}")

    async def until_fenced(self) -> None:
        """Wait until the daemon has learned that the function must be reset before anybody may use it."""

        def fenced() -> bool:
            with ControlClient(self._control) as control:
                migration = control.status()["functions"][0]["migration"]
            return migration is not None and migration["fenced"]

        with trio.fail_after(10):
            while True:
                if await trio.to_thread.run_sync(fenced):
                    return
                await trio.sleep(0.02)
