"""Saving the NVMe function, loading it into another, and going on there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
from xxhash import xxh3_128_digest

from nvmebed import CommandFailed, Driver, Host, Machine, machine, make_function
from nvmebed.host import RAM_START
from nvmebed.machine import FunctionOptions
from nvmebed.moving import agent_function, migrate, moved_driver, read_all, session_of, spare
from vfiouser_agents.api import AgentState, Outcome, Phase, Range, Role
from vfiouser_agents.errors import CorruptState, Incompatible, InvalidArgument, InvalidState
from vfiouser_oob.devices.model import ResetKind
from vfiouser_soc.agent.function import AgentFunction
from vfiouser_soc.nvme import snapshot
from vfiouser_soc.nvme.function import NvmeFunction
from vfiouser_soc.nvme.stores import MemoryStore

CMB = 2 << 20


@dataclass
class Pair:
    """A machine on its first function, and a second function that it can move to."""

    machine: Machine
    source: AgentFunction
    target: AgentFunction
    target_function: NvmeFunction
    target_host: Host

    @property
    def driver(self) -> Driver:
        """The driver, wherever the function is now."""
        return self.machine.driver

    async def move(self, *, piece: int = 1 << 20, precopy: bool = False) -> bytes:
        """Move there."""
        stream = await migrate(self.source, self.target, piece=piece, precopy=precopy)
        moved_driver(self.machine, self.target_function, self.target_host)
        return stream


@asynccontextmanager
async def pair(
    *, polled: bool = False, cmb_size: int = 0, state_size: int = 0, churn: int = 0, drain_s: float = 1.0
) -> AsyncIterator[Pair]:
    """Two functions on one store."""
    store = MemoryStore(4 << 20)
    first = make_function(store, polled=polled, cmb_size=cmb_size)
    second = make_function(store, polled=polled, cmb_size=cmb_size)
    async with machine(first) as bed, spare(second, bed) as host:
        source, target = (
            agent_function(function, state_size=state_size, churn=churn, drain_s=drain_s)
            for function in (first, second)
        )
        yield Pair(bed, source, target, second, host)


@pytest.mark.parametrize("polled", [False, True])
async def test_queues_go_on_where_they_stopped(polled: bool) -> None:
    """The driver, its queues, heads, tails and phase bits work on the other function, even after a wrap."""
    async with pair(polled=polled) as bed:
        for block in range(70):  # more than the 64 entries of the queue: the phase has changed
            await bed.driver.write_blocks(block, bytes([block]) * 512)
        await bed.move()
        for block in range(70, 140):
            await bed.driver.write_blocks(block, bytes([block & 0xFF]) * 512)
        data = await bed.driver.read_blocks(0, 140)
        assert b"".join(bytes([block & 0xFF]) * 512 for block in range(140)) == data
        assert bed.target_host.interrupts[1] > 0


async def test_source_stays_stopped_and_silent() -> None:
    """After the move, the source neither touches memory nor interrupts, whatever its registers are told."""
    async with pair() as bed:
        await bed.driver.write_blocks(0, b"x" * 512)
        await bed.move()
        source = bed.source.nvme
        before = list(bed.machine.host.memory.accesses), bed.machine.host.interrupts.copy()
        source.region_write(0, 0x1008, (5).to_bytes(4, "little"))
        source.region_write(0, 0x2000, bytes(16))
        assert (1).to_bytes(4, "little") == source.region_read(0, 0x1C, 4)
        await trio.testing.wait_all_tasks_blocked()
        assert before == (bed.machine.host.memory.accesses, bed.machine.host.interrupts)
        assert AgentState.STOPPED is bed.source.state


async def test_doorbell_of_a_stopped_function_is_kept() -> None:
    """A doorbell rung after the stop is carried over and served by the other function: no command is lost."""
    async with pair() as bed:
        session = await session_of(bed.source)
        await session.stop()
        queue = bed.machine.io
        prp1, prp2, pieces = bed.driver.prps(512)
        cid = bed.driver.submit(queue, 0x02, nsid=1, prp1=prp1, prp2=prp2)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == bed.driver.collect(queue)
        await bed.move()
        await bed.driver.wait(queue, cid)
        assert bytes(512) == bed.driver.gather(pieces)


@pytest.mark.parametrize("polled", [False, True])
async def test_doorbell_of_a_stopped_function_is_served_after_resume(polled: bool) -> None:
    """The same on the way back: the source itself serves it."""
    async with pair(polled=polled) as bed:
        session = await session_of(bed.source)
        await session.stop()
        cid = bed.driver.submit(bed.machine.io, 0x00, nsid=1)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == bed.driver.collect(bed.machine.io)
        await session.resume()
        await bed.driver.wait(bed.machine.io, cid)


async def test_commands_that_do_not_finish_are_carried() -> None:
    """A command whose DMA hangs is cancelled by the stop, begins anew on the other function and completes once."""
    async with pair(drain_s=0.0) as bed:
        prp1, prp2, pieces = bed.driver.prps(512)
        bed.machine.host.memory.hold(prp1, 512)
        cid = bed.driver.submit(bed.machine.io, 0x02, nsid=1, prp1=prp1, prp2=prp2)
        await trio.testing.wait_all_tasks_blocked()
        await bed.move()
        assert "1 commands carried over" == bed.source.status().detail
        await bed.driver.wait(bed.machine.io, cid)
        assert bytes(512) == bed.driver.gather(pieces)


async def test_a_completion_being_written_is_not_lost() -> None:
    """The host has consumed an entry whose write was cancelled unconfirmed; the queue goes on without a gap."""
    async with pair(drain_s=0.0) as bed:
        bed.machine.host.memory.hold_confirmation(bed.machine.io.cq, 16 * 64, answered=False)
        cid = bed.driver.submit(bed.machine.io, 0x00, nsid=1)
        await trio.testing.wait_all_tasks_blocked()
        await bed.driver.wait(bed.machine.io, cid)
        await bed.move()
        for _ in range(70):
            await bed.driver.io(0x00)


async def test_full_completion_queue_is_carried() -> None:
    """Completions for which there is no room stay finished: they are delivered there, in order, each once."""
    async with pair() as bed:
        queue = await bed.driver.create_queue(2, 4)
        cids = [bed.driver.submit(queue, 0x00, nsid=1) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        queue.tail = queue.tail % 4
        more = [bed.driver.submit(queue, 0x00, nsid=1) for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        await bed.move()
        for cid in [*cids, *more]:
            await bed.driver.wait(queue, cid)
        assert [*cids, *more] == queue.order


async def test_event_request_waits_on_the_other_side() -> None:
    """An asynchronous event request that waited is completed by the other function."""
    async with pair() as bed:
        await bed.driver.set_feature(0x0B, 1 << 8)
        cid = bed.driver.submit(bed.driver.queues[0], 0x0C)
        await trio.testing.wait_all_tasks_blocked()
        await bed.move()
        bed.target_function.controller.namespace_changed(1)
        assert 0x040002 == await bed.driver.wait(bed.driver.queues[0], cid)


async def test_features_logs_and_masks_are_the_same() -> None:
    """What the host set, and what it can read about the past, does not change by moving."""
    async with pair() as bed:
        await bed.driver.set_feature(0x08, 0x0103, save=True)
        await bed.driver.set_feature(0x0B, 0x11)
        with pytest.raises(CommandFailed):
            await bed.driver.io(0x7F)
        errors = await bed.driver.log_page(1, 64)
        bed.driver.write32(0x0C, 0xF0)
        bed.source.nvme.region_write(0, 0x2000, b"\xfc\xff\xff\xff" + bytes(11) + b"\0")
        table = bed.source.nvme.region_read(0, 0x2000, 512)
        await bed.move()
        assert 0x0103 == await bed.driver.get_feature(0x08)
        assert 0x11 == await bed.driver.get_feature(0x0B)
        assert errors == await bed.driver.log_page(1, 64)
        assert 0xF0 == bed.driver.read32(0x0C)
        assert table == bed.target_function.region_read(0, 0x2000, 512)
        await bed.driver.disable()
        await bed.driver.enable()
        assert 0x0103 == await bed.driver.get_feature(0x08)


async def test_a_host_that_has_set_the_time_can_move() -> None:
    """The timestamp, which Linux sets, runs on at the other function."""
    async with pair() as bed:
        page = bed.driver.alloc(4096)
        bed.machine.host.memory.poke(page, (1_700_000_000_000).to_bytes(8, "little"))
        await bed.driver.admin(0x09, prp1=page, cdw10=0x0E)
        await bed.move()
        assert 0 <= (bed.target_function.controller.features.timestamp_ms or 0) - 1_700_000_000_000 < 60_000


async def test_configuration_space_is_loaded() -> None:
    """Bus mastering, MSI-X enable and BARs are as the guest of the source had them."""
    async with pair() as bed:
        bed.source.nvme.config.write(0x10, (0xFE00_0000).to_bytes(4, "little"))
        wanted = bed.source.nvme.config.snapshot()
        await bed.move()
        assert wanted == bed.target_function.config.snapshot()


async def test_controller_memory_buffer_is_loaded_into_the_same_memory() -> None:
    """The memfd that a VMM has mapped holds the contents afterwards, and the window is where the host put it."""
    async with pair(cmb_size=CMB) as bed:
        bed.driver.write64(0x50, 0x1_0000_0000_0003 & ~0xFFF | 3)
        bed.source.nvme.region_write(2, 4096, b"in the buffer")
        memory = bed.target_function.cmb_memory
        assert memory is not None
        view = memory.view
        await bed.move()
        assert b"in the buffer" == bytes(view[4096 : 4096 + 13])
        assert bed.source.nvme.region_read(0, 0x38, 8) == bed.target_function.region_read(0, 0x38, 8)


@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 20])
async def test_any_chunk_size(piece: int) -> None:
    """The stream may be cut anywhere, by either side."""
    async with pair() as bed:
        await bed.driver.write_blocks(3, b"y" * 512)
        await bed.move(piece=piece)
        assert b"y" * 512 == await bed.driver.read_blocks(3, 1)


async def test_last_chunk_can_be_asked_for_again() -> None:
    """The same offset gives the same bytes, also in smaller pieces; any other one is refused."""
    async with pair() as bed:
        session = await session_of(bed.source, Role.SOURCE)
        await session.stop()
        first = await session.save(0, 100, Phase.FINAL)
        second = await session.save(100, 100, Phase.FINAL)
        assert second == await session.save(100, 100, Phase.FINAL)
        assert second.data[:40] == (await session.save(100, 40, Phase.FINAL)).data
        assert second.data[40:80] == (await session.save(140, 40, Phase.FINAL)).data
        with pytest.raises(InvalidArgument, match="save at 100; allowed are 140 again, 180 next"):
            await session.save(100, 40, Phase.FINAL)
        assert first == await session.save(0, 100, Phase.FINAL)


async def test_precopy_carries_state_memory_that_keeps_changing(autojump_clock: trio.testing.MockClock) -> None:
    """Pre-copy gives everything once and then what changed; the stop gives the rest; both sides hold the same."""
    size, churn = 40 << 20, 4 << 20
    async with pair(state_size=size, churn=churn) as bed:
        session = await session_of(bed.source, Role.SOURCE)
        assert (await session.estimate()).initial_bytes >= size
        stream, last = await read_all(session, 0, 1 << 20, Phase.PRECOPY)
        assert last.drained
        assert len(stream) >= size
        await trio.sleep(1)
        estimate = await session.estimate()
        assert 0 == estimate.initial_bytes
        # The working set is a sixteenth of the memory.
        assert (2 << 20) < estimate.dirty_bytes < (3 << 20)
        await session.end(Outcome.CANCELLED)
        await session.aclose()
        stream = await bed.move(precopy=True)
        assert bed.source.memory.digest() == bed.target.memory.digest()
        assert len(stream) >= size


async def test_stopped_state_memory_does_not_change(autojump_clock: trio.testing.MockClock) -> None:
    """Time passes for a stopped function without any effect; the estimate is exact and comes true."""
    async with pair(state_size=3 << 20, churn=1 << 20) as bed:
        session = await session_of(bed.source, Role.SOURCE)
        await session.stop()
        digest = bed.source.memory.digest()
        estimate = await session.estimate()
        await trio.sleep(10)
        stream, last = await read_all(session, 0, 1 << 20, Phase.FINAL)
        assert last.eof
        assert digest == bed.source.memory.digest()
        assert estimate.exact
        assert estimate.stop_copy_bytes == len(stream)


async def test_every_flipped_byte_is_found() -> None:
    """No byte of the stream can change unnoticed, even when the digest is made to fit; nothing is applied then."""
    async with pair() as bed:
        giver = await session_of(bed.source, Role.SOURCE)
        await giver.stop()
        stream, _ = await read_all(giver, 0, 1 << 20, Phase.FINAL)
        taker = await session_of(bed.target, Role.DESTINATION)
        await taker.stop()
        before = snapshot.pack(snapshot.capture(bed.target_function))[:4096]
        for at in (0, 5, 12, 16, 20, len(stream) - 1, len(stream) - 16):
            bad = bytearray(stream)
            bad[at] ^= 0x41
            await taker.load_begin(None)
            await taker.load(0, bytes(bad))
            with pytest.raises(CorruptState):
                await taker.load_commit(len(bad), xxh3_128_digest(bad))
        assert before == snapshot.pack(snapshot.capture(bed.target_function))[:4096]
        with pytest.raises(InvalidState, match="reset it, or load another one"):
            await taker.resume()
        await taker.reset()
        assert AgentState.RUNNING is bed.target.state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cmb_size": CMB}, "controller memory buffer is '0' there and '2097152' here"),
        ({"polled": True}, "doorbells is 'trapped' there and 'polled' here"),
        (
            {"lba_shift": 12},
            "namespace 1 size is '8192 blocks of 512 bytes' there and '1024 blocks of 4096 bytes' here",
        ),
    ],
)
async def test_incompatible_functions_are_refused(change: FunctionOptions, reason: str) -> None:
    """The reasons name both sides."""
    store = MemoryStore(4 << 20)
    source, target = agent_function(make_function(store)), agent_function(make_function(store, **change))
    try:
        taker = await session_of(target, Role.DESTINATION)
        with pytest.raises(Incompatible) as caught:
            await taker.check(source.describe())
        assert reason in caught.value.reasons
    finally:
        source.nvme.close()
        target.nvme.close()


async def test_other_firmware_and_other_memory_are_refused() -> None:
    """Another firmware, another store of the namespace and another size of state memory are all named."""
    source = agent_function(make_function(), firmware="2.0", state_size=1)
    target = agent_function(make_function())
    try:
        taker = await session_of(target, Role.DESTINATION)
        with pytest.raises(Incompatible) as caught:
            await taker.check(source.describe())
        found = [reason.partition(" is ")[0] for reason in caught.value.reasons]
        assert ["firmware", "namespace 1 store", "state memory"] == found
    finally:
        source.nvme.close()
        target.nvme.close()


async def test_dirty_pages_are_those_that_were_written() -> None:
    """Data, completion entries and nothing else; reading the report clears it."""
    async with pair() as bed:
        session = await session_of(bed.source)
        size = bed.machine.host.memory.end - RAM_START
        assert 4096 == await session.dirty_start([Range(RAM_START, size)], 4096)
        prp1, _, _ = bed.driver.prps(4096)
        await bed.driver.io(0x02, prp1=prp1, cdw12=7)
        report = await session.dirty_report(RAM_START, size)
        assert report.bitmap is not None
        pages = {n for n in range(size // 4096) if report.bitmap[n // 8] >> n % 8 & 1}
        assert {(prp1 - RAM_START) >> 12, (bed.machine.io.cq - RAM_START) >> 12} == pages
        assert not report.final
        await session.stop()
        report = await session.dirty_report(RAM_START, size)
        assert (bytes(size // 4096 // 8), True) == (report.bitmap, report.final)
        await session.dirty_stop()


async def test_a_cancelled_write_is_dirty() -> None:
    """A write that was cancelled may have taken place: its page is reported even so."""
    async with pair(drain_s=0.0) as bed:
        session = await session_of(bed.source)
        prp1, _, _ = bed.driver.prps(4096)
        bed.machine.host.memory.hold(prp1, 4096)
        await session.dirty_start([Range(prp1, 4096)], 4096)
        bed.driver.submit(bed.machine.io, 0x02, nsid=1, prp1=prp1, cdw12=7)
        await trio.testing.wait_all_tasks_blocked()
        await session.stop()
        assert b"\1" == (await session.dirty_report(prp1, 4096)).bitmap


async def test_stop_survives_the_client() -> None:
    """When the client of a stopped function goes, it stays stopped, and its state can still be saved."""
    async with pair() as bed:
        session = await session_of(bed.source, Role.SOURCE)
        await session.stop()
        wanted, _ = await read_all(session, 0, 1 << 20, Phase.FINAL)
        bed.source.nvme.config.clear_bus_master()
        bed.source.nvme.disconnected()
        assert AgentState.STOPPED is (await session.status()).state
        again, _ = await read_all(session, 0, 1 << 20, Phase.FINAL)
        assert wanted == again
        await session.resume()
        # Its queues belonged to a client that is gone: a driver has to reset it.
        assert 2 == bed.driver.read32(0x1C) & 2


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FUNCTION_LEVEL])
async def test_a_reset_of_the_device_ends_a_stop(kind: ResetKind) -> None:
    """A VMM that begins anew with a stopped function gets a running one; the migration is over."""
    async with pair() as bed:
        session = await session_of(bed.source, Role.SOURCE)
        await session.stop()
        bed.source.nvme.config.reset()
        bed.source.nvme.reset(kind)
        assert AgentState.RUNNING is bed.source.state
        with pytest.raises(InvalidState, match="in no migration"):
            await session.save(0, 1, Phase.FINAL)
        bed.driver.pci_command(6)
        bed.driver.enable_msix()
        await bed.driver.enable()


async def test_a_reset_interrupts_a_stop() -> None:
    """A reset while commands are being drained ends the stop with an error, and the function runs."""
    async with pair(drain_s=60) as bed:
        session = await session_of(bed.source)
        prp1, _, _ = bed.driver.prps(512)
        bed.machine.host.memory.hold(prp1, 512)
        bed.driver.submit(bed.machine.io, 0x02, nsid=1, prp1=prp1)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                with pytest.raises(InvalidState, match="a reset or a resumption ended the suspension"):
                    await session.stop()

            nursery.start_soon(stop)
            await trio.testing.wait_all_tasks_blocked()
            await session.reset()
        assert AgentState.RUNNING is bed.source.state


async def test_a_cancelled_stop_is_no_stop() -> None:
    """A caller that gives up while commands are drained leaves a function that works on."""
    async with pair(drain_s=60) as bed:
        session = await session_of(bed.source)
        prp1, _, _ = bed.driver.prps(512)
        gate = bed.machine.host.memory.hold(prp1, 512)
        cid = bed.driver.submit(bed.machine.io, 0x02, nsid=1, prp1=prp1)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.01):
            await session.stop()
        assert AgentState.RUNNING is bed.source.state
        gate.set()
        await bed.driver.wait(bed.machine.io, cid)
        await bed.driver.io(0x00)


async def test_deleting_a_queue_is_carried() -> None:
    """A queue whose deletion was waiting for a hanging command is still deleted on the other side."""
    async with pair(drain_s=0.0) as bed:
        prp1, _, _ = bed.driver.prps(512)
        bed.machine.host.memory.hold(prp1, 512)
        bed.driver.submit(bed.machine.io, 0x02, nsid=1, prp1=prp1)
        await trio.testing.wait_all_tasks_blocked()
        cid = bed.driver.submit(bed.driver.queues[0], 0x00, cdw10=1)
        await trio.testing.wait_all_tasks_blocked()
        await bed.move()
        await bed.driver.wait(bed.driver.queues[0], cid)
        assert [0] == list(bed.target_function.controller.state.submission_queues)


async def test_shutdown_is_carried() -> None:
    """A controller that was shut down is so on the other side, and fetches nothing."""
    async with pair() as bed:
        bed.driver.write32(0x14, bed.driver.cc | 1 << 14)
        await bed.driver.status(0xC, 0x8)
        await bed.move()
        bed.driver.submit(bed.machine.io, 0x00, nsid=1)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 == bed.driver.collect(bed.machine.io)
        assert 0x8 == bed.driver.read32(0x1C) & 0xC


async def test_there_and_back_again() -> None:
    """Fifty moves between two functions, with I/O after each."""
    async with pair() as bed:
        ends = [
            (bed.source, bed.machine.function, bed.machine.host),
            (bed.target, bed.target_function, bed.target_host),
        ]
        for turn in range(50):
            (source, _, _), (target, function, host) = ends
            await migrate(source, target)
            moved_driver(bed.machine, function, host)
            await bed.driver.write_blocks(turn, bytes([turn]) * 512)
            ends.reverse()
        data = await bed.driver.read_blocks(0, 50)
        assert b"".join(bytes([turn]) * 512 for turn in range(50)) == data


@pytest.mark.parametrize("polled", [False, True])
async def test_a_stop_right_after_a_resume_loses_no_doorbell(polled: bool) -> None:
    """A doorbell kept over the first stop is still there after a second one that leaves no time to notice it."""
    async with pair(polled=polled) as bed:
        session = await session_of(bed.source)
        await session.stop()
        cid = bed.driver.submit(bed.machine.io, 0x00, nsid=1)
        await session.resume()
        await session.stop()
        await session.resume()
        await bed.driver.wait(bed.machine.io, cid)
