"""Moving the NVMe function at any time, whatever it is doing, and whatever the stream is made of."""

from __future__ import annotations

import contextlib
import struct

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from nvmebed import Driver, Queue, machine, make_function
from nvmebed.moving import agent_function, migrate, moved_driver, session_of, spare
from vfiouser_agents.errors import CorruptState
from vfiouser_soc.agent.payload import SavedParts, StateReader, StateWriter
from vfiouser_soc.agent.state_memory import StateMemory, StateMemoryOptions
from vfiouser_soc.nvme import snapshot, snapshot_reader
from vfiouser_soc.nvme.stores import MemoryStore

BLOCKS = 64
ENTRIES = 8
#: One thing that the guest or the operator does.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, BLOCKS - 1), st.integers(1, 255)),
        st.tuples(st.just("read"), st.integers(0, BLOCKS - 1), st.just(0)),
        st.tuples(st.just("event"), st.just(0), st.just(0)),
        st.tuples(st.just("bad"), st.integers(0x80, 0xFF), st.just(0)),
        st.tuples(st.just("ring"), st.just(0), st.just(0)),
        st.tuples(st.just("collect"), st.just(0), st.just(0)),
        st.tuples(st.just("turns"), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("pause"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=40,
)


class Guest:
    """A guest that submits without waiting, and knows what has to come of it."""

    def __init__(self, driver: Driver, queue: Queue) -> None:
        self.driver = driver
        self.queue = queue
        self.disk = [0] * BLOCKS
        #: Command id to what its data must be (None for other commands), and where the data is.
        self.expected: dict[int, tuple[int | None, int]] = {}
        self.busy: set[int] = set()
        self.waiting_events = 0
        #: Block that a command keeps busy, by command id.
        self.blocks: dict[int, int] = {}

    def submit(self, kind: str, number: int, value: int) -> None:
        """Submit a command, if there is room and nothing that it could collide with is under way."""
        if len(self.expected) >= ENTRIES - 1:
            return
        if kind == "bad":
            self.expected[self.driver.submit(self.queue, number, nsid=1, ring=False)] = None, -1
        elif number not in self.busy:
            self.busy.add(number)
            page = self.driver.alloc(4096)
            if kind == "write":
                self.driver.host.memory.poke(page, bytes([value]) * 512)
                self.disk[number] = value
            opcode = 0x01 if kind == "write" else 0x02
            cid = self.driver.submit(self.queue, opcode, nsid=1, prp1=page, cdw10=number, ring=False)
            self.expected[cid] = (self.disk[number] if kind == "read" else None), page
            self.blocks[cid] = number

    def collect(self) -> None:
        """Take completions, each of a command that is under way, and check what it brought."""
        self.driver.collect(self.queue)
        for cid, (status, _) in list(self.queue.done.items()):
            value, page = self.expected.pop(cid)
            assert (page < 0) == bool(status)
            if value is not None:
                assert bytes([value]) * 512 == self.driver.host.memory.peek(page, 512)
            self.busy.discard(self.blocks.pop(cid, -1))
            del self.queue.done[cid]


async def _play(steps: list[tuple[str, int, int]], *, polled: bool, drain_s: float, yields: bool) -> None:
    store = MemoryStore(1 << 20)
    first, second = make_function(store, polled=polled), make_function(store, polled=polled)
    async with machine(first, io_queue=False) as bed, spare(second, bed) as other_host:
        here, there = (
            (agent_function(first, drain_s=drain_s), bed.host),
            (
                agent_function(second, drain_s=drain_s),
                other_host,
            ),
        )
        guest = Guest(bed.driver, await bed.driver.create_queue(1, ENTRIES))
        bed.host.memory.yields = other_host.memory.yields = yields
        admin = bed.driver.queues[0]
        for kind, number, value in steps:
            if kind in ("write", "read", "bad"):
                guest.submit(kind, number, value)
            elif kind == "event" and guest.waiting_events < 3:
                bed.driver.submit(admin, 0x0C)
                guest.waiting_events += 1
            elif kind == "ring":
                bed.driver.ring(guest.queue)
            elif kind == "collect":
                guest.collect()
            elif kind == "turns":
                for _ in range(number):
                    await trio.lowlevel.checkpoint()
            elif kind == "pause":
                session = await session_of(here[0])
                await session.stop()
                before = list(here[1].memory.accesses)
                bed.driver.ring(guest.queue)
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                assert before == here[1].memory.accesses
                await session.resume()
            elif kind == "move":
                await migrate(here[0], there[0], precopy=bool(number))
                here, there = there, here
                moved_driver(bed, here[0].nvme, here[1])
        bed.driver.ring(guest.queue)
        with trio.fail_after(5):
            while guest.expected or guest.waiting_events > len(here[0].nvme.controller.state.event_requests):
                guest.collect()
                await trio.sleep(0.001) if polled else await trio.lowlevel.checkpoint()
        for block, value in enumerate(guest.disk):
            assert bytes([value]) * 512 == await store.read(block * 512, 512)
        assert guest.waiting_events == len(here[0].nvme.controller.state.event_requests)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, polled=st.booleans(), yields=st.booleans(), hasty=st.booleans())
def test_no_history_loses_a_command(steps: list[tuple[str, int, int]], polled: bool, yields: bool, hasty: bool) -> None:
    """Whatever is submitted, rung and collected, and wherever the function is moved meanwhile: each command completes
    once, with the right data, also when the stop has no time to drain and carries commands over.
    """
    trio.run(lambda: _play(steps, polled=polled, drain_s=0.0 if hasty else 1.0, yields=yields))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_snapshots_that_make_no_sense_are_refused(data: st.DataObject) -> None:
    """Any value of a snapshot can be replaced by any other: it is read, or refused with a reason, and nothing else."""
    function = make_function()
    try:
        raw = msgpack.unpackb(snapshot.pack(snapshot.capture(function)))
        junk = st.one_of(
            st.none(),
            st.integers(-1, 1 << 63),
            st.binary(max_size=9),
            st.text(max_size=3),
            st.lists(st.integers(0, 70000), max_size=11),
            st.lists(st.lists(st.one_of(st.integers(0, 5000), st.binary(max_size=64)), max_size=11), max_size=3),
        )
        for name in data.draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=3)):
            raw[name] = data.draw(junk)
        with contextlib.suppress(snapshot_reader.BadSnapshot):
            snapshot_reader.parse(msgpack.packb(raw), function)
    finally:
        function.close()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 600_000),
    pieces=st.lists(st.integers(500, 300_000), min_size=1, max_size=6),
    rewrites=st.lists(st.integers(0, 3), max_size=6),
)
def test_state_memory_arrives_in_any_pieces(size: int, pieces: list[int], rewrites: list[int]) -> None:
    """However the stream is cut, and whatever is rewritten between the pieces, both sides hold the same at the end."""

    async def move() -> None:
        ours, theirs = (StateMemory(StateMemoryOptions(size), "x", trio.current_time) for _ in range(2))
        writer = StateWriter(ours, SavedParts(lambda: b"controller", memoryview(b"buffer")))
        ours.rewritten = writer.rewritten
        reader = StateReader(theirs, 6, 1 << 40)
        offset, turn, stream = 0, 0, bytearray()
        left = list(rewrites)
        while True:
            chunk = writer.take(offset, pieces[turn % len(pieces)], final=not left)
            assert chunk == writer.take(offset, pieces[turn % len(pieces)], final=not left) or not chunk.data
            await reader.put(offset, chunk.data)
            stream += chunk.data
            offset, turn = offset + len(chunk.data), turn + 1
            if chunk.eof:
                break
            if left and (index := left.pop()) < ours.blocks:
                ours.rewrite(index)
        parts = reader.finish(offset, xxh3_128_digest(stream))
        theirs.take(parts.blocks)
        assert ours.digest() == theirs.digest()
        assert (b"controller", bytearray(b"buffer")) == (parts.controller, parts.buffer)

    trio.run(move)


@settings(max_examples=100, deadline=None)
@given(junk=st.lists(st.one_of(st.binary(max_size=40), st.just(struct.pack("<4sQI", b"HEAD", 1, 0))), max_size=5))
def test_garbage_is_never_a_state(junk: list[bytes]) -> None:
    """Bytes that nobody saved are refused at the commit, whatever they are."""

    async def load() -> None:
        reader = StateReader(StateMemory(StateMemoryOptions(), "x", trio.current_time), 0, 1 << 20)
        offset = 0
        for piece in junk:
            await reader.put(offset, piece)
            offset += len(piece)
        with pytest.raises(CorruptState, match="nothing was applied"):
            reader.finish(offset, xxh3_128_digest(b"".join(junk)))

    trio.run(load)
