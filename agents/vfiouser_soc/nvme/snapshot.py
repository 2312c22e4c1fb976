"""A suspended function's state as bytes, and back.

A snapshot is one msgpack map. It holds everything that decides how the function goes on, apart from device memory (the
controller memory buffer and the state memory), which is too large to be copied twice. `snapshot_reader.parse` checks
every value against the function that is to take it, so `apply` cannot fail half-way.

The version is raised whenever a reader of the former version would get it wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from vfiouser_protocol.msix import MsixSnapshot
from vfiouser_protocol.pci import ConfigSnapshot
from vfiouser_soc.nvme.state import CompletionQueue, ControllerState, SubmissionQueue
from vfiouser_soc.nvme.suspension import Clocks

if TYPE_CHECKING:
    from vfiouser_soc.nvme.function import NvmeFunction

VERSION = 1
#: Bytes of a snapshot at most, whatever it claims to hold: a function in full use makes less than half of it.
MAX_SIZE = 1 << 20


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
