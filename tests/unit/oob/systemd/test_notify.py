"""Messages to the service manager, received on a real datagram socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from vfiouser_oob.systemd.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_messages(tmp_path: Path, abstract: bool) -> None:
    """Each call is one datagram of KEY=VALUE lines, on a path or in the abstract namespace."""
    name = f"vfiouser-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(5)
        notifier = Notifier(("@" if abstract else "") + name)
        assert notifier.ready("2 functions\nlistening")
        assert notifier.status("busy")
        assert notifier.stopping()
        expected = [b"READY=1\nSTATUS=2 functions listening", b"STATUS=busy", b"STOPPING=1"]
        assert expected == [manager.recv(1000) for _ in expected]


@pytest.mark.parametrize(("unset", "left"), [(True, {"A": "b"}), (False, {"A": "b", "NOTIFY_SOCKET": "/x"})])
def test_the_variable_is_not_passed_on(unset: bool, left: dict[str, str]) -> None:
    """Taking the address removes the variable, so that a child cannot speak for us, unless asked not to."""
    environ = {"A": "b", "NOTIFY_SOCKET": "/x"}
    Notifier.from_environment(environ, unset=unset)
    assert left == environ


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_a_watchdog_that_is_meant_for_us(environ: dict[str, str], seconds: float | None) -> None:
    """How often it wants to hear from us, and no child takes that for its own."""
    given = dict(environ)
    assert seconds == Notifier.from_environment(given).watchdog_s
    assert {} == given


def test_we_live(tmp_path: Path) -> None:
    """The message that the watchdog waits for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        assert Notifier(str(tmp_path / "notify")).alive()
        assert b"WATCHDOG=1" == manager.recv(1000)


def test_nobody_listens() -> None:
    """Without a service manager every call is a quiet no."""
    assert not Notifier.from_environment({}).ready()


def test_a_manager_that_has_gone_does_no_harm(tmp_path: Path) -> None:
    """A socket that cannot be reached is a warning, not an error."""
    assert not Notifier(str(tmp_path / "gone")).ready()


def fill(notifier: Notifier) -> int:
    """Send until the manager's queue is full; returns how many messages it took."""
    sent = 0
    while notifier.status(f"x{sent}"):
        sent += 1
        assert sent < 100_000
    assert sent > 0
    return sent


def test_a_manager_that_does_not_read_cannot_block_us(tmp_path: Path) -> None:
    """When the manager's queue is full the message is put off and the caller goes on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        fill(Notifier(str(tmp_path / "n")))


async def test_what_was_put_off_arrives_once_in_order(tmp_path: Path) -> None:
    """READY=1 that met a full queue gets through as soon as the manager reads, behind what came before it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.setblocking(False)
        notifier = Notifier(str(tmp_path / "n"))
        sent = fill(notifier)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(notifier.run)
            await trio.testing.wait_all_tasks_blocked()
            assert not notifier.ready()
            assert not notifier.stopping()
            received: list[bytes] = []
            while len(received) < sent + 3:
                await trio.lowlevel.wait_readable(manager)
                received.append(manager.recv(1000))
            nursery.cancel_scope.cancel()
        assert [f"STATUS=x{n}".encode() for n in range(sent + 1)] + [b"READY=1", b"STOPPING=1"] == received
