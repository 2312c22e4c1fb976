"""Payloads to bytes and back, for both roles.

`encode` and `decode` know every class of `messages`, through the codec that was derived from its declaration or, where
there is none, through construct itself. Decoding is *syntax only*: it refuses a payload that is too short or
contradicts itself. The models (`dma`, `irq`, `regions`) and `rules` judge what the values mean for a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import error as struct_error
from types import MappingProxyType
from typing import TypeVar

from construct import ConstructError

from vfiouser_protocol.codec_declared import build_declared, parse_declared
from vfiouser_protocol.codec_derived import Twin, derive
from vfiouser_protocol.commands import COMMANDS
from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.fields import Payload, phrase
from vfiouser_protocol.header import Header, command_name, errno_text
from vfiouser_protocol.messages import (
    DirtyPages,
    DmaReadReply,
    DmaWrite,
    Empty,
    FeatureDeviceState,
    FeatureLoggingReport,
    FeatureLoggingStart,
    FeatureMigration,
    NarrowDmaReadReply,
    NarrowDmaWrite,
)

P = TypeVar("P", bound=Payload)

#: What some clients send in place of the payload that a command has.
VARIANTS: Mapping[type[Payload], type[Payload]] = MappingProxyType(
    {DmaReadReply: NarrowDmaReadReply, DmaWrite: NarrowDmaWrite}
)
#: Every payload: those of the commands, and those that DEVICE_FEATURE carries.
PAYLOADS: frozenset[type[Payload]] = frozenset(
    {payload for spec in COMMANDS.values() for payload in (spec.request, spec.reply)}
    | {FeatureMigration, FeatureDeviceState, FeatureLoggingStart, FeatureLoggingReport}
    | set(VARIANTS.values())
)
#: The derived codec of each payload that has one.
TWINS: Mapping[type[Payload], Twin] = MappingProxyType(
    {cls: twin for cls in PAYLOADS if (twin := derive(cls)) is not None}
)
_encoder_of = {cls: twin.encode for cls, twin in TWINS.items()}.get
_decoder_of = {cls: twin.decode for cls, twin in TWINS.items()}.get
#: What struct and construct raise for values or bytes that do not fit. OverflowError: a 64-bit count used as
#: a length.
_MISFITS = (struct_error, ConstructError, ValueError, OverflowError, TypeError)


def encode(message: Payload) -> bytes:
    """Return a payload's bytes.

    Args:
        message: one of the classes of `messages`.

    Returns:
        The bytes behind the header.

    Raises:
        LocalProtocolError: a value does not fit its field, or a count contradicts the data.
    """
    encoder = _encoder_of(type(message))
    try:
        return build_declared(message) if encoder is None else encoder(message)
    except _MISFITS as exc:
        raise LocalProtocolError(f"{type(message).__name__} does not fit its layout ({exc}); not sent") from exc


def decode(cls: type[P], payload: bytes) -> P:
    """Return the message in a payload.

    Surplus bytes are ignored where every implementation ignores them, and refused where a count says how many
    bytes there must be (region and DMA data, REGION_WRITE_MULTI).

    Args:
        cls: what the payload should be.
        payload: the bytes behind the header.

    Returns:
        The message.

    Raises:
        CommandError: EINVAL, the payload is too short or contradicts itself.
    """
    decoder = _decoder_of(cls)
    try:
        if decoder is None:
            return parse_declared(cls, payload)
        return decoder(payload)  # type: ignore[no-any-return]
    except _MISFITS as exc:
        raise CommandError(
            f"{len(payload)} bytes are not a {cls.__name__} ({_first_line(exc)}); refused with EINVAL"
        ) from exc


def _first_line(exc: Exception) -> str:
    """The point of a construct error stands in its last line, behind the path."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[-1]


# --- For people ---


def describe(header: Header, payload: bytes, nfds: int, direction: str) -> str:
    """Return a message as one line for debug logs; never raises, whatever the peer sent.

    Args:
        header: the message's header.
        payload: the bytes behind it.
        nfds: number of file descriptors that are attached.
        direction: ``<`` for received, ``>`` for sent, or any other mark.

    Returns:
        For example ``< DMA_MAP #17 iova=0xc0000+0x10000 rw- fds=1``; data is counted, and shown where it is
        that of a register.
    """
    words = [direction, command_name(header.command), f"#{header.msg_id}"]
    if header.is_reply:
        words.append("reply")
    elif not header.is_command:
        words.append(f"type={header.type}")
    if header.no_reply:
        words.append("no-reply")
    if header.is_error:
        words.append(errno_text(header.error))
    else:
        words.append(_describe_payload(header, payload))
    if nfds:
        words.append(f"fds={nfds}")
    return " ".join(filter(None, words))


def _describe_payload(header: Header, payload: bytes) -> str:
    spec = COMMANDS.get(header.command)
    if spec is None or not (header.is_command or header.is_reply):
        return f"payload={len(payload)}"
    cls = spec.reply if header.is_reply else spec.request
    if header.is_reply and cls is DirtyPages and not payload:
        cls = Empty
    for layout in filter(None, (cls, VARIANTS.get(cls))):
        try:
            return phrase(decode(layout, payload))
        except CommandError:
            pass
    return f"malformed payload={len(payload)}"
