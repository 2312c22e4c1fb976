"""A bus with one client and one service of many owners, without any I/O: what QEMU's `dbus-vmstate` asks for.

QEMU asks for the owners of `org.qemu.VMState1`, then each of them for its `Id`, and then, by role, each `Save` or
`Load`. Each owner carries a piece of the state. So the answer to `ListQueuedOwners` says how many pieces there may be,
and an error in its place is a veto: QEMU fails the migration before anything has left, with our words.

Spec: D-Bus, "Message Bus Messages"; QEMU, docs/interop/dbus-vmstate.rst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self, TypeAlias

from vfiouser_oob.vm.carriers.dbus_auth import SaslServer
from vfiouser_oob.vm.carriers.dbus_wire import Call, CallReader, ReplyWriter

#: QEMU's limit for the state of one owner.
PIECE_MAX = 1 << 20
#: The name that all owners queue for.
SERVICE = "org.qemu.VMState1"
BUS = "org.freedesktop.DBus"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_BODY_MAX = PIECE_MAX + 4096
_CLIENT = ":1.0"
_OWNER = ":1."
_ID = "vfiouser-oob"
_REFUSED = "org.vfiouser_oob.Refused"
_UNKNOWN = "org.freedesktop.DBus.Error.UnknownMethod"
_NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"
#: What StartServiceByName and RequestName answer: it runs already; the name is another's.
_ALREADY_RUNNING = 2
_EXISTS = 3


@dataclass(frozen=True, slots=True)
class Opened:
    """The client has said who it is, and Hello."""


@dataclass(frozen=True, slots=True)
class OwnersAsked:
    """The client begins to save or to load; answer by `list_owners` or `refuse`."""

    call: Call


@dataclass(frozen=True, slots=True)
class SaveCalled:
    """A piece of the state is asked for; answer by `give` or `refuse`.

    Args:
        call: the call.
        index: which piece.
    """

    call: Call
    index: int


@dataclass(frozen=True, slots=True)
class LoadCalled:
    """A piece of a state has come; answer by `accept` or `refuse`.

    Args:
        call: the call.
        index: which piece.
        piece: its bytes.
    """

    call: Call
    index: int
    piece: bytes


Asked: TypeAlias = Opened | OwnersAsked | SaveCalled | LoadCalled


class DbusPeer:
    """One client's connection.

    After `receive_data` and after each answer, `data_to_send` has what is to be sent.

    Args:
        uid: the client's user, by the kernel's word.
        guid: this bus's identity, 32 hexadecimal digits.
    """

    def __init__(self, uid: int, guid: str) -> None:
        self._auth = SaslServer(uid, guid)
        self._guid = guid
        self._reader = CallReader(_BODY_MAX)
        self._writer = ReplyWriter()
        self._to_send: list[bytes] = []
        self._owners = 0
        self._greeted = False

    @classmethod
    def resumed(cls, guid: str, owners: int, serial: int, reason: str) -> Self:
        """Take over a client to which another bus has said, or was about to say, how many places there are.

        Args:
            guid: the bus's identity.
            owners: how many places.
            serial: of the call that asked for them; if nobody has answered it, it is refused. A second answer to a
                call is one to nothing, for the client.
            reason: why it is refused.
        """
        peer = cls(0, guid)
        peer._auth.done = peer._greeted = True
        peer._owners = owners
        peer.refuse(OwnersAsked(Call(serial, BUS, "", "", "", (), True)), reason)
        return peer

    def receive_data(self, data: bytes) -> Iterator[Asked]:
        """Take bytes that came.

        Yields:
            What has to be answered, in order.

        Raises:
            SaslError: the client is not who it says, or no D-Bus client.
            DbusWireError: what came is no D-Bus.
        """
        if not self._auth.done:
            data = self._auth.receive_data(data)
            self._to_send.append(self._auth.data_to_send())
        if self._auth.done:
            for call in self._reader.feed(data):
                asked = self._take(call)
                if asked is not None:
                    yield asked

    @property
    def missing(self) -> int:
        """Bytes that the message on its way still lacks; 0 if that is not known."""
        return self._reader.missing

    @property
    def begun(self) -> bool:
        """Whether a part of a message has come."""
        return self._reader.begun

    def data_to_send(self) -> bytes:
        """Return what to send now; it is returned once."""
        data = b"".join(self._to_send)
        self._to_send.clear()
        return data

    def _take(self, call: Call) -> Asked | None:
        row = _METHODS.get((call.interface, call.member))
        # Before Hello there is nobody to talk to.
        if row is None or row.signature != call.signature or not (self._greeted or call.member == "Hello"):
            self._error(call, _UNKNOWN, f"there is no {call.interface[:80]}.{call.member[:80]}({call.signature[:20]})")
            return None
        return row.take(self, call)

    # Answers

    def list_owners(self, asked: OwnersAsked, count: int) -> None:
        """Say that the state has so many places from now on.

        Args:
            asked: what is answered.
            count: how many pieces there may be.
        """
        self._owners = count
        self._reply(asked.call, "as", [f"{_OWNER}{number}" for number in range(1, count + 1)])

    def give(self, asked: SaveCalled, piece: bytes) -> None:
        """Give a piece of the state.

        Args:
            asked: what is answered.
            piece: at most `PIECE_MAX` bytes.
        """
        self._reply(asked.call, "ay", piece)

    def accept(self, asked: LoadCalled) -> None:
        """Say that a piece was taken."""
        self._reply(asked.call)

    def refuse(self, asked: OwnersAsked | SaveCalled | LoadCalled, reason: str) -> None:
        """Say no.

        Args:
            asked: what is answered.
            reason: why; QEMU prints it.
        """
        self._error(asked.call, _REFUSED, reason)

    # The bus's own methods

    def _hello(self, call: Call) -> Asked | None:
        if self._greeted:
            self._error(call, "org.freedesktop.DBus.Error.Failed", "Hello was sent before")
            return None
        self._greeted = True
        self._reply(call, "s", _CLIENT)
        return Opened()

    def _nothing(self, call: Call) -> None:
        self._reply(call)

    def _running(self, call: Call) -> None:
        self._reply(call, "u", _ALREADY_RUNNING)

    def _taken(self, call: Call) -> None:
        self._reply(call, "u", _EXISTS)

    def _bus_id(self, call: Call) -> None:
        self._reply(call, "s", self._guid)

    def _owner_of(self, name: str) -> str | None:
        if name in (BUS, _CLIENT) or self._index_of(name) is not None:
            return name
        return f"{_OWNER}1" if name == SERVICE and self._owners else None

    def _name_has_owner(self, call: Call) -> None:
        self._reply(call, "b", self._owner_of(call.arguments[0]) is not None)

    def _name_owner(self, call: Call) -> None:
        owner = self._owner_of(call.arguments[0])
        if owner is None:
            self._error(call, _NO_OWNER, f"{call.arguments[0][:80]!r} has no owner")
        else:
            self._reply(call, "s", owner)

    def _queued_owners(self, call: Call) -> Asked | None:
        if call.arguments[0] == SERVICE:
            return OwnersAsked(call)
        self._error(call, _NO_OWNER, f"{call.arguments[0][:80]!r} has no owner")
        return None

    # The service's methods

    def _index_of(self, name: str) -> int | None:
        number = name.removeprefix(_OWNER)
        # Not isdecimal alone: that is also true of digits of other scripts, and of any number of them.
        if not name.startswith(_OWNER) or not (number.isascii() and number.isdecimal()) or len(number) > 5:
            return None
        return int(number) - 1 if 1 <= int(number) <= self._owners else None

    def _all_properties(self, call: Call) -> None:
        index = self._index_of(call.destination)
        if index is None or call.arguments[0] != SERVICE:
            self._error(call, _UNKNOWN, f"{call.destination[:80]!r} has no such properties")
        else:
            self._reply(call, "a{sv}", {"Id": ("s", f"{_ID}.{index}")})

    def _save(self, call: Call) -> Asked | None:
        index = self._index_of(call.destination)
        if index is not None:
            return SaveCalled(call, index)
        self._error(call, _NO_OWNER, f"{call.destination[:80]!r} has no state")
        return None

    def _load(self, call: Call) -> Asked | None:
        index = self._index_of(call.destination)
        if index is not None:
            return LoadCalled(call, index, call.arguments[0])
        self._error(call, _NO_OWNER, f"{call.destination[:80]!r} takes no state")
        return None

    def _reply(self, call: Call, signature: str = "", *values: object) -> None:
        if call.wants_reply:
            self._to_send.append(self._writer.reply(call, self._sender_for(call), signature, *values))

    def _error(self, call: Call, name: str, text: str) -> None:
        if call.wants_reply:
            self._to_send.append(self._writer.error(call, self._sender_for(call), name, text))

    def _sender_for(self, call: Call) -> str:
        return call.destination if self._index_of(call.destination) is not None else BUS


@dataclass(frozen=True, slots=True)
class _Method:
    signature: str
    take: Callable[[DbusPeer, Call], Asked | None]


_METHODS: Mapping[tuple[str, str], _Method] = MappingProxyType(
    {
        (BUS, "Hello"): _Method("", DbusPeer._hello),
        (BUS, "AddMatch"): _Method("s", DbusPeer._nothing),
        (BUS, "RemoveMatch"): _Method("s", DbusPeer._nothing),
        (BUS, "RequestName"): _Method("su", DbusPeer._taken),
        (BUS, "StartServiceByName"): _Method("su", DbusPeer._running),
        (BUS, "GetId"): _Method("", DbusPeer._bus_id),
        (BUS, "NameHasOwner"): _Method("s", DbusPeer._name_has_owner),
        (BUS, "GetNameOwner"): _Method("s", DbusPeer._name_owner),
        (BUS, "ListQueuedOwners"): _Method("s", DbusPeer._queued_owners),
        (_PROPERTIES, "GetAll"): _Method("s", DbusPeer._all_properties),
        (SERVICE, "Save"): _Method("", DbusPeer._save),
        (SERVICE, "Load"): _Method("ay", DbusPeer._load),
    }
)
