"""VMs in a configuration file: their defaults, and what cannot be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiouser_oob.config import CarrierChoice, ConfigError, Listens, VmConfig, parse_config
from vfiouser_oob.config.summary import summary, warnings

PATH = Path("/etc/vfiouser-oob/config.toml")
FUNCTIONS = """\
[[function]]
name = "nvme0"
socket = "/run/vfio-user/nvme0.sock"
device = { kind = "vfio-user", socket = "/run/soc/f0.sock" }
[[function]]
name = "nvme1"
socket = "/run/vfio-user/nvme1.sock"
device = { kind = "vfio-user", socket = "/run/soc/f1.sock" }
"""
BOTH = FUNCTIONS + '[[vm]]\nname = "web1"\nfunctions = ["nvme0", "nvme1"]\n'


def test_a_vm_needs_a_name_and_functions_and_has_sockets_by_itself() -> None:
    """Whoever gives no paths finds the sockets beside those of the functions."""
    vm = parse_config(BOTH, PATH).vm("web1")
    assert vm is not None
    assert (vm.functions, vm.carrier) == (("nvme0", "nvme1"), CarrierChoice.AUTO)
    assert vm.sockets == {
        "monitor": Path("/run/vfio-user/web1.monitor"),
        "dbus_vmstate": Path("/run/vfio-user/web1.vmstate"),
        "vhost_user_fs": Path("/run/vfio-user/web1.vhost"),
    }


def test_everything_can_be_given() -> None:
    """Each key ends in its field."""
    text = (
        'monitor = "/m"\ncarrier = "vhost-user-fs"\nvhost_user_fs = "/f"\nvhost_user_fs_listens = "qemu"\n'
        'socket_mode = "0600"\nallow_uids = [0]\nstate_max = "1G"\nuntracked_max = 0\n'
    )
    vm = parse_config(BOTH + text, PATH).vms[0]
    assert vm == VmConfig(
        name="web1",
        functions=("nvme0", "nvme1"),
        monitor=Path("/m"),
        carrier=CarrierChoice.VHOST_USER_FS,
        vhost_user_fs=Path("/f"),
        vhost_user_fs_listens=Listens.QEMU,
        socket_mode=0o600,
        allow_uids=(0,),
        state_max=1 << 30,
        untracked_max=0,
        line=9,
    )
    assert list(vm.sockets) == ["monitor", "vhost_user_fs"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[vm]]\nname = "a"\nfunctions = ["nvme2"]', "there is no function 'nvme2'"),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0", "nvme0"]', "names 'nvme0' twice"),
        ('[[vm]]\nname = "a"\nfunctions = []', "a list of names with at least one entry"),
        ('[[vm]]\nname = "a"\nfunctions = ["../x"]', "letters, digits"),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0"]\nmonitor = "m"', "an absolute path"),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0"]\nmonitor = "/run/vfio-user/nvme0.sock"', "function 'nvme0'"),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0"]\nmonitor = "/m"\ndbus_vmstate = "/m"', "VM 'a' already"),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0"]\ncarrier = "ship"', "dbus-vmstate"),
        (
            '[[vm]]\nname = "a"\nfunctions = ["nvme0"]\n[[vm]]\nname = "b"\nfunctions = ["nvme0"]',
            "that of VM 'a' already",
        ),
        ('[[vm]]\nname = "a"\nfunctions = ["nvme0"]\n[[vm]]\nname = "a"\nfunctions = ["nvme1"]', "two VMs"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, words: str) -> None:
    """The message names the VM, what came and what is there."""
    with pytest.raises(ConfigError) as refused:
        parse_config(FUNCTIONS + text, PATH)
    assert words in str(refused.value)


def test_check_config_tells_of_vms() -> None:
    """A VM is one line; that its functions have no agent will surprise."""
    config = parse_config(BOTH + 'carrier = "dbus-vmstate"\n', PATH)
    line = (
        "  VM web1: nvme0, nvme1 by dbus-vmstate "
        "(monitor /run/vfio-user/web1.monitor, dbus_vmstate /run/vfio-user/web1.vmstate)"
    )
    assert summary(config)[-1] == line
    assert any("'nvme0' has no agent" in each for each in warnings(config))
