"""What a process has open, for tests that count it."""

from __future__ import annotations

import gc
import os

from vfiouser_oob.transport.reaper import REAPER


def open_fds() -> dict[int, str]:
    """What this process has open and will not close soon: descriptor to target, without the listing's own."""
    gc.collect()  # what earlier tests left to the collector must not go between two listings
    assert REAPER.settle(10)
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            pass
    return found
