"""Verified I/O at a depth: loops in a guest, each of which writes, reads back and compares."""

from __future__ import annotations

from vmbed.guest import Guest

__all__ = ["LOOPS", "begin_loops", "loops_go_on"]

LOOPS = 4
BEGIN_S = 90.0
#: KiB of a request, and of what it is cut into: commands that are under way at once.
REQUEST_KIB, COMMAND_KIB = 64, 8
#: Each has a place on the disk of its own and two patterns in turn. They write past the page cache until something is
#: wrong, and count how often it was right.
_LOAD = (
    "sh disk=$(block_device {function}); "
    "echo {kib} >/sys/block/${{disk##*/}}/queue/max_sectors_kb; "
    "for k in $(seq {first} {last}); do (n=0; while "
    "dd if=/tmp/p$((n % 2)) of=$disk bs={size}k count=8 seek=$((16 * k)) oflag=direct 2>/tmp/out.$k && "
    "dd if=$disk bs={size}k count=8 skip=$((16 * k)) iflag=direct 2>/tmp/out.$k >/tmp/back.$k && "
    "dd if=/tmp/p$((n % 2)) bs={size}k count=8 2>/tmp/out.$k | cmp - /tmp/back.$k; "
    "do n=$((n + 1)); echo $n >/tmp/new.$k; mv /tmp/new.$k /tmp/rounds.$k; done; "
    "echo loop $k wrong after $n >>/tmp/wrong) >/dev/null 2>&1 & done"
)


async def begin_loops(guest: Guest, functions: int = 1, each: int = LOOPS) -> None:
    """Begin the load, and wait for its first rounds.

    Args:
        guest: who does it.
        functions: how many functions it has.
        each: loops on each of them.
    """
    await guest.check("sh pattern 1 1 >/tmp/p0; pattern 2 1 >/tmp/p1")
    for function in range(functions):
        first = 1 + function * each
        await guest.check(
            _LOAD.format(function=function, first=first, last=first + each - 1, kib=COMMAND_KIB, size=REQUEST_KIB)
        )
    begun = f"[ $(ls /tmp | grep -c rounds) -ge {functions * each} -o -e /tmp/wrong ]"
    await guest.check(f"sh until {begun}; do usleep 10000; done", BEGIN_S)
    await loops_go_on(guest)


async def loops_go_on(guest: Guest, more: int = 2) -> None:
    """Wait until every loop has come around again.

    Raises:
        BedError: one read something else than it wrote.
    """
    before = await _rounds(guest)
    while any(now < then + more for now, then in zip(await _rounds(guest), before, strict=True)):
        await guest.check("sh usleep 50000")


async def _rounds(guest: Guest) -> list[int]:
    """How often each loop has read back what it wrote."""
    found = await guest.check("sh [ ! -e /tmp/wrong ] || { cat /tmp/wrong /tmp/out.*; false; }; cat /tmp/rounds.*")
    return [int(line) for line in found.lines]
