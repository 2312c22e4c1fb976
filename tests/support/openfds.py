"""What a process has open, for tests that count it."""

from __future__ import annotations

import gc
import os


def open_fds() -> dict[int, str]:
    """What this process has open: descriptor to target, without the listing's own descriptor."""
    gc.collect()  # what earlier tests left to the collector must not go between two listings
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            pass
    return found
