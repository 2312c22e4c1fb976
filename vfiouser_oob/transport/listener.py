"""Listening UNIX sockets: made, taken over, checked, and removed again if they are ours.

A socket is made in a directory of its own that nobody else can look into, gets its group and mode there, listens, and
only then appears under its name. So whoever else may write to the directory can neither put a link in the place of a
file whose owner we are about to change, nor meet a socket that does not listen yet. (The kernel goes on calling it by
the first name, and so does `ss`.)
"""

from __future__ import annotations

import errno
import grp
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio


class ListenError(OSError):
    """A socket cannot be listened on; the text says which, why and what would help."""


#: Out of descriptors or memory: what to do is to wait until some are given back, for so many seconds at a time.
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
EXHAUSTED_WAIT_S = 0.1
#: The client left before it was accepted, or a rule of the system refused it: the next one may be there already.
_NEXT_PLEASE = frozenset({errno.ECONNABORTED, errno.EPERM, errno.EPROTO})
#: QEMU connects once per device; a short queue is enough for the next client to wait in.
_BACKLOG = 16
#: What a socket is called until it listens.
_PRIVATE_NAME = "s"


class Listener:
    """A listening socket and the duty to remove its file, if we made it.

    Whether an inherited socket blocks is its owner's affair, who may go on using it, and is left as it is.

    Args:
        sock: the listening socket; owned from now on.
        path: the file that we created, or None for a socket that somebody else made.
        lasting: whether a socket that is of no use any more is tried again now and then, for an owner that must not end
            with it.
    """

    def __init__(self, sock: socket.socket, path: Path | None, *, lasting: bool = False) -> None:
        self._lasting = lasting
        if path is not None:
            sock.setblocking(False)
        self.sock = sock
        self._threads = trio.CapacityLimiter(1)
        self._path = path
        self._inode = _inode(path) if path is not None else None

    @property
    def address(self) -> str:
        """Where clients connect, for logs and `status`."""
        if self._path is not None:
            return str(self._path)
        name = self.sock.getsockname()
        return name if isinstance(name, str) and name else "(inherited socket)"

    async def next_client(self, tell: Callable[[str], None]) -> socket.socket:
        """Wait for a client, also while none can be taken.

        Args:
            tell: takes in words why none can be taken now; it is called each time that this was tried in vain.

        Raises:
            OSError: the socket is of no use any more, and is not a lasting one.
        """
        while True:
            try:
                sock = await self.accept()
            except OSError as error:
                if error.errno in _NEXT_PLEASE:
                    continue
                tell(error.strerror or str(error))
                if error.errno not in EXHAUSTED and not self._lasting:
                    raise
                await trio.sleep(EXHAUSTED_WAIT_S)
            else:
                if sock is not None:
                    return sock

    async def accept(self) -> socket.socket | None:
        """Wait for a client, once.

        Returns:
            The connected socket; None when there is no client after all.

        Raises:
            OSError: none can be taken now; one of `EXHAUSTED` if others have to give something back first.
        """
        await trio.lowlevel.wait_readable(self.sock)
        try:
            if os.get_blocking(self.sock.fileno()):
                return await self._accept_in_thread()
            return self.sock.accept()[0]
        except BlockingIOError:
            return None

    async def _accept_in_thread(self) -> socket.socket | None:
        """Accept on a socket that blocks: somebody else who has it may be quicker, and then we wait for the next."""
        given_up = False

        def accept() -> socket.socket | None:
            sock, _ = self.sock.accept()
            if given_up:
                sock.close()
                return None
            return sock

        try:
            return await trio.to_thread.run_sync(accept, limiter=self._threads, abandon_on_cancel=True)
        except trio.Cancelled:
            given_up = True
            raise

    @property
    def identity(self) -> str:
        """Which file it is, for whoever takes the socket over; empty if it is none of ours."""
        return "" if self._inode is None else f"{self._inode[0]:x}-{self._inode[1]:x}"

    def leave(self) -> None:
        """Leave the file to another process, which has the socket."""
        self._path = None

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
    number = None if group is None else _group_id(group)
    _clear_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _private_directory(path) as (private, parent):
            sock.bind(f"/proc/self/fd/{private}/{_PRIVATE_NAME}")
            try:
                _permit(private, mode, number)
                sock.listen(_BACKLOG)
                # Unlike a rename this takes nobody's place.
                os.link(_PRIVATE_NAME, path.name, src_dir_fd=private, dst_dir_fd=parent)
            except _PermissionsRefused as error:
                wanted = f"mode {mode:#o}" + (f" and group {group}" if group is not None else "")
                raise ListenError(f"cannot give {path} {wanted}: {error}") from error
            finally:
                os.unlink(_PRIVATE_NAME, dir_fd=private)
    except ListenError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise ListenError(_bind_advice(path, error)) from error
    return Listener(sock, path)


class _PermissionsRefused(Exception):
    """The system does not let us give a file away."""


def _permit(directory: int, mode: int, group: int | None) -> None:
    try:
        if group is not None:
            os.chown(_PRIVATE_NAME, -1, group, dir_fd=directory, follow_symlinks=False)
        os.chmod(_PRIVATE_NAME, mode, dir_fd=directory)
    except OSError as error:
        raise _PermissionsRefused(error.strerror) from error


@contextmanager
def _private_directory(path: Path) -> Iterator[tuple[int, int]]:
    """Make a directory beside a file that nobody else can look into, for a moment.

    Args:
        path: the file.

    Yields:
        Descriptors of the new directory and of its parent.

    Raises:
        OSError: it cannot be made, or somebody put another one in its place.
    """
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = f".{secrets.token_hex(8)}"
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            private = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                status = os.fstat(private)
                if status.st_uid != os.geteuid() or status.st_mode & 0o077:
                    raise OSError(errno.EPERM, f"somebody else is at work in {path.parent}")
                yield private, parent
            finally:
                os.close(private)
        finally:
            os.rmdir(name, dir_fd=parent)
    finally:
        os.close(parent)


def adopt_socket(fd: int, *, local: bool = True) -> socket.socket:
    """Take over an inherited stream socket, listening or connected.

    Args:
        fd: its descriptor.
        local: it must be a UNIX socket, whose peers can be told apart.

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
    if (local and sock.family != socket.AF_UNIX) or sock.type != socket.SOCK_STREAM:
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
        raise ListenError(f"{path} exists and is not a socket; remove it or choose another path")
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
        errno.EROFS: f"cannot create a socket in {path.parent}, which is read-only",
        errno.EEXIST: "another process has just taken it",
    }
    reason = advice.get(error.errno or 0) or error.strerror or str(error)
    return f"cannot listen on {path}: {reason}"


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ListenError(f"group {group!r} does not exist; create it or set another socket_group") from None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
