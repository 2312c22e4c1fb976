"""The state of all functions of a VM as one piece, which a carrier takes along.

    head │ function … │ digest
    function: head │ name │ config as written │ config as read │ MSI-X table │ (run's head │ memory) … │ stream

A function's stream has a checksum of its own and is looked into only where it is loaded; the digest guards the rest. A
function that its client moves by itself has no stream.

Whoever reads it trusts nothing: sizes are checked against what there is before anything is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, TypeVar

from construct import Const, Int32ul

from vfiouser_oob.vm.carriers.interface import State
from vfiouser_oob.vm.topology import Bdf
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import U32, U64, least_size

MAGIC = b"oobvmfns"
VERSION = 1
BARS = 6
_DIGEST = 32
#: More than any VM has, and a name is no longer than the configuration lets it be.
_FUNCTIONS_MAX = 256
_NAME_MAX = 63
_NOWHERE = 0xFFFF_FFFF
H = TypeVar("H", "BundleHead", "BundledFunction", "PageRun")


class BundleError(Exception):
    """What came is not the state of this VM; the text says why."""


class BundleHead(NamedTuple):
    """What stands in front.

    Args:
        magic: `MAGIC`.
        version: of this form.
        functions: how many follow.
    """

    magic: Annotated[bytes, Const(MAGIC)]
    version: Annotated[int, Const(VERSION, Int32ul)]
    functions: U32


class BundledFunction(NamedTuple):
    """What stands in front of a function.

    Args:
        name: bytes of its name.
        by_client: 1 if its client moves it by itself.
        written: bytes of configuration space as written, in the form of the stream's `pci` record.
        head: bytes of configuration space as read.
        table: bytes of the MSI-X table.
        runs: runs of pages.
        place: where it is on the guest's PCI bus; all bits set if that is not known.
        reserved: 0.
        ecam: where the guest's ECAM begins; 0 without one.
        rom: bytes of its expansion ROM.
        bar0: bytes of its BARs.
        bar1: likewise.
        bar2: likewise.
        bar3: likewise.
        bar4: likewise.
        bar5: likewise.
        stream: bytes of its stream.
    """

    name: U32
    by_client: U32
    written: U32
    head: U32
    table: U32
    runs: U32
    place: U32
    reserved: U32
    ecam: U64
    rom: U64
    bar0: U64
    bar1: U64
    bar2: U64
    bar3: U64
    bar4: U64
    bar5: U64
    stream: U64


class PageRun(NamedTuple):
    """What stands in front of the contents of guest memory.

    Args:
        address: the guest's.
        size: bytes.
    """

    address: U64
    size: U64


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a function is in its guest.

    Args:
        place: on the PCI bus.
        ecam: where ECAM begins; None for a machine without it.
    """

    place: Bdf
    ecam: int | None = None


@dataclass(frozen=True, slots=True)
class FunctionState:
    """All that moves of one function.

    Args:
        name: its name.
        stream: its state, as the agent's stream; empty if its client moves it.
        by_client: its client moves it by itself, so there is nothing else here.
        written: configuration space as the guest wrote it, as `ConfigShadow.encode` gives it.
        head: the first 256 bytes of it, as read.
        sizes: bytes of its BARs, by number; none for those that it does not have.
        rom_size: bytes of its expansion ROM; 0 if it has none.
        table: the MSI-X table; empty if there is none, or it could not be read.
        whereabouts: where it is in the guest; None if that is not known.
        pages: guest memory that QEMU does not know to be written: addresses and contents.
    """

    name: str
    stream: bytes = b""
    by_client: bool = False
    written: bytes = b""
    head: bytes = b""
    sizes: Mapping[int, int] = field(default_factory=dict)
    rom_size: int = 0
    table: bytes = b""
    whereabouts: Whereabouts | None = None
    pages: tuple[tuple[int, bytes], ...] = ()


def pack(states: Sequence[FunctionState]) -> bytes:
    """Make one piece of the states of a VM's functions.

    Args:
        states: of all its functions.
    """
    guarded = hashlib.sha256()
    parts: list[bytes] = []

    def add(piece: bytes, *, guard: bool = True) -> None:
        parts.append(piece)
        if guard:
            guarded.update(piece)

    add(encode(BundleHead(MAGIC, VERSION, len(states))))
    for state in states:
        for piece in _pieces(state):
            add(piece)
        add(state.stream, guard=False)
    return b"".join([*parts, guarded.digest()])


def _pieces(state: FunctionState) -> Iterator[bytes]:
    name, where = state.name.encode(), state.whereabouts
    bars = {f"bar{bar}": state.sizes.get(bar, 0) for bar in range(BARS)}
    yield encode(
        BundledFunction(
            name=len(name),
            by_client=int(state.by_client),
            written=len(state.written),
            head=len(state.head),
            table=len(state.table),
            runs=len(state.pages),
            place=_NOWHERE if where is None else _number(where.place),
            reserved=0,
            ecam=0 if where is None or where.ecam is None else where.ecam,
            rom=state.rom_size,
            stream=len(state.stream),
            **bars,
        )
    )
    yield from (name, state.written, state.head, state.table)
    for address, data in state.pages:
        yield encode(PageRun(address, len(data)))
        yield data


def _number(place: Bdf) -> int:
    return place.bus << 8 | place.device << 3 | place.function


class _BundleReader:
    """Takes a bundle apart from its beginning."""

    def __init__(self, bundle: State) -> None:
        self._view = memoryview(bundle)
        self._position = 0
        self._guarded = hashlib.sha256()

    def take(self, size: int, *, guard: bool = True) -> memoryview:
        """The next bytes.

        Raises:
            BundleError: there are not so many.
        """
        if size > len(self._view) - self._position:
            raise BundleError("the state of the VM's functions is cut off")
        piece = self._view[self._position : self._position + size]
        self._position += size
        if guard:
            self._guarded.update(piece)
        return piece

    def head(self, kind: type[H]) -> H:
        try:
            return decode(kind, bytes(self.take(least_size(kind))))
        except CommandError as error:
            raise BundleError(f"what arrived is no state of a VM's functions of this program: {error}") from error

    def end(self) -> None:
        """Check that it was whole.

        Raises:
            BundleError: it was not.
        """
        if self.take(_DIGEST, guard=False) != self._guarded.digest():
            raise BundleError("the state of the VM's functions is damaged")
        if self._position != len(self._view):
            raise BundleError("more arrived than the state of the VM's functions")


def unpack(bundle: State, names: Iterable[str]) -> dict[str, FunctionState]:
    """Take apart what `pack` made.

    Args:
        bundle: what arrived.
        names: the functions of this side's VM.

    Returns:
        The states, by name; one for each of the functions.

    Raises:
        BundleError: it is damaged, or of other functions.
    """
    reader = _BundleReader(bundle)
    count = reader.head(BundleHead).functions
    if count > _FUNCTIONS_MAX:
        raise BundleError(f"the state of {count} functions; a VM has at most {_FUNCTIONS_MAX}")
    found = [_function(reader) for _ in range(count)]
    reader.end()
    states = {state.name: state for state in found}
    wanted = set(names)
    if len(states) != len(found) or set(states) != wanted:
        theirs, ours = (", ".join(sorted(each)) or "none" for each in (states, wanted))
        raise BundleError(f"the VM that comes has the functions {theirs}, and the one here {ours}")
    return states


def _function(reader: _BundleReader) -> FunctionState:
    head = reader.head(BundledFunction)
    if head.name > _NAME_MAX:
        raise BundleError(f"a function's name of {head.name} bytes")
    name, written, config, table = (
        bytes(reader.take(size)) for size in (head.name, head.written, head.head, head.table)
    )
    pages = []
    for _ in range(head.runs):
        run = reader.head(PageRun)
        pages.append((run.address, bytes(reader.take(run.size))))
    sizes = dict(enumerate((head.bar0, head.bar1, head.bar2, head.bar3, head.bar4, head.bar5)))
    place = Bdf(head.place >> 8 & 0xFF, head.place >> 3 & 31, head.place & 7)
    return FunctionState(
        name.decode(errors="replace"),
        bytes(reader.take(head.stream, guard=False)),
        bool(head.by_client),
        written,
        config,
        {bar: size for bar, size in sizes.items() if size},
        head.rom,
        table,
        None if head.place == _NOWHERE else Whereabouts(place, head.ecam or None),
        tuple(pages),
    )
