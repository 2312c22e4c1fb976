"""What the server and its device have: found out through the socket before the first case."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vfiouser_conformance import wire
from vfiouser_conformance.case import CannotTell, CaseFailed, NotApplicable, check
from vfiouser_conformance.link import RawLink
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
#: Where the survey maps memory for a moment: no machine has anything there.
_NOWHERE = 0x7E_0000_0000
T = TypeVar("T")
#: What cases ask `Facts.known` about.
EVERYTHING = (
    "GET_INFO",
    "config space",
    "a register that holds what is written",
    "migration",
    "DMA logging",
    "DMA maps",
)


@dataclass(frozen=True, slots=True)
class Region:
    """The server's description of one region.

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
class ServerFacts:
    """What the server offers. The suite asks before the first case, so that each case knows if it applies.

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
        keeps_maps: whether DMA maps are kept; a server whose device does no DMA may ignore them.
        problems: what could not be found out, by what it is, and why.
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
    keeps_maps: bool = True
    problems: dict[str, str] = field(default_factory=dict)

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

    def known(self, *topics: str) -> None:
        """Make sure that the survey could ask about these: only then is what it did not find really absent.

        Args:
            topics: keys that `problems` may have; see `EVERYTHING`.

        Raises:
            CannotTell: it could not ask about one of them.
        """
        for topic in topics:
            if topic in self.problems:
                raise CannotTell(f"{topic} is unknown: {self.problems[topic]}")

    def maps(self) -> None:
        """Only for servers that keep maps.

        Raises:
            NotApplicable: the server ignores them, as it may if its device does no DMA.
        """
        self.known("DMA maps")
        if not self.keeps_maps:
            raise NotApplicable("the server ignores DMA maps, as it may when its device does no DMA")

    def resets(self) -> None:
        """Only for devices that can be reset.

        Raises:
            NotApplicable: the device cannot.
        """
        if not self.resettable:
            self.known("GET_INFO")
            raise NotApplicable("the device does not support DEVICE_RESET")

    def logs(self) -> None:
        """Only for servers that log DMA.

        Raises:
            NotApplicable: the server does not.
        """
        if not self.logging:
            self.known("DMA logging")
            raise NotApplicable("the server offers no DMA logging")

    def v1(self) -> int:
        """Index of the v1 migration region.

        Raises:
            NotApplicable: there is none.
        """
        if self.v1_region is None:
            self.known("GET_INFO", *(topic for topic in self.problems if topic.startswith("GET_REGION_INFO")))
            raise NotApplicable("the device has no migration region")
        return self.v1_region

    def region(self, index: int) -> Region:
        """Return a region that exists.

        Args:
            index: the region's index.

        Raises:
            NotApplicable: the device does not have it.
        """
        if index >= len(self.regions) or not self.regions[index].size:
            self.known("GET_INFO", f"GET_REGION_INFO {index}")
            raise NotApplicable(f"the device has no region {index}")
        return self.regions[index]

    def irq_count(self, index: int) -> int:
        """Return how many vectors an IRQ index has; 0 for one that the device does not have.

        Args:
            index: the IRQ index.
        """
        return self.irqs[index][1] if index < len(self.irqs) else 0

    def vectors(self, least: int = 1) -> tuple[int, int]:
        """Return an IRQ index with enough vectors, MSI-X first.

        Args:
            least: how many it needs.

        Returns:
            The index, and how many vectors it has.

        Raises:
            NotApplicable: there is none.
        """
        for index in (2, 1, 0):
            if self.irq_count(index) >= least:
                return index, self.irq_count(index)
        self.known("GET_INFO", *(f"GET_IRQ_INFO {index}" for index in range(3)))
        raise NotApplicable(f"the device has no IRQ index with {least} vectors")

    def empty_region(self) -> int:
        """Return the index of a region that is not implemented.

        Raises:
            NotApplicable: every region is.
        """
        for region in self.regions:
            if not region.size and region.index != RegionIndex.CONFIG:
                return region.index
        self.known("GET_INFO")
        raise NotApplicable("every region of the device is implemented")

    def migratable(self) -> int:
        """Return the flags of the v2 migration.

        Raises:
            NotApplicable: the server does not offer it.
        """
        if self.migration is None:
            self.known("migration")
            raise NotApplicable("the server offers no migration by DEVICE_FEATURE")
        return self.migration


def parse_capabilities(payload: bytes) -> dict[str, Any]:
    """Return the capabilities of a VERSION reply.

    Args:
        payload: the reply's payload.

    Raises:
        CaseFailed: it is not NUL-terminated JSON of the documented form.
    """
    if len(payload) <= 4:
        return {}
    check(payload[-1] == 0, "the version data of the VERSION reply does not end with a NUL byte")
    try:
        data = json.loads(payload[4:-1])
    except ValueError as error:
        raise CaseFailed(f"the version data is not JSON: {error}: {payload[4:204]!r}") from None
    except RecursionError:
        raise CaseFailed("the version data is JSON that is nested too deeply") from None
    check(isinstance(data, dict), f"the version data is not an object: {data!r}")
    found = data.get("capabilities", {})
    check(isinstance(found, dict), f"capabilities is not an object: {found!r}")
    return dict(found)


class Survey:
    """Asks one question after the other; a failed one does not spoil the next.

    Args:
        attach: gives a fresh, negotiated connection.
        drop: closes one.
    """

    def __init__(self, attach: Callable[[], RawLink], drop: Callable[[RawLink], None]) -> None:
        self.facts = ServerFacts()
        self._attach = attach
        self._drop = drop
        self._link: RawLink | None = None

    def run(self, version: wire.Received) -> ServerFacts:
        """Ask for everything; what fails is noted, not raised.

        Args:
            version: the VERSION reply of an earlier connection.
        """
        facts = self.facts
        self._ask("VERSION", lambda _: _read_version(facts, version))
        counts = self._ask("GET_INFO", _read_info)
        flags, regions, irqs = counts if counts is not None else (0, 0, 0)
        facts.resettable = bool(flags & DeviceInfoFlags.RESET)
        for index in range(min(regions, _REGIONS_MAX)):
            region = self._ask(f"GET_REGION_INFO {index}", functools.partial(_region, index))
            facts.regions.append(region or Region(index, 0, 0, 0, 32))
            if region and region.kind == (REGION_TYPE_MIGRATION, REGION_SUBTYPE_MIGRATION):
                facts.v1_region = index
        for index in range(min(irqs, _IRQS_MAX)):
            found = self._ask(f"GET_IRQ_INFO {index}", functools.partial(_read_irq, index))
            facts.irqs.append(found or (0, 0))
        self._ask("config space", lambda link: _read_config(link, facts))
        self._ask("a register that holds what is written", lambda link: _find_scratch(link, facts))
        self._ask("migration", lambda link: _find_migration(link, facts))
        self._ask("DMA logging", lambda link: _find_logging(link, facts))
        self._ask("DMA maps", lambda link: _find_maps(link, facts))
        self._fresh()
        return facts

    def _fresh(self) -> None:
        if self._link is not None:
            self._drop(self._link)
            self._link = None

    def _ask(self, what: str, question: Callable[[RawLink], T]) -> T | None:
        """One question; asked again on a fresh connection if it failed on one that others had used."""
        used = self._link is not None
        try:
            if self._link is None:
                self._link = self._attach()
            answer = question(self._link)
        except (CaseFailed, NotApplicable, struct.error, ValueError, LookupError, TypeError) as error:
            self._fresh()
            if used:
                return self._ask(what, question)
            self.facts.problems[what] = in_words(error)
            return None
        if self._link.refusals:
            self._fresh()  # some servers lose their place in the stream with a command that they refuse
        return answer


def in_words(error: BaseException) -> str:
    """Say what went wrong with a server's bytes, for people.

    Args:
        error: what sending, receiving or reading them raised.
    """
    if isinstance(error, CaseFailed | CannotTell | NotApplicable):
        return str(error)
    if isinstance(error, struct.error | IndexError):
        return "the reply is shorter than what it says or has to hold"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, MemoryError | OverflowError):
        return "the server claims more bytes than possible"
    if isinstance(error, TypeError | AttributeError):
        return "the server's JSON has a value of the wrong type"
    return f"the reply cannot be read: {error}"


def _read_version(facts: ServerFacts, version: wire.Received) -> None:
    facts.capabilities = parse_capabilities(version.payload)
    facts.minor = struct.unpack_from("<HH", version.payload)[1]


def _read_info(link: RawLink) -> tuple[int, int, int]:
    _, flags, regions, irqs = wire.INFO.unpack_from(link.ok(Command.DEVICE_GET_INFO, wire.info()).payload)
    return flags, regions, irqs


def _region(index: int, link: RawLink) -> Region:
    return read_region(link, index)


def _read_irq(index: int, link: RawLink) -> tuple[int, int]:
    payload = link.ok(Command.DEVICE_GET_IRQ_INFO, wire.info(16, 0, index)).payload
    _, flags, _, count = wire.INFO.unpack_from(payload)
    return flags, count


def read_region(link: RawLink, index: int) -> Region:
    """Ask for a region as clients do: with the short form first, then with what it says is needed.

    Args:
        link: a negotiated connection.
        index: the region's index.
    """
    payload = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index)).payload
    argsz = struct.unpack_from("<I", payload)[0]
    if 32 < argsz <= _ARGSZ_MAX:
        payload = link.ok(Command.DEVICE_GET_REGION_INFO, wire.region_info(index, argsz)).payload
    return parse_region(index, payload)


def parse_region(index: int, payload: bytes) -> Region:
    """Cut a full region info apart; a capability that is not whole is left out.

    Args:
        index: the region's index.
        payload: the reply's payload.
    """
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


def _read_config(link: RawLink, facts: ServerFacts) -> None:
    if len(facts.regions) <= RegionIndex.CONFIG or not facts.regions[RegionIndex.CONFIG].size:
        return
    size = min(facts.regions[RegionIndex.CONFIG].size, wire.PAGE)
    facts.config = link.ok(Command.REGION_READ, wire.access(RegionIndex.CONFIG, 0, size)).payload[16:]


def _find_scratch(link: RawLink, facts: ServerFacts) -> None:
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


def _find_migration(link: RawLink, facts: ServerFacts) -> None:
    reply = link.call(Command.DEVICE_FEATURE, wire.feature(0x10001, argsz=16))
    if not reply.failed and len(reply.payload) >= 16:
        facts.migration = struct.unpack_from("<Q", reply.payload, 8)[0]


def _find_logging(link: RawLink, facts: ServerFacts) -> None:
    facts.logging = not link.call(Command.DEVICE_FEATURE, wire.feature(0x60006)).failed


def _find_maps(link: RawLink, facts: ServerFacts) -> None:
    """A server whose device does no DMA may ignore maps: it agrees to any, and to unmapping what is not there."""
    requests = (
        (Command.DMA_UNMAP, wire.dma_unmap(_NOWHERE, 4 * wire.PAGE)),
        (Command.DMA_MAP, wire.dma_map(_NOWHERE, 4 * wire.PAGE)),
        (Command.DMA_MAP, wire.dma_map(_NOWHERE + wire.PAGE, 4 * wire.PAGE)),
    )
    facts.keeps_maps = any(link.call(command, payload).failed for command, payload in requests)
