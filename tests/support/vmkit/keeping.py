"""A service manager in memory that keeps whatever it is given, and a daemon's part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vfiouser_oob.server.survival import Survival
from vfiouser_oob.systemd.fd_store import FdStore
from vfiouser_oob.systemd.mailbox import Mailbox
from vfiouser_oob.transport.fds import HasFileno, OwnedFd, close_fds


class KeepingManager(Mailbox):
    """A service manager that keeps everything."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.kept: dict[str, OwnedFd] = {}

    def send(self, data: bytes, fds: Sequence[HasFileno] = ()) -> bool:
        """Do what the message says."""
        fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
        name = fields["FDNAME"]
        if "FDSTOREREMOVE" in fields:
            if name in self.kept:
                self.kept.pop(name).close()
        else:
            self.kept[name] = OwnedFd(os.dup(fds[0].fileno()))
        return True

    @contextmanager
    def daemon(self) -> Iterator[Survival]:
        """A daemon is started with what is kept."""
        survival = Survival(FdStore(self, 100), {name: fd.duplicate() for name, fd in self.kept.items()})
        survival.works = True
        try:
            yield survival
        finally:
            survival.close()

    def close(self) -> None:
        """Give up what is kept."""
        close_fds(self.kept.values())
        self.kept = {}
