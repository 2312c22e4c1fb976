"""The messages of oob_migration.v1, and how they and the plain data of the reference protocol become each other.

The messages are made when this is imported, out of the compiled .proto that `grpc_descriptor` holds. Generated code
would do the same, but protobuf ties it to the major version that it was generated with; a descriptor works with any.

Spec: proto/oob_migration/v1/oob_migration.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from vfiouser_agents.errors import ProtocolError
from vfiouser_agents.limits import MAX_ITEMS
from vfiouser_agents.operations import BY_WIRE
from vfiouser_agents.rpc.methods import CLOSE, FUNCTIONS, HELLO, OPEN, PING, WATCH

from .grpc_descriptor import FILE

PACKAGE = "oob_migration.v1"
SERVICE = f"{PACKAGE}.MigrationAgent"
#: Key of the trailing metadata with an `Error`.
ERROR_KEY = "oob-migration-error-bin"
_RANGE = "Range"


@dataclass(frozen=True, slots=True)
class _Field:
    """One field of a message, as far as conversion needs to know it."""

    name: str
    repeated: bool
    optional: bool
    message: str  # the message that it holds, or empty
    pairs: bool  # it is a map
    words: Mapping[str, int] | None  # an enum: our words


def _plans(file: FileDescriptorProto) -> dict[str, list[_Field]]:
    maps = {f".{PACKAGE}.{message.name}.{entry.name}" for message in file.message_type for entry in message.nested_type}
    enums = {f".{PACKAGE}.{enum.name}": _words(enum) for enum in file.enum_type}
    return {message.name: [_field(raw, maps, enums) for raw in message.field] for message in file.message_type}


def _words(enum: Any) -> dict[str, int]:
    # AGENT_STATE_RUNNING is our "running"; the prefix is that of the value 0, ..._UNSPECIFIED.
    prefix = enum.value[0].name.removesuffix("UNSPECIFIED")
    return {
        value.name.removeprefix(prefix).lower().replace("_", "-"): value.number for value in enum.value if value.number
    }


def _field(raw: FieldDescriptorProto, maps: set[str], enums: Mapping[str, dict[str, int]]) -> _Field:
    holds_message = raw.type == FieldDescriptorProto.TYPE_MESSAGE
    pairs = raw.type_name in maps
    return _Field(
        raw.name,
        repeated=raw.label == FieldDescriptorProto.LABEL_REPEATED,
        optional=raw.proto3_optional or holds_message,
        message=raw.type_name.rpartition(".")[2] if holds_message and not pairs else "",
        pairs=pairs,
        words=enums.get(raw.type_name),
    )


_FILE = FileDescriptorProto.FromString(FILE)
POOL = DescriptorPool()
POOL.AddSerializedFile(FILE)
_PLANS = _plans(_FILE)
#: Every message by its name without the package.
MESSAGES: Mapping[str, type[Message]] = {
    name: GetMessageClass(POOL.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _PLANS
}


@dataclass(frozen=True, slots=True)
class GrpcMethod:
    """One call.

    Args:
        path: on the wire.
        request: name of its message.
        response: name of its message.
    """

    path: str
    request: str
    response: str


def _methods() -> dict[str, GrpcMethod]:
    names = {
        HELLO: "Connect",
        PING: "Ping",
        FUNCTIONS: "Functions",
        OPEN: "Open",
        CLOSE: "CloseSession",
        WATCH: "Watch",
    }
    names |= {wire: "".join(word.title() for word in op.name.split("_")) for wire, op in BY_WIRE.items()}
    rows = {row.name: row for row in _FILE.service[0].method}
    return {
        ours: GrpcMethod(
            f"/{SERVICE}/{theirs}",
            rows[theirs].input_type.rpartition(".")[2],
            rows[theirs].output_type.rpartition(".")[2],
        )
        for ours, theirs in names.items()
    }


#: Every call by the name that it has in the reference protocol.
METHODS: Mapping[str, GrpcMethod] = _methods()


def pack(name: str, data: Mapping[str, Any] | None) -> Message:
    """Plain data as a message.

    Args:
        name: of the message.
        data: its fields; those that are missing or None are left out.

    Raises:
        ValueError: a value does not fit its field.
        TypeError: likewise.
    """
    message = MESSAGES[name]()
    for field in _PLANS[name]:
        value = None if data is None else data.get(field.name)
        if value is not None:
            _put(message, field, value)
    return message


def _put(message: Any, field: _Field, value: Any) -> None:
    if field.pairs:
        getattr(message, field.name).update(value)
    elif field.repeated:
        getattr(message, field.name).extend(_packer(field)(item) for item in value)
    elif field.message:
        getattr(message, field.name).CopyFrom(_packer(field)(value))
    else:
        setattr(message, field.name, _packer(field)(value))


def _packer(field: _Field) -> Callable[[Any], Any]:
    if field.words is not None:
        words = field.words
        return lambda value: words[value]
    if field.message == _RANGE:
        return lambda value: MESSAGES[_RANGE](iova=value[0], length=value[1])
    if field.message:
        return lambda value: pack(field.message, value)
    # protobuf takes bytes only, and pieces of state come as views of what was received.
    return lambda value: bytes(value) if isinstance(value, memoryview) else value


def unpack(name: str, message: Any) -> dict[str, Any]:
    """A message as plain data; what was not set, and has no default of its own, is missing.

    Args:
        name: of the message.
        message: the message.

    Raises:
        ProtocolError: it has a list of more entries than any has.
    """
    found: dict[str, Any] = {}
    for field in _PLANS[name]:
        if field.optional and not field.repeated and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.pairs:
            found[field.name] = dict(value)
        elif field.repeated:
            # Before they become objects of Python, which take many times their room in the message.
            if len(value) > MAX_ITEMS:
                raise ProtocolError(f"{field.name} has {len(value)} entries; at most {MAX_ITEMS} are allowed")
            found[field.name] = [_unpacked(field, item) for item in value]
        else:
            found[field.name] = _unpacked(field, value)
    return found


def _unpacked(field: _Field, value: Any) -> Any:
    if field.words is not None:
        # A value that a newer peer knows is a word that nobody knows, which reading the data refuses.
        return {number: word for word, number in field.words.items()}.get(value, f"number {value}") if value else None
    if field.message == _RANGE:
        return [value.iova, value.length]
    if field.message:
        return unpack(field.message, value)
    return value


__all__ = [
    "ERROR_KEY",
    "MESSAGES",
    "METHODS",
    "PACKAGE",
    "POOL",
    "SERVICE",
    "DecodeError",
    "GrpcMethod",
    "pack",
    "unpack",
]
