"""A server that could not be used is taken for usable again once another socket is in its place."""

from __future__ import annotations

import socket
from pathlib import Path

from vfiouser_oob.devices.server_watch import ServerWatch


def listening(path: Path) -> socket.socket:
    """A server's socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_lost_until_found(tmp_path: Path) -> None:
    """The reason and the time stay until the server was used again; another reason does not change the time."""
    path = tmp_path / "up.sock"
    with listening(path):
        watch = ServerWatch(path)
        assert (None, None) == (watch.reason, watch.since)
        watch.lost("nobody listens")
        since = watch.since
        watch.lost("still nobody")
        assert ("still nobody", since) == (watch.reason, watch.since)
        watch.found()
        assert (None, None) == (watch.reason, watch.since)


def test_a_server_that_never_was_there(tmp_path: Path) -> None:
    """Without a socket no client can be served, whether or not one has tried; it is looked for at each question."""
    path = tmp_path / "up.sock"
    watch = ServerWatch(path)
    assert "no vfio-user server's socket is at" in (watch.reason or "")
    assert watch.since
    with listening(path):
        assert watch.reason is None


def test_a_server_that_was_started_anew_is_worth_a_try(tmp_path: Path) -> None:
    """A dead server's socket says nothing new; the socket of another one does."""
    path = tmp_path / "up.sock"
    with listening(path):
        pass
    watch = ServerWatch(path)
    watch.lost("it has gone")
    assert "it has gone" == watch.reason
    path.unlink()
    assert "it has gone" == watch.reason
    with listening(path):
        assert watch.reason is None
