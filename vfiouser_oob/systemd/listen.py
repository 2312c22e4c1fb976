"""What the service manager hands over, as sd_listen_fds_with_names(3) says: sockets that it opened for us, and
descriptors that a process before us gave it to keep (`fd_store`).

The manager owns the files of its sockets: whoever got one from here must never unlink its path.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass

from vfiouser_oob.config.errors import ConfigError
from vfiouser_oob.systemd.fd_store import PREFIX
from vfiouser_oob.transport.fds import ForeignFd, OwnedFd, close_fds

FIRST_FD = 3
# More than a process may have; a damaged LISTEN_FDS must not make us walk through two thousand million descriptors.
FDS_MAX = 1 << 20
#: Name of the socket for metrics, the only one that may be of TCP.
METRICS_NAME = "metrics"
_LOCAL = frozenset({socket.AF_UNIX})
_ANY = frozenset({socket.AF_UNIX, socket.AF_INET, socket.AF_INET6})
_SOURCE = "sockets from systemd"
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass(frozen=True, slots=True)
class Inherited:
    """What came with the environment.

    Args:
        sockets: descriptors of listening UNIX stream sockets by name, close-on-exec, the caller's.
        kept: what a process before us gave to be kept, by name.
    """

    sockets: dict[str, list[int]]
    kept: dict[str, OwnedFd]


def inherited_sockets(
    environ: MutableMapping[str, str] = os.environ,
    *,
    pid: int | None = None,
    first_fd: int = FIRST_FD,
    unset: bool = True,
) -> dict[str, list[int]]:
    """Take over the sockets that came with the environment; what was kept is closed.

    Args and errors are those of `inherited_descriptors`.

    Returns:
        Descriptors by name.
    """
    inherited = inherited_descriptors(environ, pid=pid, first_fd=first_fd, unset=unset)
    close_fds(inherited.kept.values())
    return inherited.sockets


def inherited_descriptors(
    environ: MutableMapping[str, str] = os.environ,
    *,
    pid: int | None = None,
    first_fd: int = FIRST_FD,
    unset: bool = True,
) -> Inherited:
    """Take over the descriptors that came with the environment.

    Args:
        environ: the environment that describes them.
        pid: the process that they must be meant for; None = ours.
        first_fd: number of the first one.
        unset: whether to remove the variables, so that child processes do not take the descriptors for theirs.

    Returns:
        Sockets of units, and what was kept, of which nothing is known but the names. Both are empty when nothing was
        passed, or when it was meant for another process.

    Raises:
        ConfigError: the variables contradict themselves, or a descriptor that was not kept is not such a socket.
    """
    names = _announced(environ, os.getpid() if pid is None else pid, unset)
    sockets: dict[str, list[int]] = {}
    kept: dict[str, OwnedFd] = {}
    try:
        for fd, name in enumerate(names, start=first_fd):
            if name.startswith(PREFIX):
                _take_kept(kept, name, fd)
                continue
            families = _ANY if name == METRICS_NAME else _LOCAL
            check_listening(fd, f"socket {name!r} (descriptor {fd})", _SOURCE, families)
            os.set_inheritable(fd, False)
            sockets.setdefault(name, []).append(fd)
    except BaseException:
        close_fds(kept.values())
        raise
    return Inherited(sockets, kept)


def announced(environ: MutableMapping[str, str] = os.environ) -> list[tuple[int, str]]:
    """Descriptors that the environment announces to this process, whatever they are; the caller owns them.

    Args:
        environ: the environment; the variables are removed.

    Returns:
        Their numbers and names.

    Raises:
        ConfigError: the variables contradict themselves, or a descriptor is none.
    """
    found = list(enumerate(_announced(environ, os.getpid(), True), start=FIRST_FD))
    for fd, name in found:
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ConfigError(f"descriptor {name!r} ({fd}) is none: {error.strerror}", _SOURCE) from error
    return found


def _announced(environ: MutableMapping[str, str], pid: int, unset: bool) -> list[str]:
    """The names of the descriptors that the environment announces to a process."""
    values = {name: environ.get(name, "") for name in _VARIABLES}
    if unset:
        for name in _VARIABLES:
            environ.pop(name, None)
    if values["LISTEN_PID"] != str(pid):
        return []
    text = values["LISTEN_FDS"]
    if not text.isdecimal() or int(text[:10]) > FDS_MAX:
        raise ConfigError(f"LISTEN_FDS must be a number up to {FDS_MAX}, got {text[:40]!r}", _SOURCE)
    count = int(text)
    names = values["LISTEN_FDNAMES"].split(":") if values["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise ConfigError(f"LISTEN_FDS says {count} but LISTEN_FDNAMES has {len(names)} names", _SOURCE)
    return names


def _take_kept(kept: dict[str, OwnedFd], name: str, fd: int) -> None:
    """Take a descriptor over; of several with one name the last counts, which was kept last."""
    try:
        os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError(f"kept descriptor {name!r} ({fd}) is none: {error.strerror}", _SOURCE) from error
    old = kept.pop(name, None)
    if old is not None:
        old.close()
    kept[name] = ForeignFd(fd)


def check_listening(
    fd: int, label: str, source: str | None = None, families: frozenset[socket.AddressFamily] = _LOCAL
) -> None:
    """Make sure that a descriptor is a listening stream socket, a UNIX one if nothing else is said.

    Args:
        fd: descriptor number; it stays the caller's.
        label: what to call it in a message.
        source: where it came from, for the message.
        families: which it may be of.

    Raises:
        ConfigError: it is something else.
    """
    wanted = "a listening UNIX stream socket" if families == _LOCAL else "a listening stream socket, UNIX or TCP"
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConfigError(f"{label} must be {wanted}, but is not a socket", source)
    except OSError as error:
        raise ConfigError(f"{label} must be {wanted}: {error.strerror}", source) from error
    sock = socket.socket(fileno=fd)
    try:
        family, kind = sock.family, sock.type
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        sock.detach()
    if family not in families or kind != socket.SOCK_STREAM or not listening:
        is_what = f"{family.name} {kind.name}{'' if listening else ' that does not listen'}"
        raise ConfigError(f"{label} must be {wanted}, but is {is_what}", source)
