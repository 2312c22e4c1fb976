"""The state of all functions of a VM as one piece, which a carrier takes along.

    head │ function … │ digest
    function: head │ name │ registers │ memory │ stream

A function's stream has a checksum of its own and is looked into only where it is loaded; the digest guards the rest. A
function that its client moves by itself has no stream.

Whoever reads it trusts nothing: sizes are checked against what there is before anything is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypeVar

from construct import Const, Int32ul

from vfiouser_oob.vm.carriers.interface import State
from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.errors import CommandError
from vfiouser_protocol.fields import U32, U64, least_size

MAGIC = b"oobvmfns"
VERSION = 1
_DIGEST = 32
#: More than any VM has, and a name is no longer than the configuration lets it be.
_FUNCTIONS_MAX = 256
_NAME_MAX = 63
H = TypeVar("H", "BundleHead", "BundledFunction")


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
        registers: bytes of what QEMU keeps of it.
        reserved: 0.
        memory: bytes of what it has written unknown to QEMU.
        stream: bytes of its stream.
    """

    name: U32
    by_client: U32
    registers: U32
    reserved: U32
    memory: U64
    stream: U64


@dataclass(frozen=True, slots=True)
class FunctionState:
    """All that moves of one function.

    Args:
        name: its name.
        stream: its state, as the agent's stream; empty if its client moves it.
        by_client: its client moves it by itself, so there is nothing else here.
        registers: what QEMU keeps of it, as `registers.FunctionRegisters` writes it.
        memory: what it has written unknown to QEMU, as `page_contents.PageContents` writes it.
    """

    name: str
    stream: bytes = b""
    by_client: bool = False
    registers: bytes = b""
    memory: bytes = b""


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
    name = state.name.encode()
    yield encode(
        BundledFunction(len(name), int(state.by_client), len(state.registers), 0, len(state.memory), len(state.stream))
    )
    yield from (name, state.registers, state.memory)


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
            raise BundleError(
                f"what arrived is not a state that this program saved for a VM's functions: {error}"
            ) from error

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
        raise BundleError(f"the arriving VM has the functions {theirs}, and the one here has {ours}")
    return states


def _function(reader: _BundleReader) -> FunctionState:
    head = reader.head(BundledFunction)
    if head.name > _NAME_MAX:
        raise BundleError(f"a function's name of {head.name} bytes")
    name, registers, memory = (bytes(reader.take(size)) for size in (head.name, head.registers, head.memory))
    stream = bytes(reader.take(head.stream, guard=False))
    return FunctionState(name.decode(errors="replace"), stream, bool(head.by_client), registers, memory)
