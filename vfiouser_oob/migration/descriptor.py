"""The descriptor record: what a function is, as its own daemon wrote it and another reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vfiouser_agents.api import Capabilities, Descriptor
from vfiouser_agents.errors import Incompatible, ProtocolError
from vfiouser_oob.migration.stream_format import DESCRIPTOR, RECORDS

_TEXTS = ("format_id", "vendor", "model", "kind", "firmware")
_NUMBERS = ("format_version", "state_max")
_MAX_FINGERPRINT = 1024
#: Bytes of an encoded descriptor.
_MOST = RECORDS[DESCRIPTOR].most


def encode_descriptor(descriptor: Descriptor) -> bytes:
    """Return a descriptor as the stream carries it.

    Args:
        descriptor: as the source's agent gave it.

    Raises:
        ProtocolError: no destination would take it.
    """
    encoded, size = b"", sum(len(text) for text in _texts(descriptor))
    entries = len(descriptor.fingerprint)
    if entries <= _MAX_FINGERPRINT and size <= _MOST:  # before it costs anything to write it
        fields = asdict(descriptor)
        fields["fingerprint"] = dict(sorted(descriptor.fingerprint.items()))
        encoded = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        size = len(encoded)
    del descriptor  # which may be large, and would live as long as the error does
    if entries > _MAX_FINGERPRINT or size > _MOST:
        raise ProtocolError(
            f"the agent's descriptor has {entries} entries of a fingerprint and {size} bytes or more; "
            f"{_MAX_FINGERPRINT} and {_MOST} are allowed, so the function cannot be migrated"
        )
    return encoded


def _texts(descriptor: Descriptor) -> Iterator[str]:
    yield from (getattr(descriptor, name) for name in _TEXTS)
    for pair in descriptor.fingerprint.items():
        yield from pair


def decode_descriptor(payload: bytes) -> Descriptor:
    """Read a descriptor that came in a stream, and is not trusted.

    Args:
        payload: the record's payload.

    Raises:
        Incompatible: it is no descriptor.
    """
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Incompatible([f"the source's descriptor is no JSON: {error}"]) from None
    if not isinstance(fields, dict) or not _is_descriptor(fields):
        raise Incompatible(["the source's descriptor lacks what one must have, or has it in another form"])
    known = {name: fields[name] for name in (*_TEXTS, *_NUMBERS, "fingerprint")}
    return Descriptor(**known)


def _is_descriptor(fields: dict[str, Any]) -> bool:
    fingerprint = fields.get("fingerprint")
    return (
        all(isinstance(fields.get(name), str) for name in _TEXTS)
        and all(type(fields.get(name)) is int and fields[name] >= 0 for name in _NUMBERS)
        and isinstance(fingerprint, dict)
        and len(fingerprint) <= _MAX_FINGERPRINT
        and all(isinstance(value, str) for value in fingerprint.values())
    )


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
