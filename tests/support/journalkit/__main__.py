"""Go on writing a journal from where another process left it, until killed: `python -m journalkit JOURNAL PAGE SEED N`.

JOURNAL and PAGE are inherited descriptors; N is the number of steps that are done already.
"""

from __future__ import annotations

import os
import sys
from itertools import islice

from journalkit import change, steps
from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.transport.fds import OwnedFd


def main(journal_number: int, page_number: int, seed: int, done: int) -> None:
    """Write until killed, a dot for a hundred steps; each step is a command, answered when it is written."""
    fd = OwnedFd(journal_number)
    journal = Journal.resume(fd, read_journal(fd))
    page = StreamMemory.resume(OwnedFd(page_number))
    os.write(1, b"writing\n")
    for number, step in enumerate(islice(steps(seed), done, None)):
        page.begin()
        change(journal, *step)
        page.commit()
        if number % 100 == 99:
            os.write(1, b".")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
