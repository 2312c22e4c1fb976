"""A suspended function's state as bytes, and back.

A snapshot is one msgpack map. It holds everything that decides how the function goes on, apart from device memory (the
controller memory buffer and the state memory), which is too large to be copied twice. `parse` checks every value
against the function that is to take it, so `apply` cannot fail half-way.

The version is raised whenever a reader of the former version would get it wrong.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from vfiouser_oob.simulator.nvme.command import Command, Completion, parse_commands
from vfiouser_oob.simulator.nvme.queues import MAX_IN_FLIGHT
from vfiouser_oob.simulator.nvme.spec import BAR0_SIZE, PAGE, SQE_SIZE
from vfiouser_oob.simulator.nvme.state import (
    ERROR_LOG_ENTRIES,
    AsyncEvent,
    CompletionQueue,
    ControllerState,
    Counters,
    ErrorEntry,
    FeatureValues,
    SubmissionQueue,
)
from vfiouser_oob.simulator.nvme.suspension import Clocks
from vfiouser_protocol.msix import MsixSnapshot
from vfiouser_protocol.pci import ConfigSnapshot

if TYPE_CHECKING:
    from vfiouser_oob.simulator.nvme.function import NvmeFunction

VERSION = 1
#: Bytes of a snapshot at most, whatever it claims to hold.
MAX_SIZE = 4 << 20
_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
#: Completions of one queue that wait: those of every command in flight, of a few queues that share it.
_MAX_PENDING = 64 * MAX_IN_FLIGHT
_MAX_LIST = 4096
#: Commands that one queue carries: those in execution, and one fetch.
_MAX_CARRIED = 2 * MAX_IN_FLIGHT
Q = TypeVar("Q", SubmissionQueue, CompletionQueue)


class BadSnapshot(ValueError):
    """The bytes are no snapshot, or not one that this function could go on with."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one function.

    Args:
        registers: the register page.
        interrupt_mask: INTMS.
        config: PCI configuration space.
        msix: MSI-X table and pending bits.
        state: queues, features, events, logs; timestamps are not in it.
        clocks: what counts time.
        kept_writes: writes to BAR0 that are still to be carried out: offset, data.
        doorbells: the shared doorbell page, and what of it has been noticed; None where doorbells are trapped.
    """

    registers: bytes
    interrupt_mask: int
    config: ConfigSnapshot
    msix: MsixSnapshot
    state: ControllerState
    clocks: Clocks
    kept_writes: tuple[tuple[int, bytes], ...]
    doorbells: tuple[bytes, bytes] | None


def capture(function: NvmeFunction, config: ConfigSnapshot | None = None) -> Snapshot:
    """Copy a function's state; exact only while it is suspended.

    Args:
        function: the function.
        config: PCI configuration space to save; None = as it is now.
    """
    controller = function.controller
    return Snapshot(
        registers=bytes(controller.registers.image),
        interrupt_mask=controller.interrupts.mask,
        config=config or function.config.snapshot(),
        msix=function.table.snapshot(),
        state=controller.state,
        clocks=controller.clocks,
        kept_writes=tuple(controller.suspender.kept_writes),
        doorbells=function.polled_doorbells.state() if function.polled_doorbells is not None else None,
    )


def apply(snapshot: Snapshot, function: NvmeFunction) -> None:
    """Make a suspended function go on, once it does, where the snapshot was taken.

    Args:
        snapshot: what `parse` made for this function; not used any more afterwards.
        function: the function; shared memory keeps its descriptors.
    """
    function.config.restore(snapshot.config)
    function.table.restore(snapshot.msix)
    controller = function.controller
    controller.take(
        snapshot.state, snapshot.registers, snapshot.interrupt_mask, list(snapshot.kept_writes), snapshot.clocks
    )
    if function.polled_doorbells is not None and snapshot.doorbells is not None:
        function.polled_doorbells.load(*snapshot.doorbells)


def pack(snapshot: Snapshot) -> bytes:
    """Make the bytes of a snapshot."""
    state = snapshot.state
    data: bytes = msgpack.packb(
        {
            "version": VERSION,
            "registers": snapshot.registers,
            "interrupt_mask": snapshot.interrupt_mask,
            "config": list(snapshot.config),
            "msix": list(snapshot.msix),
            "submission_queues": [_pack_submission(queue) for queue in state.submission_queues.values()],
            "completion_queues": [_pack_completion(queue) for queue in state.completion_queues.values()],
            "features": [[*key, value] for key, value in state.features.current.items()],
            "saved_features": [[*key, value] for key, value in state.features.saved.items()],
            "timestamp_ms": snapshot.clocks.timestamp_ms,
            "event_requests": list(state.event_requests),
            "events": [list(event) for event in state.events],
            "masked_events": sorted(state.masked_events),
            "changed_namespaces": sorted(state.changed_namespaces),
            "errors": [list(entry) for entry in state.errors],
            "counters": asdict(state.counters),
            "power_on_s": snapshot.clocks.power_on_s,
            "frozen": state.frozen,
            "shut_down": state.shut_down,
            "kept_writes": [list(write) for write in snapshot.kept_writes],
            "doorbells": None if snapshot.doorbells is None else list(snapshot.doorbells),
        }
    )
    return data


def _pack_submission(queue: SubmissionQueue) -> list[Any]:
    commands = b"".join(command.pack() for command in (*queue.executing.values(), *queue.fetched))
    return [queue.qid, queue.base, queue.size, queue.cqid, queue.priority, queue.head, queue.tail, commands]


def _pack_completion(queue: CompletionQueue) -> list[Any]:
    pending = [list(completion) for completion in queue.pending]
    place = [queue.qid, queue.base, queue.size, queue.vector, queue.interrupt, queue.head, queue.tail, queue.phase]
    return [*place, pending, queue.writing]


def parse(data: bytes, function: NvmeFunction) -> Snapshot:
    """Read a snapshot for a function.

    Args:
        data: what `pack` made, perhaps elsewhere.
        function: whose sizes it has to fit; nothing of it changes.

    Raises:
        BadSnapshot: what is wrong with it.
    """
    if len(data) > MAX_SIZE:
        raise BadSnapshot(f"a controller state of {len(data)} bytes; at most {MAX_SIZE}")
    try:
        raw = msgpack.unpackb(data, strict_map_key=True, max_array_len=_MAX_LIST + _MAX_PENDING, max_map_len=64)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadSnapshot(f"the controller state is not msgpack: {error}") from error
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        version = raw.get("version") if isinstance(raw, dict) else None
        raise BadSnapshot(f"controller state of version {version!r}; this is version {VERSION}")
    try:
        return _Reader(function).read(raw)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        text = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BadSnapshot(f"controller state: {text}") from error


class _Reader:
    """Reads the parts of a snapshot; raises KeyError, TypeError or ValueError for what cannot be.

    Args:
        function: whose sizes it has to fit.
    """

    def __init__(self, function: NvmeFunction) -> None:
        self._function = function
        self._limits = function.controller.limits

    def read(self, raw: Mapping[str, Any]) -> Snapshot:
        function = self._function
        page = _blob("registers", raw["registers"], PAGE)
        config = ConfigSnapshot(*(_blob("config", part, function.config.size) for part in _row(raw["config"], 2)))
        table, pending, written = _row(raw["msix"], 3)
        timestamp = raw["timestamp_ms"]
        return Snapshot(
            registers=page,
            interrupt_mask=_number("interrupt_mask", raw["interrupt_mask"], _U32),
            config=config,
            msix=MsixSnapshot(
                _blob("MSI-X table", table, function.table.table_size),
                _blob("MSI-X pending bits", pending, function.table.pba_size),
                bool(written),
            ),
            state=self._state(raw),
            clocks=Clocks(
                _seconds(raw["power_on_s"]),
                None if timestamp is None else _number("timestamp", timestamp, (1 << 48) - 1),
            ),
            kept_writes=tuple(_kept(write) for write in _rows("kept_writes", raw["kept_writes"])),
            doorbells=self._doorbells(raw["doorbells"]),
        )

    def _state(self, raw: Mapping[str, Any]) -> ControllerState:
        completions = [self._completion(row) for row in _rows("completion_queues", raw["completion_queues"])]
        submissions = [self._submission(row) for row in _rows("submission_queues", raw["submission_queues"])]
        state = ControllerState(
            submission_queues=_by_id("submission", submissions),
            completion_queues=_by_id("completion", completions),
            features=FeatureValues(_features(raw["features"]), _features(raw["saved_features"])),
            event_requests=deque(_numbers("event_requests", raw["event_requests"], _U16)),
            events=deque(AsyncEvent(*_numbers("events", row, 0xFF, 3)) for row in _rows("events", raw["events"])),
            masked_events=set(_numbers("masked_events", raw["masked_events"], 0xFF)),
            changed_namespaces=set(_numbers("changed_namespaces", raw["changed_namespaces"], _U32)),
            errors=deque(
                (ErrorEntry(*_numbers("errors", row, _U64, 7)) for row in _rows("errors", raw["errors"])),
                maxlen=ERROR_LOG_ENTRIES,
            ),
            counters=_counters(raw["counters"]),
            frozen=bool(raw["frozen"]),
            shut_down=bool(raw["shut_down"]),
        )
        for queue in submissions:
            if queue.cqid not in state.completion_queues:
                raise ValueError(f"submission queue {queue.qid} uses completion queue {queue.cqid}, which is missing")
        if len(state.event_requests) > self._limits.event_requests:
            raise ValueError(f"{len(state.event_requests)} event requests; at most {self._limits.event_requests}")
        state.carry_over()
        return state

    def _queue_place(self, kind: str, qid: Any, base: Any, size: Any) -> tuple[int, int, int]:
        what = f"{kind} queue {qid}"
        number = _number(f"{kind} queue id", qid, self._limits.io_queues)
        largest = self._limits.max_entries if number else 4096
        return number, _number(f"{what}: base", base, _U64), _number(f"{what}: size", size, largest, least=2)

    def _submission(self, row: Any) -> SubmissionQueue:
        qid, base, size, cqid, priority, head, tail, commands = _row(row, 8)
        qid, base, size = self._queue_place("submission", qid, base, size)
        what = f"submission queue {qid}"
        if not isinstance(commands, bytes) or len(commands) % SQE_SIZE or len(commands) > _MAX_CARRIED * SQE_SIZE:
            raise ValueError(f"{what}: its commands are not whole, or more than {_MAX_CARRIED}")
        fetched: deque[Command] = deque(parse_commands(commands))
        return SubmissionQueue(
            qid,
            base,
            size,
            _number(f"{what}: completion queue", cqid, self._limits.io_queues),
            _number(f"{what}: priority", priority, 3),
            _number(f"{what}: head", head, size - 1),
            _number(f"{what}: tail", tail, size - 1),
            fetched=fetched,
        )

    def _completion(self, row: Any) -> CompletionQueue:
        qid, base, size, vector, interrupt, head, tail, phase, pending, writing = _row(row, 10)
        qid, base, size = self._queue_place("completion", qid, base, size)
        what = f"completion queue {qid}"
        rows = _rows(f"{what}: pending", pending)
        entries = deque(Completion(*_numbers(f"{what}: pending", entry, _U32, 4)) for entry in rows)
        tail = _number(f"{what}: tail", tail, size - 1)
        return CompletionQueue(
            qid,
            base,
            size,
            _number(f"{what}: vector", vector, self._limits.vectors - 1),
            bool(interrupt),
            _number(f"{what}: head", head, size - 1),
            tail,
            _number(f"{what}: phase", phase, 1),
            entries,
            _number(f"{what}: entries being written", writing, min(len(entries), size - tail)),
        )

    def _doorbells(self, raw: Any) -> tuple[bytes, bytes] | None:
        if (raw is None) != (self._function.polled_doorbells is None):
            raise ValueError("doorbells are polled on one side and trapped on the other")
        if raw is None:
            return None
        page, noticed = _row(raw, 2)
        return _blob("doorbell page", page, PAGE), _blob("noticed doorbells", noticed, PAGE)


def _number(what: str, value: Any, most: int, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}; allowed are {least} to {most}")
    return value


def _numbers(what: str, row: Any, most: int, count: int | None = None) -> list[int]:
    values = _rows(what, row) if count is None else _row(row, count)
    return [_number(what, value, most) for value in values]


def _blob(what: str, value: Any, size: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != size:
        raise ValueError(f"{what} is not {size} bytes")
    return value


def _row(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"an entry does not have {count} values")
    return value


def _rows(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_PENDING:
        raise ValueError(f"{what} is no list of at most {_MAX_PENDING}")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1 << 40:
        raise ValueError(f"power_on_s is {value!r}")
    return float(value)


def _kept(raw: Any) -> tuple[int, bytes]:
    offset, data = _row(raw, 2)
    if not isinstance(data, bytes) or not 0 < len(data) <= PAGE:
        raise ValueError("a kept write has no data, or more than a page")
    return _number("kept write: offset", offset, BAR0_SIZE - len(data)), data


def _features(raw: Any) -> dict[tuple[int, int, int], int]:
    rows = [_numbers("features", row, _U32, 4) for row in _rows("features", raw)]
    return {(feature, selector, nsid): value for feature, selector, nsid, value in rows}


def _counters(raw: Any) -> Counters:
    if not isinstance(raw, dict):
        raise ValueError("counters is no map")
    return Counters(**{entry.name: _number(entry.name, raw[entry.name], _U64) for entry in fields(Counters)})


def _by_id(kind: str, queues: Sequence[Q]) -> dict[int, Q]:
    table = {queue.qid: queue for queue in queues}
    if len(table) != len(queues):
        raise ValueError(f"a {kind} queue is there twice")
    return table
