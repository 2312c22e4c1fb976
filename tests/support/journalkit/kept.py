"""A service that finds what was kept for it, and keeps it: `python -m journalkit.kept REPORT COUNT`.

It appends a line to the file REPORT: what it was given, and whether COUNT descriptors and a journal are kept now.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import trio

from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.systemd.fd_store import FdStore
from vfiouser_oob.systemd.listen import inherited_descriptors
from vfiouser_oob.systemd.notify import Notifier
from vfiouser_oob.transport.fds import OwnedFd, close_fds

JOURNAL = "vfu/journal"


async def main(report: Path, count: int) -> None:
    """Serve until killed."""
    kept = inherited_descriptors().kept
    found = sorted(kept)
    notifier = Notifier.from_environment()
    store = FdStore.from_environment(notifier.mailbox)
    for name in found:
        store.adopt(name)
    if JOURNAL in kept:
        fd = kept.pop(JOURNAL)
        journal = Journal.resume(fd, read_journal(fd))
    else:
        journal = Journal.create("kept")
        store.keep(JOURNAL, journal)
    starts = len(journal.records.get(1, {}))
    journal.put(1, starts.to_bytes(2, "big"), b"started")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(notifier.run)
        ends = []
        for number in range(count):
            name = f"vfu/f{number}/main"
            if name not in kept:
                left, right = socket.socketpair()
                with OwnedFd(left.detach()) as fd:
                    store.keep(name, fd, watched=True)
                ends.append(right)
        whole = await store.check()
        with report.open("a") as file:
            line = {"pid": os.getpid(), "found": found, "starts": starts, "whole": whole, "limit": store.limit}
            file.write(json.dumps(line) + "\n")
        notifier.ready()
        try:
            await trio.sleep_forever()
        finally:
            close_fds(kept.values())


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
