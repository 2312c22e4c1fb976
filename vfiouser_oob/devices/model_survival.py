"""How a client of a model outlives the process that the model is in.

    restart:  model comes to rest ─► snapshot into kept memory ─► record ─► next process restores, and the record goes
    crash:    no record ─► next process: registers answer with EIO until DEVICE_RESET

In both cases the client stays connected, and its mappings, the memory behind its BARs, and its eventfds stay.

Rule 1: *a snapshot counts once.* Its record goes before the model goes on, so that nobody restores what is old.
Rule 2: *what is noted is what was done*, at each change, before the answer; so it is right after a crash as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgpack

from vfiouser_oob.devices.base import BackendUnavailable
from vfiouser_oob.devices.eventfds import IRQ_ACTIONS, Eventfds
from vfiouser_oob.devices.memfd import SharedMemory
from vfiouser_oob.devices.model import DeviceModel
from vfiouser_oob.persist.memory import read_memory
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.notes import DeviceNotes, Inheritance
from vfiouser_oob.persist.successor.things import LineThing, SnapshotThing
from vfiouser_oob.transport.fds import OwnedFd
from vfiouser_protocol.constants import Command
from vfiouser_protocol.irq import LineState
from vfiouser_protocol.messages import SetIrqs
from vfiouser_protocol.pci import ConfigSnapshot

#: What the next process may begin once more: whatever the device itself does is not among it.
REPEATABLE = frozenset(
    {
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_SET_IRQS,
        Command.DEVICE_RESET,
    }
)
#: What memory is called that is behind no region, and that for the snapshot.
_FIRST_MEMORY = 1 << 16
_SNAPSHOT_MEMORY = (1 << 32) - 1
#: Bytes of a snapshot at most, config space included.
MAX_SNAPSHOT = 64 << 20


@dataclass(frozen=True, slots=True)
class RestoredModel:
    """What a snapshot says, apart from the model's own part.

    Args:
        config: configuration space.
        intx: the model asserts its INTx line.
        state: the model's own.
    """

    config: ConfigSnapshot
    intx: bool
    state: bytes

    def pack(self) -> bytes:
        """Make its bytes."""
        data: bytes = msgpack.packb((*self.config, self.intx, self.state))
        return data

    @classmethod
    def unpack(cls, data: bytes) -> RestoredModel:
        """Read what `pack` made.

        Raises:
            UnusableRecord: it is damaged.
        """
        try:
            values, written, intx, state = msgpack.unpackb(data, max_bin_len=MAX_SNAPSHOT)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise UnusableRecord(f"the snapshot is damaged: {error}") from error
        if [type(each) for each in (values, written, intx, state)] != [bytes, bytes, bool, bytes]:
            raise UnusableRecord("the snapshot is damaged")
        return cls(ConfigSnapshot(values, written), intx, state)


class ModelEstate:
    """Takes down what the next process needs of a model and its client.

    Args:
        model: the model.
        irqs: its client's eventfds.
        notes: where it is taken down.
        memory: for a snapshot.
    """

    def __init__(self, model: DeviceModel, irqs: Eventfds, notes: DeviceNotes, memory: OwnedFd) -> None:
        self._model = model
        self._irqs = irqs
        self._notes = notes
        self._memory = memory
        self._noted: dict[tuple[int, int, int], OwnedFd] = {}

    @classmethod
    def begin(cls, model: DeviceModel, irqs: Eventfds, notes: DeviceNotes) -> ModelEstate:
        """Begin with a client that has just come.

        Raises:
            OSError: there is no memory for a snapshot.
        """
        memory = OwnedFd(os.memfd_create("vfiouser-snapshot", os.MFD_CLOEXEC))
        notes.region(_SNAPSHOT_MEMORY, memory)
        for index, shared in _memories(model):
            notes.region(index, shared)
        return cls(model, irqs, notes, memory)

    @classmethod
    def go_on(cls, model: DeviceModel, irqs: Eventfds, notes: DeviceNotes, left: Inheritance) -> ModelEstate:
        """Go on with a client of another process: take over its memory and its interrupts.

        Raises:
            BackendUnavailable: memory is missing.
        """
        memories = dict(_memories(model))
        if missing := {*memories, _SNAPSHOT_MEMORY} - set(left.regions):
            raise BackendUnavailable(f"memory of the model was not kept: {sorted(missing)}")
        try:
            for index, shared in memories.items():
                shared.adopt(left.regions[index])
        except (OSError, ValueError) as error:
            raise BackendUnavailable(f"memory of the model cannot be used: {error}") from error
        estate = cls(model, irqs, notes, left.regions[_SNAPSHOT_MEMORY].take())
        for thing, fd in left.eventfds:
            irqs.restore(thing.index, thing.vector, thing.action, fd)
        for line in left.lines:
            if line.index < len(model.irqs):
                irqs.state.restore_line(line.index, LineState(line.active, line.masked, line.pending))
        estate._noted = dict(estate._handles(range(len(model.irqs))))
        return estate

    def _handles(
        self, indices: Iterable[int], vectors: range | None = None
    ) -> Iterator[tuple[tuple[int, int, int], OwnedFd]]:
        for index in indices:
            for vector in range(self._model.irqs[index].count) if vectors is None else vectors:
                for action in IRQ_ACTIONS:
                    handle = self._irqs.handle(index, vector, action)
                    if handle is not None:
                        yield (index, vector, action), handle

    def irqs_set(self, request: SetIrqs) -> None:
        """A DEVICE_SET_IRQS was carried out."""
        index = request.index
        if index >= len(self._model.irqs):
            return
        vectors = range(request.start, request.start + request.count) if request.count else None
        now = dict(self._handles((index,), vectors))
        for place, handle in now.items():
            if self._noted.get(place) is not handle:
                self._notes.eventfd(*place, handle)
        for place in [place for place in self._noted if _concerned(place, index, vectors) and place not in now]:
            self._notes.eventfd(*place, None)
            del self._noted[place]
        self._noted.update(now)
        self._note_line(index, latched=False)

    def _note_line(self, index: int, *, latched: bool) -> None:
        line = self._irqs.state.line(index)
        # Without the device's state nobody knows what an interrupt was for.
        pending = line.pending if latched else bytes(len(line.pending))
        self._notes.line(LineThing(index, line.active, line.masked, pending))

    def leave(self, *, intx: bool) -> None:
        """Write down the state of a model that has come to rest.

        Args:
            intx: the model asserts its INTx line.

        Raises:
            OSError: there is no room.
            ValueError: it is too large.
        """
        model = self._model
        if model.snapshot_version is None:
            return
        data = RestoredModel(model.config.snapshot(), intx, model.snapshot()).pack()
        if len(data) > MAX_SNAPSHOT:
            raise ValueError(f"a snapshot of {len(data)} bytes; at most {MAX_SNAPSHOT}")
        os.ftruncate(self._memory.fileno(), 0)
        written = 0
        while written < len(data):
            written += os.pwrite(self._memory.fileno(), data[written:], written)
        for index in range(len(model.irqs)):
            self._note_line(index, latched=True)
        self._notes.snapshot(SnapshotThing(name_of(model), model.snapshot_version, len(data)))

    def take_snapshot(self, thing: SnapshotThing | None) -> RestoredModel:
        """Read what another process has left of the model; it counts no more from here on.

        Args:
            thing: its record.

        Raises:
            UnusableRecord: there is none, or it is not for this model.
            OSError: it cannot be read.
        """
        model = self._model
        if thing is None:
            raise UnusableRecord(
                "it has no snapshots" if model.snapshot_version is None else "the daemon was killed, or could not wait"
            )
        self._notes.snapshot(None)
        if (thing.model, thing.version) != (name_of(model), model.snapshot_version):
            found = f"{name_of(model)} of version {model.snapshot_version}"
            raise UnusableRecord(f"its snapshot is of {thing.model} of version {thing.version}, and it is {found}")
        data = read_memory(self._memory, MAX_SNAPSHOT)
        if len(data) != thing.size:
            raise UnusableRecord(f"its snapshot has {len(data)} bytes; it had {thing.size}")
        return RestoredModel.unpack(data)

    def close(self) -> None:
        """Close what is this process's."""
        self._memory.close()


def _concerned(place: tuple[int, int, int], index: int, vectors: range | None) -> bool:
    return place[0] == index and (vectors is None or place[1] in vectors)


def _memories(model: DeviceModel) -> Sequence[tuple[int, SharedMemory]]:
    """All shared memory of a model, each by one name, though several regions may show it."""
    found: dict[SharedMemory, int] = {}
    for index, region in sorted(model.regions.items()):
        if region.memory is not None:
            found.setdefault(region.memory, index)
    for number, memory in enumerate(model.memories, _FIRST_MEMORY):
        found.setdefault(memory, number)
    return [(index, memory) for memory, index in found.items()]


def name_of(model: DeviceModel) -> str:
    """Which model it is: where its class is."""
    return f"{type(model).__module__}:{type(model).__qualname__}"


__all__ = ["MAX_SNAPSHOT", "REPEATABLE", "ModelEstate", "RestoredModel", "name_of"]
