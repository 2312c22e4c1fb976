"""Real functions in a configuration: the device, its own driver as agent, and what a VMM is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vfiouser_oob.cli.main import main
from vfiouser_oob.config import (
    ConfigError,
    KernelVfioDevice,
    RegionPolicy,
    VfioInterface,
    parse_agent,
    parse_config,
    parse_device,
)
from vfiouser_oob.config.schema import AgentConfig, DmaMode, FunctionConfig
from vfiouser_oob.config.summary import warnings
from vfiouser_oob.devices.factory import make_backend
from vfiouser_oob.transport.activity import Activity

UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
TEXT = """\
[[function]]
name = "nic0"
socket = "/run/vfio-user/nic0.sock"
device = { kind = "kernel-vfio", bdf = "3B:00.2", region_policy = "trap" }
agent = { kind = "kernel-vfio" }
"""


def test_device_and_agent_of_a_file() -> None:
    """The address gets its domain, and the agent is the driver of this very function."""
    (function,) = parse_config(TEXT, Path("/etc/c.toml")).functions
    assert function.device == KernelVfioDevice(bdf="0000:3b:00.2", region_policy=RegionPolicy.TRAP)
    assert function.agent == AgentConfig(kind="kernel-vfio", function="0000:3b:00.2")


def test_interface_of_the_kernel() -> None:
    """It can be chosen, and is told back in the short form."""
    device = parse_device("kernel-vfio:3b:00.2,interface=group")
    assert device == KernelVfioDevice(bdf="0000:3b:00.2", interface=VfioInterface.GROUP)
    assert "kernel-vfio:0000:3b:00.2,interface=group" == device.describe()
    assert "kernel-vfio:0000:3b:00.2" == KernelVfioDevice(bdf="0000:3b:00.2").describe()


def test_agent_of_the_command_line() -> None:
    """The short form needs no address."""
    device = parse_device("kernel-vfio:0000:3b:00.2")
    assert parse_agent("kernel-vfio:", device) == AgentConfig(kind="kernel-vfio", function="0000:3b:00.2")


@pytest.mark.parametrize("written", [UUID, UUID.upper(), f"/sys/bus/mdev/devices/{UUID}", f"/sys/devices/x/{UUID}/"])
def test_a_mediated_device(written: str) -> None:
    """By its UUID or its directory, in a file and as the first word of the short form; its driver is its agent."""
    text = TEXT.replace('bdf = "3B:00.2", region_policy = "trap"', f'mdev = "{written}"')
    (function,) = parse_config(text, Path("/etc/c.toml")).functions
    expected = KernelVfioDevice(mdev=UUID)
    assert expected == function.device
    assert expected == parse_device(f"kernel-vfio:{written}") == parse_device(expected.describe())
    assert function.agent == AgentConfig(kind="kernel-vfio", function=UUID)


def test_a_mediated_device_that_is_not_there_is_worth_a_warning() -> None:
    """It is made anew after each boot, and a configuration may be checked before that."""
    config = parse_config(TEXT.replace('bdf = "3B:00.2"', f'mdev = "{UUID}"'), Path("/etc/c.toml"))
    assert any(f"no mediated device {UUID}" in text for text in warnings(config))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'device = { kind = "kernel-vfio", bdf = "3B:00.2", region_policy = "trap" }',
            'device = { kind = "model", model = "nvme" }',
            "this one is 'model'",
        ),
        (
            'agent = { kind = "kernel-vfio" }',
            'agent = { kind = "kernel-vfio", address = "x" }',
            "unknown key 'address'",
        ),
        ('bdf = "3B:00.2", ', "", "key 'bdf' or 'mdev' is missing"),
        ("bdf =", f'mdev = "{UUID}", bdf =', "keys 'bdf' and 'mdev' exclude each other"),
        ('bdf = "3B:00.2"', 'mdev = "83b8f4f2"', "mdev must be a mediated device's UUID"),
        ('bdf = "3B:00.2"', f'bdf = "{UUID}"', "bdf must be a PCI address"),
        ('"trap"', '"none"', "region_policy must be one of"),
        ('"trap"', '"trap", interface = "iommufd"', "interface must be one of"),
    ],
)
def test_mistakes(old: str, new: str, words: str) -> None:
    """What does not fit together is refused with the reason."""
    with pytest.raises(ConfigError, match=words):
        parse_config(TEXT.replace(old, new), Path("/etc/c.toml"))


def test_a_function_that_is_not_there_is_worth_a_warning() -> None:
    """`check-config` says so, since the machine may be another one or the card not yet plugged in."""
    config = parse_config(TEXT.replace("3B:00.2", "fffe:3b:00.2"), Path("/etc/c.toml"))
    assert any("no PCI function fffe:3b:00.2" in text for text in warnings(config))


@pytest.mark.parametrize("wish", [{"dma": DmaMode.MESSAGES}, {"retain_state": True}])
async def test_what_is_not_possible_is_refused(wish: dict[str, Any]) -> None:
    """Hardware writes memory by itself, and the kernel resets it: a configuration against that is a mistake."""
    device = KernelVfioDevice(bdf="0000:3b:00.2")
    config = FunctionConfig(name="nic0", device=device, **wish)
    activity = Activity()
    with pytest.raises(ConfigError, match="not possible for a real function"):
        make_backend(config, activity)
    activity.close()


def test_the_snippet_allocates_memory_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The IOMMU pins all of the VM's memory at attach, which must fit into the time of one reply."""
    path = tmp_path / "c.toml"
    path.write_text("[daemon]\nreply_budget_s = 30.0\n" + TEXT)
    assert 0 == main(["snippet", "qemu", "nic0", "--config", str(path)])
    out = capsys.readouterr().out
    assert "share=on,prealloc=on" in out
    assert '"x-msg-timeout": 31000' in out


def test_the_snippet_foresees_a_big_vm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A VM whose memory is not locked within the budget gets a longer timeout, and is told the budget for it."""
    path = tmp_path / "c.toml"
    path.write_text(TEXT)
    assert 0 == main(["snippet", "qemu", "nic0", "--config", str(path), "--memory", "256G"])
    printed = capsys.readouterr()
    assert '"x-msg-timeout": 65000' in printed.out
    assert "set reply_budget_s = 64 under [daemon]" in printed.err
    assert 0 == main(["snippet", "qemu", "nic0", "--config", str(path), "--memory", "8G"])
    printed = capsys.readouterr()
    assert '"x-msg-timeout": 5000' in printed.out
    assert "[daemon]" not in printed.err


def test_a_mediated_device_needs_no_memory_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its driver takes hold of pages when it needs them."""
    path = tmp_path / "c.toml"
    path.write_text(TEXT.replace('bdf = "3B:00.2"', f'mdev = "{UUID}"'))
    assert 0 == main(["snippet", "qemu", "nic0", "--config", str(path), "--memory", "256G"])
    printed = capsys.readouterr()
    assert "share=on" in printed.out
    assert "prealloc" not in printed.out
    assert '"x-msg-timeout": 5000' in printed.out
    assert "[daemon]" not in printed.err
