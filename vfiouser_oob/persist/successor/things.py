"""The things that a successor rebuilds: one frozen value each, one kind of record each.

A record is a list of a version and the fields of the value in their order. A kind's version is its own, so a daemon
that knows one thing better than another still understands the rest. `THINGS` is all there is to know about a kind.

Measured (CPython 3.11 on a small virtual machine on which an empty call takes 56 ns; `journalkit.measure`): `to_record`
of a range 2300 ns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from vfiouser_oob.persist.successor.descriptors import DescriptorKind
from vfiouser_oob.persist.successor.thing import Thing, values_of
from vfiouser_protocol.capabilities import Negotiated, VersionCapabilities

__all__ = [
    "THINGS",
    "AgreedThing",
    "ArrivedThing",
    "AssignedThing",
    "ClientThing",
    "CompanionThing",
    "ConfigThing",
    "CounterThing",
    "FunctionThing",
    "LineThing",
    "MigrationThing",
    "ProgressThing",
    "RangeThing",
    "RegionThing",
    "SaidThing",
    "SnapshotThing",
    "Thing",
    "TwinThing",
    "UpstreamThing",
    "VectorThing",
    "VfioThing",
    "VmThing",
    "VmstateThing",
]

_U16, _U32 = (1 << 16) - 1, (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class FunctionThing(Thing):
    """The function that the journal is about.

    Args:
        name: its name.
        identity: a digest of what it is configured to be; a successor with another configuration drops the client.
        program: version of the program that wrote it, for people.
    """

    KIND: ClassVar[int] = 1
    name: str
    identity: str
    program: str


@dataclass(frozen=True, slots=True)
class ClientThing(Thing):
    """A client that is connected.

    Args:
        number: which; no other one of the function has had it.
        main: name of the socket that it connected.
        memory: name of that socket's memory.
        pid: who it was when it connected.
        uid: likewise.
        gid: likewise.
    """

    KIND: ClassVar[int] = 2
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType(
        {"main": DescriptorKind.SOCKET, "memory": DescriptorKind.MEMORY}
    )
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 4})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": _U32})
    number: int
    main: str
    memory: str
    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class TwinThing(Thing):
    """The second socket of the client, for our own commands.

    Args:
        socket: its name.
        memory: name of its memory.
    """

    KIND: ClassVar[int] = 3
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType(
        {"socket": DescriptorKind.SOCKET, "memory": DescriptorKind.MEMORY}
    )
    socket: str
    memory: str


@dataclass(frozen=True, slots=True)
class AgreedThing(Thing):
    """What was negotiated.

    Args:
        end: 0 with the client; 1 with the server behind the function.
        number: with which client.
        minor: protocol minor in use.
        reply_payload: the VERSION reply's payload.
        client: what the client takes.
        server: what we take.
        twin: a second socket was granted.
        write_multiple: whether REGION_WRITE_MULTI may be used.
        migration_pgsize: bytes per bit of a dirty bitmap; None without migration.
    """

    KIND: ClassVar[int] = 4
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"end": 1})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"end": 1, "number": _U32})
    end: int
    number: int
    minor: int
    reply_payload: bytes
    client: VersionCapabilities
    server: VersionCapabilities
    twin: bool
    write_multiple: bool
    migration_pgsize: int | None

    @classmethod
    def of(cls, negotiated: Negotiated, end: int = 0, number: int = 0) -> AgreedThing:
        """What was negotiated, to be written down."""
        return cls(end, number, *negotiated)

    @property
    def negotiated(self) -> Negotiated:
        """What was negotiated, as the protocol has it."""
        return Negotiated(*values_of(AgreedThing)(self)[2:])


@dataclass(frozen=True, slots=True)
class RangeThing(Thing):
    """One window of client memory.

    Args:
        address: DMA address of its first byte.
        size: its length in bytes.
        flags: DmaMapFlags.
        offset: where it starts in its file, in bytes.
        file: name of that; None if it is reached by messages.
    """

    KIND: ClassVar[int] = 5
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"address": 8})
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({"file": DescriptorKind.MEMORY})
    address: int
    size: int
    flags: int
    offset: int
    file: str | None


@dataclass(frozen=True, slots=True)
class VectorThing(Thing):
    """One eventfd that the client has given for one vector.

    Args:
        index: IRQ index.
        vector: which of its vectors.
        action: which of IrqSetFlags' actions it is for.
        eventfd: its name.
    """

    KIND: ClassVar[int] = 6
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 1, "vector": 2, "action": 1})
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({"eventfd": DescriptorKind.EVENTFD})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 255, "vector": _U16, "action": 255})
    index: int
    vector: int
    action: int
    eventfd: str


@dataclass(frozen=True, slots=True)
class LineThing(Thing):
    """The state of one IRQ index.

    Args:
        index: which.
        active: eventfds were given for it, so that a vector without one latches.
        masked: one byte per vector.
        pending: one byte per vector: an interrupt was latched.
    """

    KIND: ClassVar[int] = 7
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 1})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 255})
    index: int
    active: bool
    masked: bytes
    pending: bytes


@dataclass(frozen=True, slots=True)
class ConfigThing(Thing):
    """Bytes of config space, as last written.

    Args:
        offset: of the first.
        data: they.
    """

    KIND: ClassVar[int] = 8
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"offset": 2})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"offset": 4095})
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MigrationThing(Thing):
    """The migration record.

    Args:
        text: as it writes itself down, with a version of its own.
    """

    KIND: ClassVar[int] = 9
    text: str


@dataclass(frozen=True, slots=True)
class CounterThing(Thing):
    """One number that is counted for people.

    Args:
        number: which; its owner knows.
        value: how many.
    """

    KIND: ClassVar[int] = 10
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 2})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": _U16})
    number: int
    value: int


@dataclass(frozen=True, slots=True)
class RegionThing(Thing):
    """Memory behind a region that the client may have mapped, or other memory of a device.

    Args:
        index: region index; from 0x10000 on, the device knows what it is.
        memory: its name.
    """

    KIND: ClassVar[int] = 11
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 4})
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({"memory": DescriptorKind.MEMORY})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"index": _U32})
    index: int
    memory: str


@dataclass(frozen=True, slots=True)
class UpstreamThing(Thing):
    """A connection to the server behind the function.

    Args:
        number: which of them: 0, and 1 for its twin.
        socket: its name.
        memory: name of its memory.
    """

    KIND: ClassVar[int] = 12
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 1})
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType(
        {"socket": DescriptorKind.SOCKET, "memory": DescriptorKind.MEMORY}
    )
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 255})
    number: int
    socket: str
    memory: str


@dataclass(frozen=True, slots=True)
class VfioThing(Thing):
    """A container, group, device or iommufd of the kernel.

    Args:
        number: which of them; its owner knows.
        handle: its name.
        space: number of the address space, of an iommufd; else 0.
    """

    KIND: ClassVar[int] = 13
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 1})
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({"handle": DescriptorKind.VFIO})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 255, "space": _U32})
    number: int
    handle: str
    space: int


@dataclass(frozen=True, slots=True)
class AssignedThing(Thing):
    """Which vectors of one IRQ index have eventfds that were passed on to the device.

    Args:
        index: which.
        vectors: one byte per vector.
    """

    KIND: ClassVar[int] = 14
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 1})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"index": 255})
    index: int
    vectors: bytes


@dataclass(frozen=True, slots=True)
class VmThing(Thing):
    """The VM that the journal is about, and its migration.

    Args:
        identity: a digest of what it is configured to be; a successor with another configuration begins anew.
        program: version of the program that wrote it, for people.
        text: the record, as it writes itself down, with a version of its own.
    """

    KIND: ClassVar[int] = 32
    identity: str
    program: str
    text: str


@dataclass(frozen=True, slots=True)
class ArrivedThing(Thing):
    """What has come of one function of a VM that is not its own state, as long as QEMU may not have it.

    Args:
        number: which of the VM's functions, in the order of the configuration.
        by_client: its client moves it by itself, so there is nothing else here.
        registers: what QEMU keeps of it, as it came.
    """

    KIND: ClassVar[int] = 33
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"number": 2})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": _U16})
    number: int
    by_client: bool
    registers: bytes


@dataclass(frozen=True, slots=True)
class ProgressThing(Thing):
    """How far the client has come with a part of what it does in a migration.

    Args:
        part: which; its owner knows.
        number: of the command with which it went on, modulo 2^32; until that is answered, what was before counts.
        before: how far it was; its owner knows how that is written.
        after: how far it is once the command is answered.
    """

    KIND: ClassVar[int] = 40
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"part": 1})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"part": 255, "number": _U32})
    part: int
    number: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class CompanionThing(Thing):
    """The connection of a VM's companion device.

    Args:
        number: which; no other one of the VM has had it.
        kept: its socket is kept; else QEMU listens, and a successor connects.
        busy: a message may have been read and not answered, so nobody can follow the conversation.
        runs: whether all its queues are enabled.
        bases: of each queue its index and where its next request is, four bytes each.
    """

    KIND: ClassVar[int] = 34
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": _U32})
    number: int
    kept: bool
    busy: bool
    runs: bool
    bases: bytes


@dataclass(frozen=True, slots=True)
class SaidThing(Thing):
    """What was said of a companion's queues, guest memory or log, and is not said again.

    Args:
        request: of vhost-user.
        index: of a queue.
        payload: of the message.
        descriptors: what the names of its descriptors have in common.
        count: how many there are.
    """

    KIND: ClassVar[int] = 35
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({"request": 2, "index": 2})
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"request": _U16, "index": _U16})
    request: int
    index: int
    payload: bytes
    descriptors: int
    count: int


@dataclass(frozen=True, slots=True)
class VmstateThing(Thing):
    """The connection of a QEMU that has been told how many pieces a VM's state has, and has not asked for any.

    Args:
        number: which; no other one of the VM has had it.
        owners: how many pieces.
        serial: of the call that was answered by that, or was about to be.
    """

    KIND: ClassVar[int] = 36
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({"number": _U32, "owners": _U32, "serial": _U32})
    number: int
    owners: int
    serial: int


@dataclass(frozen=True, slots=True)
class SnapshotThing(Thing):
    """The state of a device model that came to rest: it lies in the memory that was kept for it.

    Args:
        model: which model.
        version: of what the model wrote.
        size: its bytes.
    """

    KIND: ClassVar[int] = 15
    model: str
    version: int
    size: int


#: Every kind, in the order in which a successor rebuilds.
THINGS: Sequence[type[Thing]] = (
    FunctionThing,
    VfioThing,
    UpstreamThing,
    RegionThing,
    ClientThing,
    TwinThing,
    AgreedThing,
    ConfigThing,
    RangeThing,
    LineThing,
    VectorThing,
    AssignedThing,
    MigrationThing,
    ProgressThing,
    CounterThing,
    VmThing,
    ArrivedThing,
    CompanionThing,
    SaidThing,
    VmstateThing,
    SnapshotThing,
)
