"""The two processes that the VM tests are about: the SoC simulator and the daemon in front of it.

Everything that depends on the program's command line and on the form of its status is in this module.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import trio

from vmbed.errors import BedError
from vmbed.notify import NotifySocket
from vmbed.processes import LoggedProcess, deadline, logged_process, stop_keeper

__all__ = ["MIB", "PROGRAM", "SocConfig", "Stack", "environment", "service", "soc_and_daemon"]

MIB = 1 << 20
STATUS_S = 20.0
CHECKOUT = Path(__file__).resolve().parents[3]
IMPORT_ROOTS = (CHECKOUT, CHECKOUT / "protocol", CHECKOUT / "agents", CHECKOUT / "tests" / "support")
PROGRAM = (sys.executable, "-m", "vfiouser_oob")


@dataclass(frozen=True, slots=True)
class SocConfig:
    """What the simulated IPU/DPU exposes.

    Attributes:
        functions: how many NVMe functions; the daemon serves the first.
        image: file behind the namespace; else RAM of `size` bytes.
        size: namespace size in bytes, without an image.
        cmb: bytes of controller memory buffer, 0 for none.
        doorbells: `trapped` makes each doorbell write a message, `polled` maps them as shared memory.
    """

    functions: int = 1
    image: Path | None = None
    size: int = 256 * MIB
    cmb: int = 0
    doorbells: Literal["trapped", "polled"] = "trapped"

    def arguments(self) -> list[str]:
        """Return the options of `simulate-soc`."""
        argv = ["--functions", str(self.functions), "--doorbells", self.doorbells]
        argv += ["--image", str(self.image)] if self.image else ["--size", str(self.size)]
        argv += ["--cmb", str(self.cmb)] if self.cmb else []
        return argv


class Stack:
    """The running pair; made by `soc_and_daemon`."""

    def __init__(
        self, soc: LoggedProcess, daemon: LoggedProcess, socket: Path, control: Path, agent: LoggedProcess | None
    ) -> None:
        self.soc = soc
        self.daemon = daemon
        #: The function's agent, if it has one; it may be killed.
        self.agent = agent
        self.socket = socket
        self._control = control

    async def status(self) -> dict[str, Any]:
        """Return what `vfiouser-oob status --json` says."""
        argv = [*PROGRAM, "status", "--json", "--control-socket", str(self._control)]
        with deadline(STATUS_S, "answer to status", self.daemon.log):
            done = await trio.run_process(
                argv, env=environment(), capture_stdout=True, capture_stderr=True, check=False
            )
        if done.returncode != 0:
            raise BedError(f"status ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    async def messages(self, command: str) -> int:
        """Return how many messages of this command the daemon has taken from the VMM so far."""
        counters = (await self.status())["functions"][0]["messages"]
        return int(counters.get(command, 0))

    def check_alive(self) -> None:
        """Fail if one of the two has ended."""
        for process in (self.soc, self.daemon):
            if process.returncode is not None:
                raise process.died("the test was not done with it")


@asynccontextmanager
async def soc_and_daemon(
    workdir: Path, config: SocConfig | None = None, *, agent: bool = False, keep: bool = False
) -> AsyncIterator[Stack]:
    """Start the simulator, then the daemon on its first function; both are ready when this yields.

    At the end both are asked to stop, and must do so with status 0.

    Args:
        workdir: for sockets and logs; its path must be short (UNIX socket addresses are).
        config: what the simulator exposes.
        agent: the function has an agent, a process of its own, and so a migration interface.
        keep: the daemon is a keeper's child, which starts it again; what is called the daemon is the keeper.
    """
    upstream = workdir / "soc"
    upstream.mkdir()
    socket, control = workdir / "vmm.sock", workdir / "control.sock"
    arguments = (config or SocConfig()).arguments()
    async with AsyncExitStack() as stack:
        simulate = ["simulate-soc", "--socket-dir", str(upstream)]
        only = ["--device-only"] if agent else []
        soc = await stack.enter_async_context(service(workdir, "soc", [*simulate, *arguments, *only]))
        serve = ["serve", "--socket-path", str(socket), "--control-socket", str(control)]
        serve += ["--device", f"vfio-user:{upstream / 'f0.sock'}"]
        speaker: LoggedProcess | None = None
        if agent:
            address = f"unix://{workdir / 'agent.sock'}"
            listen = [*simulate, "--agent-only", f"--agent-listen={address}"]
            speaker = await stack.enter_async_context(service(workdir, "agent", listen))
            serve += ["--agent", f"msgpack-rpc:{address},function=f0"]
        if keep:
            serve = ["keep", "--max-starts", "100", "--", *PROGRAM, *serve]
        daemon = await stack.enter_async_context(service(workdir, "daemon", serve))
        if keep:
            stack.push_async_callback(stop_keeper, daemon)
        running = Stack(soc, daemon, socket, control, speaker)
        yield running
        running.check_alive()
        for process in (daemon, soc):
            if (status := await process.stop()) != 0:
                raise process.died(f"asked to stop, it ended with status {status}, not 0")


@asynccontextmanager
async def service(
    workdir: Path, name: str, command: Sequence[str], program: Sequence[str] = PROGRAM
) -> AsyncIterator[LoggedProcess]:
    """Run one of the program's services until it says that it is ready, as systemd would."""
    async with NotifySocket(workdir / f"{name}.notify") as notify:
        variables = {**environment(), **notify.environment}
        log = workdir / f"{name}.log"
        async with logged_process(name, [*program, *command], log, env=variables) as process:
            await notify.ready(process)
            yield process


def environment() -> dict[str, str]:
    """Return the environment in which the checkout's own packages are the ones that are run."""
    inherited = os.environ.get("PYTHONPATH", "")
    roots = [str(root) for root in IMPORT_ROOTS]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *filter(None, [inherited])])}
