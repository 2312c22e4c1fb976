"""Plans of the replay: order, masks, what is left out, and that a function which takes them looks as its source did."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfiouser_oob.migration.config_shadow import ConfigShadow
from vfiouser_oob.vm.replay import (
    ConfigWrite,
    FunctionShape,
    MemoryWrite,
    ReadBack,
    ReplayPlan,
    SourceView,
    checks,
    is_as_reset,
    plan_replay,
    table_at,
    through_ecam,
    written_bytes,
)
from vfiouser_oob.vm.topology import Bdf
from vfiouser_protocol.pci import (
    BarSpec,
    ConfigSpace,
    Msi,
    Msix,
    PciExpress,
    PciIdentity,
    PowerManagement,
)

BASE = 0xFEBF_0000
TABLE = b"".join(n.to_bytes(4, "little") * 3 + b"\0\0\0\0" for n in (0xFEE0_1000, 0xFEE0_2000))
MEM, MASTER = 0x2, 0x4


def space() -> ConfigSpace:
    """A function with everything: a wide BAR, a narrow one, a port BAR, a ROM, and all capabilities."""
    return ConfigSpace(
        PciIdentity(0x1234, 0x5678, 0x010802),
        [BarSpec(0, 0x4000, is_64=True), BarSpec(2, 0x1000), BarSpec(4, 0x20, io=True)],
        capabilities=[
            PowerManagement(),
            Msi(vectors=2, is_64=True, maskable=True),
            Msix(2, table_bar=0, table_offset=0x2000, pba_bar=0, pba_offset=0x3000),
            PciExpress(),
        ],
        rom_size=0x1_0000,
    )


SIZES = {0: 0x4000, 2: 0x1000, 4: 0x20}
PM, MSI, MSIX = 0x40, 0x48, 0x60


def shape() -> FunctionShape:
    """What it looks like."""
    return FunctionShape(space().read(0, 256), SIZES, 0x1_0000)


def shadow(*writes: tuple[int, int, int]) -> dict[int, int]:
    """What a guest wrote: offset, value, size."""
    noted = ConfigShadow()
    for offset, value, size in writes:
        noted.note(offset, value.to_bytes(size, "little"))
    return written_bytes(noted.writes())


PLACED = ((0x10, BASE | 4, 4), (0x14, 0, 4), (0x18, 0xFE00_0000, 4), (0x20, 0xC001, 4))
ENABLED = (*PLACED, (0x04, 0x0407, 2), (0x3C, 0x0B, 1), (MSIX + 2, 0x8001, 2))


def plan(*writes: tuple[int, int, int], table: bytes = TABLE) -> ReplayPlan:
    """The plan of what a guest wrote."""
    return plan_replay(SourceView(shadow(*writes), table), shape())


def text(steps: tuple[ConfigWrite | MemoryWrite, ...]) -> list[str]:
    """Steps as short words."""
    return [
        f"{step.offset:#x}={int.from_bytes(step.data, 'little'):#x}/{len(step.data)}"
        if isinstance(step, ConfigWrite)
        else f"[{step.address:#x}]{len(step.data)}"
        for step in steps
    ]


def test_capabilities_are_where_the_tests_have_them() -> None:
    """The offsets above are the function's."""
    head = shape().head
    assert (head[PM], head[MSI], head[MSIX]) == (0x01, 0x05, 0x11)


def test_order() -> None:
    """BARs, ROM, COMMAND, line, table, MSI, MSI-X control; the power state and nothing else closes."""
    found = plan(
        *ENABLED,
        (0x30, 0xFD00_0001, 4),
        (PM + 4, 0x8000, 2),
        (MSI + 4, 0xFEE0_0000, 4),
        (MSI + 8, 0, 4),
        (MSI + 0xC, 0x21, 2),
        (MSI + 0x10, 1, 4),
        (MSI + 2, 0x10, 2),
    )
    assert text(found.steps) == [
        *(f"0x10={BASE | 4:#x}/4", "0x14=0x0/4", "0x18=0xfe000000/4", "0x20=0xc001/4", "0x30=0xfd000001/4"),
        *("0x4=0x407/2", "0x3c=0xb/1", f"[{BASE + 0x2000:#x}]32"),
        *("0x4c=0xfee00000/4", "0x50=0x0/4", "0x54=0x21/2", "0x58=0x1/4", "0x4a=0x10/2", "0x62=0x8001/2"),
    ]
    assert text(found.closing) == ["0x44=0x0/2"]  # a written 1 would clear PME_Status
    assert found.missing == ()


def test_memory_and_dma_are_on_as_long_as_needed() -> None:
    """A guest that has them off gets them off again, after everything else."""
    found = plan(*PLACED, (0x04, 0x0400, 2), (MSIX + 2, 0xC001, 2))
    assert "0x4=0x406/2" in text(found.steps)
    assert text(found.closing) == ["0x4=0x400/2"]


def test_a_function_that_nobody_touched() -> None:
    """Nothing is written but what takes the early DMA away; a table that is read back empty has no address."""
    found = plan()
    assert (text(found.steps), text(found.closing)) == (["0x4=0x4/2"], ["0x4=0x0/2"])
    assert found.missing == ("the MSI-X table, since BAR 0 has no address",)
    assert plan(table=b"").missing == ()


@pytest.mark.parametrize("low", [0xFFFF_FFFF, 0xFFFF_FFF4])
def test_bar_that_is_being_sized(low: int) -> None:
    """A guest that was finding out a BAR's size has no table at that address; the BAR itself is as it wrote it."""
    found = plan((0x10, low, 4), (0x14, 0xFFFF_FFFF, 4), (0x04, 0, 2))
    assert text(found.steps) == [f"0x10={low:#x}/4", "0x14=0xffffffff/4", "0x4=0x4/2"]
    assert len(found.missing) == 1


def test_wide_address() -> None:
    """The upper half counts."""
    found = plan((0x10, 0x4, 4), (0x14, 0x38, 4), (0x04, 6, 2))
    assert found.steps[-1] == MemoryWrite(0x38_0000_2000, TABLE, found.steps[-1].mask)
    assert table_at(shadow((0x10, 0x4, 4), (0x14, 0x38, 4)), shape()) == (0x38_0000_2000, 32)


def test_no_table_no_address() -> None:
    """Nothing is read of a function without a table, or one at no address."""
    assert table_at(shadow(), shape()) is None
    assert table_at(shadow(*PLACED), FunctionShape(bytes(256), SIZES)) is None


def test_table_of_another_size() -> None:
    """A table that is not this function's is refused."""
    with pytest.raises(ValueError, match="48 bytes; the function's has 32"):
        plan(*ENABLED, table=TABLE + bytes(16))


def test_narrow_msi() -> None:
    """MSI with 32 bits and without masks has its data where the upper address would be."""
    config = ConfigSpace(PciIdentity(1, 2, 3), [], capabilities=[Msi(is_64=False)])
    noted = shadow((0x44, 0xFEE0_0000, 4), (0x48, 0x31, 2), (0x42, 1, 2))
    found = plan_replay(SourceView(noted), FunctionShape(config.read(0, 256), {}))
    assert text(found.steps) == ["0x4=0x4/2", "0x44=0xfee00000/4", "0x48=0x31/2", "0x42=0x1/2"]


@pytest.mark.parametrize(
    "head",
    [bytes(256), bytes(10), b"\xff" * 256, bytes(6) + b"\x10" + bytes(0x2D) + b"\x40" + bytes(0xB) + b"\x11\x40" * 96],
)
def test_odd_shapes(head: bytes) -> None:
    """A head without capabilities, a short one, and circles are planned all the same."""
    plan_replay(SourceView(shadow(*ENABLED)), FunctionShape(head, {0: 0x4000, 5: 0x1000}))


def test_through_ecam() -> None:
    """Each function has 4 KiB of addresses."""
    place = Bdf(2, 3, 1)
    writes = through_ecam(plan(*ENABLED).steps, place, 0xB000_0000)
    assert writes[0] == MemoryWrite(0xB021_9010, (BASE | 4).to_bytes(4, "little"), b"\0\xc0\xff\xff")
    assert {each.address >> 12 for each in writes} == {0xB0219, BASE + 0x2000 >> 12}


def test_as_reset() -> None:
    """After a reset, when QEMU has written zeros, nothing need be done; one register that is set is enough."""
    reset = {**dict.fromkeys(range(0x10, 0x28), 0), 0x04: 0, 0x05: 0, 0x3C: 0, MSIX + 2: 0, MSIX + 3: 0}
    looks = FunctionShape(space().read(0, 256), SIZES)
    assert is_as_reset(reset, looks)
    for offset in (0x04, 0x12, 0x3C, MSIX + 3):
        assert not is_as_reset({**reset, offset: 0x40}, looks), offset


def test_check() -> None:
    """What was read is compared in the bits that can be read."""
    check = ReadBack(0x1000, b"\x04\0\xbf\xfe\x01\0\0\0", b"\xf0\xff\xff\xff\x01\0\0\0", "BAR 0")
    assert check.failure(b"\x0c\0\xbf\xfe\x03\xff\0\0") == ""
    assert check.failure(b"\x04\0\xbf\xfe\0\0\0\0") == "BAR 0+0x4 is 00000000 instead of 01000000"
    assert check.failure(b"\x04\0") == "BAR 0 gave 2 bytes of 8"


class Guest:
    """QEMU's part of a function, played by `ConfigSpace`, and its table."""

    def __init__(self) -> None:
        self.space = space()
        self.table = bytes(32)

    def write(self, address: int, data: bytes) -> None:
        """DMA by the function to itself."""
        command = int.from_bytes(self.space.read(4, 2), "little")
        assert address < 0x1000 or command & MEM
        if address < 0x1000:
            self.space.write(address, data)
        else:
            self.table = data

    def read(self, address: int, size: int) -> bytes:
        """The same, reading."""
        return self.space.read(address, size) if address < 0x1000 else self.table[:size]


WRITES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([0x10, 0x14, 0x18, 0x20, 0x30]), st.integers(0, 0xFFFF_FFFF), st.just(4)),
        st.tuples(st.sampled_from([0x04, PM + 4, MSI + 2, MSIX + 2]), st.integers(0, 0xFFFF), st.just(2)),
        st.tuples(st.sampled_from([MSI + 4, MSI + 8, MSI + 0xC]), st.integers(0, 0xFFFF_FFFF), st.just(4)),
        st.tuples(st.just(0x3C), st.integers(0, 0xFF), st.just(1)),
    ),
    max_size=20,
)


@given(WRITES)
@example([(PM + 4, 3, 2), (PM + 4, 1, 2)])  # from D3 there is no way to D1
def test_the_same_view(writes: list[tuple[int, int, int]]) -> None:
    """Whatever a guest wrote, the function at the destination reads as the one at the source, and the checks hold."""
    source, destination = Guest(), Guest()
    noted = ConfigShadow()
    for offset, value, size in writes:
        source.space.write(offset, value.to_bytes(size, "little"))
        noted.note(offset, value.to_bytes(size, "little"))
    seen = FunctionShape(source.space.read(0, 256), SIZES, 0x1_0000)
    found = plan_replay(SourceView(written_bytes(noted.writes()), TABLE), seen)
    destination.space.write(4, MASTER.to_bytes(2, "little"))
    steps = through_ecam(found.steps, Bdf(0, 0), 0)
    for each in steps:
        destination.write(each.address, each.data)
    for check in checks(steps):
        assert check.failure(destination.read(check.address, len(check.data))) == ""
    assert found.missing or destination.table == TABLE
    for each in through_ecam(found.closing, Bdf(0, 0), 0):
        destination.write(each.address, each.data)
    assert destination.space.read(0, 256) == source.space.read(0, 256)


@given(WRITES, st.integers(0, 31), st.integers(0, 7))
def test_a_spoilt_replay_is_found(writes: list[tuple[int, int, int]], at: int, bit: int) -> None:
    """A bit of the table that is not as it should be is told."""
    found: Mapping[int, int] = shadow(*writes, *ENABLED)
    steps = through_ecam(plan_replay(SourceView(found, TABLE), shape()).steps, Bdf(0, 0), 0)
    (check,) = [each for each in checks(steps) if each.address > 0x1000]
    spoilt = bytearray(TABLE)
    spoilt[at] ^= 1 << bit
    seen = bool(check.mask[at] & 1 << bit)
    assert bool(check.failure(bytes(spoilt))) == seen
