"""The daemon is restarted and killed in the middle of migrations whose clients stay: they go on, and one copy runs.

Who runs is asked of the functions' agents. No outcome depends on when a daemon is killed: where that decides what its
client reads, each of the outcomes is looked at.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from restartbed.migrating import MigratingBed
from vfiouser_agents.api import AgentState
from vfiouser_oob.client.guest import PAGE_SIZE, ClientMemory
from vfiouser_oob.lab.nvme.driver import NvmeDriver
from vfiouser_oob.lab.vmm.attachment import Attachment
from vfiouser_oob.lab.vmm.side import Generation, MigrationSide
from vfiouser_oob.lab.vmm.v1 import V1Side
from vfiouser_oob.lab.vmm.voyage import SideOptions, open_side
from vfiouser_protocol.constants import DeviceState, RegionIndex
from vfiouser_protocol.errors import ReplyError, VfioUserError
from vfiouser_protocol.migration_v1 import FROM_V2, STATE_MASK

pytestmark = pytest.mark.slow  # each start of the daemon takes a second of a processor

S = DeviceState
_BASE, _SIZE = 0x1_0000_0000, 2 << 20
_CSTS = 0x1C
_DATA = bytes(range(256)) * 16


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MigratingBed]:
    """One pair of hosts and one keeper for all of it."""
    bed = MigratingBed(tmp_path_factory.mktemp("vt"))
    log = ""
    try:
        trio.run(bed.ready)
        yield bed
    finally:
        log = bed.close()
    assert "Traceback" not in log
    assert "bug:" not in log
    assert "client goes on after a restart" in log


class Vm:
    """A VM between both functions.

    Args:
        memory: of its guest, at the source.
        here: attached at the source.
        there: at the destination.
        driver: of its guest.
        source: the migration interface at the source.
        destination: at the destination.
    """

    def __init__(
        self,
        memory: ClientMemory,
        here: Attachment,
        there: Attachment,
        driver: NvmeDriver,
        source: MigrationSide,
        destination: MigrationSide,
    ) -> None:
        self.memory = memory
        self.here = here
        self.there = there
        self.driver = driver
        self.source = source
        self.destination = destination

    @classmethod
    @asynccontextmanager
    async def open(cls, bed: MigratingBed, generation: Generation) -> AsyncIterator[Vm]:
        """Attach both functions; they are let go as a VMM does that exits, unasked."""
        options = SideOptions(chunk_size=50_000)
        with (
            ClientMemory(_SIZE, _BASE) as memory,
            ClientMemory(_SIZE, _BASE) as other,
            trio.fail_after(600),  # a start of the daemon takes half a minute where twenty others want the processor
            trio.CancelScope() as leaving,
        ):
            async with (
                Attachment.open(bed.socket(bed.source), memory) as here,
                NvmeDriver.open(here.client, memory, pool_pages=64) as driver,
                Attachment.open(bed.socket(bed.destination), other) as there,
            ):
                await driver.write(0, _DATA)
                source = await open_side(generation, here.client, options)
                destination = await open_side(generation, there.client, options)
                try:
                    yield cls(memory, here, there, driver, source, destination)
                finally:
                    source.close()
                    destination.close()
                leaving.cancel()
                await trio.sleep_forever()

    async def reads(self, side: MigrationSide) -> DeviceState:
        """The state that a client reads."""
        if isinstance(side, V1Side):
            value = await side.state() & STATE_MASK
            return next(state for state, bits in FROM_V2.items() if bits == value)
        attachment = self.here if side is self.source else self.there
        return DeviceState(await attachment.client.get_device_state())

    async def back(self) -> None:
        """The source is to run again; what is refused is not followed by a reset, which its driver does not expect."""
        if isinstance(self.source, V1Side):
            await self.source.cancel()
        else:
            await self.here.client.set_device_state(S.RUNNING)

    async def rest(self) -> list[bytes]:
        """Read what is left."""
        pieces = []
        while not (portion := await self.source.read()).last:
            pieces.append(portion.data)
        return pieces

    async def works_here(self) -> None:
        """The guest goes on at the source with the queues that it has."""
        assert _DATA == await self.driver.read(0, len(_DATA) // 512)
        await self.driver.write(8, _DATA)

    async def works_there(self) -> None:
        """The destination has the controller as the guest had it."""
        status = await self.there.client.region_read(RegionIndex.BAR0, _CSTS, 4)
        assert 1 == int.from_bytes(status, "little") & 1

    async def migrate(self, bed: MigratingBed) -> None:
        """All of it, undisturbed."""
        await self.destination.load_setup()
        assert await self.source.save_setup()
        stream = [(await self.source.read()).data]
        await self.source.stop()
        stream += await self.rest()
        await self.source.save_cleanup()
        for piece in stream:
            await self.destination.load(piece)
        await self.destination.start()
        assert (False, True) == await bed.running()
        await self.works_there()


@pytest.mark.parametrize("generation", list(Generation))
async def test_a_migration_goes_on(bed: MigratingBed, generation: Generation) -> None:
    """Disturbed between its steps, from the first to the last, it succeeds; kills and restarts take turns."""
    v2 = generation is Generation.V2
    async with Vm.open(bed, generation) as vm:
        source, destination = vm.source, vm.destination
        assert (True, True) == await bed.running()
        await destination.load_setup()
        await source.start_logging(vm.memory)
        await source.dirty(vm.memory)
        assert await source.save_setup()
        await bed.disturb(kill=v2)
        assert (S.PRE_COPY, S.RESUMING) == (await vm.reads(source), await vm.reads(destination))
        assert (True, False) == await bed.running()
        # What was told of dirty pages, and what was not, is told again.
        assert b"\xff" * (_SIZE // PAGE_SIZE // 8) == await source.dirty(vm.memory)
        stream = [(await source.read()).data]
        await vm.works_here()
        await bed.disturb(kill=not v2)
        stream.append((await source.read()).data)
        await source.stop()
        stream.append((await source.read()).data)
        await bed.disturb(kill=v2)
        assert (S.STOP_COPY, S.RESUMING) == (await vm.reads(source), await vm.reads(destination))
        assert (False, False) == await bed.running()
        stream += await vm.rest()
        await bed.disturb(kill=not v2)
        assert S.STOP_COPY is await vm.reads(source)
        assert (await source.read()).last
        await source.save_cleanup()
        for piece in stream:
            await destination.load(piece)
        assert (False, False) == await bed.running()
        await destination.start()
        await vm.works_there()
        await bed.disturb(kill=True)
        assert (S.STOP, S.RUNNING) == (await vm.reads(source), await vm.reads(destination))
        assert (False, True) == await bed.running()
        await vm.works_there()


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("whole", [False, True], ids=["part", "whole"])
async def test_a_load_of_which_something_came(bed: MigratingBed, generation: Generation, whole: bool) -> None:
    """It never runs; its client's reset leads out, the source goes on when its own says so, and all can be repeated."""
    async with Vm.open(bed, generation) as vm:
        source, destination = vm.source, vm.destination
        await destination.load_setup()
        assert await source.save_setup()
        await source.stop()
        stream = await vm.rest()
        await source.save_cleanup()
        for piece in stream if whole else stream[:3]:
            await destination.load(piece)
        await bed.disturb(kill=whole)
        assert (S.STOP, S.RESUMING) == (await vm.reads(source), await vm.reads(destination))
        for attempt in (destination.load(stream[0]), destination.start()):
            with pytest.raises(VfioUserError):
                await attempt
        assert (False, False) == await bed.running()
        await source.cancel()
        assert (True, False) == await bed.running()
        await vm.works_here()
        await vm.there.client.reset()
        assert (S.RUNNING, S.RUNNING) == (await vm.reads(source), await vm.reads(destination))
        await vm.migrate(bed)


async def test_a_committed_load_runs_once(bed: MigratingBed) -> None:
    """It was verified and applied: the next daemon lets it run, when its client says so."""
    async with Vm.open(bed, Generation.V2) as vm:
        await vm.destination.load_setup()
        await vm.source.stop()
        stream = await vm.rest()
        for piece in stream:
            await vm.destination.load(piece)
        await vm.there.client.set_device_state(S.STOP)
        assert AgentState.LOADED is (await bed.destination.status()).state
        await bed.disturb(kill=True)
        assert (S.STOP_COPY, S.STOP) == (await vm.reads(vm.source), await vm.reads(vm.destination))
        assert (False, False) == await bed.running()
        await vm.there.client.set_device_state(S.RUNNING)
        assert (False, True) == await bed.running()
        await vm.works_there()


#: Steps of a source in the middle of which its daemon is killed, and what the function does before and behind each.
STEPS = {
    "save": (True, True),
    "stop": (True, False),
    "cancel": (False, True),
}


@pytest.mark.parametrize("generation", list(Generation))
@pytest.mark.parametrize("step", STEPS)
async def test_killed_in_the_middle_of_a_step(bed: MigratingBed, generation: Generation, step: str) -> None:
    """The client reads an error and then the truth, or nothing but success; from either it gets to RUNNING."""
    async with Vm.open(bed, generation) as vm:
        source = vm.source
        if step != "save":
            assert await source.save_setup()
        if step == "cancel":
            await source.stop()
            await source.read()
        work = {"save": source.save_setup, "stop": source.stop, "cancel": vm.back}[step]

        async def attempt() -> None:
            try:
                await work()
            except ReplyError:
                pass

        async with trio.open_nursery() as nursery:
            bed.freeze(bed.source)
            nursery.start_soon(attempt)
            await trio.sleep(0.1)  # so that it was begun, most of the time
            bed.daemon.kill()
            bed.thaw(bed.source)
            await bed.again()
        running, _ = await bed.running()
        state = await vm.reads(source)
        if state in (S.RUNNING, S.PRE_COPY):
            await bed.source.until(AgentState.RUNNING)
        else:
            assert not running
        if state is not S.RUNNING:
            await vm.back()
        await bed.source.until(AgentState.RUNNING)
        await vm.works_here()
        await vm.migrate(bed)
