"""The process's standard streams and signals, as supervisors and shells leave them: closed, full, in another locale."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfiouser_oob.cli.main import COMMANDS
from vfiouser_oob.control.client import ControlClient

ROOT = Path(__file__).resolve().parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "protocol", "agents"))}
#: Python as it is where neither the locale nor Python's own rescue of the C locale gives UTF-8.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CONFIG = """\
[[function]]
name = "f0"
socket = "{directory}/é.sock"
device = {{ kind = "model", model = "test" }}
"""
VERSION = struct.pack("<HHIII", 1, 1, 20, 0, 0) + bytes(4)


def command(*arguments: str | Path) -> list[str]:
    """The command line of a command."""
    return [sys.executable, "-m", "vfiouser_oob", *map(str, arguments)]


@contextmanager
def daemon(
    directory: Path, stderr: Any, *, shell: str = "", more: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon with one function, ready to serve; it has to end in order."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(60)
        arguments: list[str | Path] = ["serve", "--socket-path", directory / "f0.sock", "--device", "model:test"]
        line = command(*arguments, "--control-socket", directory / "control.sock", "--state-directory", "none", *more)
        if shell:
            line = ["bash", "-c", f'exec "$@" {shell}', "bash", *line]
        environ = {**ENVIRON, "NOTIFY_SOCKET": str(directory / "notify")}
        with subprocess.Popen(line, env=environ, stderr=stderr) as process:
            try:
                assert manager.recv(1000).startswith(b"READY=1")
                yield process
                process.terminate()
                assert 0 == process.wait(60)
            finally:
                process.kill()


def negotiate(path: Path) -> socket.socket:
    """Connect and have VERSION answered."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(60)
    client.connect(str(path))
    client.sendall(VERSION)
    header = client.recv(16, socket.MSG_WAITALL)
    assert (1, 0) == struct.unpack("<2xHIII", header)[0::3]
    return client


def test_nobody_reads_the_log(tmp_path: Path) -> None:
    """With a full pipe as standard error, clients are served and the daemon ends in order."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    with daemon(tmp_path, writer, more=["--log-level", "debug"]):
        for _ in range(50):
            negotiate(tmp_path / "f0.sock").close()
        with ControlClient(tmp_path / "control.sock") as control:
            assert 1 == len(control.status()["functions"])
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("shell", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, shell: str) -> None:
    """A daemon without standard streams serves, and nothing that is meant for them reaches a client."""
    with daemon(tmp_path, None, shell=shell, more=["--log-level", "debug"]) as process:
        for fd in range(3):
            target = os.readlink(f"/proc/{process.pid}/fd/{fd}")
            assert "socket" not in target
        client = negotiate(tmp_path / "f0.sock")
        client.close()


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (signal.SIGHUP, b"reload refused"),
        (signal.SIGUSR1, b"signal ignored signal=SIGUSR1"),
        (signal.SIGUSR2, b"signal ignored signal=SIGUSR2"),
    ],
)
def test_signals_without_meaning(tmp_path: Path, number: signal.Signals, answer: bytes) -> None:
    """A signal that asks for nothing we have is a line in the log, and ends nothing."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as log, daemon(tmp_path, writer) as process:
        os.close(writer)
        process.send_signal(number)
        silent = threading.Timer(30, process.kill)  # so that the log ends
        silent.start()
        found = any(answer in line for line in log)
        silent.cancel()
        assert found, "the log ended"
        negotiate(tmp_path / "f0.sock").close()


@pytest.mark.parametrize("name", [entry.name for entry in COMMANDS])
def test_help_in_any_locale(name: str) -> None:
    """Where the locale has only ASCII, `--help` is printed all the same."""
    done = subprocess.run(command(name, "--help"), env={**ENVIRON, **ASCII}, capture_output=True, check=False)
    assert (0, b"") == (done.returncode, done.stderr)


def test_names_and_errors_in_any_locale(tmp_path: Path) -> None:
    """What a locale cannot write is escaped, in what is printed and in errors."""
    config = tmp_path / "größe.toml"
    config.write_text(
        f'[[function]]\nname = "f0"\nsocket = "{tmp_path}/é.sock"\ndevice = {{kind = "model", model = "test"}}\n'
    )
    environ = {**ENVIRON, **ASCII}
    done = subprocess.run(command("check-config", config), env=environ, capture_output=True, check=False)
    assert (0, b"") == (done.returncode, done.stderr)
    config.write_text("nothing = 1\n")
    done = subprocess.run(command("check-config", config), env=environ, capture_output=True, check=False)
    assert 2 == done.returncode
    assert b"internal error" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("serve",), ("serve", "--no-such-option"), ("status", "--control-socket", "/gone")]
)
def test_the_journal_learns_that_it_is_an_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A fatal line has its priority where the journal reads it."""
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        environ = {**ENVIRON, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        done = subprocess.run(command(*arguments), env=environ, stderr=stream, check=False)
        assert done.returncode
        lines = (tmp_path / "journal").read_text().splitlines()
    assert lines
    assert all(line.startswith("<3>vfiouser-oob") for line in lines)
