"""Starting a process with descriptors in a row, as sd_listen_fds(3) expects them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence

from vfiouser_oob.transport.fds import HasFileno

FIRST = 3
# The process has to be told its own number, which nobody knows before it is there; exec keeps it.
_SHELL = ("/bin/sh", "-c", '[ -z "$LISTEN_FDS" ] || export LISTEN_PID=$$; exec "$@"', "keep")
_OURS = frozenset({"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "FDSTORE"})


def moves(numbers: Sequence[int], first: int) -> list[tuple[int, int]]:
    """The order in which descriptors are put in a row, so that none is overwritten before it was moved.

    Args:
        numbers: where they are, each once.
        first: where the first one shall be.

    Returns:
        Moves as (from, to), for dup2. A number above all others is used for what goes in a circle; it is the last
        thing that stays open beside them.
    """
    spare = max((*numbers, first + len(numbers))) + 1
    waiting = dict(enumerate(numbers, start=first))  # target to source
    needed = {source: target for target, source in waiting.items()}
    ready = [target for target in waiting if target not in needed]
    done: list[tuple[int, int]] = []
    while waiting:
        if not ready:
            # Only circles are left. A descriptor that is in its place goes round as well: so it becomes inheritable.
            target = next(iter(waiting))
            done.append((target, spare))
            waiting[needed.pop(target)] = spare
            ready.append(target)
        target = ready.pop()
        source = waiting.pop(target)
        done.append((source, target))
        needed.pop(source, None)
        if source in waiting:
            ready.append(source)
    return done


def environment(environ: Mapping[str, str], names: Sequence[str], notify_socket: str, limit: int) -> dict[str, str]:
    """The environment of a process that is given descriptors.

    Args:
        environ: ours.
        names: theirs.
        notify_socket: where it says how far it is, and what is to be kept.
        limit: how many descriptors are kept.
    """
    own = {key: value for key, value in environ.items() if key not in _OURS}
    given = {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)} if names else {}
    return {**own, **given, "NOTIFY_SOCKET": notify_socket, "FDSTORE": str(limit)}


def start(command: Sequence[str], fds: Sequence[HasFileno], environ: Mapping[str, str]) -> int:
    """Start a process that has descriptors in a row from 3 on, and the three standard ones.

    Args:
        command: program, looked up in PATH, and arguments.
        fds: what it gets; they stay the caller's.
        environ: its environment.

    Returns:
        Its process id; it is the caller's to wait for.

    Raises:
        OSError: it cannot be started.
    """
    order = moves([fd.fileno() for fd in fds], FIRST)
    actions: list[tuple[int, int] | tuple[int, int, int]] = [(os.POSIX_SPAWN_DUP2, *move) for move in order]
    row = range(FIRST, FIRST + len(fds))
    actions += [(os.POSIX_SPAWN_CLOSE, number) for number in {to for _, to in order} - set(row)]
    return os.posix_spawn(_SHELL[0], (*_SHELL, *command), environ, file_actions=actions, setsigdef=_signals())


def _signals() -> set[int]:
    """Signals that the process shall not ignore just because we, or Python, do."""
    return {signal.SIGPIPE, signal.SIGXFSZ}
