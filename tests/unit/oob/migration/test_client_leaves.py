"""Steps that are under way when the client leaves, over a device that answers late."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest
import trio

from memoryless import MemorylessClient
from vfiouser_agents.memory import MemoryAgent, MemoryFunction
from vfiouser_oob.config.schema import MigrationConfig
from vfiouser_oob.devices.model_backend import ModelBackend, ModelSession
from vfiouser_oob.devices.models.test_device import build
from vfiouser_oob.migration.port import attach
from vfiouser_oob.migration.runner import MigrationRunner
from vfiouser_oob.migration.steps import Steps
from vfiouser_oob.observability import log
from vfiouser_oob.observability.events import EventHub
from vfiouser_protocol.capabilities import VersionCapabilities
from vfiouser_protocol.errors import CommandError

_COMMAND = 4


class LateSession(ModelSession):
    """A device that answers when it is told to, as one behind a socket does some time."""

    def __init__(self, backend: ModelBackend) -> None:
        super().__init__(backend, MemorylessClient())
        self.asked, self.answers = trio.Event(), trio.Event()

    async def _late(self) -> None:
        self.asked.set()
        await self.answers.wait()

    async def reset(self) -> None:  # type: ignore[override]
        """Reset, later."""
        await self._late()
        super().reset()

    async def flush(self) -> None:
        """Nothing is on its way, as is found out later."""
        await self._late()

    async def region_write(self, region: int, offset: int, data: bytes, *, posted: bool) -> None:  # type: ignore[override]
        """Write, later."""
        await self._late()
        super().region_write(region, offset, data, posted=posted)


Taken = Callable[[Steps, float], Awaitable[object]]
CASES: dict[str, tuple[Taken, bool]] = {
    "flush": (lambda steps, deadline: steps.flush(deadline), True),
    "reset": (lambda steps, deadline: steps.reset_device(deadline), True),
    "reset again": (lambda steps, deadline: steps.reset_device_again(deadline), False),
    "write config": (lambda steps, deadline: steps.write_config(deadline), False),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_client_that_leaves_during_a_step(name: str) -> None:
    """What can be finished without it is; what cannot is refused, and nothing else happens to the migration."""
    take, finished = CASES[name]
    backend = ModelBackend(build("f0", None))
    with closing(backend), trio.fail_after(60):
        async with MemoryAgent([MemoryFunction(state_size=4096, seed=1)]) as agent, trio.open_nursery() as nursery:
            runner = MigrationRunner("f0", agent, "f0", MigrationConfig(), EventHub(), log.get("function"))
            nursery.start_soon(runner.run)
            session = LateSession(backend)
            port = await attach(runner, session, "f0", VersionCapabilities())
            assert not port.shadow.note(_COMMAND, b"\x06\0")
            said: list[object] = []

            async def step() -> None:
                try:
                    said.append(await take(runner.steps, trio.current_time() + 30))
                except CommandError as error:
                    said.append(str(error))

            async with trio.open_nursery() as steps:
                steps.start_soon(step)
                await session.asked.wait()
                await runner.detach(logged=False)
                session.answers.set()
            assert [None if finished else "the client left before the device was ready"] == said
            await session.close()
            nursery.cancel_scope.cancel()
