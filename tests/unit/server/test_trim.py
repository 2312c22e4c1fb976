"""Memory that a client made us use goes back to the system."""

from __future__ import annotations

import subprocess
import sys

from vfiouser_oob.server.trim import give_back, resident

#: In a process of its own: what other tests have freed would be used again, and nothing would grow.
FREED = """
from vfiouser_oob.server.trim import WORTH, give_back, resident
before = resident()
freed, kept = [], []
for number in range(1500):
    freed.append(bytes([number % 256]) * 65536)
    kept.append(bytes([number % 256]) * 1024)
freed.clear()
grown = resident() - before
assert grown > 2 * WORTH, "else this shows nothing"
thread = give_back(before)
assert thread is not None
thread.join()
assert resident() - before < grown / 2
"""


def test_what_is_freed_below_what_is_used_goes_back() -> None:
    """The C library keeps freed pieces below one that is in use; asked for, it gives their pages back."""
    subprocess.run([sys.executable, "-c", FREED], check=True)


def test_nothing_is_done_for_a_little() -> None:
    """A client that used little costs nothing when it goes, and neither does one of which that is not known."""
    assert give_back(resident()) is None
    assert give_back(0) is None
