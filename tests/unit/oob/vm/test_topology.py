"""Places in a VM's PCI hierarchy, and the monitor's lines that reach them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_oob.vm.topology import (
    Bdf,
    Slot,
    TopologyError,
    bridge_of,
    early_master,
    find_device,
    parse_slot,
    port_read,
    port_write,
    read_value,
)

# What matters of QEMU's answer: a function on the root bus, and one behind a root port.
PCI: list[dict[str, Any]] = [
    {
        "bus": 0,
        "devices": [
            {"bus": 0, "slot": 0, "function": 0, "qdev_id": ""},
            {"bus": 0, "slot": 5, "function": 1, "qdev_id": "f0"},
            {
                "bus": 0,
                "slot": 4,
                "function": 0,
                "qdev_id": "rp0",
                "pci_bridge": {
                    "bus": {"number": 0, "secondary": 3, "subordinate": 3},
                    "devices": [{"bus": 3, "slot": 0, "function": 0, "qdev_id": "f1"}],
                },
            },
        ],
    }
]


def test_find_device() -> None:
    """By id, on the root bus and below."""
    assert find_device(PCI, "f0") == Bdf(0, 5, 1)
    assert find_device(PCI, "f1") == Bdf(3, 0)
    assert str(find_device(PCI, "f1")) == "03:00.0"
    with pytest.raises(TopologyError, match="id f2"):
        find_device(PCI, "f2")


@given(
    st.recursive(
        st.none() | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["devices", "pci_bridge", "qdev_id", "bus", "slot"]), inner | st.just("f0"), max_size=4
            )
        ),
        max_leaves=15,
    )
)
def test_odd_answers_have_no_device(answer: Any) -> None:
    """Whatever QEMU answers, it is a place or the one error."""
    with pytest.raises(TopologyError):
        find_device([answer, {"devices": [answer]}], "f9")


def test_endless_bridges() -> None:
    """A hierarchy that is too deep is not followed."""
    below: dict[str, Any] = {"devices": [{"bus": 0, "slot": 0, "function": 0, "qdev_id": "f0"}]}
    for _ in range(40):
        below = {"devices": [{"qdev_id": "", "pci_bridge": below}]}
    with pytest.raises(TopologyError):
        find_device([below], "f0")


@pytest.mark.parametrize(("address", "slot"), [(40, Slot(5)), (0, Slot(0)), (250, Slot(31, 2)), (255, Slot(31, 7))])
def test_slots(address: int, slot: Slot) -> None:
    """As QEMU gives them."""
    assert parse_slot(address) == slot


@pytest.mark.parametrize("address", [-1, 256, True, None, "05.0", 5.0])
def test_what_is_no_slot(address: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(TopologyError, match="not the address"):
        parse_slot(address)


@pytest.mark.parametrize(
    ("parent", "bridge"),
    [
        ("/machine/peripheral/rp0/rp0", "rp0"),
        ("/machine/q35/pcihost/pcie.0", None),
        ("/machine/unattached/device[3]/pci.0", None),
        ("/machine/peripheral/", None),
        (None, None),
    ],
)
def test_bridges(parent: Any, bridge: str | None) -> None:
    """Only what a user has named is a bridge above a function."""
    assert bridge_of(parent) == bridge


def test_registers() -> None:
    """Where a register is, both ways."""
    place = Bdf(0x70, 5, 2)
    assert place.ecam(0xB000_0000, 0x44) == 0xB702_A044
    assert place.port(0x46) == 0x8070_2A44


@pytest.mark.parametrize(
    ("offset", "data", "lines"),
    [
        (0x10, b"\x04\0\xbf\xfe", ["o /w 0xcf8 0x80002810", "o /w 0xcfc 0xfebf0004"]),
        (0x06, b"\1\2", ["o /w 0xcf8 0x80002804", "o /h 0xcfe 0x201"]),
        (0x3D, b"\5", ["o /w 0xcf8 0x8000283c", "o /b 0xcfd 0x5"]),
    ],
)
def test_port_write(offset: int, data: bytes, lines: list[str]) -> None:
    """The dword is chosen, the byte in it is in the port."""
    assert port_write(Bdf(0, 5), offset, data) == lines


@pytest.mark.parametrize(("offset", "data"), [(0x100, b"\0"), (0x10, b"\0" * 3), (0x11, b"\0" * 4), (0xFE, b"\0" * 4)])
def test_what_ports_cannot(offset: int, data: bytes) -> None:
    """Extended registers, odd sizes and two dwords at once."""
    with pytest.raises(ValueError, match="cannot be written"):
        port_write(Bdf(0, 5), offset, data)


def test_port_read() -> None:
    """The last line's output has the value."""
    assert port_read(Bdf(0, 5), 0x06, 2) == ["o /w 0xcf8 0x80002804", "i /h 0xcfe"]
    assert read_value("portw[0x0cfe] = 0x0407\r\n") == 0x0407
    for output in ("", "portw[0x0cfe] =", "unknown command: 'i'"):
        with pytest.raises(TopologyError):
            read_value(output)


def test_early_master() -> None:
    """On the root bus two lines; behind bridges each of them gets a spare bus number first."""
    assert early_master([Slot(5)]) == ["o /w 0xcf8 0x80002804", "o /h 0xcfc 0x4"]
    assert early_master([Slot(4), Slot(0)]) == [
        *("o /w 0xcf8 0x80002018", "o /w 0xcfc 0x707000"),
        *("o /w 0xcf8 0x80700004", "o /h 0xcfc 0x4"),
    ]
    assert early_master([Slot(4), Slot(1), Slot(2, 1)]) == [
        *("o /w 0xcf8 0x80002018", "o /w 0xcfc 0x717000"),
        *("o /w 0xcf8 0x80700818", "o /w 0xcfc 0x717170"),
        *("o /w 0xcf8 0x80711104", "o /h 0xcfc 0x4"),
    ]
