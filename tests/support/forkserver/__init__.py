"""Our programs as real processes without the half second that each would spend on importing itself.

A test starts hundreds of daemons, simulators and agents, and most of a start is imports. One process per pytest worker
has done those imports; each program is a fork of it. It has a pid, a session, an environment and descriptors of its
own, it is killed as any process is, and it ends with a status of its own. Only its `/proc/PID/cmdline` is that of the
fork server, so what a test says about the command line itself needs `subprocess`.

`Forked` has what tests use of `subprocess.Popen`; `start_process` has the shape that the demo's `running` starts
processes with, and returns what has the methods of `trio.Process`.
"""

from __future__ import annotations

from forkserver.client import Forked, fork_program, start_process

__all__ = ["Forked", "fork_program", "start_process"]
