"""The fork server: `python -m forkserver.server FD`.

It has one thread and no event loop, and imports without running: so a fork of it is as good as a new process.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Sequence

from forkserver.wire import MOST, MOST_FDS, REPORT, Request

#: What nearly every program of ours imports sooner or later.
PRELOADED = (
    "trio",
    "vfiouser_agents.adapters.msgpack_rpc",
    "vfiouser_oob.cli.main",
    "vfiouser_oob.cli.serve",
    "vfiouser_oob.devices.model_backend",
    "vfiouser_oob.lab.vmm",
    "vfiouser_oob.server.daemon",
    "vfiouser_soc.agent.process",
    "vfiouser_soc.command",
    "vfiouser_soc.soc",
)


def main() -> None:
    """Serve requests until the test process is gone."""
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        for module in PRELOADED:
            importlib.import_module(module)
        gc.freeze()
        request, fds = _serve(requests)
    # From here on this is the program.
    _become(request, fds)
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


def _serve(requests: socket.socket) -> tuple[Request, list[int]]:
    """Fork for each request; returns in the child. Ends in the parent when nobody asks any more."""
    poll = select.epoll()
    poll.register(requests, select.EPOLLIN)
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for fd, _ in poll.poll():
            if fd != requests.fileno():
                _report_end(poll, fd, *children.pop(fd))
                continue
            data, fds, _, _ = socket.recv_fds(requests, MOST, MOST_FDS)
            if not data:
                os._exit(0)
            pid = os.fork()
            if not pid:
                poll.close()
                for watched, (_, other) in children.items():
                    os.close(watched)
                    other.close()
                os.close(fds.pop())
                return Request.decode(data), fds
            report = socket.socket(fileno=fds.pop())
            for inherited in fds:
                os.close(inherited)
            watched = os.pidfd_open(pid)
            children[watched] = pid, report
            poll.register(watched, select.EPOLLIN)
            _send(report, pid)


def _report_end(poll: select.epoll, watched: int, pid: int, report: socket.socket) -> None:
    poll.unregister(watched)
    os.close(watched)
    _, status = os.waitpid(pid, 0)
    with report:
        _send(report, os.waitstatus_to_exitcode(status))


def _send(report: socket.socket, number: int) -> None:
    try:
        report.send(REPORT.pack(number), socket.MSG_NOSIGNAL)
    except BrokenPipeError:  # nobody wants to know
        pass


def _become(request: Request, fds: Sequence[int]) -> None:
    """Take on what makes a process: session, descriptors, environment, working directory, arguments."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # They may lie where others of them have to go.
    above = max([*fds, *request.numbers]) + 1
    moved = [_duplicate_above(fd, above) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(moved, request.numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request.environ)
    os.chdir(request.cwd)
    sys.argv = [request.module, *request.arguments]
    sys.orig_argv = [sys.executable, "-m", request.module, *request.arguments]
    sys.path[:] = [path for path in request.environ.get("PYTHONPATH", "").split(os.pathsep) if path] + [
        path for path in sys.path if path
    ]


def _duplicate_above(fd: int, least: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)


if __name__ == "__main__":
    main()
