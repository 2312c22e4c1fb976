"""`snippet` for a VM: what its QEMU is started with, and the domain that libvirt makes the same of."""

from __future__ import annotations

import json
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from vfiouser_oob.cli.main import main

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
CONFIG = """
[[vm]]
name = "web"
functions = ["nvme0", "nvme1"]
{vm}

[[function]]
name = "nvme0"
socket = "/run/vfio-user/it's, nvme0.sock"
device = {{ kind = "model", model = "nvme" }}

[[function]]
name = "nvme1"
socket = "/run/vfio-user/nvme1.sock"
device = {device}
"""
MODEL = '{ kind = "model", model = "nvme" }'
KERNEL = '{ kind = "kernel-vfio", bdf = "0000:01:00.0" }'


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """Where a test's configuration goes."""
    return tmp_path / "config.toml"


def told(
    capsys: pytest.CaptureFixture[str], config: Path, *arguments: str, vm: str = "", device: str = MODEL
) -> tuple[str, str]:
    """What `snippet` prints for the VM: its output and its notes."""
    config.write_text(CONFIG.format(vm=vm, device=device))
    assert main(["snippet", *arguments, "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    return out, err


def options(out: str) -> list[tuple[str, str]]:
    """The options that a shell would pass."""
    words = shlex.split(out.replace("\\\n", ""))
    return list(zip(words[::2], words[1::2], strict=True))


def test_all_options_of_qemu(capsys: pytest.CaptureFixture[str], configured: Path) -> None:
    """Shared memory, each function under its name at a slot that libvirt does not give out, monitor and carrier."""
    out, err = told(capsys, configured, "qemu", "web", "--memory", "2G")
    found = options(out)
    first, second = (json.loads(value) for name, value in found if name == "-device")
    assert found[:3] == [
        ("-m", "2G"),
        ("-object", "memory-backend-memfd,id=vfio-user-ram,size=2G,share=on"),
        ("-machine", "q35,memory-backend=vfio-user-ram"),
    ]
    assert first == {
        "driver": "vfio-user-pci",
        "id": "nvme0",
        "bus": "pcie.0",
        "addr": "0x10",
        "socket": {"type": "unix", "path": "/run/vfio-user/it's, nvme0.sock"},
        "x-msg-timeout": 5000,
    }
    assert (second["id"], second["addr"]) == ("nvme1", "0x11")
    assert found[-3:-1] == [
        ("-chardev", "socket,id=oobmonitor,path=/run/vfio-user/web.monitor,server=off,reconnect-ms=500"),
        ("-object", '{"qom-type": "monitor-qmp", "id": "oobmon", "chardev": "oobmonitor"}'),
    ]
    assert found[-1][0] == "-object"
    assert json.loads(found[-1][1]) == {
        "qom-type": "dbus-vmstate",
        "id": "oobvmstate",
        "addr": "unix:path=/run/vfio-user/web.vmstate",
    }
    assert "/run/vfio-user/web.monitor, /run/vfio-user/web.vmstate (mode 0660" in err


@pytest.mark.parametrize(
    ("vm", "device", "carrier"),
    [
        ("", MODEL, "dbus-vmstate"),
        ("", KERNEL, "vhost-user-fs-pci"),
        ('carrier = "vhost-user-fs"', MODEL, "vhost-user-fs-pci"),
        ('carrier = "dbus-vmstate"', KERNEL, "dbus-vmstate"),
    ],
)
def test_the_carrier_that_fits(
    capsys: pytest.CaptureFixture[str], configured: Path, vm: str, device: str, carrier: str
) -> None:
    """A real function writes guest memory unseen, and only the companion has a log for that; else the object."""
    out, err = told(capsys, configured, "qemu", "web", vm=vm, device=device)
    assert {name for name in ("dbus-vmstate", "vhost-user-fs-pci") if name in out} == {carrier}
    assert ("web.vhost" in err) == (carrier == "vhost-user-fs-pci")
    assert ("prealloc=on" in out) == (device == KERNEL)


def test_a_companion_comes_last(capsys: pytest.CaptureFixture[str], configured: Path) -> None:
    """QEMU loads devices in this order; it listens where the daemon is to be restarted under it."""
    vm = 'carrier = "vhost-user-fs"\nvhost_user_fs_listens = "qemu"\nvhost_user_fs = "/run/vfio-user/a,b"'
    found = options(told(capsys, configured, "qemu", "web", vm=vm)[0])
    assert found[-2] == ("-chardev", "socket,id=oobvhost,path=/run/vfio-user/a,,b,server=on,wait=on")
    assert found[-1][0] == "-device"
    assert json.loads(found[-1][1])["addr"] == "0x1e"


def test_a_whole_domain_for_libvirt(capsys: pytest.CaptureFixture[str], configured: Path) -> None:
    """The words for QEMU are the same; memory is libvirt's own affair."""
    words = options(told(capsys, configured, "qemu", "web")[0])[3:]
    out, _ = told(capsys, configured, "libvirt", "web", "--memory", "512M", "--domain-type", "qemu")
    domain = ET.fromstring(out)
    given = [argument.attrib["value"] for argument in domain.iter(f"{QEMU}arg")]
    assert given == [word for option in words for word in option]
    assert (domain.attrib["type"], domain.findtext("name")) == ("qemu", "web")
    assert domain.findtext("memory") == str(512 << 20)
    backing = domain.find("memoryBacking")
    assert backing is not None
    assert [element.tag for element in backing] == ["source", "access"]


def test_memory_for_a_real_function_is_there_at_once(capsys: pytest.CaptureFixture[str], configured: Path) -> None:
    """An IOMMU locks all of it within one message."""
    out, _ = told(capsys, configured, "libvirt", "web", device=KERNEL)
    assert ET.fromstring(out).find("memoryBacking/allocation") is not None


@pytest.mark.parametrize(
    ("vmm", "name", "allowed"), [("qemu", "wep", "web, nvme0, nvme1"), ("libvirt", "nvme0", "allowed: web")]
)
def test_unknown_names(capsys: pytest.CaptureFixture[str], configured: Path, vmm: str, name: str, allowed: str) -> None:
    """A wrong name is refused with those that there are; libvirt has snippets of VMs only."""
    configured.write_text(CONFIG.format(vm="", device=MODEL))
    assert main(["snippet", vmm, name, "--config", str(configured)]) == 2
    assert allowed in capsys.readouterr().err


def test_too_many_functions_for_one_bus(capsys: pytest.CaptureFixture[str], configured: Path) -> None:
    """Libvirt's devices need room on it, too."""
    names = [f"f{number}" for number in range(15)]
    functions = "".join(f'[[function]]\nname = "{name}"\nsocket = "/run/{name}"\ndevice = {MODEL}\n' for name in names)
    configured.write_text(f'[[vm]]\nname = "web"\nfunctions = {json.dumps(names)}\n{functions}')
    assert main(["snippet", "qemu", "web", "--config", str(configured)]) == 2
    assert "14 fit beside each other" in capsys.readouterr().err
