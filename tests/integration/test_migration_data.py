"""The way of the data: bounded buffers, deadlines, dirty pages, and a device link with a long delay."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from daemonkit import function
from migrationkit import FAST, PRE_COPY, RESUMING, RUNNING, STOP, STOP_COPY, Vmm, bed, stream_of, until, with_caps
from rawclient import DIRTY_PAGES, FEATURE, MIG_DATA_READ, MIG_DATA_WRITE, REGION_WRITE, RESET, Answer, memfd
from vfiouser_agents.api import AgentState, Chunk
from vfiouser_agents.errors import Busy, DeviceFailed, TransportLost
from vfiouser_agents.faults import (
    SESSION_OPS,
    ChangesResult,
    Delay,
    Drops,
    Fails,
    NeverAnswers,
    duplicated_save,
    short_report,
    short_save,
)
from vfiouser_oob.config.schema import UpstreamDevice
from vfiouser_oob.persist.capabilities import Facts

# Buffers


async def test_prefetch_is_bounded(tmp_path: Path) -> None:
    """While the client takes chunk n, chunk n+1 is fetched, and no more."""
    async with bed(tmp_path, state_size=4 << 20) as both, both.source.vmm() as src:
        await src.set_state(STOP_COPY)
        await src.data_read(1000)
        source = both.source.runner.steps.source
        assert source is not None
        await until(lambda: source.buffered > FAST.chunk_size + 1000)
        fetched = both.source.device.calls.count("save")
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert fetched == both.source.device.calls.count("save") == 2
        await src.read_stream(8192)
        assert source.peak <= 2 * FAST.chunk_size + 4096


async def test_destination_holds_one_piece(tmp_path: Path) -> None:
    """The client's next write is answered only when the agent has the piece before the last one."""
    async with bed(tmp_path, state_size=1 << 20) as both, both.destination.vmm() as dst:
        stream = await stream_of(both.source)
        await dst.set_state(RESUMING)
        both.agent.inject("load", Delay(0.2), function_id="dst")
        begun = trio.current_time()
        await dst.data_write(stream[: 80 << 10])
        assert trio.current_time() - begun < 0.15
        await dst.write_stream(stream[80 << 10 :])
        assert trio.current_time() - begun >= 0.2
        await dst.set_state(RUNNING)
        assert both.migrated()


async def test_prefetched_chunk_survives_the_stop(tmp_path: Path) -> None:
    """What was fetched in PRE_COPY comes first in STOP_COPY; a chunk that was under way is not lost either."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        both.agent.inject("save", Delay(0.05, after=True), after=1, function_id="src")
        await src.set_state(PRE_COPY)
        head = await src.data_read(10)
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        await dst.write_stream(head + await src.read_stream())
        await dst.set_state(RUNNING)
        assert both.migrated()


async def test_interrupted_chunks_are_asked_for_again(tmp_path: Path) -> None:
    """A lost connection or a busy agent in the middle of the data costs nothing but time."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        for op, side in (("save", "src"), ("load", "dst")):
            for number, fault in enumerate((Drops(), Drops(executed=True), Fails(Busy("later")))):
                both.agent.inject(op, fault, after=number, function_id=side)
        await src.set_state(PRE_COPY)
        stream = await src.data_read(1 << 20)
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        await dst.write_stream(stream + await src.read_stream())
        await dst.set_state(RUNNING)
        assert both.migrated()


@pytest.mark.parametrize("fault", [short_save(), duplicated_save(), ChangesResult(lambda chunk: Chunk(b""))])
async def test_agents_that_break_the_rules(tmp_path: Path, fault: ChangesResult) -> None:
    """Chunks that are too long, empty or do not fit each other end the save, not the function."""
    async with bed(tmp_path, config=replace(FAST, chunk_size=16 << 10)) as both, both.source.vmm() as src:
        both.agent.inject("save", fault, after=1, count=None)
        await src.set_state(STOP_COPY)
        with trio.fail_after(5):
            while not (error := await src.data_read_errno(1000)):
                pass
        assert error in (errno.EPROTO, errno.EINVAL)
        assert STOP_COPY == await src.state()
        await src.set_state(RUNNING)
        assert both.source.runs


async def test_device_that_fails_while_it_is_saved(tmp_path: Path) -> None:
    """The agent's word that the function is broken is an error state, and a reset leads out."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        both.agent.inject("save", Fails(DeviceFailed("smoke")), after=1)
        await src.set_state(STOP_COPY)
        with trio.fail_after(5):
            while not await src.data_read_errno(50_000):
                pass
        assert (0, 6) == (await src.state(), await src.v1_state())
        await src.succeed(RESET)
        assert RUNNING == await src.state()


async def test_an_agent_without_precopy(tmp_path: Path) -> None:
    """The client may enter PRE_COPY all the same: it gets the descriptor early, and the state after the stop."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        with_caps(both.source.device, precopy=False)
        both.source.runner.link.facts = Facts(both.source.device.caps, 0.0)
        await src.set_state(PRE_COPY)
        head = await src.data_read(4096)
        assert b'"kind":"test"' in head
        await src.set_state(STOP_COPY)
        await dst.set_state(RESUMING)
        await dst.write_stream(head + await src.read_stream())
        await dst.set_state(RUNNING)
        assert both.migrated()


async def test_padded_reads(tmp_path: Path) -> None:
    """Clients that insist on the size that they asked for can have it."""
    async with bed(tmp_path, config=replace(FAST, pad_reads=True), state_size=100) as both, both.source.vmm() as src:
        await src.set_state(STOP_COPY)
        answer = await src.succeed(17, struct.pack("<II", 8 + 65536, 65536))
        argsz, size = struct.unpack_from("<II", answer.payload)
        assert (8 + 65536, 8 + size) == (len(answer.payload), argsz)
        assert bytes(65536 - size) == answer.payload[8 + size :]


# Deadlines


#: Calls that each side's client waits for, directly or not.
WAITED_FOR = [
    *(("src", op) for op in SESSION_OPS if op not in ("check", "load_begin", "load", "load_commit")),
    *(("dst", op) for op in SESSION_OPS if op not in ("save", "estimate", "dirty_start", "dirty_report", "dirty_stop")),
]


@pytest.mark.parametrize(("side", "op"), WAITED_FOR)
async def test_one_deadline(tmp_path: Path, side: str, op: str) -> None:
    """However long the agent's own limits are, and whatever hangs, each message is answered within its budget."""
    fd = memfd(1 << 16)
    limitless = replace(FAST, call_s=60, stop_s=60, data_s=60)

    async def soon(client: Vmm, command: int, *fields: bytes) -> Answer:
        # Half a second is the budget; the rest is for a machine that is busy.
        with trio.fail_after(1.5):
            return await client.command(command, b"".join(fields))

    async def to(client: Vmm, state: int) -> None:
        await soon(client, FEATURE, struct.pack("<IIII", 16, 2 | 1 << 17, state, 0))

    async with bed(tmp_path, config=limitless, reply_budget_s=0.5, state_size=8 << 10) as both:
        stream = await stream_of(both.source)
        async with both.source.vmm() as src, both.destination.vmm() as dst:
            await src.dma_map(0, 1 << 16, fd)
            await until(lambda: both.source.runner.record.asked and both.destination.runner.record.asked)
            hung = both.agent.inject(op, NeverAnswers(), count=None, function_id=side)
            if op == "status":  # asked when a resumption may have had its effect
                both.agent.inject("resume", Drops(), count=None, function_id=side)
            await soon(src, FEATURE, struct.pack("<IIQII", 24, 6 | 1 << 17, 4096, 0, 0))
            for state in (PRE_COPY, RUNNING, PRE_COPY, STOP_COPY):
                await to(src, state)
                await soon(src, MIG_DATA_READ, struct.pack("<II", 8 + 65536, 65536))
            await soon(src, FEATURE, struct.pack("<IIQQQ", 4096, 8 | 1 << 16, 0, 1 << 16, 4096))
            await soon(src, FEATURE, struct.pack("<II", 8, 7 | 1 << 17))
            for data in (b"", stream):
                await to(dst, RESUMING)
                await soon(dst, MIG_DATA_WRITE, struct.pack("<II", 8 + len(data), len(data)), data)
                await to(dst, STOP)
                await to(dst, RUNNING)
            for client in (src, dst):
                await to(client, RUNNING)
                await soon(client, FEATURE, struct.pack("<II", 16, 2 | 1 << 16))
                await to(client, STOP)
                await soon(client, RESET)
            assert hung.struck or (side, op) == ("dst", "abort")
    os.close(fd)


async def test_slow_data(tmp_path: Path) -> None:
    """PRE_COPY is short when time is up; STOP_COPY is an error then, and the next read goes on without loss."""
    config = replace(FAST, data_s=60)
    async with (
        bed(tmp_path, config=config, reply_budget_s=0.4) as both,
        both.source.vmm() as src,
        both.destination.vmm() as dst,
    ):
        both.agent.inject("save", Delay(0.6), function_id="src")
        await src.set_state(PRE_COPY)
        stream = await src.data_read(200_000)
        assert 0 < len(stream) < 65536
        both.agent.inject("save", Delay(0.6), after=2, function_id="src")
        await until(lambda: both.source.runner.steps.source.buffered > 65536)  # type: ignore[union-attr]
        await src.set_state(STOP_COPY)
        errors: list[int] = []
        while len(errors) < 50:
            answer = await src.command(17, struct.pack("<II", 8 + 60_000, 60_000))
            errors.append(answer.error)
            stream += answer.payload[8:]
            if not answer.error and len(answer.payload) < 60_008:
                break
        assert {0, errno.ETIMEDOUT} == set(errors)
        await dst.set_state(RESUMING)
        await dst.write_stream(stream)
        await dst.set_state(RUNNING)
        assert both.migrated()


# Dirty pages


async def test_dirty_reports_that_fail(tmp_path: Path) -> None:
    """A report that does not come makes its range dirty, once; another range is not touched."""
    fd = memfd(1 << 20)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 20, fd)
        assert 4096 == await src.start_logging()
        for fault in (Fails(TransportLost("gone")), Drops(executed=True), NeverAnswers(executed=False)):
            both.source.device.work(0x80000, 1)
            both.agent.inject("dirty_report", fault)
            assert set(range(16)) == await src.report(0, 0x10000)
            if isinstance(fault, NeverAnswers):
                break  # and so does the agent from now on
            assert {0} == await src.report(0x80000, 0x10000)
            assert set() == await src.report(0, 1 << 20)
    os.close(fd)


async def test_reports_that_nobody_waits_for(tmp_path: Path) -> None:
    """A report asked for without a reply has told nobody: its pages are dirty still, in both generations."""
    fd = memfd(1 << 20)
    requests = {
        FEATURE: struct.pack("<IIQQQ", 1 << 20, 8 | 1 << 16, 0, 1 << 20, 4096),
        DIRTY_PAGES: struct.pack("<IIQQQQ", 40 + 32, 4, 0, 1 << 20, 4096, 32),
    }
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 20, fd)
        await src.start_logging()
        for command, request in requests.items():
            both.source.device.work(0x3000, 1)
            await src.send(src.pack(command, request, flags=0x10))
            assert {3} == (await src.report(0, 1 << 20) if command == DIRTY_PAGES else await src.v1_dirty(0, 1 << 20))
            assert set() == await src.report(0, 1 << 20)
    os.close(fd)


async def test_data_that_nobody_waits_for(tmp_path: Path) -> None:
    """A read without a reply takes nothing of the stream."""
    async with bed(tmp_path) as both, both.source.vmm() as src, both.destination.vmm() as dst:
        await src.set_state(STOP_COPY)
        await src.send(src.pack(17, struct.pack("<II", 8 + 5000, 5000), flags=0x10))
        await dst.set_state(RESUMING)
        await dst.write_stream(await src.read_stream())
        await dst.set_state(RUNNING)
        assert both.migrated()


async def test_a_short_report_is_not_believed(tmp_path: Path) -> None:
    """A bitmap that is too short for its range leaves the range dirty."""
    fd = memfd(1 << 20)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 20, fd)
        await src.start_logging()
        both.agent.inject("dirty_report", short_report())
        assert set(range(256)) == await src.report(0, 1 << 20)
        assert set() == await src.report(0, 1 << 20)
    os.close(fd)


@pytest.mark.parametrize("size", [1 << 62, 1, 3000, 0])
async def test_page_sizes_that_no_host_has(tmp_path: Path, size: int) -> None:
    """One bit of a page of 2^62 bytes would be spread over 2^50: the log is not used, and reports are prompt."""
    fd = memfd(1 << 20)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 20, fd)
        both.agent.inject("dirty_start", ChangesResult(lambda chosen: size))
        await src.start_logging()
        with trio.fail_after(1):
            assert set() == await src.report(0, 1 << 20)
    os.close(fd)


async def test_dirty_log_outlives_a_reset(tmp_path: Path) -> None:
    """A reset through the agent ends its log: it is begun anew, and everything is dirty once."""
    fd = memfd(1 << 16)
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 16, fd)
        await src.start_logging()
        await src.set_state(STOP)
        await src.succeed(RESET)
        assert set(range(16)) == await src.report(0, 1 << 16)
        both.source.device.work(0x3000, 1)
        assert {3} == await src.report(0, 1 << 16)
    os.close(fd)


async def test_a_reset_with_petabytes_mapped(tmp_path: Path) -> None:
    """What is dirty as a whole is noted as such, so ranges of any size cost neither time nor memory."""
    fd = memfd(1 << 16)
    size = 1 << 43
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 1 << 16, fd)
        for number in range(1, 1025):
            await src.dma_map(number * size, size)
        await src.start_logging()
        await src.set_state(STOP)
        with trio.fail_after(5):
            await src.succeed(RESET)
            assert set(range(8)) == await src.report(0, 1 << 15)
            assert set(range(256)) == await src.report(3 * size + (1 << 40), 1 << 20)
            assert set() == await src.report(3 * size + (1 << 40), 1 << 20)
            assert set(range(16)) == await src.report(1 << 15, 1 << 15, 2048)
        await src.dma_unmap(7 * size, size)
        assert set() == await src.report(0, 1 << 16)
    os.close(fd)


async def test_report_rules(tmp_path: Path) -> None:
    """Unmapped is ENOENT, not logging is EINVAL; ranges need not be mappings; pages convert; later maps count."""
    fd = memfd(1 << 20)
    async with bed(tmp_path) as both, both.source.vmm() as src:

        async def errno_of(iova: int, length: int, page: int) -> int:
            return (await src.command(FEATURE, struct.pack("<IIQQQ", 1 << 20, 8 | 1 << 16, iova, length, page))).error

        await src.dma_map(0, 0x8000, fd)
        assert errno.EINVAL == await errno_of(0, 0x8000, 4096)
        assert errno.ENOENT == await errno_of(0x100000, 0x8000, 4096)
        await src.start_logging()
        assert errno.EINVAL == (await src.command(FEATURE, struct.pack("<IIQII", 24, 6 | 1 << 17, 8192, 0, 0))).error
        await src.dma_map(0x8000, 0x8000, fd, offset=0x8000)
        both.source.device.work(0x7000, 0x2000)
        assert {3, 4} == await src.report(0, 0x10000, 8192)
        both.source.device.work(0x9000, 1)
        assert {2, 3} == await src.report(0x8000, 0x8000, 2048)
        assert errno.EINVAL == await errno_of(0, 0x8000, 3000)
        await src.succeed(FEATURE, struct.pack("<II", 8, 7 | 1 << 17))
        assert errno.EINVAL == await errno_of(0, 0x8000, 4096)
        assert both.source.device.log is None
    os.close(fd)


async def test_memory_without_a_file_is_the_clients(tmp_path: Path) -> None:
    """What goes by messages was written by the client: v2 reports nothing, v1 refuses to."""
    async with bed(tmp_path) as both, both.source.vmm() as src:
        await src.dma_map(0, 0x8000)
        await src.start_logging()
        both.source.device.work(0, 0x8000)
        assert set() == await src.report(0, 0x8000)
        assert errno.EINVAL == await src.errno(DIRTY_PAGES, struct.pack("<IIQQQQ", 48, 4, 0, 0x8000, 4096, 8))


# The device link


class SlowRelay:
    """Between two UNIX sockets; what goes up is late by `delay_s`, as on a busy bus."""

    def __init__(self, path: Path, upstream: Path) -> None:
        self.path, self.upstream, self.delay_s = path, upstream, 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and relay until cancelled."""
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
            await listener.bind(os.fspath(self.path))
            listener.listen()
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._serve, sock)

    async def _serve(self, client: trio.socket.SocketType) -> None:
        with client, trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as server:
            await server.connect(os.fspath(self.upstream))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._relay, client, server, lambda: self.delay_s)
                await self._relay(server, client, lambda: 0.0)
                nursery.cancel_scope.cancel()

    async def _relay(
        self, source: trio.socket.SocketType, target: trio.socket.SocketType, delay_s: Callable[[], float]
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes, list[int]]](10_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._collect, source, send, delay_s)
            async for due, data, fds in receive:
                await trio.sleep_until(due)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
                sent = await target.sendmsg([data], rights)
                while sent < len(data):
                    sent += await target.send(data[sent:])
                for fd in fds:
                    os.close(fd)
            target.shutdown(socket.SHUT_WR)

    async def _collect(
        self,
        source: trio.socket.SocketType,
        send: trio.MemorySendChannel[tuple[float, bytes, list[int]]],
        delay_s: Callable[[], float],
    ) -> None:
        async with send:
            while True:
                data, ancillary, _, _ = await source.recvmsg(65536, socket.CMSG_SPACE(64))
                if not data:
                    return
                fds = [fd for _, _, content in ancillary for fd in struct.unpack(f"{len(content) // 4}i", content)]
                await send.send((trio.current_time() + delay_s(), data, fds))


@pytest.mark.parametrize("target", [STOP, STOP_COPY, PRE_COPY])
async def test_a_doorbell_just_before_the_stop(tmp_path: Path, target: int) -> None:
    """A posted write is at the device before the agent is told to stop it, however slow the link is."""
    relay = SlowRelay(tmp_path / "slow.sock", tmp_path / "up.sock")
    async with (
        trio.open_nursery() as nursery,
        bed(
            tmp_path,
            devices=lambda name: UpstreamDevice(socket=relay.path),
            also=(function(tmp_path, "up"),),
        ) as both,
    ):
        await nursery.start(relay.run)
        seen: list[int] = []
        device = next(item for item in both.daemon.functions if item.name == "up").backend
        move = both.source.device.move

        def watch(state: AgentState) -> None:
            if state is AgentState.QUIESCED:
                seen.append(int.from_bytes(device.model.region_read(0, 4, 4), "little"))  # type: ignore[attr-defined]
            move(state)

        both.source.device.move = watch  # type: ignore[method-assign]
        async with both.source.vmm() as src:
            relay.delay_s = 0.1  # from now on: all that an attach asks would be too late on a slow machine
            if target == PRE_COPY:
                await src.set_state(PRE_COPY)
            doorbell = struct.pack("<QIII", 4, 0, 4, 4711)
            await src.send(src.pack(REGION_WRITE, doorbell, flags=0x10))
            await src.set_state(STOP_COPY if target == PRE_COPY else target)
        assert [4711] == seen
        nursery.cancel_scope.cancel()
