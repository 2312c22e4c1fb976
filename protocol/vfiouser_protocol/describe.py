"""Phrases for the payloads, as debug logs show them: addresses in hex, flags as letters, data counted, not
shown.

`codec.describe` puts them together with the header into one line per message.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Mapping
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Any

from vfiouser_protocol import constants as c
from vfiouser_protocol import messages as m

#: Version data is text and short; more than this of it is not shown.
MAX_TEXT = 300


def errno_text(errno: int) -> str:
    """Return the name of an error number, or the number.

    Args:
        errno: any number; 0 is legal in an error reply.
    """
    return _errno.errorcode.get(errno, f"errno={errno}")


def letters(flags: int, alphabet: str) -> str:
    """Return flags as letters, one per bit from bit 0, with ``-`` for a clear bit and unknown bits in hex.

    Args:
        flags: the bits.
        alphabet: the letter of each bit.
    """
    text = "".join(letter if flags >> bit & 1 else "-" for bit, letter in enumerate(alphabet))
    unknown = flags >> len(alphabet) << len(alphabet)
    return f"{text}+{unknown:#x}" if unknown else text


def flag_names(flags: int, kind: type[IntFlag]) -> str:
    """Return the names of the bits that are set, unknown ones in hex.

    Args:
        flags: the bits.
        kind: the flags' enumeration.
    """
    names = [member.name or "" for member in kind if flags & member]
    known = sum(member for member in kind if flags & member)
    if flags & ~known:
        names.append(f"{flags & ~known:#x}")
    return "|".join(names) or "0"


def member_name(value: int, kind: type[IntEnum]) -> str:
    """Return the name of a number, or the number.

    Args:
        value: any number.
        kind: the numbers' enumeration.
    """
    return kind(value).name if value in kind._value2member_map_ else str(value)


def _version(message: m.Version) -> str:
    text = message.data.rstrip(b"\0").decode("utf-8", "replace")
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
    # One line stays one line, whatever the peer put into its text.
    return f"{message.major}.{message.minor} {shown!a}" if text else f"{message.major}.{message.minor}"


def _dma_map(message: m.DmaMap) -> str:
    window = f"iova={message.address:#x}+{message.size:#x}"
    flags = letters(message.flags, "rwm" if message.flags < 8 else "rwmf")
    return f"{window} {flags} offset={message.offset:#x}" if message.offset else f"{window} {flags}"


def _dma_unmap(message: m.DmaUnmap) -> str:
    text = f"iova={message.address:#x}+{message.size:#x}"
    if message.flags:
        text += f" {flag_names(message.flags, c.DmaUnmapFlags)}"
    return text if message.bitmap_size is None else f"{text} bitmap={message.bitmap_size}"


def _device_info(message: m.DeviceInfo) -> str:
    if not message.num_regions:
        return f"argsz={message.argsz}"
    flags = flag_names(message.flags, c.DeviceInfoFlags)
    return f"{flags} regions={message.num_regions} irqs={message.num_irqs}"


def _region(index: int) -> str:
    return f"region={member_name(index, c.RegionIndex)}"


def _region_info(message: m.RegionInfo) -> str:
    text = f"{_region(message.index)} argsz={message.argsz}"
    if not message.flags and not message.size:
        return text
    return f"{text} size={message.size:#x} {letters(message.flags, 'rwmc')} caps={len(message.capabilities)}"


def _irq_info(message: m.IrqInfo) -> str:
    text = f"irq={member_name(message.index, c.IrqIndex)}"
    if not message.flags and not message.count:
        return text
    return f"{text} count={message.count} {flag_names(message.flags, c.IrqInfoFlags)}"


def _set_irqs(message: m.SetIrqs) -> str:
    vectors = f"[{message.start}+{message.count}]"
    flags = flag_names(message.flags, c.IrqSetFlags)
    return f"irq={member_name(message.index, c.IrqIndex)}{vectors} {flags}"


def _access(message: Any) -> str:
    return f"{_region(message.region)} +{message.offset:#x} count={message.count}"


def _dma(message: Any) -> str:
    return f"iova={message.address:#x} count={message.count}"


def _dirty_pages(message: m.DirtyPages) -> str:
    text = flag_names(message.flags, c.DirtyPagesFlags)
    return text if message.iova is None else f"{text} iova={message.iova:#x}+{message.size:#x}"


def _feature(message: m.DeviceFeature) -> str:
    operations = flag_names(message.flags & ~0xFFFF, c.FeatureFlags)
    return f"{operations} {member_name(message.index, c.Feature)} data={len(message.data)}"


#: The phrase of each payload that a message can have.
PHRASES: Mapping[type[m.Payload], Callable[[Any], str]] = MappingProxyType(
    {
        m.Version: _version,
        m.Empty: lambda message: "",
        m.DmaMap: _dma_map,
        m.DmaUnmap: _dma_unmap,
        m.DeviceInfo: _device_info,
        m.RegionInfo: _region_info,
        m.RegionIoFds: lambda message: f"{_region(message.index)} count={message.count}",
        m.IrqInfo: _irq_info,
        m.SetIrqs: _set_irqs,
        m.RegionRead: _access,
        m.RegionReadReply: _access,
        m.RegionWrite: _access,
        m.RegionWriteReply: _access,
        m.RegionWriteMulti: lambda message: f"writes={len(message.writes)}",
        m.RegionWriteMultiReply: lambda message: f"done={message.wr_cnt}",
        m.DmaRead: _dma,
        m.DmaReadReply: _dma,
        m.DmaWrite: _dma,
        m.DmaWriteReply: _dma,
        m.DirtyPages: _dirty_pages,
        m.DeviceFeature: _feature,
        m.MigDataRead: lambda message: f"size={message.size}",
        m.MigDataReadReply: lambda message: f"size={message.size}",
        m.MigDataWrite: lambda message: f"size={message.size}",
    }
)
