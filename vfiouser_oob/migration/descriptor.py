"""The descriptor record: what a function is, as its own daemon wrote it and another reads it."""

from __future__ import annotations

import json
from dataclasses import fields

from vfiouser_agents.api import Capabilities, Descriptor
from vfiouser_agents.errors import Incompatible, ProtocolError
from vfiouser_agents.rpc.wire import WireError, from_wire, to_wire
from vfiouser_oob.migration.stream_format import DESCRIPTOR, RECORDS

#: Bytes of an encoded descriptor.
_MOST = RECORDS[DESCRIPTOR].most


def encode_descriptor(descriptor: Descriptor) -> bytes:
    """Return a descriptor as the stream carries it.

    Args:
        descriptor: as the source's agent gave it.

    Raises:
        ProtocolError: no destination would take it.
    """
    encoded, refusal = b"", _refusal(descriptor)
    if not refusal:  # before it costs anything to write it
        encoded = json.dumps(to_wire(descriptor), sort_keys=True, separators=(",", ":")).encode()
        if len(encoded) > _MOST:
            refusal = f"it has {len(encoded)} bytes; allowed are {_MOST}"
    del descriptor  # which may be large, and would live as long as the error does
    if refusal:
        raise ProtocolError(f"the agent's descriptor cannot be sent: {refusal}, so the function cannot be migrated")
    return encoded


def _refusal(descriptor: Descriptor) -> str:
    """Why a destination would not take a descriptor; empty if it would."""
    try:
        from_wire(Descriptor, to_wire(descriptor), "descriptor")
    except WireError as error:
        return str(error)
    return ""


def decode_descriptor(payload: bytes) -> Descriptor:
    """Read a descriptor that came in a stream, and is not trusted.

    Args:
        payload: the record's payload.

    Raises:
        Incompatible: it is no descriptor.
    """
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Incompatible([f"the source's descriptor is not JSON: {error}"]) from None
    try:
        descriptor: Descriptor = from_wire(Descriptor, document, "descriptor")
    except WireError as error:
        raise Incompatible([f"the source's descriptor cannot be used: {error}"]) from None
    # What an agent may leave out, a daemon writes.
    missing = {field.name for field in fields(Descriptor)} - document.keys()
    if missing:
        raise Incompatible([f"the source's descriptor lacks {', '.join(sorted(missing))}"])
    return descriptor


def require_similar(theirs: Descriptor, ours: Descriptor, caps: Capabilities) -> None:
    """Refuse at once what no agent would take; the verdict about the rest is the agent's.

    Args:
        theirs: of the source.
        ours: of this function.
        caps: of this function's agent.

    Raises:
        Incompatible: with reasons that name both sides.
    """
    reasons = [
        f"{name}: the source has {getattr(theirs, name)!r}, this function {getattr(ours, name)!r}"
        for name in ("kind", "vendor")
        if getattr(theirs, name) != getattr(ours, name)
    ]
    formats = caps.formats or (ours.format_id,)
    if theirs.format_id not in formats:
        reasons.append(
            f"format: the source has {theirs.format_id!r}, this function takes {', '.join(formats)}; "
            "between adapters of different kinds, give both agents the same descriptor.format_id"
        )
    if reasons:
        raise Incompatible(reasons)
