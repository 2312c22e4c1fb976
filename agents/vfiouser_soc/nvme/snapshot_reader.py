"""From the bytes of a snapshot to a state that a function can take.

Nothing of a snapshot is believed. Rule 1: a value is taken only if a guest could have brought the function that takes
it there, so whoever makes a snapshot can do no more than a guest. Rule 2: what is wrong is refused with words before
anything is applied. Rule 3: sizes are checked before what they are the sizes of is built.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from vfiouser_protocol.msix import MsixSnapshot
from vfiouser_protocol.pci import ConfigSnapshot
from vfiouser_soc.nvme.command import Completion, SubmissionEntry, parse_commands
from vfiouser_soc.nvme.events import check_event
from vfiouser_soc.nvme.queues import MAX_IN_FLIGHT
from vfiouser_soc.nvme.registers import RegisterFile
from vfiouser_soc.nvme.snapshot import MAX_SIZE, VERSION, Snapshot
from vfiouser_soc.nvme.spec import (
    CC_MPS_SHIFT,
    PAGE,
    REGISTERS_OFFSET,
    SQE_SIZE,
    Cc,
    ControllerRegister,
    Csts,
    EventType,
)
from vfiouser_soc.nvme.state import (
    ERROR_LOG_ENTRIES,
    AsyncEvent,
    CompletionQueue,
    ControllerState,
    Counters,
    ErrorEntry,
    FeatureValues,
    SubmissionQueue,
)
from vfiouser_soc.nvme.suspension import MAX_KEPT_BYTES, MAX_KEPT_WRITES, Clocks

if TYPE_CHECKING:
    from vfiouser_soc.nvme.function import NvmeFunction

_U16, _U32, _U64 = 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF
#: Status fields have 15 bits; the phase tag is the 16th.
_STATUS = 0x7FFF
#: Counters go on counting from what they are given, and are 64 bits wide where they are shown.
_MAX_COUNT = 1 << 62
#: Entries of any list: more than a function in full use has of anything.
_MAX_LIST = 8192
#: Commands that one queue carries: those in execution, and one fetch.
_MAX_CARRIED = 2 * MAX_IN_FLIGHT
_MAX_EVENTS = 16
_BUFFER_REGISTERS = (
    ControllerRegister.CMBLOC,
    ControllerRegister.CMBSZ,
    ControllerRegister.CMBMSC,
    ControllerRegister.CMBSTS,
)
_ERROR_FIELDS = (_MAX_COUNT, _U16, _U16, _STATUS, _U16, _U64, _U32)
_PENDING_FIELDS = (_U16, _U16, _STATUS, _U32)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BadSnapshot(ValueError):
    """The bytes are no snapshot, or not one that this function could go on with."""


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
        raw = msgpack.unpackb(data, strict_map_key=True, max_array_len=_MAX_LIST, max_map_len=64)
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
        config = ConfigSnapshot(*(_blob("config", part, function.config.size) for part in _row(raw["config"], 2)))
        function.config.check(config)
        table, pending, written = _row(raw["msix"], 3)
        msix = MsixSnapshot(
            _blob("MSI-X table", table, function.table.table_size),
            _blob("MSI-X pending bits", pending, function.table.pba_size),
            _flag("MSI-X table written", written),
        )
        function.table.check(msix)
        timestamp = raw["timestamp_ms"]
        registers, mask = self._registers(raw)
        return Snapshot(
            registers=registers.image_bytes,
            interrupt_mask=mask,
            config=config,
            msix=msix,
            state=self._state(raw, registers),
            clocks=Clocks(
                _seconds(raw["power_on_s"]),
                None if timestamp is None else _number("timestamp", timestamp, (1 << 48) - 1),
            ),
            kept_writes=self._kept_writes(raw["kept_writes"]),
            doorbells=self._doorbells(raw["doorbells"]),
        )

    # Registers

    def _registers(self, raw: Mapping[str, Any]) -> tuple[RegisterFile, int]:
        """Check the registers, and what they say of each other."""
        own = self._function.controller.registers
        registers = own.imagined(_blob("registers", raw["registers"], PAGE))
        mask = _number("interrupt_mask", raw["interrupt_mask"], _U32)
        if not registers[ControllerRegister.INTMS] == registers[ControllerRegister.INTMC] == mask:
            raise ValueError(f"INTMS and INTMC do not show the interrupt mask {mask:#x}")
        cc, csts = registers[ControllerRegister.CC], registers[ControllerRegister.CSTS]
        known = csts & ~(Csts.RDY | Csts.CFS | Csts.SHST) == 0 and csts & Csts.SHST != Csts.SHST
        if not known or (csts & (Csts.RDY | Csts.CFS) and not cc & Cc.EN):
            raise ValueError(f"CSTS {csts:#x} with CC {cc:#x}")
        if cc & Cc.EN and not csts & Csts.CFS:
            shift = 12 + ((cc & Cc.MPS) >> CC_MPS_SHIFT)
            if shift > self._limits.page_shift_max or cc & (Cc.CSS | Cc.AMS):
                raise ValueError(f"the controller is enabled with CC {cc:#x}, which it cannot be")
        # Where there is one, CMBMSC says what the other three show.
        if self._function.cmb_memory is None and any(registers[register] for register in _BUFFER_REGISTERS):
            raise ValueError("there is a controller memory buffer on one side only")
        return registers, mask

    # Queues, features, events, logs

    def _state(self, raw: Mapping[str, Any], registers: RegisterFile) -> ControllerState:
        features = self._function.controller.features
        current, saved = _features(raw["features"]), _features(raw["saved_features"])
        for values, are_saved in ((current, False), (saved, True)):
            for key, value in values.items():
                features.check(key, value, saved=are_saved)
        most = 1 + self._limits.io_queues
        completions = [self._completion(row) for row in _rows("completion_queues", raw["completion_queues"], most)]
        submissions = [self._submission(row) for row in _rows("submission_queues", raw["submission_queues"], most)]
        state = ControllerState(
            submission_queues=_unique("submission queue", {queue.qid: queue for queue in submissions}, submissions),
            completion_queues=_unique("completion queue", {queue.qid: queue for queue in completions}, completions),
            features=FeatureValues(current, saved),
            event_requests=deque(self._event_requests(raw["event_requests"])),
            events=deque(_events(raw["events"])),
            masked_events={EventType(kind) for kind in _numbers("masked_events", raw["masked_events"], 0xFF)},
            changed_namespaces=self._changed_namespaces(raw["changed_namespaces"]),
            errors=deque(
                (ErrorEntry(*_fields("errors", row, _ERROR_FIELDS)) for row in _rows("errors", raw["errors"])),
                maxlen=ERROR_LOG_ENTRIES,
            ),
            counters=_counters(raw["counters"]),
            frozen=_flag("frozen", raw["frozen"]),
            shut_down=_flag("shut_down", raw["shut_down"]),
        )
        self._check_whole(state, registers)
        state.carry_over()
        return state

    def _check_whole(self, state: ControllerState, registers: RegisterFile) -> None:
        """Check what the parts say of each other."""
        cc, csts = registers[ControllerRegister.CC], registers[ControllerRegister.CSTS]
        shift = 12 + ((cc & Cc.MPS) >> CC_MPS_SHIFT)
        bases = [queue.base for queue in state.submission_queues.values()]
        bases += [queue.base for queue in state.completion_queues.values()]
        pending = sum(len(queue.pending) for queue in state.completion_queues.values())
        allowed = (1 + self._limits.io_queues) * MAX_IN_FLIGHT + self._limits.event_requests
        live = cc & Cc.EN and not csts & Csts.CFS
        admin = 0 in state.submission_queues and 0 in state.completion_queues
        problem = (
            ((live and not admin) and "the controller is enabled and has no admin queues")
            or ((not cc & Cc.EN and (bases or state.event_requests)) and "the controller is disabled and has queues")
            or ((state.frozen and not csts & Csts.CFS) and "the controller is frozen, but CSTS.CFS is clear")
            or ((state.shut_down != bool(csts & Csts.SHST)) and "CSTS.SHST and the shutdown do not agree")
            or (any(base & (1 << shift) - 1 for base in bases) and "a queue is not page aligned")
            or (pending > allowed and f"{pending} completions wait; at most {allowed}")
        )
        if problem:
            raise ValueError(problem)
        for queue in state.submission_queues.values():
            if queue.cqid not in state.completion_queues:
                raise ValueError(f"submission queue {queue.qid} uses completion queue {queue.cqid}, which is missing")
            if bool(queue.qid) != bool(queue.cqid):
                raise ValueError(f"submission queue {queue.qid} uses completion queue {queue.cqid}")

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
        fetched: deque[SubmissionEntry] = deque(parse_commands(commands))
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
        entries = deque(Completion(*_fields(f"{what}: pending", entry, _PENDING_FIELDS)) for entry in rows)
        tail = _number(f"{what}: tail", tail, size - 1)
        return CompletionQueue(
            qid,
            base,
            size,
            _number(f"{what}: vector", vector, self._limits.vectors - 1 if qid else 0),
            _flag(f"{what}: interrupt", interrupt),
            _number(f"{what}: head", head, size - 1),
            tail,
            _number(f"{what}: phase", phase, 1),
            entries,
            _number(f"{what}: entries being written", writing, min(len(entries), size - tail)),
        )

    def _event_requests(self, raw: Any) -> list[int]:
        requests = _numbers("event_requests", _rows("event_requests", raw, self._limits.event_requests), _U16)
        if len(set(requests)) != len(requests):
            raise ValueError("an event request is there twice")
        return requests

    def _changed_namespaces(self, raw: Any) -> set[int]:
        changed = set(_numbers("changed_namespaces", raw, _U32))
        if not changed <= set(self._function.namespaces):
            raise ValueError(f"changed namespaces {sorted(changed)}; there are {sorted(self._function.namespaces)}")
        return changed

    # What the host wrote and the controller has not noticed

    def _kept_writes(self, raw: Any) -> tuple[tuple[int, bytes], ...]:
        last = REGISTERS_OFFSET + PAGE * (1 if self._function.polled_doorbells is not None else 2)
        kept = tuple(_kept(write, last) for write in _rows("kept_writes", raw, MAX_KEPT_WRITES))
        size = sum(len(data) for _, data in kept)
        if size > MAX_KEPT_BYTES:
            raise ValueError(f"{size} bytes of kept writes; at most {MAX_KEPT_BYTES}")
        return kept

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


def _numbers(what: str, row: Any, most: int) -> list[int]:
    return [_number(what, value, most) for value in _rows(what, row)]


def _fields(what: str, row: Any, most: Sequence[int]) -> list[int]:
    return [_number(what, value, limit) for value, limit in zip(_row(row, len(most)), most, strict=True)]


def _flag(what: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{what} is {value!r}; it must be true or false")
    return value


def _blob(what: str, value: Any, size: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != size:
        raise ValueError(f"{what} is not {size} bytes")
    return value


def _row(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"an entry does not have {count} values")
    return value


def _rows(what: str, value: Any, most: int = _MAX_LIST) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{what} is not a list of at most {most}")
    return value


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1 << 40:
        raise ValueError(f"power_on_s is {value!r}")
    return float(value)


def _kept(raw: Any, end: int) -> tuple[int, bytes]:
    offset, data = _row(raw, 2)
    if not isinstance(data, bytes) or not 0 < len(data) <= PAGE:
        raise ValueError("a kept write has no data, or more than a page")
    offset = _number("kept write: offset", offset, end - len(data))
    if offset // PAGE != (offset + len(data) - 1) // PAGE:
        raise ValueError(f"a kept write of {len(data)} bytes at {offset:#x}, over the end of a page")
    return offset, data


def _features(raw: Any) -> dict[tuple[int, int, int], int]:
    rows = [_fields("features", row, (_U32,) * 4) for row in _rows("features", raw)]
    return _unique("feature", {(feature, selector, nsid): value for feature, selector, nsid, value in rows}, rows)


def _events(raw: Any) -> list[AsyncEvent]:
    events = [AsyncEvent(*_fields("events", row, (0xFF,) * 3)) for row in _rows("events", raw, _MAX_EVENTS)]
    for event in events:
        check_event(event)
    _unique("event", dict.fromkeys(events), events)
    return events


def _counters(raw: Any) -> Counters:
    if not isinstance(raw, dict):
        raise ValueError("counters is not a map")
    return Counters(**{entry.name: _number(entry.name, raw[entry.name], _MAX_COUNT) for entry in fields(Counters)})


def _unique(what: str, table: dict[K, V], rows: Sequence[object]) -> dict[K, V]:
    if len(table) != len(rows):
        raise ValueError(f"a {what} is there twice")
    return table
