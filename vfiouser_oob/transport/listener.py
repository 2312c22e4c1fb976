"""Listening UNIX sockets: made, taken over, checked, and removed again if they are ours."""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from pathlib import Path


class ListenError(OSError):
    """A socket cannot be listened on; the text says which, why and what would help."""


#: QEMU connects once per device; a short queue is enough for the next client to wait in.
_BACKLOG = 16


class Listener:
    """A listening socket and the duty to remove its file, if we made it.

    Args:
        sock: the listening socket; owned from now on.
        path: the file that we created, or None for a socket that somebody else made.
    """

    def __init__(self, sock: socket.socket, path: Path | None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._path = path
        self._inode = _inode(path) if path is not None else None

    @property
    def address(self) -> str:
        """Where clients connect, for logs and `status`."""
        name = self.sock.getsockname()
        return name if isinstance(name, str) and name else "(inherited socket)"

    def close(self) -> None:
        """Stop listening; the file is removed unless somebody replaced it meanwhile."""
        self.sock.close()
        if self._path is not None and _inode(self._path) == self._inode:
            self._path.unlink(missing_ok=True)


def listen_on_path(path: Path, mode: int = 0o660, group: str | None = None) -> Listener:
    """Create a listening socket.

    A socket file that nobody listens on is a dead process's and is replaced; a live one is left alone.

    Args:
        path: where to listen.
        mode: permission bits of the file.
        group: its group; None keeps ours.

    Raises:
        ListenError: the path is in use, not a socket, or not permitted.
    """
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(os.fspath(path))
    except OSError as error:
        sock.close()
        raise ListenError(_bind_advice(path, error)) from error
    try:
        # Nobody can connect before listen(), so there is no moment with the wrong permissions.
        if group is not None:
            os.chown(path, -1, _group_id(group))
        path.chmod(mode)
        sock.listen(_BACKLOG)
    except ListenError:
        sock.close()
        path.unlink(missing_ok=True)
        raise
    except OSError as error:
        sock.close()
        path.unlink(missing_ok=True)
        wanted = f"mode {mode:#o}" + (f" and group {group}" if group is not None else "")
        raise ListenError(f"cannot give {path} {wanted}: {error.strerror}") from error
    return Listener(sock, path)


def adopt_socket(fd: int) -> socket.socket:
    """Take over an inherited UNIX stream socket, listening or connected.

    Raises:
        ListenError: it is something else, or not open.
    """
    try:
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ListenError(f"descriptor {fd} is not a socket")
        sock = socket.socket(fileno=fd)
    except ListenError:
        raise
    except OSError as error:
        raise ListenError(f"descriptor {fd} is unusable: {error.strerror}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ListenError(f"descriptor {fd} is a socket, but not of AF_UNIX and SOCK_STREAM")
    return sock


def _clear_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ListenError(_bind_advice(path, error)) from error
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(os.fspath(path))
    if result == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif result != errno.ENOENT:
        reason = "another process listens on it" if result in (0, errno.EAGAIN) else os.strerror(result)
        raise ListenError(f"{path} is in use: {reason}; stop that process or choose another path")


def _bind_advice(path: Path, error: OSError) -> str:
    advice = {
        errno.ENOENT: f"the directory {path.parent} does not exist; create it",
        errno.EACCES: f"no permission to create a socket in {path.parent}",
        errno.EADDRINUSE: "it has just been taken by another process",
    }
    reason = advice.get(error.errno or 0) or error.strerror or str(error)
    return f"cannot listen on {path}: {reason}"


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(f"there is no group {group!r}; create it or set another socket_group") from None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
