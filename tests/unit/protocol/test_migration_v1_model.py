"""The v1 generation: transitions, registers, the iteration by which data is taken, and DIRTY_PAGES."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiouser_protocol import migration_v1 as v1
from vfiouser_protocol.constants import DeviceState, RegionFlags
from vfiouser_protocol.dirty_pages import GetDirty, StartDirty, StopDirty, interpret_dirty_pages, require_dirty_range
from vfiouser_protocol.dma_logging import DmaLogging
from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.migration_v1 import DataAccess, Iteration, IterationPhase, MigrationRegister, RegionLayout
from vfiouser_protocol.regions import SparseArea, parse_region_info, region_info_reply

PAGE = 4096
MIB = 1 << 20
LAYOUT = RegionLayout(PAGE, MIB)
RUNNING, STOP, PRE_COPY, STOP_COPY, RESUMING = (
    DeviceState.RUNNING,
    DeviceState.STOP,
    DeviceState.PRE_COPY,
    DeviceState.STOP_COPY,
    DeviceState.RESUMING,
)


def refused(number: int, call: object, *args: object, **kwargs: object) -> str:
    """Proves that a call is refused with an errno; returns why."""
    with pytest.raises(CommandError) as info:
        call(*args, **kwargs)  # type: ignore[operator]
    assert number == info.value.errno
    return str(info.value)


# device_state

#: Which of 0 to 7 may be written in each state.
ALLOWED = {0: "0124", 1: "01234", 2: "012", 3: "0123", 4: "14", 6: ""}
#: The states that the shared engine goes through.
PATHS = {
    (0, 1): [RUNNING],
    (0, 2): [STOP_COPY],
    (0, 4): [RESUMING],
    (1, 0): [STOP],
    (1, 2): [STOP, STOP_COPY],
    (1, 3): [PRE_COPY],
    (1, 4): [STOP, RESUMING],
    (2, 0): [STOP],
    (2, 1): [STOP, RUNNING],
    (3, 0): [RUNNING, STOP],
    (3, 1): [RUNNING],
    (3, 2): [STOP_COPY],
    (4, 1): [STOP, RUNNING],
}


@pytest.mark.parametrize("current", ALLOWED)
@pytest.mark.parametrize("written", range(8))
@pytest.mark.parametrize("reserved", [0, 0xFFFF_FFF8])
def test_every_transition(current: int, written: int, reserved: int) -> None:
    """Exactly what real clients need is allowed, reserved bits mean nothing, and the way is that of the v2 states."""
    state = v1.TO_V2[current]
    if str(written) not in ALLOWED[current]:
        assert "the state stays" in refused(errno.EINVAL, v1.require_transition, state, written | reserved)
        return
    arcs = v1.require_transition(state, written | reserved)
    assert PATHS.get((current, written), []) == [arc.target for arc in arcs]


def test_both_views_have_the_same_states() -> None:
    """Each state of one view is one of the other."""
    assert {0: STOP, 1: RUNNING, 2: STOP_COPY, 3: PRE_COPY, 4: RESUMING, 6: DeviceState.ERROR} == dict(v1.TO_V2)
    assert all(state is v1.TO_V2[value] for state, value in v1.FROM_V2.items())


def test_reserved_bits_are_kept() -> None:
    """They are the client's, the three state bits are the device's."""
    assert 1 == v1.device_state_value(RUNNING)
    assert 0xFFFF_FFFA == v1.device_state_value(STOP_COPY, 0xFFFF_FFFF)


# The region


def test_the_region_describes_itself() -> None:
    """Type 3, subtype 1; the register page is trapped, the data section may be mapped."""
    spec = LAYOUT.spec()
    payload, attach = region_info_reply(spec, 80)
    info = parse_region_info(payload)
    assert attach
    assert (9, PAGE + MIB, (3, 1)) == (info.index, info.size, info.type)
    assert (SparseArea(PAGE, MIB),) == info.mappable_areas
    assert RegionFlags.READ | RegionFlags.WRITE == info.flags & 3
    assert 80 == info.argsz


@pytest.mark.parametrize(
    ("page", "data"), [(0, PAGE), (16, 16), (3000, 3000), (PAGE, 0), (PAGE, PAGE + 1), (PAGE, -PAGE)]
)
def test_impossible_layouts(page: int, data: int) -> None:
    """The data section is whole pages on a page of its own."""
    with pytest.raises(LocalProtocolError):
        RegionLayout(page, data)


@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [
        (0, 4, MigrationRegister.DEVICE_STATE),
        (4, 4, MigrationRegister.RESERVED),
        (8, 8, MigrationRegister.PENDING_BYTES),
        (16, 8, MigrationRegister.DATA_OFFSET),
        (24, 8, MigrationRegister.DATA_SIZE),
        (PAGE, 1, DataAccess(0, 1)),
        (PAGE + 5, 8, DataAccess(5, 13)),
        (PAGE, MIB, DataAccess(0, MIB)),
        (PAGE + MIB - 1, 1, DataAccess(MIB - 1, MIB)),
    ],
)
def test_accesses_that_mean_something(offset: int, count: int, expected: object) -> None:
    """Registers whole, data in any way."""
    assert expected == LAYOUT.locate(offset, count)


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        *[(0, count) for count in (1, 2, 3, 8, 32)],
        *[(4, count) for count in (1, 2, 8)],
        *[(8, count) for count in (4, 16)],
        *[(offset, 4) for offset in (1, 2, 6, 12, 20, 28, 32, 2048, PAGE - 4, PAGE - 1)],
        (PAGE - 8, 8),
        (PAGE - 4, 8),
        (PAGE + MIB, 1),
        (PAGE + MIB - 1, 2),
        (1 << 63, 8),
    ],
)
def test_accesses_that_mean_nothing(offset: int, count: int) -> None:
    """Parts of registers, several at once, dead space, and out of the region."""
    refused(errno.EINVAL, LAYOUT.locate, offset, count)


@pytest.mark.parametrize("register", MigrationRegister)
@pytest.mark.parametrize("state", DeviceState)
def test_who_may_write_what(register: MigrationRegister, state: DeviceState) -> None:
    """State and the reserved word always, data_size while resuming, the rest never."""
    always = register in (MigrationRegister.DEVICE_STATE, MigrationRegister.RESERVED)
    if always or (register is MigrationRegister.DATA_SIZE and state is RESUMING):
        v1.require_writable(register, state)
    else:
        refused(errno.EINVAL, v1.require_writable, register, state)


def test_register_bytes() -> None:
    """Little-endian, in the register's size."""
    assert bytes.fromhex("03000000") == v1.pack_register(MigrationRegister.DEVICE_STATE, 3)
    assert bytes.fromhex("0010000000000000") == v1.pack_register(MigrationRegister.DATA_OFFSET, PAGE)
    assert 0x0403_0201 == v1.unpack_register(bytes([1, 2, 3, 4]))


# Saving


def saving(state: DeviceState = STOP_COPY) -> Iteration:
    """An iteration that just began to save."""
    iteration = Iteration(LAYOUT)
    iteration.enter(state)
    return iteration


def take(iteration: Iteration, size: int) -> bool:
    """One whole iteration of a client; returns whether it acknowledged the chunk before."""
    acknowledged = iteration.begin_pending()
    assert size == iteration.pending(size)
    assert iteration.offset()
    iteration.prepared(size)
    assert size == iteration.size()
    return acknowledged


def test_a_whole_save() -> None:
    """Each pending_bytes acknowledges the chunk before; 0 ends it for good."""
    iteration = saving()
    assert not take(iteration, 100)
    assert take(iteration, 50)
    assert iteration.begin_pending()
    assert 0 == iteration.pending(0)
    assert IterationPhase.FINISHED is iteration.phase
    assert not iteration.begin_pending()
    assert 0 == iteration.pending(1000)
    refused(errno.EINVAL, iteration.offset)
    refused(errno.EINVAL, iteration.size)


def test_reads_can_be_repeated() -> None:
    """The same chunk, without preparing it again."""
    iteration = saving()
    for _ in range(3):
        assert not iteration.begin_pending()
        assert 10 == iteration.pending(10)
    assert iteration.offset()
    iteration.prepared(10)
    for _ in range(3):
        assert not iteration.offset()
        assert 10 == iteration.size()
    assert not iteration.offset()


def test_a_chunk_whose_size_was_not_read_is_shown_again() -> None:
    """pending_bytes read twice loses nothing."""
    iteration = saving()
    iteration.begin_pending()
    iteration.pending(10)
    iteration.offset()
    iteration.prepared(10)
    assert not iteration.begin_pending()
    assert 10 == iteration.pending(0)
    refused(errno.EINVAL, iteration.size)
    assert not iteration.offset()
    assert 10 == iteration.size()
    assert iteration.begin_pending()


def test_a_failed_preparation_can_be_repeated() -> None:
    """As long as no chunk came, data_offset asks for it."""
    iteration = saving()
    iteration.begin_pending()
    iteration.pending(10)
    assert iteration.offset()
    refused(errno.EINVAL, iteration.size)
    assert iteration.offset()
    iteration.prepared(10)
    assert 10 == iteration.size()


@pytest.mark.parametrize("state", [RUNNING, STOP, DeviceState.ERROR])
def test_nothing_moves_outside_of_a_migration(state: DeviceState) -> None:
    """pending_bytes is 0, the others are refused, data is not written."""
    iteration = saving(state)
    assert not iteration.begin_pending()
    assert 0 == iteration.pending(1000)
    refused(errno.EINVAL, iteration.offset)
    refused(errno.EINVAL, iteration.size)
    refused(errno.EINVAL, iteration.write_size, 1)
    refused(errno.EINVAL, iteration.require_data_access, write=True)
    iteration.require_data_access(write=False)


def test_out_of_sequence() -> None:
    """data_offset and data_size before pending_bytes."""
    iteration = saving(PRE_COPY)
    refused(errno.EINVAL, iteration.offset)
    assert "pending_bytes was read" in refused(errno.EINVAL, iteration.size)
    refused(errno.EINVAL, iteration.write_size, 1)


def test_zero_in_precopy_means_later() -> None:
    """There may be more, so the next pending_bytes is asked for again."""
    iteration = saving(PRE_COPY)
    iteration.begin_pending()
    assert 0 == iteration.pending(0)
    refused(errno.EINVAL, iteration.offset)
    iteration.begin_pending()
    assert 5 == iteration.pending(5)


@pytest.mark.parametrize("read_size", [False, True])
def test_stop_with_a_chunk_shown(read_size: bool) -> None:
    """What was taken is acknowledged by the first pending_bytes after the stop, what was not is shown again."""
    iteration = saving(PRE_COPY)
    iteration.begin_pending()
    iteration.pending(10)
    iteration.offset()
    iteration.prepared(10)
    if read_size:
        iteration.size()
    assert not iteration.enter(STOP_COPY)
    assert 10 == iteration.chunk
    refused(errno.EINVAL, iteration.offset)
    refused(errno.EINVAL, iteration.size)
    assert read_size == iteration.begin_pending()
    assert 20 == iteration.pending(20)
    assert read_size == iteration.offset()


def test_same_state_again_changes_nothing() -> None:
    """The v1 fork of QEMU writes 2 in 2, amid an iteration."""
    iteration = saving()
    take(iteration, 10)
    assert not iteration.enter(STOP_COPY)
    assert IterationPhase.DELIVERED is iteration.phase


@pytest.mark.parametrize("state", [RUNNING, STOP, RESUMING])
def test_leaving_drops_the_chunk(state: DeviceState) -> None:
    """The engine is told, so that it can forget it too."""
    iteration = saving()
    take(iteration, 10)
    assert iteration.enter(state)
    assert not iteration.enter(STOP_COPY)
    assert (IterationPhase.INITIAL, 0) == (iteration.phase, iteration.chunk)


def test_misuse_of_prepared() -> None:
    """A chunk that nobody asked for, or that does not fit, is an internal error."""
    iteration = saving()
    with pytest.raises(LocalProtocolError):
        iteration.prepared(1)
    iteration.begin_pending()
    iteration.pending(1)
    with pytest.raises(LocalProtocolError):
        iteration.prepared(MIB + 1)


# Resuming


def test_a_whole_load() -> None:
    """data_offset may be read or not; data_size says how much is consumed."""
    iteration = saving(RESUMING)
    assert not iteration.offset()
    iteration.require_data_access(write=True)
    assert 0 == iteration.size()
    for size in (MIB, 1, 0, 77):
        assert size == iteration.write_size(size)
        assert size == iteration.size()
    iteration.write_size(5)
    refused(errno.EINVAL, iteration.write_size, MIB + 1)
    refused(errno.EINVAL, iteration.write_size, (1 << 64) - 1)
    assert not iteration.begin_pending()
    assert 0 == iteration.pending(5)
    assert not iteration.enter(RUNNING)
    iteration.enter(RESUMING)
    assert 0 == iteration.size()


# DIRTY_PAGES


def dirty(flags: int, *numbers: int, argsz: int = 4096) -> bytes:
    """A DIRTY_PAGES payload."""
    return struct.pack(f"<II{len(numbers)}Q", argsz, flags, *numbers)


@pytest.fixture
def logging() -> DmaLogging:
    """A log that runs, with pages of 4 KiB."""
    log = DmaLogging()
    log.start(PAGE)
    return log


def test_start_and_stop() -> None:
    """At any time; argsz is 8."""
    assert StartDirty() == interpret_dirty_pages(dirty(1, argsz=8), DmaLogging())
    assert StopDirty() == interpret_dirty_pages(dirty(2, argsz=8), DmaLogging())


def test_get(logging: DmaLogging) -> None:
    """The bitmap is at 40, argsz is exact."""
    call = interpret_dirty_pages(dirty(4, 0x10000, 128 * PAGE, PAGE, 16), logging)
    assert isinstance(call, GetDirty)
    assert (0x10000, 128 * PAGE, PAGE, None) == (call.iova, call.length, call.page_size, call.short)
    bitmap = bytes(range(16))
    assert dirty(4, 0x10000, 128 * PAGE, PAGE, 16, argsz=56) + bitmap == call.reply(bitmap)


@pytest.mark.parametrize("argsz", [8, 40, 55])
def test_short_get(logging: DmaLogging, argsz: int) -> None:
    """A client that takes too little learns how much there is, and nothing is cleared."""
    call = interpret_dirty_pages(dirty(4, 0, 128 * PAGE, PAGE, 16, argsz=argsz), logging)
    assert isinstance(call, GetDirty)
    assert struct.pack("<II", 56, 4) == call.short


BAD = {
    "payload of 4": bytes(4),
    "argsz 4": dirty(1, argsz=4),
    **{f"flags {flags}": dirty(flags) for flags in (0, 3, 8)},
    "flags 5": dirty(5, 0, PAGE, PAGE, 8),
    "short": dirty(4, 0, PAGE, PAGE),
    "argsz over 1 MiB": dirty(4, 0, PAGE, PAGE, 8, argsz=MIB + 1),
    "page size": dirty(4, 0, 4 * PAGE, 2 * PAGE, 8),
    "page size 0": dirty(4, 0, PAGE, 0, 8),
    "page size 3000": dirty(4, 0, PAGE, 3000, 8),
    "bitmap size": dirty(4, 0, 128 * PAGE, PAGE, 8),
    "bitmap size huge": dirty(4, 0, PAGE, PAGE, 1 << 60),
    "wraps": dirty(4, (1 << 64) - PAGE, 2 * PAGE, PAGE, 8),
    "empty range": dirty(4, 0, 0, PAGE, 0),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_dirty_pages(logging: DmaLogging, name: str) -> None:
    """EINVAL, whatever is logged."""
    refused(errno.EINVAL, interpret_dirty_pages, BAD[name], logging)


def test_get_before_start() -> None:
    """EINVAL: there is nothing to report."""
    refused(errno.EINVAL, interpret_dirty_pages, dirty(4, 0, PAGE, PAGE, 8), DmaLogging())


@pytest.mark.parametrize("payload", [dirty(1, argsz=8), dirty(0), dirty(4, 0, PAGE, PAGE, 8)])
def test_a_function_that_cannot_be_migrated(payload: bytes) -> None:
    """ENOTSUP, but for requests that are too short."""
    refused(errno.ENOTSUP, interpret_dirty_pages, payload, DmaLogging(), migratable=False)
    refused(errno.EINVAL, interpret_dirty_pages, payload[:4], DmaLogging(), migratable=False)


def test_what_may_be_asked_about(logging: DmaLogging) -> None:
    """Unmapped memory is ENOENT; memory that only messages reach is the client's own to track."""
    call = interpret_dirty_pages(dirty(4, 0, PAGE, PAGE, 8), logging)
    assert isinstance(call, GetDirty)
    require_dirty_range(call, mapped=True, by_file=True)
    refused(errno.ENOENT, require_dirty_range, call, mapped=False, by_file=False)
    refused(errno.EINVAL, require_dirty_range, call, mapped=True, by_file=False)
