"""The shipped units, judged by systemd's own tools."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "packaging" / "systemd"
NAMES = ("vfiouser-oob.service", "vfiouser-oob.socket", "vfiouser-oob@.service", "vfiouser-oob@.socket")
BINARY = "/usr/bin/vfiouser-oob"


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """The units with a binary that exists on this machine, since verify looks for it."""
    for name in NAMES:
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace(BINARY, shutil.which("true") or "/bin/true"))
    return tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze."""
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def test_verify(rendered: Path) -> None:
    """systemd finds nothing wrong and nothing unknown in any unit."""
    done = analyze("verify", "--man=no", *(str(rendered / name) for name in NAMES))
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("name", ["vfiouser-oob.service", "vfiouser-oob@.service"])
def test_exposure(rendered: Path, name: str) -> None:
    """The services stay below 1.0 of 10 on systemd's scale of exposure; a bare unit has 9.6."""
    done = analyze("security", "--offline=yes", "--threshold=10", "--no-pager", str(rendered / name))
    assert 0 == done.returncode, done.stdout[-300:]
    assert re.search(r"Overall exposure level for .*: 0\.\d", done.stdout)


@pytest.mark.parametrize("name", ["vfiouser-oob.service", "vfiouser-oob@.service"])
@pytest.mark.parametrize(
    ("drop_in", "opened"),
    [
        ("kernel-vfio.conf", r"PrivateDevices=.*has access to hardware devices"),
        ("agents.conf", r"PrivateNetwork=.*has access to the host's network"),
    ],
)
def test_the_drop_ins(rendered: Path, name: str, drop_in: str, opened: str) -> None:
    """systemd knows all of each, it wins over the unit, and the service stays nearly as confined."""
    folder = rendered / f"{name}.d"
    folder.mkdir()
    shutil.copy(UNITS / drop_in, folder)
    done = analyze("verify", "--man=no", str(rendered / name))
    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)
    done = analyze("security", "--offline=yes", "--threshold=20", "--no-pager", str(rendered / name))
    exposure = re.search(r"Overall exposure level for .*: (\d\.\d)", done.stdout)
    assert exposure is not None
    assert float(exposure[1]) < 2.0
    assert re.search(opened, done.stdout), done.stdout


def settings(text: str) -> list[str]:
    """The settings of a unit."""
    return sorted(line.strip() for line in text.splitlines() if re.match(r"\s*[A-Z]\w*=", line))


@pytest.mark.parametrize(("howto", "drop_in"), [("kernel-vfio", "kernel-vfio.conf"), ("systemd", "agents.conf")])
def test_the_how_tos_show_the_drop_ins(howto: str, drop_in: str) -> None:
    """The lines in the document are those of the file."""
    blocks = re.findall(r"```ini\n(.*?)```", (ROOT / f"docs/howto/{howto}.md").read_text(), re.DOTALL)
    assert settings((UNITS / drop_in).read_text()) in [settings(block) for block in blocks]


def test_one_user_serves_real_functions() -> None:
    """The user of the drop-in is the one that is made, and the one that the rules and the how-to give nodes to."""
    (user,) = re.findall(r"^u (\S+)", (UNITS / "kernel-vfio.sysusers").read_text(), re.MULTILINE)
    rules = (ROOT / "packaging/udev/60-vfiouser-oob.rules").read_text()
    assert {user} == set(re.findall(r'OWNER="(.*?)"', rules))
    assert f"User={user}" in settings((UNITS / "kernel-vfio.conf").read_text())
    assert f"--owner {user}" in (ROOT / "docs/howto/kernel-vfio.md").read_text()


def read_unit(name: str) -> configparser.ConfigParser:
    """A unit's sections; of a key that occurs several times the last one."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((UNITS / name).read_text())
    return parser


@pytest.mark.parametrize("name", ["vfiouser-oob.service", "vfiouser-oob@.service"])
def test_a_service_tells_when_it_is_ready(name: str) -> None:
    """systemd waits for our notification, and does not retry a bad configuration for ever."""
    service = read_unit(name)["Service"]
    assert ("notify", "on-failure", "2") == (
        service["Type"],
        service["Restart"],
        service["RestartPreventExitStatus"],
    )
    assert service["ExecStart"].startswith(f"{BINARY} serve --config /etc/vfiouser-oob/")


@pytest.mark.parametrize("name", ["vfiouser-oob.service", "vfiouser-oob@.service"])
def test_a_service_may_make_sockets_and_be_reloaded(name: str) -> None:
    """The directory's group is made, the service is in it and may write there; a reload tells whether it worked."""
    service = read_unit(name)["Service"]
    assert ("-/run/vfio-user", "kvm vfio-user") == (service["ReadWritePaths"], service["SupplementaryGroups"])
    (mode, owner, group) = re.findall(
        r"^d /run/vfio-user (\S+) (\S+) (\S+)", (UNITS / "vfiouser-oob.tmpfiles").read_text(), re.MULTILINE
    )[0]
    assert ("0775", "root", "vfio-user") == (mode, owner, group)
    made = re.findall(r"^g (\S+)", (UNITS / "vfiouser-oob.sysusers").read_text(), re.MULTILINE)
    assert {"kvm", "vfio-user"} == set(made)
    where = "" if "@" not in name else " --control-socket /run/vfiouser-oob-%i/control.sock"
    assert f"{BINARY} reload{where}" == service["ExecReload"]
    assert where.strip() in service["ExecStart"]
    assert "30s" == service["WatchdogSec"]


@pytest.mark.parametrize("name", ["vfiouser-oob.socket", "vfiouser-oob@.socket"])
def test_sockets_are_for_the_group_of_vmms(name: str) -> None:
    """The sockets are not in a directory that goes with the service, and QEMU's group may connect."""
    section = read_unit(name)["Socket"]
    assert ("0660", "kvm") == (section["SocketMode"], section["SocketGroup"])
    assert section["ListenStream"].startswith("/run/vfio-user/")


def test_shipped_socket_and_configuration_fit_together() -> None:
    """The path in the socket unit is that of a function in the shipped configuration, so it is found by path."""
    config = tomllib.loads((ROOT / "packaging" / "config.toml").read_text())
    paths = [function["socket"] for function in config["function"]]
    assert read_unit("vfiouser-oob.socket")["Socket"]["ListenStream"] in paths


def test_template_names_its_socket_after_the_function() -> None:
    """An instance's socket carries the function's name, by which the daemon finds it."""
    assert "%i" == read_unit("vfiouser-oob@.socket")["Socket"]["FileDescriptorName"]


def test_backend_description() -> None:
    """The JSON description names the program that the units start."""
    description = json.loads((ROOT / "packaging" / "50-vfiouser-oob.json").read_text())
    assert {"description", "type", "binary", "tags"} <= set(description)
    assert BINARY == description["binary"]
