"""Work that a guest does by itself while it is moved: it writes, reads back and compares, until something is wrong."""

from __future__ import annotations

from vmbed.guest import Guest

__all__ = ["begin_load", "goes_on", "quiet", "rounds"]

BEGIN_S = 60.0
#: Each round writes 64 KiB past the page cache, with a pattern that changes, reads it back and compares; its beginning
#: and end go into a file, in hundredths of a second as the guest's own clock has them.
_LOAD = (
    "sh disk=$(block_device 0) && pattern 1 1 >/tmp/p0 && pattern 2 1 >/tmp/p1 && (n=0; while "
    "read begun rest </proc/uptime; at=$((n % 256)); "
    "dd if=/tmp/p$((n % 2)) of=$disk bs=64k count=1 skip=$((n % 16)) seek=$at oflag=direct 2>/tmp/out && "
    "dd if=$disk of=/tmp/back bs=64k count=1 skip=$at iflag=direct 2>/tmp/out && "
    "dd if=/tmp/p$((n % 2)) bs=64k count=1 skip=$((n % 16)) 2>/tmp/out | cmp - /tmp/back; do "
    "read ended rest </proc/uptime; echo $begun $ended >>/tmp/rounds; n=$((n + 1)); done; "
    "echo round $n was wrong >/tmp/wrong) >/dev/null 2>&1 &"
)
_LOOK = "sh [ ! -e /tmp/wrong ] || { cat /tmp/wrong /tmp/out; false; }; cat /tmp/rounds"


async def begin_load(guest: Guest) -> None:
    """Begin, and wait for the first round."""
    await guest.check(_LOAD)
    await guest.check("sh while [ ! -e /tmp/rounds -a ! -e /tmp/wrong ]; do usleep 10000; done", BEGIN_S)
    await rounds(guest)


async def rounds(guest: Guest) -> list[int]:
    """How long each round took that went well, in milliseconds.

    Raises:
        BedError: what was read is not what was written.
    """
    times = [line.split() for line in (await guest.check(_LOOK)).lines]
    return [round((float(pair[1]) - float(pair[0])) * 1000) for pair in times if len(pair) == 2]


async def goes_on(guest: Guest, more: int = 2) -> int:
    """Wait until it has come around again; returns how many rounds there were."""
    before = len(await rounds(guest))
    while (count := len(await rounds(guest))) < before + more:
        await guest.check("sh usleep 50000")
    return count


async def quiet(guest: Guest) -> None:
    """Look that the guest's driver has noticed nothing."""
    lines = (await guest.check("sh dmesg | grep -i 'timeout\\|abort\\|reset\\|down' | grep -i nvme; true")).lines
    assert not lines
