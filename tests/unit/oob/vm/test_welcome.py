"""Whether a VM would be welcome on a host: each thing that is in the way, in words for whoever moves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from libvirtbed.words import domain_of, status_of
from vfiouser_oob.config.vms import CarrierChoice, VmConfig
from vfiouser_oob.vm.domain_xml import LibvirtDomain
from vfiouser_oob.vm.welcome import arrival_refusal, host_refusal, missing_parts

QEMU = {"pid": 7, "uid": 0, "command": "qemu"}


@pytest.mark.parametrize(
    ("monitor", "carrier", "takes", "words"),
    [
        (True, "V", CarrierChoice.AUTO, ""),
        (True, "F", CarrierChoice.AUTO, ""),
        (True, "VF", CarrierChoice.VHOST_USER_FS, ""),
        (False, "V", CarrierChoice.AUTO, "no monitor for the daemon"),
        (True, "", CarrierChoice.AUTO, "no carrier (dbus-vmstate or vhost-user-fs-pci)"),
        (True, "V", CarrierChoice.VHOST_USER_FS, "VM web on this host takes vhost-user-fs-pci only"),
    ],
)
def test_what_a_domain_lacks(monitor: bool, carrier: str, takes: CarrierChoice, words: str) -> None:
    """A VM without monitor or carrier would lose its functions, and nobody would notice before the guest."""
    sockets = LibvirtDomain(domain_of(monitor=monitor, carrier=carrier)).sockets
    missing = missing_parts(sockets, VmConfig(name="web", functions=("nvme0",), carrier=takes))
    assert words in missing
    assert bool(missing) == bool(words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (status_of(), ""),
        (status_of({"name": "mail"}), "does not serve VM web yet"),
        (status_of({"qemu": QEMU, "phase": "running"}), "has a QEMU on this host already (process 7, it is running)"),
        (status_of({"functions": [{"name": "nvme1"}]}), "does not serve function nvme1"),
        (status_of(function={"client": QEMU}), "process 7 uses function nvme0"),
        (status_of(function={"migration": None}), "has no agent"),
        (status_of(blocked="its agent cannot load"), "cannot take a state on this host: its agent cannot load"),
        (status_of(agent_away_since="2026-01-01T00:00:00Z"), "has not answered since 2026-01-01T00:00:00Z"),
        (status_of(migratable=False), "nvme0 cannot take a state"),
    ],
)
def test_what_keeps_a_host_from_taking_it(status: Any, words: str) -> None:
    """The daemon's own knowledge, before a QEMU is started."""
    refusal = host_refusal(status, "web")
    assert words in refusal
    assert bool(refusal) == bool(words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (status_of({"qemu": QEMU, "phase": "incoming", "carriers": ["dbus-vmstate"]}), ""),
        (status_of({"qemu": QEMU, "phase": "incoming"}), "has not connected a carrier of VM web"),
        (status_of(), "has not connected the monitor"),
        (status_of({"name": "mail"}), "does not serve VM web"),
    ],
)
def test_whether_a_qemu_is_met(status: Any, words: str) -> None:
    """Without monitor or carrier it would lose the functions."""
    refusal = arrival_refusal(status, "web")
    assert words in refusal
    assert bool(refusal) == bool(words)


def test_paths_of_the_bed() -> None:
    """What tests call a domain has the default paths of its VM."""
    sockets = LibvirtDomain(domain_of(carrier="VF")).sockets
    assert sockets.others == VmConfig(name="web", functions=("nvme0",)).sockets
    assert sockets.functions == {"nvme0": Path("/run/vfio-user/nvme0.sock")}
