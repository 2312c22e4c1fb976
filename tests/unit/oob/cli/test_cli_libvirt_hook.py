"""The hook as libvirt calls it: a domain on standard input, a domain or nothing on standard output, words for virsh."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from libvirtbed.words import domain_of, status_of
from vfiouser_oob.cli import libvirt_hook
from vfiouser_oob.cli.main import main
from vfiouser_oob.control.server import AccessPolicy, ControlServer
from vfiouser_oob.server.administration import Administration
from vfiouser_oob.transport.listener import listen_on_path
from vfiouser_oob.vm.domain_xml import LibvirtDomain

HOOK = Path(__file__).resolve().parents[4] / "packaging/libvirt/vfiouser-oob"
CONFIG = """
[daemon]
control_socket = "{folder}/control"
[[vm]]
name = "web"
functions = ["nvme0"]
monitor = "{folder}/monitor"
[[function]]
name = "nvme0"
socket = "{folder}/nvme0.sock"
device = {{ kind = "model", model = "nvme" }}
"""


class Told:
    """Knows what a test says that a daemon knows; the last of several statuses stays."""

    def __init__(self, *statuses: Any) -> None:
        self.statuses = list(statuses)

    @property
    def administration(self) -> Administration:
        """A hook changes nothing."""
        raise AssertionError("asked for a change")

    async def check_migration(self, vm: str, destination: str | None) -> dict[str, Any]:
        """A hook looks at the status only."""
        raise AssertionError("asked for more than the status")

    def metrics(self) -> Any:
        """A hook measures nothing."""
        raise AssertionError("asked for more than the status")

    def migrations(self) -> Any:
        """A hook does not ask what is over."""
        raise AssertionError("asked for more than the status")

    def status(self) -> Any:
        """The next status."""
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def subscribe(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Nothing happens."""
        return trio.open_memory_channel[dict[str, Any]](0)[1]


@contextmanager
def daemon(folder: Path, *statuses: Any) -> Iterator[Path]:
    """A control socket that tells these statuses, one after the other; returns the configuration that names it."""
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=folder))
    scope, listener = trio.CancelScope(), listen_on_path(folder / "control")
    token: list[trio.lowlevel.TrioToken] = []
    started = threading.Event()

    async def serve() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(ControlServer(Told(*statuses), AccessPolicy()).serve, listener.sock.dup())
                started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    started.wait(10)
    try:
        yield config
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join()
        listener.close()


def hook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, operation: str, domain: str
) -> tuple[int, str, str]:
    """Run it; returns its exit code, its output and its errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(domain))
    code = main(["libvirt-hook", "--config", str(config), "web", operation, "begin", "-"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("operation", ["migrate", "restore"])
def test_sockets_are_named_as_they_are_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, operation: str
) -> None:
    """A carrier that has its default path here is named with it."""
    with daemon(tmp_path, status_of()) as config:
        code, out, err = hook(monkeypatch, capsys, config, operation, domain_of("/run/elsewhere"))
        assert (code, err) == (0, "")
        there = LibvirtDomain(out).sockets
        assert there.functions == {"nvme0": tmp_path / "nvme0.sock"}
        assert there.others == {"monitor": tmp_path / "monitor", "dbus_vmstate": Path("/run/vfio-user/web.vmstate")}
        assert hook(monkeypatch, capsys, config, operation, out) == (0, "", "")


@pytest.mark.parametrize(
    ("domain", "status", "words"),
    [
        (domain_of(functions=("nvme0", "x")), status_of(), "has the functions nvme0, x (it has web: nvme0)"),
        (domain_of(carrier=""), status_of(), "the domain has no carrier"),
        (domain_of(), status_of(blocked="of a reason"), "cannot take a state on this host: of a reason"),
        ("nonsense", status_of(), "the domain is no XML"),
    ],
)
def test_what_could_not_run_here_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    domain: str,
    status: Any,
    words: str,
) -> None:
    """One line, which libvirt shows; nothing on standard output, which it would take for a domain."""
    with daemon(tmp_path, status) as config:
        code, out, err = hook(monkeypatch, capsys, config, "migrate", domain)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert words in err


def test_a_host_without_a_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is refused at once."""
    with daemon(tmp_path, status_of()) as config:
        pass
    code, out, err = hook(monkeypatch, capsys, config, "migrate", domain_of())
    assert (code, out) == (1, "")
    assert "no daemon answers" in err


@pytest.mark.parametrize(("operation", "domain"), [("stopped", domain_of()), ("migrate", domain_of(functions=()))])
def test_what_is_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, operation: str, domain: str
) -> None:
    """Other operations, and domains without our functions, pass without a look at anything."""
    assert hook(monkeypatch, capsys, tmp_path / "none", operation, domain) == (0, "", "")


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that looks like a QEMU which waits for the VM."""
    monkeypatch.setattr(libvirt_hook, "PID_FILES", tmp_path)
    with subprocess.Popen(["sh", "-c", "read line", "qemu", "-incoming", "defer"], stdin=subprocess.PIPE) as process:
        (tmp_path / "web.pid").write_text(str(process.pid))
        yield
        process.communicate(b"end\n")


@pytest.mark.usefixtures("waiting")
def test_started_waits_until_qemu_is_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The source begins to send when it returns."""
    qemu = {"pid": 7, "uid": 0, "command": "qemu"}
    met = {"qemu": qemu, "phase": "incoming"}
    statuses = [status_of(), status_of(met), status_of({**met, "carriers": ["dbus-vmstate"]})]
    with daemon(tmp_path, *statuses) as config:
        assert hook(monkeypatch, capsys, config, "started", domain_of()) == (0, "", "")


def test_started_lets_a_vm_boot_that_could_not_migrate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A start is no migration: neither a daemon nor a configuration is looked for."""
    monkeypatch.setattr(libvirt_hook, "PID_FILES", tmp_path)
    assert hook(monkeypatch, capsys, tmp_path / "none", "started", domain_of()) == (0, "", "")


@pytest.mark.usefixtures("waiting")
def test_started_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What is missing is named."""
    monkeypatch.setattr(libvirt_hook, "MEET_S", 0.01)
    with daemon(tmp_path, status_of()) as config:
        code, out, err = hook(monkeypatch, capsys, config, "started", domain_of())
    assert (code, out) == (1, "")
    assert "QEMU has not connected the monitor of VM web (waited for 0.01 s)" in err


@pytest.mark.parametrize(
    ("operation", "domain", "called"),
    [("migrate", domain_of(), True), ("migrate", "<domain/>", False), ("stopped", domain_of(), False)],
)
def test_the_script_passes_on_what_is_ours(tmp_path: Path, operation: str, domain: str, called: bool) -> None:
    """Other domains of the host do not even start our program."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\ncat\n')
    program.chmod(0o755)
    done = subprocess.run(
        [str(HOOK), "web", operation, "begin", "-"],
        input=domain,
        env={"PATH": "/usr/bin:/bin", "VFIOUSER_OOB": str(program)},
        capture_output=True,
        text=True,
        check=True,
    )
    first = f"libvirt-hook --config /etc/vfiouser-oob/config.toml web {operation} begin -\n"
    assert done.stdout == (first + domain.strip() + "\n" if called else "")
