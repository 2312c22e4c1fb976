"""The kernel's table of descriptors has its size before clients come, so that it never grows under them."""

import subprocess
import sys

import pytest

from vfiouser_oob.transport.fd_table import ROOM

#: In a process of its own, since a table never shrinks; says how large it is, and what of it is in use.
_CHILD = """
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
hard = min(int(sys.argv[1]), hard)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))
before = os.listdir("/proc/self/fd")
from vfiouser_oob.transport.fd_table import make_room_for_fds
make_room_for_fds()
assert os.listdir("/proc/self/fd") == before
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(hard, int(status["FDSize"]))
"""


@pytest.mark.parametrize("limit", [600, 4096, 2 * ROOM])
def test_table_has_its_size_before_clients_come(limit: int) -> None:
    """No descriptor that a client brings makes the kernel enlarge the table, and none stays open for that."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(limit)], capture_output=True, text=True, check=True)
    hard, size = map(int, done.stdout.split())
    assert size >= min(hard, ROOM)


def test_process_that_may_have_no_more_descriptors_goes_on() -> None:
    """Where there is no room at all, the table stays as it is."""
    child = (
        "import resource\n"
        "from vfiouser_oob.transport.fd_table import make_room_for_fds\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "make_room_for_fds()\n"
    )
    subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
