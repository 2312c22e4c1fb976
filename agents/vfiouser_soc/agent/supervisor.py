"""Keeps an agent process alive beside the device process."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence

import trio

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.observability import log
from vfiouser_soc.agent.process import SUPERVISED
from vfiouser_soc.options import SocOptions

#: Pauses before an agent that died is started again, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
#: An agent that lived this long, in seconds, did not die of its start.
_SETTLED_S = 10.0
#: Seconds until an agent that was told to end is killed.
_STOP_S = 5.0
#: Bytes of an agent's greeting at most.
_LINE_MAX = 64 << 10
#: Variables by which a service manager speaks to one process only.
_NOT_INHERITED = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


class Supervisor:
    """Starts the agent process, and starts it again at the same addresses when it dies.

    Args:
        options: of the whole SoC.
    """

    def __init__(self, options: SocOptions) -> None:
        self._options = options
        self._log = log.get("supervisor")
        #: Where the agent listens, with the ports that were really taken; empty until the first one does.
        self.addresses: tuple[str, ...] = ()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep an agent process running until cancelled, and end it then.

        Args:
            task_status: told when the first one listens.

        Raises:
            ConfigError: the first one does not get that far.
        """
        pause = _FIRST_PAUSE
        while True:
            begin = trio.current_time()
            code = await self._run_once(task_status)
            if not self.addresses:
                raise ConfigError(f"the agent process ended with code {code} before it listened; see its messages")
            task_status = trio.TASK_STATUS_IGNORED
            lived = trio.current_time() - begin
            pause = _FIRST_PAUSE if lived > _SETTLED_S else pause
            self._log.warning("the agent process ended", code=code, after_s=round(lived, 1), next_in_s=pause)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_once(self, task_status: trio.TaskStatus[None]) -> int:
        """Run one agent process from its start to its end; returns its exit code."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await trio.lowlevel.open_process(
                agent_command(self._options, self.addresses or self._options.agent.listen),
                stdin=theirs.fileno(),
                env=_environment(),
                # Ctrl-C on a terminal is for us; the agent ends with us.
                start_new_session=True,
            )
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            if addresses := await _greeting(stream):
                self._log.info("the agent process listens", pid=process.pid, addresses=", ".join(addresses))
                self.addresses = addresses
                task_status.started()
            return await process.wait()
        finally:
            await _end(process, stream)


async def _greeting(stream: trio.SocketStream) -> tuple[str, ...]:
    """Where the agent says that it listens; empty if it ends without a word."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LINE_MAX:
            data = await stream.receive_some(4096)
            if not data:
                return ()
            line += data
    except trio.BrokenResourceError:
        return ()
    return tuple(json.loads(line)["addresses"])


async def _end(process: trio.Process, stream: trio.SocketStream) -> None:
    with trio.CancelScope(shield=True):
        await stream.aclose()
        with trio.move_on_after(_STOP_S):
            await process.wait()
        if process.poll() is None:
            process.kill()
            await process.wait()


def agent_command(options: SocOptions, addresses: Sequence[str]) -> list[str]:
    """The command line of the agent process that belongs to a SoC.

    Args:
        options: of the whole SoC.
        addresses: where it shall listen.
    """
    command = [sys.executable, "-m", "vfiouser_oob", "simulate-soc", "--agent-only"]
    command += ["--socket-dir", str(options.socket_dir), "--agent-protocol", options.agent.protocol]
    for address in addresses:
        command += ["--agent-listen", address]
    agent = options.agent
    for option, path in (("--tls-cert", agent.tls_cert), ("--tls-key", agent.tls_key), ("--tls-ca", agent.tls_ca)):
        if path is not None:
            command += [option, str(path)]
    if agent.allow_plaintext:
        command.append("--allow-plaintext")
    return [*command, "--log-level", options.log_level.value, "--log-format", options.log_format.value]


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    # The agent finds our packages where we found them, installed or not.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return {**environment, SUPERVISED: "1"}
