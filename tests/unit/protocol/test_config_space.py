"""The config space model: header, BAR and ROM sizing, capabilities, and what a write tells the device."""

from __future__ import annotations

import errno
import struct

import pytest

from vfiouser_protocol.errors import CommandError, LocalProtocolError
from vfiouser_protocol.pci import (
    BarSpec,
    Capability,
    ConfigEffects,
    ConfigSpace,
    Msi,
    Msix,
    PciExpress,
    PciIdentity,
    PowerManagement,
    SerialNumber,
    VendorSpecific,
)

NVME = PciIdentity(0x1B36, 0x0010, 0x010802, 2, subsystem_vendor=0x1AF4, subsystem=0x1100)
BARS = (
    BarSpec(0, 0x4000, is_64=True),
    BarSpec(2, 0x1000, prefetchable=True),
    BarSpec(3, 0x20, io=True),
    BarSpec(4, 8 << 30, is_64=True, prefetchable=True),
)
CAPABILITIES = (PowerManagement(), PciExpress(), Msi(8, maskable=True), Msix(32, 2, 0, 2, 0x800))
#: Where the chain above comes to lie.
PM, EXPRESS, MSI, MSIX = 0x40, 0x48, 0x84, 0x9C


def make(**kwargs: object) -> ConfigSpace:
    """A function with one of everything."""
    options: dict[str, object] = {
        "rom_size": 0x10000,
        "interrupt_pin": 1,
        "capabilities": CAPABILITIES,
        "size": 4096,
    }
    return ConfigSpace(NVME, BARS, **(options | kwargs))  # type: ignore[arg-type]


def get(config: ConfigSpace, offset: int, width: int) -> int:
    """A register of 1, 2 or 4 bytes."""
    return int.from_bytes(config.read(offset, width), "little")


def put(config: ConfigSpace, offset: int, width: int, value: int) -> ConfigEffects:
    """Write a register of 1, 2 or 4 bytes."""
    return config.write(offset, value.to_bytes(width, "little"))


def walk(config: ConfigSpace) -> list[tuple[int, int]]:
    """(id, offset) of the capability chain, as an operating system walks it."""
    chain: list[tuple[int, int]] = []
    position = get(config, 0x34, 1)
    while position:
        assert position >= 0x40
        assert position % 4 == 0
        assert len(chain) < 48
        chain.append((get(config, position, 1), position))
        position = get(config, position + 1, 1)
    return chain


def test_header_after_power_on() -> None:
    """Ids, class, pin and status are where the specification puts them; nothing is enabled."""
    config = make()
    header = struct.unpack("<HHHHB3sBBBB24xIHHIB7xBBBB", config.read(0, 64))
    vendor, device, command, status, revision, class_code, line_size, latency, kind, bist = header[:10]
    assert (0x1B36, 0x0010, 0, 0x0010, 2) == (vendor, device, command, status, revision)
    assert bytes([2, 8, 1]) == class_code
    assert (0, 0, 0, 0) == (line_size, latency, kind, bist)
    assert (0, 0x1AF4, 0x1100, 0, 0x40, 0, 1, 0, 0) == header[10:]


def test_capability_chain_is_linked() -> None:
    """The chain has each capability once, in order, and the model knows where they are."""
    config = make()
    assert [(1, PM), (0x10, EXPRESS), (5, MSI), (0x11, MSIX)] == walk(config)
    assert MSIX == config.capability_offset(0x11)
    assert config.capability_offset(0x09) is None
    assert [] == walk(ConfigSpace(NVME))
    assert 0 == get(ConfigSpace(NVME), 0x06, 2)


@pytest.mark.parametrize(
    ("register", "kind", "mask"),
    [
        pytest.param(0x10, 0x4, 0xFFFFC004, id="64-bit, low half"),
        pytest.param(0x14, 0x0, 0xFFFFFFFF, id="64-bit, high half"),
        pytest.param(0x18, 0x8, 0xFFFFF008, id="32-bit prefetchable"),
        pytest.param(0x1C, 0x1, 0xFFFFFFE1, id="I/O"),
        pytest.param(0x20, 0xC, 0x0000000C, id="8 GiB, low half"),
        pytest.param(0x24, 0x0, 0xFFFFFFFE, id="8 GiB, high half"),
        pytest.param(0x30, 0x0, 0xFFFF0001, id="ROM"),
    ],
)
def test_bar_sizing(register: int, kind: int, mask: int) -> None:
    """All ones read back as size mask and type bits; 0 reads back as the type bits."""
    config = make()
    assert kind == get(config, register, 4)
    put(config, register, 4, 0xFFFFFFFF)
    assert mask == get(config, register, 4)
    put(config, register, 4, 0)
    assert kind == get(config, register, 4)


def test_unimplemented_bars_and_rom_stay_zero() -> None:
    """Sizing what is not there reads 0."""
    config = ConfigSpace(NVME, [BarSpec(1, 0x1000)])
    for register in (0x10, 0x18, 0x1C, 0x20, 0x24, 0x30):
        put(config, register, 4, 0xFFFFFFFF)
        assert 0 == get(config, register, 4)


def test_qemu_rom_probe() -> None:
    """Read, write 0xfffff800, read, write back: the size of region 6, or 0 without a ROM."""
    config = make()
    before = config.read(0x30, 4)
    put(config, 0x30, 4, 0xFFFFF800)
    assert 0x10000 == -get(config, 0x30, 4) & 0xFFFFFFFF
    config.write(0x30, before)
    assert bytes(4) == config.read(0x30, 4)
    config = make(rom_size=0)
    put(config, 0x30, 4, 0xFFFFF800)
    assert 0 == get(config, 0x30, 4)


def test_bar_addresses() -> None:
    """Addresses are reported without type bits, over both halves, however they were written."""
    config = make()
    put(config, 0x10, 4, 0xFE000000)
    put(config, 0x14, 4, 0x12)
    put(config, 0x18, 2, 0x5000)
    put(config, 0x1A, 1, 0x0D)
    put(config, 0x1B, 1, 0xFE)
    put(config, 0x1C, 4, 0xC041)
    assert [0x12FE000000, 0xFE0D5000, 0xC040, 0] == [config.bar_address(i) for i in (0, 2, 3, 4)]
    for register in range(0x10, 0x28, 4):
        put(config, register, 4, 0)
    assert [0] * 4 == [config.bar_address(i) for i in (0, 2, 3, 4)]
    with pytest.raises(LocalProtocolError, match="BAR 1 does not exist"):
        config.bar_address(1)


def test_widths_agree() -> None:
    """Every byte read alone, in pairs and in fours is the same as in one read of the whole."""
    config = make(extended=[SerialNumber(0x1122334455667788)])
    whole = config.read(0, 4096)
    assert 4096 == len(whole)
    for width in (1, 2, 4):
        for offset in range(256 + 64):
            assert whole[offset : offset + width] == config.read(offset, width)
    assert b"" == config.read(4096, 0)


@pytest.mark.parametrize(("offset", "count"), [(0x100, 1), (0xFF, 2), (0, 257), ((1 << 64) - 1, 4), (257, 0), (-1, 1)])
def test_accesses_outside_are_refused(offset: int, count: int) -> None:
    """Reads and writes past the end are EINVAL and write nothing."""
    config = make(size=256)
    before = config.snapshot()
    with pytest.raises(CommandError) as read:
        config.read(offset, count)
    with pytest.raises(CommandError) as written:
        config.write(offset, b"\xff" * count)
    assert [errno.EINVAL] * 2 == [read.value.errno, written.value.errno]
    assert before == config.snapshot()


def test_read_only_registers_ignore_writes() -> None:
    """Ids, class, capability pointers and pin survive a write of all ones over everything."""
    config = make()
    before = config.read(0, 4096)
    config.write(0, b"\xff" * 4096)
    for start, length in ((0x00, 4), (0x08, 4), (0x0D, 3), (0x28, 8), (0x34, 8), (0x3D, 3), (0x100, 64)):
        assert before[start : start + length] == config.read(start, length)
    assert [(1, PM), (0x10, EXPRESS), (5, MSI), (0x11, MSIX)] == walk(config)
    assert 0x0547 == get(config, 0x04, 2)


def test_command_register() -> None:
    """Each bit reports its own change, once."""
    config = make()
    assert (False, False, False) == (config.bus_master, config.memory_enabled, config.intx_disabled)
    assert ConfigEffects(memory_changed=True) == put(config, 0x04, 2, 0x0002)
    assert ConfigEffects(bus_master_changed=True) == put(config, 0x04, 2, 0x0006)
    assert not put(config, 0x04, 2, 0x0006)
    assert ConfigEffects(intx_disable_changed=True) == put(config, 0x05, 1, 0x04)
    assert (True, True, True) == (config.bus_master, config.memory_enabled, config.intx_disabled)
    assert not put(config, 0x04, 2, 0x0506)
    expected = ConfigEffects(bus_master_changed=True, memory_changed=True, intx_disable_changed=True)
    assert expected == put(config, 0x04, 4, 0)


def test_decode_bits_follow_the_bars() -> None:
    """A function without I/O BARs has no I/O enable bit, one without any memory no memory enable bit."""
    for bars, expected in (
        ((BarSpec(0, 0x1000),), 0x0546),
        ((BarSpec(0, 8, io=True),), 0x0545),
        ((), 0x0544),
    ):
        config = ConfigSpace(NVME, bars)
        put(config, 0x04, 2, 0xFFFF)
        assert expected == get(config, 0x04, 2)


def test_clear_bus_master_on_behalf_of_a_lost_client() -> None:
    """DMA is forbidden, everything else and the rest of the command register stay, in the shadow too."""
    config = make()
    put(config, 0x04, 2, 0x0406)
    put(config, 0x10, 4, 0xFE000000)
    config.clear_bus_master()
    assert (False, True, True) == (config.bus_master, config.memory_enabled, config.intx_disabled)
    assert b"\x02\x04" == config.as_written[4:6]
    assert 0xFE000000 == config.bar_address(0)


def test_status_register() -> None:
    """The interrupt bit follows INTx, error bits are cleared by writing 1, the rest cannot be written."""
    config = make()
    config.set_interrupt_status(True)
    put(config, 0x06, 2, 0xFFFF)
    assert 0x0018 == get(config, 0x06, 2)
    config.set_interrupt_status(False)
    assert 0x0010 == get(config, 0x06, 2)
    with_errors = bytearray(config.snapshot().values)
    with_errors[0x06:0x08] = b"\x10\xf9"
    config.restore(config.snapshot()._replace(values=bytes(with_errors)))
    put(config, 0x06, 2, 0x8100)
    assert 0x7810 == get(config, 0x06, 2)
    put(config, 0x04, 4, 0xFFFF0000)
    assert 0x0010 == get(config, 0x06, 2)


def test_bars_and_rom_report_changes() -> None:
    """Address changes are told; writing the same again, or type bits only, is not a change."""
    config = make()
    assert ConfigEffects(bars_changed=True) == put(config, 0x10, 4, 0xFE000000)
    assert not put(config, 0x10, 4, 0xFE000004)
    assert ConfigEffects(rom_changed=True) == put(config, 0x30, 4, 0xFE100001)
    assert not put(config, 0x3C, 1, 11)
    assert 11 == get(config, 0x3C, 1)


def test_msix_control() -> None:
    """Enable and function mask report a change; size, table and PBA registers are fixed."""
    config = make()
    assert (31, 0x2, 0x802) == (get(config, MSIX + 2, 2), get(config, MSIX + 4, 4), get(config, MSIX + 8, 4))
    assert ConfigEffects(msix_changed=True) == put(config, MSIX + 2, 2, 0xC01F)
    assert (True, True) == (config.msix_enabled, config.msix_function_masked)
    assert ConfigEffects(msix_changed=True) == put(config, MSIX + 3, 1, 0x80)
    assert (True, False) == (config.msix_enabled, config.msix_function_masked)
    assert not put(config, MSIX + 2, 2, 0x87FF)
    assert 0x801F == get(config, MSIX + 2, 2)
    config.write(MSIX + 4, b"\xff" * 8)
    assert (0x2, 0x802) == (get(config, MSIX + 4, 4), get(config, MSIX + 8, 4))


def test_msi() -> None:
    """64-bit MSI with masks: eight vectors offered, four enabled; address, data and masks are kept."""
    config = make()
    assert 0x0186 == get(config, MSI + 2, 2)
    put(config, MSI + 4, 4, 0xFEE00003)
    put(config, MSI + 8, 4, 0x1)
    put(config, MSI + 12, 2, 0x4041)
    assert ConfigEffects(msi_changed=True) == put(config, MSI + 2, 2, 0x0021)
    assert config.msi_enabled
    assert (0xFEE00000, 1, 0x4041) == (
        get(config, MSI + 4, 4),
        get(config, MSI + 8, 4),
        get(config, MSI + 12, 2),
    )
    put(config, MSI + 16, 4, 0xFFFFFFFF)
    assert (0xFF, 0) == (get(config, MSI + 16, 4), get(config, MSI + 20, 4))
    put(config, MSI + 2, 2, 0x0071)
    assert ConfigEffects(msi_changed=True) == put(config, MSI + 2, 2, 0)


@pytest.mark.parametrize(
    ("msi", "size", "data"),
    [
        (Msi(1, is_64=False), 10, 8),
        (Msi(1), 14, 12),
        (Msi(32, is_64=False, maskable=True), 20, 8),
        (Msi(32, maskable=True), 24, 12),
    ],
)
def test_msi_variants(msi: Msi, size: int, data: int) -> None:
    """The four layouts have their lengths, and message data where it belongs."""
    assert (size, data) == (msi.size, msi.data_offset)
    config = ConfigSpace(NVME, capabilities=[msi, VendorSpecific(b"abc")])
    put(config, 0x40 + data, 2, 0x1234)
    assert 0x1234 == get(config, 0x40 + data, 2)
    assert (0x40 + size + 3) & ~3 == config.capability_offset(0x09)


def test_function_without_msi_and_msix() -> None:
    """Without the capabilities nothing is ever enabled."""
    config = ConfigSpace(NVME)
    config.write(0x40, b"\xff" * 0xC0)
    assert (False, False, False) == (config.msi_enabled, config.msix_enabled, config.msix_function_masked)


def test_power_states() -> None:
    """D3hot and back are told and keep the registers; D1 and D2, which there are not, are ignored."""
    config = make()
    assert 0x0008 == get(config, PM + 4, 2)
    assert not put(config, PM + 4, 2, 1)
    assert ConfigEffects(power_changed=True) == put(config, PM + 4, 2, 3)
    assert not put(config, PM + 4, 1, 2)
    assert 0x000B == get(config, PM + 4, 2)
    assert ConfigEffects(power_changed=True) == config.write(PM, bytes(8))
    assert 0x0008 == get(config, PM + 4, 2)


def test_pci_express_looks_like_an_endpoint() -> None:
    """What Linux reads at enumeration: version 2 endpoint, FLR, sane payload sizes, a link that is up."""
    config = make()
    assert 0x0002 == get(config, EXPRESS + 2, 2)
    device = get(config, EXPRESS + 4, 4)
    assert device & 1 << 28
    assert device & 1 << 15
    assert device & 7 <= 5
    control = get(config, EXPRESS + 8, 2)
    assert control >> 5 & 7 <= device & 7
    assert control >> 12 & 7 <= 5
    capability, status = get(config, EXPRESS + 0x0C, 4), get(config, EXPRESS + 0x12, 2)
    assert (3, 4) == (status & 0xF, status >> 4 & 0x3F)
    assert (capability & 0xF, capability >> 4 & 0x3F) == (status & 0xF, status >> 4 & 0x3F)
    assert get(config, EXPRESS + 0x2C, 4) & 1 << (status & 0xF)
    assert 0 == get(config, EXPRESS + 0x0A, 2)


@pytest.mark.parametrize(("offset", "data"), [(8, b"\x10\xa8"), (8, b"\x10\xa8\x00\x00"), (9, b"\xa8")])
def test_flr_is_detected(offset: int, data: bytes) -> None:
    """Initiate FLR is reported for each way to write it, and reads back as 0."""
    config = make()
    assert config.write(EXPRESS + offset, data).flr
    assert 0x2810 == get(config, EXPRESS + 8, 2)
    assert config.write(EXPRESS + offset, data).flr


def test_flr_is_not_detected_elsewhere() -> None:
    """The low byte alone, a function without FLR, and other writes are no reset."""
    assert not put(make(), EXPRESS + 8, 1, 0xFF)
    assert not put(make(), EXPRESS + 10, 2, 0x8000)
    config = make(capabilities=(PciExpress(flr=False),))
    assert 0 == get(config, 0x44, 4) & 1 << 28
    assert not put(config, 0x48, 2, 0x8000)


def test_reset_restores_power_on_values() -> None:
    """After reset reads and shadow are as at the beginning."""
    config = make()
    fresh = config.snapshot()
    config.write(0, b"\xff" * 4096)
    assert fresh != config.snapshot()
    config.reset()
    assert fresh == config.snapshot()


def test_flr_can_leave_addresses_alone() -> None:
    """With keep_addresses, BARs, ROM and interrupt line stay; command, MSI-X and the rest are reset."""
    config = make()
    put(config, 0x10, 4, 0xFE000000)
    put(config, 0x30, 4, 0xFE100000)
    put(config, 0x3C, 1, 11)
    put(config, 0x04, 2, 0x0406)
    put(config, MSIX + 2, 2, 0x8000)
    config.reset(keep_addresses=True)
    assert (0xFE000000, 0xFE100000, 11) == (config.bar_address(0), get(config, 0x30, 4), get(config, 0x3C, 1))
    assert 0 == get(config, 0x04, 2)
    assert not config.msix_enabled
    assert b"\x00\x00\x00\xfe" == config.as_written[0x10:0x14]
    assert bytes(2) == config.as_written[4:6]


def test_shadow_keeps_writes_as_written() -> None:
    """as_written has each byte as the client wrote it, also where reads do not show it."""
    config = make()
    untouched = config.as_written
    assert config.read(0, 4096) == untouched
    put(config, 0x10, 4, 0xFFFFFFFF)
    put(config, 0x00, 2, 0xABCD)
    put(config, MSIX + 2, 2, 0xC7FF)
    put(config, EXPRESS + 8, 2, 0xA810)
    shadow = config.as_written
    assert (b"\xff\xff\xff\xff", b"\xcd\xab") == (shadow[0x10:0x14], shadow[0:2])
    assert (b"\xff\xc7", b"\x10\xa8") == (shadow[MSIX + 2 : MSIX + 4], shadow[EXPRESS + 8 : EXPRESS + 10])
    assert untouched[0x14:0x40] == shadow[0x14:0x40]


def test_snapshot_and_restore() -> None:
    """A snapshot brings another function of the kind to the same state, but cannot change what it is."""
    source = make()
    put(source, 0x04, 2, 0x0406)
    put(source, 0x10, 4, 0xFE000000)
    put(source, MSIX + 2, 2, 0x8000)
    target = make()
    target.restore(source.snapshot())
    assert source.snapshot() == target.snapshot()
    assert (True, True, 0xFE000000) == (target.bus_master, target.msix_enabled, target.bar_address(0))
    other = ConfigSpace(PciIdentity(1, 2, 3), BARS, capabilities=CAPABILITIES, size=4096)
    other.restore(source.snapshot())
    assert (1, 2) == (get(other, 0, 2), get(other, 2, 2))
    with pytest.raises(ValueError, match="256"):
        make(size=256).restore(source.snapshot())


def test_extended_chain() -> None:
    """The chain at 0x100 is linked; without extended capabilities it is an empty header."""
    config = make(extended=[SerialNumber(0x1122334455667788), SerialNumber(1)])
    assert 0x3 | 1 << 16 | 0x10C << 20 == get(config, 0x100, 4)
    assert 0x1122334455667788 == int.from_bytes(config.read(0x104, 8), "little")
    assert 0x3 | 1 << 16 == get(config, 0x10C, 4)
    assert 0 == get(make(), 0x100, 4)


def test_vendor_specific_capability() -> None:
    """Length and body are readable and fixed."""
    config = ConfigSpace(NVME, capabilities=[VendorSpecific(b"hello")])
    config.write(0x42, b"\xff" * 6)
    assert bytes([9, 0, 8]) + b"hello" == config.read(0x40, 8)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"size": 512}, "512", id="size"),
        pytest.param({"size": 256, "extended": [SerialNumber(1)]}, "4096", id="extended in 256"),
        pytest.param({"interrupt_pin": 5}, "pin 5", id="pin"),
        pytest.param({"rom_size": 3000}, "ROM of 3000", id="ROM not a power of two"),
        pytest.param({"rom_size": 1024}, "ROM of 1024", id="ROM too small"),
        pytest.param({"capabilities": [PciExpress()] * 4}, "no room", id="chain too long"),
        pytest.param({"extended": [SerialNumber(1)] * 400}, "no room", id="extended chain too long"),
        pytest.param({"capabilities": [Msix(1, 5, 0, 2, 0)]}, "BAR 5", id="MSI-X table in no BAR"),
        pytest.param({"capabilities": [Msix(1, 3, 0, 2, 0)]}, "BAR 3", id="MSI-X table in I/O"),
        pytest.param({"capabilities": [Msix(512, 2, 0, 0, 0)]}, "table", id="MSI-X table past the end"),
        pytest.param({"capabilities": [Msix(1, 2, 0, 2, 0x1000)]}, "pending", id="PBA past the end"),
    ],
)
def test_impossible_functions(options: dict[str, object], match: str) -> None:
    """A description that no function can have is refused when it is made."""
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    "bars",
    [
        pytest.param([BarSpec(6, 0x1000)], id="index 6"),
        pytest.param([BarSpec(5, 0x1000, is_64=True)], id="64-bit at 5"),
        pytest.param([BarSpec(0, 0x1000, is_64=True), BarSpec(1, 0x1000)], id="upper half taken"),
        pytest.param([BarSpec(0, 0x1000), BarSpec(0, 0x1000)], id="twice"),
        pytest.param([BarSpec(0, 0x1800)], id="not a power of two"),
        pytest.param([BarSpec(0, 8)], id="memory too small"),
        pytest.param([BarSpec(0, 0)], id="size 0"),
        pytest.param([BarSpec(0, 1 << 32)], id="4 GiB in 32 bits"),
        pytest.param([BarSpec(0, 512, io=True)], id="I/O too big"),
        pytest.param([BarSpec(0, 64, io=True, is_64=True)], id="64-bit I/O"),
    ],
)
def test_impossible_bars(bars: list[BarSpec]) -> None:
    """BARs that cannot be, alone or together, are refused when the function is made."""
    with pytest.raises(ValueError, match="BarSpec"):
        ConfigSpace(NVME, bars)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Msi(3), "3 vectors"),
        (lambda: Msi(64), "64 vectors"),
        (lambda: Msix(0, 0, 0, 0, 0x800), "0 vectors"),
        (lambda: Msix(2049, 0, 0, 2, 0), "2049 vectors"),
        (lambda: Msix(1, 0, 4, 2, 0), "multiples of 8"),
        (lambda: Msix(64, 0, 0, 0, 0x3F8), "overlap"),
        (lambda: ConfigSpace(PciIdentity(1, 1, 1 << 24)), "class code"),
    ],
)
def test_impossible_capabilities(build: object, match: str) -> None:
    """Capabilities that no function can have are refused when they are made."""
    with pytest.raises(ValueError, match=match):
        build()  # type: ignore[operator]


def test_capabilities_are_what_the_chain_needs() -> None:
    """Every capability class says its own id and a length that its registers fit in."""
    for capability in (*CAPABILITIES, VendorSpecific(b"x")):
        assert isinstance(capability, Capability)
        config = ConfigSpace(NVME, BARS, capabilities=[capability])
        config.write(0x40, b"\xff" * 0xC0)
        assert capability.capability_id == get(config, 0x40, 1)
        assert bytes(0xC0 - capability.size) == config.read(0x40 + capability.size, 0xC0 - capability.size)
