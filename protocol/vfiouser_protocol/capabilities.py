"""VERSION: what each side can do, and what the two agree on.

A stranger wrote the JSON in VERSION. Types are as strict as in libvfio-user and QEMU: an integer
is an integer (neither 8.0 nor "8" nor true), a boolean is a boolean. Unknown members are ignored, of a member
that occurs twice the last one counts (both as json-c does), and text behind the first complete value is
ignored. Whatever else is wrong ends the connection: there is no other moment to tell the peer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from vfiouser_protocol.codec import decode, encode
from vfiouser_protocol.constants import PROTOCOL_MAJOR, PROTOCOL_MINOR
from vfiouser_protocol.errors import CommandError, StreamError
from vfiouser_protocol.limits import (
    DEFAULT_MAX_BITMAP_SIZE,
    DEFAULT_MAX_DATA_XFER_SIZE,
    DEFAULT_MAX_DMA_MAPS,
    DEFAULT_MAX_MSG_FDS,
    DEFAULT_PGSIZES,
    MAX_VERSION_DATA,
)
from vfiouser_protocol.messages import Version

#: libvfio-user refuses a client that says more.
MAX_MAX_MSG_FDS = 1024
#: Smallest page of any host that vfio-user runs on; a finer dirty bitmap would only cost memory.
MIN_MIGRATION_PGSIZE = 4096
#: Sizes and masks are 64-bit numbers on every implementation.
_U64_MAX = (1 << 64) - 1


class TwinSocket(NamedTuple):
    """Capability `twin_socket`: a second socket for the commands of the server.

    Args:
        supported: wanted (request), granted (reply).
        fd_index: which of the reply's file descriptors it is; in a granting reply only.
    """

    supported: bool
    fd_index: int | None = None


class MigrationCapability(NamedTuple):
    """Capability `migration`.

    Args:
        pgsize: bytes per bit of a dirty bitmap; the smaller of both sides' is used. 0 means not said.
        max_bitmap_size: largest dirty bitmap in bytes.
    """

    pgsize: int = DEFAULT_PGSIZES
    max_bitmap_size: int = DEFAULT_MAX_BITMAP_SIZE


class VersionCapabilities(NamedTuple):
    """What one side announces about itself; the defaults are what silence means.

    Args:
        max_msg_fds: file descriptors it can receive per message.
        max_data_xfer_size: data bytes it takes per transfer. 0 is possible: no transfer at all.
        max_dma_maps: simultaneously valid DMA windows.
        pgsizes: page sizes of DMA windows, one bit per power of two.
        write_multiple: whether it knows REGION_WRITE_MULTI.
        twin_socket: see `TwinSocket`; None when not mentioned.
        migration: see `MigrationCapability`; None when not mentioned.

    Spec: vfio-user, VFIO_USER_VERSION, "Capabilities".
    """

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES
    write_multiple: bool = False
    twin_socket: TwinSocket | None = None
    migration: MigrationCapability | None = None


class VersionData(NamedTuple):
    """A parsed VERSION payload.

    Args:
        major: protocol major, always 0.
        minor: protocol minor.
        capabilities: what the sender announces, silence filled with defaults.
        present: the members that were really there, nested ones dotted (``migration.pgsize``).
    """

    major: int
    minor: int
    capabilities: VersionCapabilities
    present: frozenset[str]


class Negotiated(NamedTuple):
    """What the two sides agreed on.

    Args:
        minor: protocol minor in use.
        reply_payload: the VERSION reply's payload.
        client: what the client takes, and so limits what the server may send. `max_data_xfer_size` is never
            more
            than the server's own.
        server: what the server takes, and so limits what the client may send.
        twin: whether the server's commands go over a twin socket.
        write_multiple: whether REGION_WRITE_MULTI is usable.
        migration_pgsize: bytes per bit of dirty bitmaps, None when not both mentioned migration.
    """

    minor: int
    reply_payload: bytes
    client: VersionCapabilities
    server: VersionCapabilities
    twin: bool
    write_multiple: bool
    migration_pgsize: int | None


# --- Reading ---


def parse_version_request(payload: bytes) -> VersionData:
    """Return what a client proposes.

    Args:
        payload: the VERSION command's payload.

    Raises:
        StreamError: EINVAL; the payload, its JSON or a value is impossible, and the connection ends.

    Spec: vfio-user, VFIO_USER_VERSION.
    """
    return _parse_version(payload, is_reply=False)


def parse_version_reply(payload: bytes) -> VersionData:
    """Return what a server answers.

    Args:
        payload: the VERSION reply's payload.

    Raises:
        StreamError: EINVAL; the payload, its JSON or a value is impossible, and the connection ends.

    Spec: vfio-user, VFIO_USER_VERSION.
    """
    return _parse_version(payload, is_reply=True)


def _parse_version(payload: bytes, *, is_reply: bool) -> VersionData:
    try:
        version = decode(Version, payload)
    except CommandError as exc:
        raise StreamError(f"VERSION needs 4 bytes, got {len(payload)}; the connection ends") from exc
    if version.major != PROTOCOL_MAJOR:
        raise _refusal(f"major version is {version.major}, only {PROTOCOL_MAJOR} exists")
    members = _load_capabilities(version.data) if version.data else {}
    known = {name: check(members[name], name) for name, check in _CHECKS.items() if name in members}
    nested = {f"{name}.{inner}" for name in ("migration", "twin_socket") if name in known for inner in members[name]}
    capabilities = VersionCapabilities(**known)
    twin = capabilities.twin_socket
    if is_reply:
        if twin is not None and twin.supported and twin.fd_index is None:
            raise _refusal("twin_socket is granted without an fd_index")
    elif twin is not None:
        # An fd_index has no meaning in a request.
        capabilities = capabilities._replace(twin_socket=TwinSocket(twin.supported))
    return VersionData(version.major, version.minor, capabilities, frozenset(known) | nested)


def _load_capabilities(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_VERSION_DATA:
        raise _refusal(f"version data has {len(data)} bytes, at most {MAX_VERSION_DATA} are read")
    if not data.endswith(b"\0"):
        raise _refusal("version data does not end with a NUL")
    try:
        text = data[: data.index(b"\0")].decode("utf-8").lstrip(" \t\r\n")
        value, _end = _DECODER.raw_decode(text)
    # ValueError covers bad UTF-8, bad JSON and numbers of thousands of digits; RecursionError deep nesting.
    except (ValueError, RecursionError) as exc:
        raise _refusal(f"version data is not JSON ({type(exc).__name__})") from exc
    if not isinstance(value, dict):
        raise _refusal(f"version data is a JSON {type(value).__name__}, it must be an object")
    return _object(value.get("capabilities", {}), "capabilities")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _refusal(message: str) -> StreamError:
    return StreamError(f"VERSION refused: {message}; the connection ends")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(f"{name} is a JSON {type(value).__name__}, it must be an object")
    return value


def _number(value: Any, name: str, maximum: int = _U64_MAX) -> int:
    # In Python true is an int; on the wire it is not.
    if type(value) is not int or not 0 <= value <= maximum:
        shown = value if type(value) is int and value.bit_length() <= 64 else type(value).__name__
        raise _refusal(f"{name} is {shown}, it must be an integer from 0 to {maximum}")
    return value


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _refusal(f"{name} is a JSON {type(value).__name__}, it must be true or false")
    return value


def _pgsizes(value: Any, name: str) -> int:
    if not _number(value, name):
        raise _refusal("pgsizes is 0; at least one page size is needed")
    return int(value)


def _twin_socket(value: Any, name: str) -> TwinSocket:
    members = _object(value, name)
    supported = _boolean(members.get("supported", False), "twin_socket.supported")
    if "fd_index" not in members:
        return TwinSocket(supported)
    return TwinSocket(supported, _number(members["fd_index"], "twin_socket.fd_index", MAX_MAX_MSG_FDS))


def _migration(value: Any, name: str) -> MigrationCapability:
    members = _object(value, name)
    # 0 is taken as if pgsize were not there, as libvfio-user does.
    pgsize = _number(members.get("pgsize", 0), "migration.pgsize")
    if pgsize and (pgsize < MIN_MIGRATION_PGSIZE or pgsize & (pgsize - 1)):
        raise _refusal(f"migration.pgsize is {pgsize}, it must be a power of two of at least {MIN_MIGRATION_PGSIZE}")
    bitmap = members.get("max_bitmap_size", DEFAULT_MAX_BITMAP_SIZE)
    return MigrationCapability(pgsize, _number(bitmap, "migration.max_bitmap_size"))


_CHECKS: Mapping[str, Callable[[Any, str], Any]] = MappingProxyType(
    {
        "max_msg_fds": lambda value, name: _number(value, name, MAX_MAX_MSG_FDS),
        "max_data_xfer_size": _number,
        "max_dma_maps": _number,
        "pgsizes": _pgsizes,
        "write_multiple": _boolean,
        "twin_socket": _twin_socket,
        "migration": _migration,
    }
)


# --- Writing ---


def encode_version(capabilities: Mapping[str, Any] | VersionCapabilities, minor: int = PROTOCOL_MINOR) -> bytes:
    """Return a VERSION payload.

    Args:
        capabilities: the members of the JSON object; of `VersionCapabilities`, all that is not None.
        minor: protocol minor.

    Returns:
        Version numbers, compact JSON and its NUL.
    """
    if isinstance(capabilities, VersionCapabilities):
        capabilities = capability_members(capabilities)
    text = json.dumps({"capabilities": dict(capabilities)}, separators=(",", ":"))
    return encode(Version(PROTOCOL_MAJOR, minor, text.encode("ascii") + b"\0"))


def capability_members(capabilities: VersionCapabilities) -> dict[str, Any]:
    """Return capabilities as the members of the JSON object.

    Args:
        capabilities: what is announced; None is left out, as is a `write_multiple` of false.

    Returns:
        A JSON-ready dict.
    """
    members: dict[str, Any] = {}
    for name, value in capabilities._asdict().items():
        if isinstance(value, tuple):
            nested = value._asdict()  # type: ignore[attr-defined]
            members[name] = {inner: item for inner, item in nested.items() if item is not None}
        elif value is not None and value is not False:
            members[name] = value
    return members


#: What a reply gives up first when it would be longer than the request. What equals its default goes before
#: all these, because nothing is lost with it.
_DROP_ORDER = (
    "pgsizes",
    "max_dma_maps",
    "write_multiple",
    "migration.max_bitmap_size",
    "max_msg_fds",
    "migration",
    "twin_socket",
    "max_data_xfer_size",
)


def negotiate(
    request: VersionData, offer: VersionCapabilities, *, request_payload_size: int, grant_twin: bool = False
) -> Negotiated:
    """Settle, on the server, what holds on this connection.

    The reply names only what the client named, with the server's values, and is never longer than the
    request, because QEMU receives it into a buffer of that size; members are given up for that. Only a
    request with hardly any JSON gets a longer reply, since the empty ``{"capabilities":{}}`` is what the
    rust-vmm client cannot do without.

    Args:
        request: the client's proposal.
        offer: the server's own capabilities; `twin_socket` in it has no meaning.
        request_payload_size: bytes of the request's payload.
        grant_twin: whether a twin socket is granted if it was asked for; its descriptor is number 0 of the
            reply.

    Returns:
        The agreement.

    Spec: vfio-user, VFIO_USER_VERSION.
    """
    theirs = request.capabilities
    wants_twin = theirs.twin_socket is not None and theirs.twin_socket.supported
    twin = TwinSocket(True, 0) if grant_twin and wants_twin and theirs.max_msg_fds > 0 else None
    pgsize = _common_pgsize(theirs, offer)
    migration = None
    if pgsize is not None and offer.migration is not None:
        migration = offer.migration._replace(pgsize=pgsize)
    answer = offer._replace(
        twin_socket=twin, migration=migration, write_multiple=theirs.write_multiple and offer.write_multiple
    )
    members = {name: value for name, value in capability_members(answer).items() if name in request.present}
    if "migration.max_bitmap_size" not in request.present:
        members.get("migration", {}).pop("max_bitmap_size", None)
    minor = min(request.minor, PROTOCOL_MINOR)
    payload = _fitting_reply(members, minor, request_payload_size)
    # What did not fit into the reply is not agreed on.
    twin_kept, multi_kept, migration_kept = (name in members for name in ("twin_socket", "write_multiple", "migration"))
    return Negotiated(
        minor=minor,
        reply_payload=payload,
        client=_effective(theirs, offer),
        server=answer._replace(
            write_multiple=multi_kept,
            twin_socket=twin if twin_kept else None,
            migration=migration if migration_kept else None,
        ),
        twin=twin_kept,
        write_multiple=multi_kept,
        migration_pgsize=pgsize if migration_kept else None,
    )


def _common_pgsize(one: VersionCapabilities, other: VersionCapabilities) -> int | None:
    """The smaller page size of two that mention migration; the default if neither says one."""
    if one.migration is None or other.migration is None:
        return None
    said = [pgsize for pgsize in (one.migration.pgsize, other.migration.pgsize) if pgsize]
    return min(said, default=DEFAULT_PGSIZES)


def _fitting_reply(members: dict[str, Any], minor: int, size: int) -> bytes:
    """Encode, removing members until the reply fits; `members` is left with what is in it."""
    defaults = capability_members(VersionCapabilities())
    at_default = [name for name, value in members.items() if defaults.get(name) == value]
    for name in (*at_default, *_DROP_ORDER):
        payload = encode_version(members, minor)
        if len(payload) <= size:
            return payload
        outer, _dot, inner = name.partition(".")
        if not inner:
            members.pop(outer, None)
        elif outer in members:
            members[outer].pop(inner, None)
    return encode_version(members, minor)


def _effective(theirs: VersionCapabilities, ours: VersionCapabilities) -> VersionCapabilities:
    """What may be sent to the peer: no transfer larger than it takes, nor than we would take ourselves."""
    size = min(theirs.max_data_xfer_size, ours.max_data_xfer_size)
    return theirs._replace(max_data_xfer_size=size)


def accept_reply(proposal: VersionData, reply_payload: bytes, nfds: int) -> Negotiated:
    """Settle, on the client, what the server's answer means.

    Args:
        proposal: what this client proposed.
        reply_payload: the VERSION reply's payload.
        nfds: file descriptors that came with it.

    Returns:
        The agreement.

    Raises:
        StreamError: the answer is impossible or contradicts the proposal, and the connection ends.

    Spec: vfio-user, VFIO_USER_VERSION.
    """
    reply = parse_version_reply(reply_payload)
    ours, theirs = proposal.capabilities, reply.capabilities
    if reply.minor > proposal.minor:
        raise _refusal(f"minor version is {reply.minor}, proposed was {proposal.minor}")
    twin = theirs.twin_socket is not None and theirs.twin_socket.supported
    if twin:
        if ours.twin_socket is None or not ours.twin_socket.supported:
            raise _refusal("twin_socket is granted but was not asked for")
        index = theirs.twin_socket.fd_index if theirs.twin_socket else None
        if index is None or index >= nfds:
            raise _refusal(f"twin_socket is descriptor {index}, {nfds} came")
    write_multiple = ours.write_multiple and theirs.write_multiple
    return Negotiated(
        minor=reply.minor,
        reply_payload=reply_payload,
        client=ours,
        server=_effective(theirs, ours)._replace(write_multiple=write_multiple),
        twin=twin,
        write_multiple=write_multiple,
        migration_pgsize=_common_pgsize(ours, theirs),
    )
