"""What the server and its device have: found out through the socket before the first case."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from vfiouser_oob.conformance import wire
from vfiouser_oob.conformance.case import CaseFailed, NotApplicable, check
from vfiouser_oob.conformance.link import Link
from vfiouser_protocol.constants import (
    REGION_SUBTYPE_MIGRATION,
    REGION_TYPE_MIGRATION,
    Command,
    DeviceInfoFlags,
    MigrationFlags,
    RegionCapId,
    RegionFlags,
    RegionIndex,
)

_REGIONS_MAX = 100
_IRQS_MAX = 50
_ARGSZ_MAX = 1 << 20
#: Places in config space that hold what a driver writes: the interrupt line, and the addresses of BARs.
_LINE = 0x3C
_BAR0, _BARS = 0x10, 6


@dataclass(frozen=True, slots=True)
class Region:
    """One region.

    Args:
        index: its index.
        size: in bytes; 0 = not implemented.
        flags: RegionFlags.
        offset: of the region in its file.
        argsz: payload size of the full region info.
        areas: (offset, size) of the mappable areas.
        kind: (type, subtype) of its TYPE capability, if any.
    """

    index: int
    size: int
    flags: int
    offset: int
    argsz: int
    areas: tuple[tuple[int, int], ...] = ()
    kind: tuple[int, int] | None = None

    @property
    def mappable(self) -> bool:
        """Whether it, or a part of it, may be mapped."""
        return bool(self.flags & RegionFlags.MMAP)


@dataclass(slots=True)
class Facts:
    """What was found.

    Args:
        capabilities: of the VERSION reply.
        minor: of the VERSION reply.
        resettable: whether DEVICE_RESET is supported.
        regions: by index.
        irqs: (flags, count) by index.
        config: config space as it was found.
        scratch: offset and width of a place in config space that holds what is written to it, if one was found.
        migration: flags of the v2 migration feature; None = not offered.
        v1_region: index of the v1 migration region; None = not offered.
        logging: whether DMA logging (v2) is offered.
        problems: what could not be found out, and why.
    """

    capabilities: dict[str, Any] = field(default_factory=dict)
    minor: int = 0
    resettable: bool = False
    regions: list[Region] = field(default_factory=list)
    irqs: list[tuple[int, int]] = field(default_factory=list)
    config: bytes = b""
    scratch: tuple[int, int] | None = None
    migration: int | None = None
    v1_region: int | None = None
    logging: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def transfer(self) -> int:
        """Largest transfer that the server takes, in bytes."""
        value = self.capabilities.get("max_data_xfer_size")
        return value if isinstance(value, int) and value > 0 else wire.DEFAULT_TRANSFER

    @property
    def writes_multi(self) -> bool:
        """Whether REGION_WRITE_MULTI was agreed."""
        return self.capabilities.get("write_multiple") is True

    @property
    def pre_copy(self) -> bool:
        """Whether the v2 migration has the PRE_COPY state."""
        return bool((self.migration or 0) & MigrationFlags.PRE_COPY)

    def region(self, index: int) -> Region:
        """A region that exists.

        Raises:
            NotApplicable: the device does not have it.
        """
        if index >= len(self.regions) or not self.regions[index].size:
            raise NotApplicable(f"the device has no region {index}")
        return self.regions[index]

    def irq_count(self, index: int) -> int:
        """Vectors of an IRQ index."""
        return self.irqs[index][1] if index < len(self.irqs) else 0

    def vectors(self, least: int = 1) -> tuple[int, int]:
        """An IRQ index with at least so many vectors, MSI-X first, and its count.

        Raises:
            NotApplicable: there is none.
        """
        for index in (2, 1, 0):
            if self.irq_count(index) >= least:
                return index, self.irq_count(index)
        raise NotApplicable(f"the device has no IRQ index with {least} vectors")

    def empty_region(self) -> int:
        """The index of a region that is not implemented."""
        for region in self.regions:
            if not region.size and region.index != RegionIndex.CONFIG:
                return region.index
        raise NotApplicable("every region of the device is implemented")

    def migratable(self) -> int:
        """Flags of the v2 migration."""
        if self.migration is None:
            raise NotApplicable("the server offers no migration by DEVICE_FEATURE")
        return self.migration


def parse_capabilities(payload: bytes) -> dict[str, Any]:
    """The capabilities of a VERSION reply.

    Raises:
        CaseFailed: it is not NUL-terminated JSON of the documented form.
    """
    if len(payload) <= 4:
        return {}
    check(payload[-1] == 0, "the version data of the VERSION reply does not end with a NUL byte")
    try:
        data = json.loads(payload[4:-1])
    except ValueError as error:
        raise CaseFailed(f"the version data is not JSON: {error}: {payload[4:]!r}") from None
    check(isinstance(data, dict), f"the version data is not an object: {data!r}")
    found = data.get("capabilities", {})
    check(isinstance(found, dict), f"capabilities is not an object: {found!r}")
    return dict(found)


def discover(link: Link, version: wire.Message) -> Facts:
    """Ask a fresh, negotiated connection for everything; what fails is noted, not raised.

    Args:
        link: the connection.
        version: its VERSION reply.
    """
    facts = Facts()

    @contextlib.contextmanager
    def noting(what: str) -> Any:
        try:
            yield
        except (CaseFailed, struct.error) as error:
            facts.problems.append(f"{what}: {error}")

    with noting("VERSION"):
        facts.capabilities = parse_capabilities(version.payload)
        facts.minor = struct.unpack_from("<HH", version.payload)[1]
    regions = irqs = 0
    with noting("GET_INFO"):
        payload = link.ok(Command.DEVICE_GET_INFO, wire.info()).payload
        _, flags, regions, irqs = wire.INFO.unpack_from(payload)
        facts.resettable = bool(flags & DeviceInfoFlags.RESET)
    for index in range(min(regions, _REGIONS_MAX)):
        region = Region(index, 0, 0, 0, 32)
        with noting(f"GET_REGION_INFO {index}"):
            region = read_region(link, index)
        facts.regions.append(region)
        if region.kind == (REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION):
            facts.v1_region = index
    for index in range(min(irqs, _IRQS_MAX)):
        with noting(f"GET_IRQ_INFO {index}"):
            _, flags, _, count = wire.INFO.unpack_from(
                link.ok(Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, index)).payload
            )
            facts.irqs.append((flags, count))
    with noting("config space"):
        _read_config(link, facts)
    with noting("DEVICE_FEATURE"):
        _find_migration(link, facts)
    return facts


def read_region(link: Link, index: int) -> Region:
    """Ask for a region as clients do: with the short form first, then with what it says is needed."""
    payload = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index)).payload
    argsz = struct.unpack_from("<I", payload)[0]
    if 32 < argsz <= _ARGSZ_MAX:
        payload = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz)).payload
    return parse_region(index, payload)


def parse_region(index: int, payload: bytes) -> Region:
    """Cut a full region info apart; a capability that is not whole is left out."""
    argsz, flags, _, cap_offset, size, offset = wire.REGION_INFO.unpack_from(payload)
    areas: list[tuple[int, int]] = []
    kind: tuple[int, int] | None = None
    at, seen = cap_offset if flags & RegionFlags.CAPS else 0, 0
    while 32 <= at <= len(payload) - 16 and seen < 16:
        cap, _, following, first, second = struct.unpack_from("<HHIII", payload, at)
        if cap == RegionCapId.SPARSE_MMAP:
            whole = min(first, (len(payload) - at - 16) // 16)
            areas += [struct.unpack_from("<QQ", payload, at + 16 + 16 * n) for n in range(whole)]
        elif cap == RegionCapId.TYPE:
            kind = (first, second)
        at, seen = following, seen + 1
    if flags & RegionFlags.MMAP and not cap_offset:
        areas = [(0, size)]
    return Region(index, size, flags, offset, argsz, tuple(areas), kind)


def _read_config(link: Link, facts: Facts) -> None:
    if len(facts.regions) <= RegionIndex.CONFIG or not facts.regions[RegionIndex.CONFIG].size:
        return
    size = min(facts.regions[RegionIndex.CONFIG].size, wire.PAGE)
    facts.config = link.ok(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, size)).payload[16:]
    if len(facts.config) < 64:
        return
    for offset, width, value in _candidates(facts.config):
        old = facts.config[offset : offset + width]
        for data in (value, old):
            link.call(Command.REGION_WRITE, wire.access(RegionIndex.CONFIG, offset, width, data))
            now = link.call(Command.REGION_READ, wire.access(RegionIndex.CONFIG, offset, width)).payload[16:]
            if now != data:
                break
        else:
            facts.scratch = (offset, width)
            return


def _candidates(config: bytes) -> list[tuple[int, int, bytes]]:
    """Places in config space that should hold a written value, with one that differs from what is there."""
    found = [(_LINE, 1, bytes([config[_LINE] ^ 0x5A]))]
    for bar in range(_BARS):
        offset = _BAR0 + 4 * bar
        value = struct.unpack_from("<I", config, offset)[0]
        # The top byte of a memory BAR of up to 16 MiB: all its bits are address bits.
        found.append((offset + 3, 1, bytes([(value >> 24) ^ 0x40])))
    return found


def _find_migration(link: Link, facts: Facts) -> None:
    reply = link.call(Command.DEVICE_FEATURE, wire.feature(0x10001, argsz=16))
    if not reply.failed and len(reply.payload) >= 16:
        facts.migration = struct.unpack_from("<Q", reply.payload, 8)[0]
    probe = link.call(Command.DEVICE_FEATURE, wire.feature(0x60006))
    facts.logging = not probe.failed
