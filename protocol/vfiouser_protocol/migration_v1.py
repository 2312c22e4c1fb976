"""Migration of the v1 generation: a region with registers and a data section.

Everything is a table: the transitions of device_state, the registers, and the iteration by which a client takes data.
The engine that both generations share knows states of the v2 generation only; `TO_V2` and `FROM_V2` translate. A v1
client enters pre-copy whatever the device can, so 1 → 3 is legal for a device without PRE_COPY too: such a device has
nothing to say there.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from vfiouser_protocol.constants import (
    REGION_SUBTYPE_MIGRATION,
    REGION_TYPE_MIGRATION,
    DeviceState,
    RegionIndex,
)
from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.migration_v2 import Arc, require_path
from vfiouser_protocol.regions import RegionSpec, RegionType, SparseArea

# --- device_state ---

STOPPED = 0
RUNNING = 1
STOP_COPY = 2
PRE_COPY = 3
RESUMING = 4
ERROR = 6

#: RUNNING, SAVING and RESUMING; the other bits mean nothing and are kept.
STATE_MASK = 7
RESERVED_BITS = 0xFFFF_FFF8

#: What may follow what. The specification forbids 3→1, 3→0, 0→2 and writing a state again, but real clients cancel,
#: migrate paused machines and write 2 twice. From the error state leads nothing but a reset.
#: Spec: vfio-user 0.9.1, "Device state transitions".
TRANSITIONS: Mapping[int, frozenset[int]] = MappingProxyType(
    {
        STOPPED: frozenset({STOPPED, RUNNING, STOP_COPY, RESUMING}),
        RUNNING: frozenset({STOPPED, RUNNING, STOP_COPY, PRE_COPY, RESUMING}),
        STOP_COPY: frozenset({STOPPED, RUNNING, STOP_COPY}),
        PRE_COPY: frozenset({STOPPED, RUNNING, STOP_COPY, PRE_COPY}),
        RESUMING: frozenset({RUNNING, RESUMING}),
        ERROR: frozenset(),
    }
)

TO_V2: Mapping[int, DeviceState] = MappingProxyType(
    {
        STOPPED: DeviceState.STOP,
        RUNNING: DeviceState.RUNNING,
        STOP_COPY: DeviceState.STOP_COPY,
        PRE_COPY: DeviceState.PRE_COPY,
        RESUMING: DeviceState.RESUMING,
        ERROR: DeviceState.ERROR,
    }
)
FROM_V2: Mapping[DeviceState, int] = MappingProxyType({state: value for value, state in TO_V2.items()})


def require_transition(current: DeviceState, written: int) -> tuple[Arc, ...]:
    """Return what a write of device_state asks for, refuse it if it is illegal.

    Args:
        current: where the device is.
        written: the whole register as the client wrote it; reserved bits are ignored.

    Returns:
        The arcs in order, none if the device is there already.

    Raises:
        CommandError: EINVAL; the old state stays.

    Spec: vfio-user 0.9.1, device_state.
    """
    value = FROM_V2[current]
    wanted = written & STATE_MASK
    allowed = TRANSITIONS[value]
    if wanted not in allowed:
        hint = f"allowed are {sorted(allowed)}" if allowed else "only a reset ends this"
        raise CommandError(f"device_state {wanted} was written in state {value}; {hint}; the state stays")
    return require_path(current, TO_V2[wanted])


def device_state_value(state: DeviceState, last_written: int = 0) -> int:
    """Return what device_state reads as.

    Args:
        state: where the device is.
        last_written: what the client wrote last; its reserved bits are kept.

    Spec: struct vfio_device_migration_info: clients read, modify and write, so reserved bits have to survive.
    """
    return FROM_V2[state] | (last_written & RESERVED_BITS)


# --- The region ---


class MigrationRegister(Enum):
    """The registers at the start of the region; see `REGISTERS`."""

    DEVICE_STATE = "device_state"
    RESERVED = "reserved"
    PENDING_BYTES = "pending_bytes"
    DATA_OFFSET = "data_offset"
    DATA_SIZE = "data_size"


class RegisterRule(NamedTuple):
    """Where a register is and who may write it when.

    Args:
        offset: in the region, bytes; every access begins here.
        size: bytes; every access has exactly this many.
        writable: states in which a write means something; None: in every one.
    """

    offset: int
    size: int
    writable: frozenset[DeviceState] | None = frozenset()


#: Spec: struct vfio_device_migration_info. The specification ignores accesses to the reserved word, as is done here;
#: libvfio-user refuses them.
REGISTERS: Mapping[MigrationRegister, RegisterRule] = MappingProxyType(
    {
        MigrationRegister.DEVICE_STATE: RegisterRule(0, 4, None),
        MigrationRegister.RESERVED: RegisterRule(4, 4, None),
        MigrationRegister.PENDING_BYTES: RegisterRule(8, 8),
        MigrationRegister.DATA_OFFSET: RegisterRule(16, 8),
        MigrationRegister.DATA_SIZE: RegisterRule(24, 8, frozenset({DeviceState.RESUMING})),
    }
)
_BY_OFFSET = MappingProxyType({rule.offset: register for register, rule in REGISTERS.items()})
_REGISTERS_END = 32


class DataAccess(NamedTuple):
    """An access to the data section.

    Args:
        start: first byte, in the data section.
        end: behind the last byte.
    """

    start: int
    end: int


class RegionLayout:
    """Registers on a page of their own, which is trapped, and behind it the data section, which may be mapped.

    Args:
        page_size: of the host, bytes; the data section begins on a page.
        data_size: of the data section, bytes, whole pages: the most that one iteration moves.
    """

    def __init__(self, page_size: int, data_size: int) -> None:
        if page_size < _REGISTERS_END or page_size & (page_size - 1):
            raise LocalProtocolError(f"a page of {page_size} bytes; a power of two from {_REGISTERS_END} on is needed")
        if data_size <= 0 or data_size % page_size:
            raise LocalProtocolError(f"a data section of {data_size} bytes; whole pages of {page_size} are needed")
        self.data_start = page_size
        self.data_size = data_size

    @property
    def size(self) -> int:
        """Of the whole region, bytes."""
        return self.data_start + self.data_size

    def spec(self) -> RegionSpec:
        """Return what the region says about itself.

        Spec: vfio-user 0.9.1: a region of type 3, subtype 1; clients search for it, here it is region 9.
        """
        return RegionSpec(
            index=int(RegionIndex.MIGRATION),
            size=self.size,
            areas=(SparseArea(self.data_start, self.data_size),),
            type=RegionType(REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION),
            mappable=True,
        )

    def locate(self, offset: int, count: int) -> MigrationRegister | DataAccess:
        """Return what an access is about.

        Args:
            offset: in the region, bytes.
            count: bytes, at least 1.

        Returns:
            A register, or a part of the data section.

        Raises:
            CommandError: EINVAL: part of a register, more than one, what lies behind them, or out of the region.
        """
        what = f"access of {count} bytes at {offset:#x} of the migration region"
        if self.data_start <= offset and offset + count <= self.size:
            return DataAccess(offset - self.data_start, offset + count - self.data_start)
        register = _BY_OFFSET.get(offset)
        if register is None:
            raise CommandError(f"{what}: no register begins there, and data lies from {self.data_start:#x} on; refused")
        if count != REGISTERS[register].size:
            raise CommandError(f"{what}: {register.value} has {REGISTERS[register].size} bytes; refused")
        return register


def require_writable(register: MigrationRegister, state: DeviceState) -> None:
    """Refuse a write that means nothing.

    Args:
        register: what is written.
        state: where the device is.

    Raises:
        CommandError: EINVAL.
    """
    writable = REGISTERS[register].writable
    if writable is not None and state not in writable:
        allowed = " or ".join(item.name for item in writable) or "no state"
        raise CommandError(f"{register.value} was written in {state.name}; that is allowed in {allowed}; refused")


def pack_register(register: MigrationRegister, value: int) -> bytes:
    """Return a register's bytes.

    Args:
        register: which.
        value: what it holds.
    """
    return value.to_bytes(REGISTERS[register].size, "little")


def unpack_register(data: bytes) -> int:
    """Return the value in a register's bytes."""
    return int.from_bytes(data, "little")


# --- Taking and giving data ---


class IterationPhase(Enum):
    """How far the client is with a chunk while data is saved."""

    INITIAL = "initial"
    #: pending_bytes was read and there is data.
    STARTED = "started"
    #: data_offset was read: a chunk lies in the data section.
    PREPARED = "prepared"
    #: data_size was read: the client knows the chunk, and asking for more acknowledges it.
    DELIVERED = "delivered"
    #: pending_bytes was read again before data_size: the same chunk will be shown again.
    HELD = "held"
    #: As PREPARED and DELIVERED, but the device was stopped meanwhile: a new iteration has to begin.
    KEPT = "kept"
    TAKEN = "taken"
    #: pending_bytes was 0 after the stop; it stays so.
    FINISHED = "finished"


class IterationEvent(Enum):
    """What can happen to an iteration."""

    READ_PENDING = "pending_bytes was read"
    READ_OFFSET = "data_offset was read"
    READ_SIZE = "data_size was read"
    STOP = "the device was stopped"


class IterationStep(NamedTuple):
    """What an event leads to.

    Args:
        phase: where.
        prepare: a chunk has to be put into the data section first.
        acknowledge: the chunk in the data section was taken and may be forgotten.
    """

    phase: IterationPhase
    prepare: bool = False
    acknowledge: bool = False


#: What is not here is out of sequence, which is EINVAL.
#: Spec: vfio-user 0.9.1, "Device migration: saving"; libvfio-user for what is out of sequence.
ITERATION: Mapping[IterationPhase, Mapping[IterationEvent, IterationStep]] = MappingProxyType(
    {
        IterationPhase.INITIAL: {
            IterationEvent.READ_PENDING: IterationStep(IterationPhase.STARTED),
            IterationEvent.STOP: IterationStep(IterationPhase.INITIAL),
        },
        IterationPhase.STARTED: {
            IterationEvent.READ_PENDING: IterationStep(IterationPhase.STARTED),
            IterationEvent.READ_OFFSET: IterationStep(IterationPhase.PREPARED, prepare=True),
            IterationEvent.STOP: IterationStep(IterationPhase.INITIAL),
        },
        IterationPhase.PREPARED: {
            IterationEvent.READ_PENDING: IterationStep(IterationPhase.HELD),
            IterationEvent.READ_OFFSET: IterationStep(IterationPhase.PREPARED),
            IterationEvent.READ_SIZE: IterationStep(IterationPhase.DELIVERED),
            IterationEvent.STOP: IterationStep(IterationPhase.KEPT),
        },
        IterationPhase.DELIVERED: {
            IterationEvent.READ_PENDING: IterationStep(IterationPhase.STARTED, acknowledge=True),
            IterationEvent.READ_OFFSET: IterationStep(IterationPhase.DELIVERED),
            IterationEvent.READ_SIZE: IterationStep(IterationPhase.DELIVERED),
            IterationEvent.STOP: IterationStep(IterationPhase.TAKEN),
        },
        IterationPhase.HELD: {
            IterationEvent.READ_PENDING: IterationStep(IterationPhase.HELD),
            IterationEvent.READ_OFFSET: IterationStep(IterationPhase.PREPARED),
            IterationEvent.STOP: IterationStep(IterationPhase.KEPT),
        },
        IterationPhase.KEPT: {IterationEvent.READ_PENDING: IterationStep(IterationPhase.HELD)},
        IterationPhase.TAKEN: {IterationEvent.READ_PENDING: IterationStep(IterationPhase.STARTED, acknowledge=True)},
        IterationPhase.FINISHED: {IterationEvent.READ_PENDING: IterationStep(IterationPhase.FINISHED)},
    }
)

_SAVING = frozenset({DeviceState.PRE_COPY, DeviceState.STOP_COPY})


#: How far an iteration is: the state that it follows, its phase, bytes of its chunk, data_size as last written.
IterationMark: TypeAlias = "tuple[DeviceState, IterationPhase, int, int]"
NO_ITERATION: IterationMark = (DeviceState.RUNNING, IterationPhase.INITIAL, 0, 0)


class Iteration:
    """The registers pending_bytes, data_offset and data_size, and the chunk that they are about.

    Reads come in two halves where the engine has to do something in between: `begin_pending`, then `pending`;
    `offset`, then `prepared`. If what is in between fails, the client may just read again.

    Args:
        layout: of the region.
    """

    def __init__(self, layout: RegionLayout) -> None:
        self._layout = layout
        self._state = DeviceState.RUNNING
        self.phase = IterationPhase.INITIAL
        #: Bytes of the chunk in the data section; 0 if there is none.
        self.chunk = 0
        self._written = 0

    @property
    def state(self) -> DeviceState:
        """The state that this follows."""
        return self._state

    @property
    def mark(self) -> IterationMark:
        """All of this, so that another one can go on with it."""
        return self._state, self.phase, self.chunk, self._written

    def restore(self, mark: IterationMark) -> None:
        """Go on where another one was.

        Args:
            mark: what that one said.
        """
        self._state, self.phase, self.chunk, self._written = mark

    def enter(self, state: DeviceState) -> bool:
        """Follow the device to another state.

        Args:
            state: where it is now; intermediate ones need not be told.

        Returns:
            True if a chunk that may not have been taken was dropped.
        """
        before, self._state = self._state, state
        if state is before:
            return False
        self._written = 0
        if (before, state) == (DeviceState.PRE_COPY, DeviceState.STOP_COPY):
            self.phase = ITERATION[self.phase][IterationEvent.STOP].phase
            return False
        self.phase = IterationPhase.INITIAL
        dropped, self.chunk = bool(self.chunk), 0
        return dropped

    def begin_pending(self) -> bool:
        """Begin to answer a read of pending_bytes.

        Returns:
            True if the chunk in the data section was taken: the engine forgets it.
        """
        if self._state not in _SAVING:
            return False
        step = self._step(IterationEvent.READ_PENDING)
        self.phase = step.phase
        if step.acknowledge:
            self.chunk = 0
        return step.acknowledge

    def pending(self, amount: int) -> int:
        """Return the value of pending_bytes.

        Args:
            amount: bytes that the engine has or expects, with those of a chunk in the data section; 0 only if nothing
                will come before the device is stopped, or for good once it is.

        Returns:
            0 while nothing is saved, and for good once it was 0 after the stop.
        """
        if self._state not in _SAVING or self.phase is IterationPhase.FINISHED:
            return 0
        if self.phase is IterationPhase.STARTED and not amount:
            # Before the stop there may be more later; after it this was the end.
            stopped = self._state is DeviceState.STOP_COPY
            self.phase = IterationPhase.FINISHED if stopped else IterationPhase.INITIAL
        return max(amount, self.chunk)

    def offset(self) -> bool:
        """Begin to answer a read of data_offset; its value is always the layout's `data_start`.

        Returns:
            True if a chunk has to be put into the data section first, and told to `prepared`.

        Raises:
            CommandError: EINVAL: out of sequence, or no data goes either way.
        """
        if self._state is DeviceState.RESUMING:
            return False
        step = self._step(IterationEvent.READ_OFFSET)
        if not step.prepare:
            self.phase = step.phase
        return step.prepare

    def prepared(self, size: int) -> None:
        """A chunk lies in the data section.

        Args:
            size: of the chunk, bytes; 0 if there is nothing now.

        Raises:
            LocalProtocolError: the phase is not STARTED, or the chunk is larger than the data section.
        """
        if self.phase is not IterationPhase.STARTED or not 0 <= size <= self._layout.data_size:
            raise LocalProtocolError(f"a chunk of {size} bytes in phase {self.phase.value}; not shown")
        self.phase = ITERATION[self.phase][IterationEvent.READ_OFFSET].phase
        self.chunk = size

    def size(self) -> int:
        """Return the value of data_size: of the chunk while saving, as last written while resuming.

        Raises:
            CommandError: EINVAL: out of sequence, or no data goes either way.
        """
        if self._state is DeviceState.RESUMING:
            return self._written
        self.phase = self._step(IterationEvent.READ_SIZE).phase
        return self.chunk

    def write_size(self, size: int) -> int:
        """Judge a write of data_size.

        Args:
            size: bytes of the data section that the client filled.

        Returns:
            Bytes that the engine consumes before it answers.

        Raises:
            CommandError: EINVAL: nothing is loaded, or more than the data section has.
        """
        require_writable(MigrationRegister.DATA_SIZE, self._state)
        if size > self._layout.data_size:
            raise CommandError(f"data_size {size} was written, the data section has {self._layout.data_size}; refused")
        self._written = size
        return size

    def require_data_access(self, *, write: bool) -> None:
        """Refuse a trapped access to the data section that would touch a chunk that is not the client's.

        Args:
            write: whether it is a write.

        Raises:
            CommandError: EINVAL.
        """
        if write and self._state is not DeviceState.RESUMING:
            raise CommandError(f"data was written in {self._state.name}; that is allowed in RESUMING; refused")

    def _step(self, event: IterationEvent) -> IterationStep:
        if self._state not in _SAVING:
            raise CommandError(f"{event.value} in {self._state.name}, where no data goes either way; refused")
        step = ITERATION[self.phase].get(event)
        if step is None:
            legal = [item.value for item in ITERATION[self.phase] if item is not IterationEvent.STOP]
            raise CommandError(f"{event.value} in phase {self.phase.value}; expected: {', '.join(legal)}; refused")
        return step
