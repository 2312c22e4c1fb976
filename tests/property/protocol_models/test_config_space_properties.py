"""Config space and MSI-X table against naive models: registers written down one by one, bytes handled one by
one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_protocol.msix import MsixTable
from vfiouser_protocol.pci import (
    BarSpec,
    ConfigEffects,
    ConfigSpace,
    Msix,
    PciExpress,
    PciIdentity,
    PowerManagement,
)

PM, EXPRESS, MSIX = 0x40, 0x48, 0x84
#: What can be written in the function below: offset, width, bits that take the value, bits that a 1 clears.
REGISTERS = (
    (0x04, 2, 0x0546, 0),
    (0x06, 2, 0, 0xF900),
    (0x0C, 1, 0xFF, 0),
    (0x10, 4, 0xFFFFC000, 0),
    (0x14, 4, 0xFFFFFFFF, 0),
    (0x18, 4, 0xFFFFF000, 0),
    (0x30, 4, 0xFFFF0001, 0),
    (0x3C, 1, 0xFF, 0),
    (PM + 4, 2, 0x0003, 0),
    (EXPRESS + 0x08, 2, 0x79FF, 0),
    (EXPRESS + 0x0A, 2, 0, 0x000F),
    (EXPRESS + 0x10, 2, 0x01CB, 0),
    (EXPRESS + 0x28, 2, 0x001F, 0),
    (EXPRESS + 0x30, 2, 0x000F, 0),
    (MSIX + 2, 2, 0xC000, 0),
)


def make() -> ConfigSpace:
    """A function with two BARs, a ROM and three capabilities."""
    return ConfigSpace(
        PciIdentity(0x1B36, 0x0010, 0x010802),
        [BarSpec(0, 0x4000, is_64=True), BarSpec(2, 0x1000)],
        rom_size=0x10000,
        interrupt_pin=1,
        capabilities=[PowerManagement(), PciExpress(), Msix(16, 2, 0, 2, 0x800)],
    )


class NaiveConfig:
    """Bytes in a list, masks in dictionaries."""

    def __init__(self, initial: bytes) -> None:
        self.bytes = list(initial)
        self.written = list(initial)
        self.takes: dict[int, int] = {}
        self.clears: dict[int, int] = {}
        for offset, width, takes, clears in REGISTERS:
            for i in range(width):
                self.takes[offset + i] = takes >> 8 * i & 0xFF
                self.clears[offset + i] = clears >> 8 * i & 0xFF

    def field(self, offset: int, width: int) -> int:
        """A little-endian register."""
        return sum(self.bytes[offset + i] << 8 * i for i in range(width))

    def facts(self) -> dict[str, object]:
        """What the fields of ConfigEffects are about."""
        command = self.field(4, 2)
        return {
            "bus_master_changed": command & 4,
            "memory_changed": command & 2,
            "intx_disable_changed": command & 0x400,
            "bars_changed": self.bytes[0x10:0x28],
            "rom_changed": self.field(0x30, 4),
            "msix_changed": self.field(MSIX + 2, 2),
            "power_changed": self.field(PM + 4, 2) & 3,
        }

    def write(self, offset: int, data: bytes) -> ConfigEffects:
        """Byte by byte; then the rule about power states."""
        before = self.facts()
        state = self.bytes[PM + 4] & 3
        for position, byte in enumerate(data, offset):
            takes, clears = self.takes.get(position, 0), self.clears.get(position, 0)
            self.bytes[position] = (self.bytes[position] & ~takes | byte & takes) & ~(byte & clears)
            self.written[position] = byte
        if self.bytes[PM + 4] & 3 in (1, 2):
            self.bytes[PM + 4] = self.bytes[PM + 4] & ~3 | state
        after = self.facts()
        flr_at = EXPRESS + 9 - offset
        flr = 0 <= flr_at < len(data) and data[flr_at] >= 0x80
        return ConfigEffects(**{name: before[name] != after[name] for name in before}, flr=flr)


interesting = st.sampled_from([offset for offset, _, _, _ in REGISTERS])
writes = st.lists(
    st.tuples(
        st.one_of(interesting, st.integers(0, 252)),
        st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff" * 4, bytes(4), b"\3", b"\1"])),
    ),
    max_size=12,
)


@given(writes=writes, whole=st.none() | st.binary(min_size=256, max_size=256))
@settings(deadline=None)
def test_config_space_equals_naive(writes: list[tuple[int, bytes]], whole: bytes | None) -> None:
    """Any writes, also one of everything: same bytes, same effects, same shadow, same answers."""
    config = make()
    naive = NaiveConfig(config.read(0, 256))
    for offset, data in [*writes, *([(0, whole)] if whole else []), *writes[:2]]:
        data = data[: 256 - offset]
        effects = config.write(offset, data)
        expected = naive.write(offset, data)
        assert expected == effects
        assert any(expected) == bool(effects)
        assert bytes(naive.bytes) == config.read(0, 256)
        assert bytes(naive.written) == config.as_written
    command = naive.field(4, 2)
    assert (bool(command & 4), bool(command & 2)) == (config.bus_master, config.memory_enabled)
    assert bool(command & 0x400) == config.intx_disabled
    control = naive.field(MSIX + 2, 2)
    assert (control >= 0x8000, bool(control & 0x4000)) == (config.msix_enabled, config.msix_function_masked)
    assert naive.field(0x10, 8) & ~0xF == config.bar_address(0)
    twin = make()
    twin.restore(config.snapshot())
    assert config.snapshot() == twin.snapshot()


@given(offset=st.integers(0, 4200), count=st.integers(0, 4200))
@settings(deadline=None)
def test_reads_are_slices(offset: int, count: int) -> None:
    """A read inside config space is that slice of the whole."""
    config = make()
    if offset + count <= 256:
        assert config.read(0, 256)[offset : offset + count] == config.read(offset, count)


@given(
    size=st.integers(4, 31).map(lambda shift: 1 << shift),
    prefetchable=st.booleans(),
    is_64=st.booleans(),
    index=st.integers(0, 4),
    address=st.integers(0, 2**64 - 1),
)
@settings(deadline=None)
def test_every_bar_can_be_sized_and_placed(
    size: int, prefetchable: bool, is_64: bool, index: int, address: int
) -> None:
    """The procedure of the specification finds the size; an aligned address comes back."""
    config = ConfigSpace(PciIdentity(1, 1, 1), [BarSpec(index, size, is_64, prefetchable)])
    register, width = 0x10 + 4 * index, 8 if is_64 else 4
    kind = config.read(register, 4)[0] & 0xF
    assert (4 if is_64 else 0) | (8 if prefetchable else 0) == kind
    config.write(register, b"\xff" * width)
    mask = int.from_bytes(config.read(register, width), "little") & ~0xF
    assert size == (1 << 8 * width) - mask
    address = address % (1 << 8 * width) // size * size
    config.write(register, address.to_bytes(width, "little"))
    assert address == config.bar_address(index)
    assert address | kind == int.from_bytes(config.read(register, width), "little")


@given(
    vectors=st.integers(1, 80),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 1300), st.binary(max_size=40)),
            st.tuples(
                st.just("write"),
                st.integers(0, 3).map(lambda vector: 16 * vector + 12),
                st.sampled_from([b"\0\0\0\0", b"\1\0\0\0"]),
            ),
            st.tuples(st.sampled_from(["set", "clear"]), st.integers(0, 79) | st.integers(0, 3), st.just(b"")),
        ),
        max_size=15,
    ),
)
@settings(deadline=None)
def test_msix_table_equals_naive(vectors: int, steps: list[tuple[str, int, bytes]]) -> None:
    """Table bytes, masks, pending bits and the vectors that a write frees, against sets and byte rules."""
    table = MsixTable(vectors)
    naive = bytearray((bytes(12) + b"\1\0\0\0") * vectors)
    pending: set[int] = set()
    written = False
    for what, number, data in steps:
        if what == "write":
            offset = number % (16 * vectors)
            data = data[: 16 * vectors - offset]
            held = {v for v in pending if not written or naive[16 * v + 12] & 1}
            touched = {position // 16 for position in range(offset, offset + len(data))}
            for position, byte in enumerate(data, offset):
                takes = {0: 0xFC, 12: 1, 13: 0, 14: 0, 15: 0}.get(position % 16, 0xFF)
                naive[position] = byte & takes
            written = written or bool(data)
            expected = sorted(v for v in held & touched if not naive[16 * v + 12] & 1)
            assert expected == table.write(offset, data)
        else:
            vector = number % vectors
            (pending.add if what == "set" else pending.discard)(vector)
            (table.set_pending if what == "set" else table.clear_pending)(vector)
    assert naive == table.read(0, 16 * vectors)
    assert sum(1 << v for v in pending) == int.from_bytes(table.read_pba(0, table.pba_size), "little")
    for vector in range(vectors):
        assert (written and bool(naive[16 * vector + 12] & 1)) == table.masked(vector)
        assert (vector in pending) == table.pending(vector)
