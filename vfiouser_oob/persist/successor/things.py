"""The things that a successor rebuilds: one frozen value each, one kind of record each.

A record is a list of a version and the fields of the value in their order. A kind's version is its own, so a daemon
that knows one thing better than another still understands the rest. `THINGS` is all there is to know about a kind.

Measured (CPython 3.11 on a small virtual machine on which an empty call takes 56 ns; `journalkit.measure`): `to_record`
of a range 2300 ns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_type_hints

import msgpack

from vfiouser_oob.persist.journal.layout import Key
from vfiouser_oob.persist.record import UnusableRecord
from vfiouser_oob.persist.successor.descriptors import DescriptorKind
from vfiouser_protocol.capabilities import MigrationCapability, Negotiated, TwinSocket, VersionCapabilities

_U16, _U32, _U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Thing:
    """What all things have in common."""

    #: Which kind of record it is, and the version of that kind.
    KIND: ClassVar[int]
    VERSION: ClassVar[int] = 1
    #: Its fields that tell it from others of its kind, with the bytes that each has in a key; none if there is one.
    KEY: ClassVar[Mapping[str, int]] = MappingProxyType({})
    #: Its fields that name kept descriptors, and what each has to be.
    DESCRIPTORS: ClassVar[Mapping[str, DescriptorKind]] = MappingProxyType({})
    #: Largest values of its numbers, where that is not 64 bits.
    LARGEST: ClassVar[Mapping[str, int]] = MappingProxyType({})

    @property
    def key(self) -> Key:
        """Which one of its kind it is."""
        return b"".join(getattr(self, name).to_bytes(size, "big") for name, size in self.KEY.items())

    def to_record(self) -> bytes:
        """Write it down."""
        record: bytes = msgpack.packb((self.VERSION, *_values_of(type(self))(self)))
        return record

    @classmethod
    def from_record(cls, record: bytes) -> Self:
        """Read what `to_record` wrote.

        Args:
            record: the value of a journal's record.

        Raises:
            UnusableRecord: it is damaged, or of a version that is not understood.
        """
        try:
            values = msgpack.unpackb(record, use_list=False, strict_map_key=False)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise UnusableRecord(f"it is damaged: {error}") from error
        if not isinstance(values, tuple) or not values:
            raise UnusableRecord("it is damaged: it is no list")
        if values[0] != cls.VERSION:
            raise UnusableRecord(f"it is of version {values[0]!r}; {cls.VERSION} is understood")
        readers = _readers_of(cls)
        if len(values) != len(readers) + 1:
            raise UnusableRecord(f"it is damaged: it has {len(values) - 1} fields of {len(readers)}")
        return cls(**{name: read(name, value) for (name, read), value in zip(readers.items(), values[1:], strict=True)})


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
        return Negotiated(*_values_of(AgreedThing)(self)[2:])


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
    CounterThing,
    SnapshotThing,
)


def _is(kind: type) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if type(value) is not kind:
            raise UnusableRecord(f"it is damaged: {name} is {type(value).__name__}, it has to be {kind.__name__}")
        return value

    return read


def _or_none(reader: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else reader(name, value)


def _number(largest: int) -> Callable[[str, Any], int]:
    whole = _is(int)

    def read(name: str, value: Any) -> int:
        number: int = whole(name, value)
        if not 0 <= number <= largest:
            raise UnusableRecord(f"it is damaged: {name} is {number}, it has to be from 0 to {largest}")
        return number

    return read


def _parts(kind: type, readers: Sequence[Callable[[str, Any], Any]]) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if not isinstance(value, tuple) or len(value) != len(readers):
            raise UnusableRecord(f"it is damaged: {name} is no list of {len(readers)}")
        return kind(*(reader(name, item) for reader, item in zip(readers, value, strict=True)))

    return read


_ANY_NUMBER = _number(_U64)
_TWIN = _parts(TwinSocket, (_is(bool), _or_none(_ANY_NUMBER)))
_MIGRATION = _parts(MigrationCapability, (_ANY_NUMBER, _ANY_NUMBER))
#: How a field is read, by its type.
_READERS: Mapping[Any, Callable[[str, Any], Any]] = MappingProxyType(
    {
        int: _ANY_NUMBER,
        int | None: _or_none(_ANY_NUMBER),
        bool: _is(bool),
        bytes: _is(bytes),
        str: _is(str),
        str | None: _or_none(_is(str)),
        VersionCapabilities: _parts(
            VersionCapabilities, (*[_ANY_NUMBER] * 4, _is(bool), _or_none(_TWIN), _or_none(_MIGRATION))
        ),
    }
)


def _field_readers(kind: type[Thing]) -> Mapping[str, Callable[[str, Any], Any]]:
    hints = get_type_hints(kind)
    return {
        field.name: _number(kind.LARGEST[field.name]) if field.name in kind.LARGEST else _READERS[hints[field.name]]
        for field in fields(kind)
    }


def _field_values(kind: type[Thing]) -> Callable[[Thing], tuple[Any, ...]]:
    names = [field.name for field in fields(kind)]
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda thing: (get(thing),)


_FIELD_READERS = MappingProxyType({kind: _field_readers(kind) for kind in THINGS})
_FIELD_VALUES = MappingProxyType({kind: _field_values(kind) for kind in THINGS})
_readers_of = _FIELD_READERS.__getitem__
_values_of = _FIELD_VALUES.__getitem__
