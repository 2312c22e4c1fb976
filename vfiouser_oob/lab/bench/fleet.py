"""The same functions in one daemon or in a daemon each, with an agent behind all of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfiouser_oob.lab.bench.scale_figures import Spread
from vfiouser_oob.lab.demo.children import Child, running, running_command

_DEVICE = '{ kind = "model", model = "nvme", size = "1M" }'
#: What a machine that is too busy does late is to be measured, not refused.
_PATIENCE = "migration = { call_s = 60, stop_s = 60, data_s = 60 }"
_BUDGET = "reply_budget_s = 60"


@dataclass(slots=True)
class Fleet:
    """Daemons that serve.

    Args:
        directory: where their sockets are.
        agent: the process of the agent of all of them.
        address: the agent's address.
        stack: ends them.
        daemons: the daemons of the functions that are measured, so far.
        sockets: of the functions that are measured.
        start_s: seconds that it took until all of them served.
    """

    directory: Path
    agent: Child
    address: str
    stack: AsyncExitStack
    daemons: list[Child] = field(default_factory=list)
    sockets: list[Path] = field(default_factory=list)
    start_s: float = 0.0

    @property
    def bystander(self) -> Path:
        """The socket of one more function, which nobody migrates."""
        return self.directory / "bystander.sock"

    async def grow(self, functions: int, spread: Spread) -> None:
        """Have so many functions, and the bystander's.

        Args:
            functions: how many; one daemon cannot grow, processes are started in addition.
            spread: over which processes.
        """
        names = [f"f{number}" for number in range(len(self.sockets), functions)]
        if spread is Spread.MANY_PROCESSES and not self.sockets:
            await self._start(self.bystander.stem, [self.bystander.stem])
        began = time.perf_counter()
        if spread is Spread.ONE_DAEMON:
            self.daemons.append(await self._start("all", [*names, self.bystander.stem]))
        else:
            await self._start_each(names)
        self.start_s += time.perf_counter() - began
        self.sockets += [self.directory / f"{name}.sock" for name in names]

    async def _start_each(self, names: Sequence[str]) -> None:
        """Start daemons, a few at a time: none becomes ready sooner because all of them begin at once."""
        places = trio.CapacityLimiter(2 * len(os.sched_getaffinity(0)))

        async def start(name: str) -> None:
            async with places:
                self.daemons.append(await self._start(name, [name]))

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(start, name)

    async def _start(self, title: str, names: Sequence[str]) -> Child:
        config = self.directory / f"{title}.toml"
        lines = ["[daemon]", 'control_socket = "none"', 'log_level = "warning"', _BUDGET]
        for name in names:
            lines += [
                "[[function]]",
                f'name = "{name}"',
                f'socket = "{self.directory / f"{name}.sock"}"',
                f"device = {_DEVICE}",
            ]
            if name != self.bystander.stem:
                lines.append(_PATIENCE)
                lines.append(f'agent = {{ kind = "msgpack-rpc", address = "{self.address}", function = "{name}" }}')
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["serve", "--config", str(config)]
        return await self.stack.enter_async_context(running(title, command, self.directory))


@asynccontextmanager
async def fleet(directory: Path, functions: int, state_size: int) -> AsyncIterator[Fleet]:
    """Run an agent, for daemons that are still to be started; all of them end with the block.

    Args:
        directory: does not exist yet.
        functions: how many it knows: f0, f1 …
        state_size: bytes of the state of each.
    """
    await trio.Path(directory).mkdir()
    where = directory / "address"
    command = [sys.executable, "-m", "vfiouser_oob.lab.bench.agent", str(where), str(functions), str(state_size)]
    async with running_command("agent", command, directory) as agent, AsyncExitStack() as stack:
        one = Fleet(directory, agent, where.read_text(encoding="utf-8"), stack)
        try:
            yield one
        finally:
            # All of them at once, so that each only has to be waited for.
            for daemon in one.daemons:
                if daemon.process.poll() is None:
                    daemon.process.terminate()
