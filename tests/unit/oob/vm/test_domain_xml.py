"""Domains: which words for QEMU name our sockets, and what is left alone where they are elsewhere."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from libvirtbed.words import domain_of
from vfiouser_oob.vm.domain_xml import NAMESPACE, DomainError, DomainSockets, LibvirtDomain


def words(text: str) -> list[str]:
    """A domain's words for QEMU."""
    return [argument.attrib["value"] for argument in ET.fromstring(text).iter(f"{{{NAMESPACE}}}arg")]


def test_what_a_domain_names() -> None:
    """Functions by their class; monitor and carriers by the ids that `snippet` gives them; nothing else."""
    found = LibvirtDomain(domain_of("/run/a", ("nvme0", "nvme1"), carrier="VF")).sockets
    assert found.functions == {"nvme0": Path("/run/a/nvme0.sock"), "nvme1": Path("/run/a/nvme1.sock")}
    assert found.others == {
        "monitor": Path("/run/a/web.monitor"),
        "dbus_vmstate": Path("/run/a/web.vmstate"),
        "vhost_user_fs": Path("/run/a/web.vhost"),
    }


def test_a_domain_for_another_host_differs_in_paths_only() -> None:
    """Awkward characters are written as each word wants them, and everything else of the domain stays."""
    text = domain_of("/run/a", carrier="VF")
    there = DomainSockets(
        {"nvme0": Path("/run/b/it's, it.sock")},
        {"monitor": Path("/run/b/m,1"), "dbus_vmstate": Path("/run/b/v 1,"), "vhost_user_fs": Path("/run/b/f")},
    )
    moved = LibvirtDomain(text).moved(there)
    assert moved is not None
    assert LibvirtDomain(moved).sockets == there
    changed = [pair for pair in zip(words(text), words(moved), strict=True) if pair[0] != pair[1]]
    assert [after for _, after in changed[1:]] == [
        "socket,id=oobmonitor,path=/run/b/m,,1,server=off,reconnect-ms=500",
        '{"qom-type": "dbus-vmstate", "id": "oobvmstate", "addr": "unix:path=/run/b/v%201%2C"}',
        "socket,id=oobvhost,path=/run/b/f",
    ]
    metadata = ET.fromstring(moved).find("metadata")
    assert metadata is not None
    assert [each.text for each in metadata.iter() if each.tag.endswith("}name")] == ["a & b"]


def test_the_same_paths_need_no_new_domain() -> None:
    """A hook that prints nothing leaves a domain as it is."""
    domain = LibvirtDomain(domain_of())
    assert domain.moved(domain.sockets) is None


@pytest.mark.parametrize("text", ["", "<domain", "x" * (5 << 20)], ids=["empty", "cut", "huge"])
def test_what_is_no_domain(text: str) -> None:
    """It is refused in words."""
    with pytest.raises(DomainError, match="domain"):
        LibvirtDomain(text)


@pytest.mark.parametrize(
    "word",
    [
        "{",
        "[]",
        '{"driver":"vfio-user-pci"}',
        '{"driver":"vfio-user-pci","id":"x","socket":"/run/x"}',
        '{"driver":"vfio-user-pci","id":7,"socket":{"path":"/run/x"}}',
        '{"qom-type":"dbus-vmstate","id":"oobvmstate","addr":"unix:abstract=x"}',
        '{"qom-type":"dbus-vmstate","id":"slirp","addr":"unix:path=/run/slirp"}',
        "socket,id=oobmonitor,host=127.0.0.1,port=1",
        "socket,id=oobmonitor2,path=/run/x",
        "[" * 9000,
    ],
)
def test_words_that_are_none_of_ours(word: str) -> None:
    """Whatever else a domain has is left alone."""
    element = ET.fromstring(domain_of(functions=(), monitor=False, carrier=""))
    next(element.iter(f"{{{NAMESPACE}}}arg")).set("value", word)
    assert LibvirtDomain(ET.tostring(element, encoding="unicode")).sockets == DomainSockets()
