"""Work that a guest does by itself while it is moved: it writes and reads back, until something is wrong."""

from __future__ import annotations

from vmbed.guest import Guest

__all__ = ["begin_load", "goes_on", "quiet"]

#: Another pattern each time; counts how often it was right.
_LOAD = (
    "sh (n=0; while cmd_io $((n % 7)) 1 >/tmp/out 2>&1; do n=$((n + 1)); echo $n >/tmp/r; mv /tmp/r /tmp/rounds; done; "
    "echo wrong after $n >>/tmp/wrong) >/dev/null 2>&1 &"
)


async def begin_load(guest: Guest) -> None:
    """Begin, and wait for the first rounds."""
    await guest.check(_LOAD)
    await guest.check("sh while [ ! -e /tmp/rounds ]; do usleep 10000; done")
    await goes_on(guest)


async def _rounds(guest: Guest) -> int:
    look = "sh [ ! -e /tmp/wrong ] || { cat /tmp/wrong /tmp/out; false; }; cat /tmp/rounds"
    return int((await guest.check(look)).lines[-1])


async def goes_on(guest: Guest, more: int = 2) -> None:
    """Wait until it has come around again.

    Raises:
        BedError: what was read is not what was written.
    """
    before = await _rounds(guest)
    while await _rounds(guest) < before + more:
        await guest.check("sh usleep 100000")


async def quiet(guest: Guest) -> None:
    """Look that the guest's driver has noticed nothing."""
    lines = (await guest.check("sh dmesg | grep -i 'timeout\\|abort\\|reset\\|down' | grep -i nvme; true")).lines
    assert not lines
