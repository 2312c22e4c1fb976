"""A real systemd reloads the daemon, adds a function without a change of its unit, and restarts one that hangs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import systemdbed
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.observability.status import StatusReport

ROOT = Path(__file__).resolve().parents[2]
NAME = "vfiouser-oob.service"
pytestmark = [
    pytest.mark.skipif(systemdbed.why_not() is not None, reason=str(systemdbed.why_not())),
    pytest.mark.slow,
]


class Unit:
    """The service under its manager, and what its daemon says.

    Args:
        place: directory of its sockets and its configuration.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.manager: systemdbed.Manager

    def text(self) -> str:
        """The unit; what matters is as in the one that we ship."""
        path = os.pathsep.join(str(ROOT / part) for part in ("", "protocol", "agents"))
        program = f"{sys.executable} -m vfiouser_oob"
        return f"""
[Service]
Type=notify
NotifyAccess=main
Environment=PYTHONPATH={path}
ExecStart={program} serve --config {self.place}/config.toml
ExecReload={program} reload --control-socket {self.place}/control.sock
WatchdogSec=3s
TimeoutAbortSec=1s
Restart=on-failure
RestartSec=0
"""

    def write(self, *names: str, more: str = "") -> None:
        """Write the configuration."""
        tables = "".join(
            f'[[function]]\nname = "{name}"\nsocket = "{self.place}/{name}.sock"\n'
            'device = { kind = "model", model = "test" }\n'
            for name in names
        )
        (self.place / "config.toml").write_text(
            f'[daemon]\ncontrol_socket = "{self.place}/control.sock"\n{more}{tables}'
        )

    def status(self) -> StatusReport:
        """Ask the daemon."""
        with ControlClient(self.place / "control.sock") as client:
            return client.status()

    @property
    def names(self) -> list[str]:
        """Its functions."""
        return [function["name"] for function in self.status()["functions"] if function["phase"] == "listening"]

    def shown(self, name: str) -> str:
        """A property of the unit."""
        return self.manager.ctl("show", "--value", f"--property={name}", NAME)


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    """The service, started with one function."""
    made = Unit(tmp_path)
    made.write("f0")
    with systemdbed.running(tmp_path, {NAME: made.text()}) as manager:
        made.manager = manager
        manager.ctl("start", NAME)
        yield made


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that systemd does and announces to nobody here."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_reload_and_watchdog(unit: Unit) -> None:
    """A reload succeeds or fails as a whole command does; a daemon that hangs is ended and started again."""
    pid = unit.shown("MainPID")
    unit.write("f0", "f1")
    unit.manager.ctl("reload", NAME)
    assert ["f0", "f1"] == unit.names
    unit.write("f0", more="colour = 'red'\n")
    unit.manager.ctl("reload", NAME, check=False)
    assert "exit-code" == unit.shown("ReloadResult")
    assert ["f0", "f1"] == unit.names
    assert ("active", pid, "0") == (unit.shown("ActiveState"), unit.shown("MainPID"), unit.shown("NRestarts"))
    # It goes on telling that it lives.
    first = unit.shown("WatchdogTimestampMonotonic")
    until(lambda: unit.shown("WatchdogTimestampMonotonic") > first)
    unit.write("f0")
    unit.manager.ctl("kill", "--signal=STOP", NAME)
    until(lambda: unit.shown("NRestarts") == "1" and unit.shown("ActiveState") == "active")
    assert ["f0"] == unit.names
