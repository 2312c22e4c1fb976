"""A function whose own kernel driver can migrate it: the agents' calls, carried out on the driver's state machine.

Everything here blocks and runs in the function's worker, one call at a time; only `status` is also asked from outside.

    agent       kernel
    RUNNING     RUNNING, PRE_COPY
    QUIESCED    RUNNING_P2P, PRE_COPY_P2P
    STOPPED     STOP, STOP_COPY
    LOADING     RESUMING
    LOADED      STOP, after a load that was committed
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_128

from vfiouser_agents.api import AgentState, Capabilities, Chunk, Descriptor, DirtyReport, Estimate, Phase, Range, Role
from vfiouser_agents.errors import (
    AgentError,
    Busy,
    CorruptState,
    DeviceFailed,
    Incompatible,
    InvalidArgument,
    InvalidState,
    NoResources,
    Unsupported,
)
from vfiouser_oob.devices.kernel_vfio.dma import DmaSpace
from vfiouser_oob.devices.kernel_vfio.migration_device import MigrationDevice
from vfiouser_oob.devices.kernel_vfio.migration_dirty import PAGE_SIZE, KernelPageLog, start_log
from vfiouser_oob.observability import log as logs
from vfiouser_protocol.constants import DeviceState, MigrationFlags

FORMAT = "linux-vfio-v2"
_FORMAT_VERSION = 1
_MAX_STATE = 1 << 40
_MAX_CHUNK = 1 << 20
#: What the kernel takes at least: as many as fit into a page.
_MAX_RANGES = 256

_STATES: Mapping[int, AgentState] = {
    DeviceState.ERROR: AgentState.ERROR,
    DeviceState.STOP: AgentState.STOPPED,
    DeviceState.RUNNING: AgentState.RUNNING,
    DeviceState.STOP_COPY: AgentState.STOPPED,
    DeviceState.RESUMING: AgentState.LOADING,
    DeviceState.RUNNING_P2P: AgentState.QUIESCED,
    DeviceState.PRE_COPY: AgentState.RUNNING,
    DeviceState.PRE_COPY_P2P: AgentState.QUIESCED,
}
_QUIESCE = {
    DeviceState.RUNNING: DeviceState.RUNNING_P2P,
    DeviceState.PRE_COPY: DeviceState.PRE_COPY_P2P,
}
#: A pre-copy goes on into the stop-copy, in the same stream.
_STOP = {
    DeviceState.RUNNING: DeviceState.STOP,
    DeviceState.RUNNING_P2P: DeviceState.STOP,
    DeviceState.PRE_COPY: DeviceState.STOP_COPY,
    DeviceState.PRE_COPY_P2P: DeviceState.STOP_COPY,
}
#: Giving up what is being saved.
_DROP = {
    DeviceState.PRE_COPY: DeviceState.RUNNING,
    DeviceState.PRE_COPY_P2P: DeviceState.RUNNING_P2P,
    DeviceState.STOP_COPY: DeviceState.STOP,
}
_SAVE = {
    DeviceState.RUNNING: DeviceState.PRE_COPY,
    DeviceState.RUNNING_P2P: DeviceState.PRE_COPY_P2P,
    DeviceState.STOP: DeviceState.STOP_COPY,
}
_PHASES: Mapping[Phase, frozenset[AgentState]] = {
    Phase.PRECOPY: frozenset({AgentState.RUNNING, AgentState.QUIESCED}),
    Phase.FINAL: frozenset({AgentState.STOPPED, AgentState.LOADED}),
}
_STILL = frozenset({AgentState.STOPPED, AgentState.LOADING, AgentState.LOADED})


@dataclass
class _Outgoing:
    """What was read last: it may be asked for again."""

    start: int = 0
    kept: bytes = b""
    eof: bool = False

    @property
    def next(self) -> int:
        return self.start + len(self.kept)


@dataclass
class _Incoming:
    """What was written so far."""

    total: int = 0
    last_start: int = 0
    last: bytes = b""
    digest: xxh3_128 = field(default_factory=xxh3_128)
    #: Why the driver refused a piece; said at the commit.
    refused: str = ""


class KernelFunction:
    """One function; lives as long as its backend, whoever is connected.

    Args:
        name: its PCI address, or the UUID of a mediated device.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._log = logs.get("devices.kernel_vfio").bind(device=name)
        self.caps: Capabilities | None = None
        self.role: Role | None = None
        self.migration_id = ""
        #: The session that began the migration.
        self.owner: object | None = None
        #: The log that is kept, and what it covers.
        self.logging: tuple[KernelPageLog, tuple[Range, ...]] | None = None
        self._device: MigrationDevice | None = None
        self._space: DmaSpace | None = None
        self._state = DeviceState.RUNNING
        self._data_fd = -1
        self._outgoing: _Outgoing | None = None
        self._incoming: _Incoming | None = None
        #: A load was begun and not committed: the function must not run.
        self._spoiled = False
        self._loaded = False

    # Coming and going of the device

    @property
    def attached(self) -> bool:
        """Whether a client has the device."""
        return self._device is not None

    def attach(self, device: MigrationDevice, space: DmaSpace) -> None:
        """A client has the device, which runs, and an address space for it."""
        self._forget_all()
        self._device, self._space = device, space
        self._learn_capabilities(device, space)

    def detach(self) -> None:
        """The client goes; the device is reset and closed after this."""
        self._forget_all()
        self._device = self._space = None

    def learn(self, device: MigrationDevice, space: DmaSpace) -> None:
        """Find out what a device can do that is open for this only."""
        self._learn_capabilities(device, space)

    def _learn_capabilities(self, device: MigrationDevice, space: DmaSpace) -> None:
        flags = device.flags()
        stop_copy = bool(flags & MigrationFlags.STOP_COPY)
        self.caps = Capabilities(
            stop_copy=stop_copy,
            p2p=stop_copy and bool(flags & MigrationFlags.P2P),
            precopy=stop_copy and bool(flags & MigrationFlags.PRE_COPY),
            dirty=stop_copy and (device.can_log or space.can_log),
            reset=device.can_reset,
            formats=(FORMAT,) if stop_copy else (),
            max_state=_MAX_STATE,
            max_chunk=_MAX_CHUNK,
            page_sizes=(PAGE_SIZE,) if device.can_log else (space.page_size,),
            max_ranges=_MAX_RANGES,
        )

    def _forget_all(self) -> None:
        self._close_data()
        self._state = DeviceState.RUNNING
        self._spoiled = self._loaded = False
        self.logging = None
        self.forget_migration()

    def forget_migration(self) -> None:
        """Leave the migration."""
        self.role, self.migration_id, self.owner = None, "", None

    # What it does

    @property
    def agent_state(self) -> AgentState:
        """Where it is, as far as we know."""
        state = _STATES[self._state]
        return AgentState.LOADED if state is AgentState.STOPPED and self._loaded else state

    def ask(self) -> AgentState:
        """Where it is, as the kernel says; a reset by somebody else is noticed here."""
        if self._device is not None and self.caps is not None and self.caps.stop_copy:
            try:
                state = DeviceState(self._device.state())
            except (OSError, ValueError) as error:
                raise DeviceFailed(f"{self.name}: the kernel does not tell the state: {error}") from error
            if state is not self._state and state is DeviceState.RUNNING:
                self._close_data()
                self._spoiled = self._loaded = False
            self._state = state
        return self.agent_state

    def _open_device(self) -> MigrationDevice:
        if self.caps is not None and not self.caps.stop_copy:
            raise Unsupported(f"the driver of {self.name} has no migration of its own")
        if self._device is None:
            raise InvalidState(f"{self.name} has no client, so it is closed and reset")
        return self._device

    def _working(self) -> MigrationDevice:
        device = self._open_device()
        if self.ask() is AgentState.ERROR:
            raise DeviceFailed(f"{self.name} has failed; reset it first")
        return device

    def _go(self, target: DeviceState) -> None:
        device = self._open_device()
        try:
            fd = device.set_state(target)
        except OSError as error:
            was = self._state
            self.ask()
            raise self._failure(f"from {was.name} to {target.name}", error) from error
        self._state = target
        if fd >= 0:
            self._close_data()
            self._data_fd = fd

    def _failure(self, what: str, error: OSError) -> AgentError:
        text = f"{self.name}: the driver refused to go {what}: {error.strerror}"
        if self._state is DeviceState.ERROR:
            return DeviceFailed(f"{text}; it is in its error state now")
        if error.errno in (errno.ENOMEM, errno.ENOSPC):
            return NoResources(text)
        return Busy(text) if error.errno in (errno.EBUSY, errno.EAGAIN) else DeviceFailed(text)

    def _close_data(self) -> None:
        fd, self._data_fd = self._data_fd, -1
        self._outgoing = self._incoming = None
        if fd >= 0 and self._device is not None:
            self._device.close(fd)

    def quiesce(self) -> None:
        """Start no DMA any more, where the driver has that as a step of its own."""
        self._working()
        if self.caps is not None and not self.caps.p2p:
            self.stop()
        elif self._state in _QUIESCE:
            self._go(_QUIESCE[self._state])

    def stop(self) -> None:
        """Hold still."""
        self._working()
        if self._state in _STOP:
            self._go(_STOP[self._state])

    def resume(self) -> None:
        """Run."""
        if not self.attached:
            return
        self._working()
        if self._spoiled:
            raise InvalidState(f"{self.name} holds a state that was not committed; reset it, or load another state")
        if self._state not in (DeviceState.RUNNING, DeviceState.PRE_COPY):
            self._close_data()
            self._go(DeviceState.RUNNING)
        self._loaded = False

    def reset(self) -> None:
        """Begin anew, in no migration."""
        self.forget_migration()
        if self._device is None:
            return
        if not self._device.can_reset:
            raise Unsupported(f"the kernel knows no way to reset {self.name}")
        self.stop_logging()
        self._close_data()
        try:
            self._device.reset()
        except OSError as error:
            raise DeviceFailed(f"{self.name} cannot be reset: {error.strerror}") from error
        self._spoiled = self._loaded = False
        self._state = DeviceState.RUNNING

    # Saving

    def describe(self) -> Descriptor:
        """What it is."""
        vendor, device, class_code = self._open_device().identity
        return Descriptor(
            FORMAT, _FORMAT_VERSION, f"{vendor:04x}", f"{device:04x}", f"pci-{class_code:06x}", "", _MAX_STATE
        )

    def check(self, there: Descriptor) -> None:
        """Compare what a driver's state depends on, as far as can be told; the driver judges the rest."""
        here = self.describe()
        pairs = [
            (name, getattr(there, name), getattr(here, name))
            for name in ("format_id", "format_version", "vendor", "model", "kind")
        ]
        reasons = [f"{name} is {theirs!r} there and {ours!r} here" for name, theirs, ours in pairs if theirs != ours]
        if reasons:
            raise Incompatible(reasons)

    def estimate(self) -> Estimate:
        """How much there is."""
        device = self._working()
        try:
            rest = device.data_size()
            precopy = self._state in (DeviceState.PRE_COPY, DeviceState.PRE_COPY_P2P) and self._data_fd >= 0
            initial, dirty = device.precopy_info(self._data_fd) if precopy else (0, 0)
        except OSError as error:
            raise Unsupported(f"the driver of {self.name} does not tell sizes: {error.strerror}") from error
        return Estimate(min(rest, _MAX_STATE), initial, dirty)

    def save(self, offset: int, limit: int, phase: Phase) -> Chunk:
        """Give the next piece."""
        device = self._working()
        if limit <= 0 or offset < 0:
            raise InvalidArgument(f"save of {limit} bytes at {offset}: both must be positive")
        if phase is Phase.PRECOPY and self.caps is not None and not self.caps.precopy:
            raise Unsupported(f"the driver of {self.name} has no pre-copy")
        if self.agent_state not in _PHASES[phase] or self._spoiled:
            raise InvalidState(f"save({phase.value}) of {self.name}, which is {self.agent_state.value}")
        out = self._outgoing
        if out is None or (offset == 0 and out.start > 0):
            out = self._begin_saving()
        if out.start <= offset < out.next:
            return Chunk(out.kept[offset - out.start :][:limit])
        if offset != out.next:
            raise InvalidArgument(f"save at {offset}; {out.start} to {out.next} can be given")
        if not out.eof:
            data = self._read(device, min(limit, _MAX_CHUNK))
            if data:
                out.start, out.kept = offset, data
                return Chunk(data)
            out.eof = phase is Phase.FINAL
        return Chunk(b"", eof=out.eof, drained=not out.eof)

    def _begin_saving(self) -> _Outgoing:
        if self._state in _DROP:
            self._close_data()
            self._go(_DROP[self._state])
        self._go(_SAVE[self._state])
        self._outgoing = _Outgoing()
        return self._outgoing

    def _read(self, device: MigrationDevice, count: int) -> bytes:
        try:
            return device.read(self._data_fd, count)
        except OSError as error:
            self.ask()
            raise self._failure("on saving", error) from error

    # Loading

    def load_begin(self, total: int | None) -> None:
        """Get ready."""
        self._working()
        if self.agent_state not in _STILL:
            raise InvalidState(f"load_begin needs a function that is stopped; {self.name} is {self.agent_state.value}")
        if total is not None and not 0 <= total <= _MAX_STATE:
            raise NoResources(f"a state of {total} bytes", {"max_state": _MAX_STATE})
        self.drop()
        self._spoiled, self._loaded = True, False
        self._go(DeviceState.RESUMING)
        self._incoming = _Incoming()

    def load(self, offset: int, data: bytes) -> None:
        """Take a piece; what the driver does not like is said at the commit."""
        device = self._working()
        incoming = self._loading()
        if len(data) > _MAX_CHUNK:
            raise InvalidArgument(f"load of {len(data)} bytes; at most {_MAX_CHUNK} at once")
        if offset == incoming.last_start and data == incoming.last:
            return
        if offset != incoming.total:
            raise InvalidArgument(f"load at {offset}; the next piece begins at {incoming.total}")
        if not incoming.refused:
            try:
                device.write(self._data_fd, data)
            except OSError as error:
                incoming.refused = f"the driver refused it at {offset}: {error.strerror}"
        incoming.digest.update(data)
        incoming.last_start, incoming.last = offset, data
        incoming.total += len(data)

    def load_commit(self, total: int, digest: bytes) -> None:
        """Verify and apply."""
        self._working()
        if self.agent_state is AgentState.LOADED:
            raise InvalidState("the state is committed already")
        incoming = self._loading()
        if total != incoming.total:
            raise CorruptState(f"{incoming.total} bytes came, {total} were announced")
        if incoming.digest.digest() != digest:
            raise CorruptState(f"the digest of the {total} bytes that came is another one")
        if incoming.refused:
            raise CorruptState(incoming.refused)
        try:
            self._go(DeviceState.STOP)
        except (DeviceFailed, Busy, NoResources) as error:
            if self._state is DeviceState.ERROR:
                raise
            raise CorruptState(f"the driver does not accept the state: {error}") from error
        self._close_data()
        self._spoiled, self._loaded = False, True

    def _loading(self) -> _Incoming:
        if self._incoming is None:
            raise InvalidState(f"nothing is being loaded; {self.name} is {self.agent_state.value}")
        return self._incoming

    def drop(self) -> None:
        """Give up what is being saved or loaded. A half-loaded state goes by a reset, and the function holds still."""
        if not self.attached:
            return
        state = self._state
        self._close_data()
        if state is DeviceState.RESUMING:
            device = self._open_device()
            try:
                device.reset()
            except OSError as error:
                raise DeviceFailed(f"{self.name} cannot be reset: {error.strerror}") from error
            self._state = DeviceState.RUNNING
            self._go(DeviceState.STOP)
        elif state in _DROP:
            self._go(_DROP[state])

    # Dirty pages

    def start_logging(self, ranges: Sequence[Range], page_size: int) -> int:
        """Log."""
        device = self._open_device()
        if self.caps is None or not self.caps.dirty:
            raise Unsupported(f"the driver of {self.name} has no dirty log")
        if self.logging is not None:
            raise InvalidState("dirty pages are logged already; stop that first")
        if len(ranges) > _MAX_RANGES:
            raise NoResources(f"{len(ranges)} ranges", {"max_ranges": _MAX_RANGES})
        if page_size < PAGE_SIZE or page_size & (page_size - 1):
            raise InvalidArgument(f"a page size of {page_size}; powers of two from {PAGE_SIZE} on")
        if not ranges or any(not part.length or (part.iova | part.length) % PAGE_SIZE for part in ranges):
            raise InvalidArgument("ranges must be whole pages, and not empty")
        assert self._space is not None
        try:
            log, note = start_log(device, self._space, ranges)
        except OSError as error:
            raise NoResources(f"{self.name}: dirty pages cannot be logged: {error.strerror}") from error
        if note:
            self._log.info(note)
        self.logging = (log, tuple(ranges))
        return log.page_size

    def report(self, iova: int, length: int) -> DirtyReport:
        """Report and forget."""
        if self.logging is None:
            raise InvalidState("dirty pages are not being logged")
        log, ranges = self.logging
        page_size = log.page_size
        if not length or (iova | length) % page_size:
            raise InvalidArgument(f"a report of {length} bytes at {iova:#x}: whole pages of {page_size} bytes only")
        if not any(part.iova <= iova and iova + length <= part.iova + part.length for part in ranges):
            raise InvalidArgument(f"{iova:#x}+{length:#x} is not in the ranges that are logged")
        try:
            bitmap = log.report(iova, length)
        except OSError as error:
            raise DeviceFailed(f"{self.name}: the dirty log is lost: {error.strerror}") from error
        return DirtyReport(bitmap, final=self.agent_state in _STILL)

    def stop_logging(self) -> None:
        """Forget."""
        if self.logging is not None:
            (log, _), self.logging = self.logging, None
            try:
                log.stop()
            except OSError:  # a device that was reset has forgotten by itself
                pass
