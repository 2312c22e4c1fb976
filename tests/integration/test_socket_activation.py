"""The daemon under systemd's own launcher: it takes the sockets, says when it is ready, serves, ends in order."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rawclient import GET_INFO, QEMU_CAPABILITIES, VERSION, RawClient
from vfiouser_oob.control.client import ControlClient
from vfiouser_oob.observability.status import StatusReport

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
[daemon]
control_socket = "{directory}/control.sock"
[[function]]
name = "f0"
socket = "{directory}/f0.sock"
device = {{ kind = "model", model = "test" }}
[[function]]
name = "f1"
device = {{ kind = "model", model = "test" }}
"""


@contextmanager
def activated(directory: Path, names: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """systemd-socket-activate, holding f0.sock and f1.sock; the daemon starts with the first connection."""
    launcher = shutil.which("systemd-socket-activate")
    assert launcher is not None, "systemd-socket-activate is missing: apt install systemd"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "protocol", "agents"))
    command = [launcher, f"--listen={directory}/f0.sock", f"--listen={directory}/f1.sock", f"--fdname={names}"]
    command += [f"--setenv=PYTHONPATH={path}", f"--setenv=NOTIFY_SOCKET={directory}/notify"]
    command += [sys.executable, "-m", "vfiouser_oob", "serve", *arguments]
    with (directory / "stderr").open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[trio.socket.SocketType]:
    """The service manager's end of the notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield trio.socket.from_stdlib_socket(sock)


async def connect(path: Path) -> trio.socket.SocketType:
    """Connect as soon as the launcher listens."""
    while True:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            await trio.lowlevel.checkpoint()


async def negotiate(sock: trio.socket.SocketType) -> None:
    """Do what QEMU does first, and see that a function answers."""
    client = RawClient(sock)
    await client.send(client.pack(VERSION, b"\0\0\0\0" + QEMU_CAPABILITIES))
    answer = await client.receive()
    assert (VERSION, 0) == (answer.command, answer.error)
    await client.send(client.pack(GET_INFO, b"\x10\0\0\0" + bytes(12)))
    answer = await client.receive()
    assert (GET_INFO, 0) == (answer.command, answer.error)


def ask_status(path: Path) -> StatusReport:
    """Ask the daemon itself."""
    with ControlClient(path) as client:
        return client.status()


@pytest.mark.parametrize("names", ["f0:f1", "unit.socket:f1"])
async def test_activation(tmp_path: Path, manager: trio.socket.SocketType, names: str) -> None:
    """Sockets are found by name, or by path where the name is the unit's; the paths outlive the daemon."""
    (tmp_path / "config.toml").write_text(CONFIG.format(directory=tmp_path))
    arguments = ("--config", str(tmp_path / "config.toml"))
    with (
        trio.fail_after(30),
        activated(tmp_path, names, *arguments) as process,
        await connect(tmp_path / "f0.sock") as first,
        await connect(tmp_path / "f1.sock") as second,
    ):
        assert b"READY=1\nSTATUS=serving 2 functions" == await manager.recv(1000)
        await negotiate(first)
        await negotiate(second)
        status = await trio.to_thread.run_sync(ask_status, tmp_path / "control.sock")
        assert process.pid == status["daemon"]["pid"]
        for name, function in zip(("f0", "f1"), status["functions"], strict=True):
            client = function["client"]
            assert client is not None
            expected = (name, "attached", str(tmp_path / f"{name}.sock"), os.getpid())
            assert expected == (function["name"], function["phase"], function["socket"], client["pid"])
        process.send_signal(signal.SIGTERM)
        assert (await manager.recv(1000)).startswith(b"STOPPING=1")
        code = await trio.to_thread.run_sync(process.wait)
    errors = (tmp_path / "stderr").read_text()
    assert 0 == code, errors
    assert "Traceback" not in errors
    # The launcher owns these files; only what the daemon made itself is gone.
    assert (tmp_path / "f0.sock").is_socket()
    assert (tmp_path / "f1.sock").is_socket()
    assert not (tmp_path / "control.sock").exists()


async def test_a_socket_that_fits_no_function(tmp_path: Path, manager: trio.socket.SocketType) -> None:
    """Where a unit and the configuration do not fit together, that function is a failed one, and the others serve."""
    text = CONFIG.format(directory=tmp_path).replace(f'socket = "{tmp_path}/f0.sock"\n', "")
    (tmp_path / "config.toml").write_text(text)
    arguments = ("--config", str(tmp_path / "config.toml"))
    with (
        trio.fail_after(30),
        activated(tmp_path, "f0:other", *arguments) as process,
        await connect(tmp_path / "f0.sock") as client,
    ):
        assert b"READY=1\nSTATUS=serving 1 function; 1 failed" == await manager.recv(1000)
        await negotiate(client)
        status = await trio.to_thread.run_sync(ask_status, tmp_path / "control.sock")
        good, bad = status["functions"]
        assert ("f0", "attached", None) == (good["name"], good["phase"], good["failed"])
        assert ("f1", "failed") == (bad["name"], bad["phase"])
        pattern = r"function 'f1' has no socket configured, .*'other' at .*/f1\.sock\); give it the line `socket.*"
        assert re.fullmatch(pattern, str(bad["failed"]))
        process.send_signal(signal.SIGTERM)
        code = await trio.to_thread.run_sync(process.wait)
    errors = (tmp_path / "stderr").read_text()
    assert 0 == code
    assert re.search(r"systemd passed a socket that fits no function socket=.*other.*f1\.sock", errors)
