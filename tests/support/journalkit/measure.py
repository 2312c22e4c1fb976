"""What the journal and the memory of a stream cost: `python -m journalkit.measure`; the best of many rounds counts."""

from __future__ import annotations

import timeit
from collections.abc import Callable

from vfiouser_oob.persist.journal.journal import Journal, read_journal
from vfiouser_oob.persist.stream_memory import StreamMemory
from vfiouser_oob.persist.successor.things import RangeThing


def best_ns(work: Callable[[], object], number: int, rounds: int = 30) -> float:
    """Nanoseconds per call."""
    return min(timeit.repeat(work, number=number, repeat=rounds)) / number * 1e9


def main() -> None:
    """Print the figures that the docstrings name."""
    value, key = bytes(32), bytes(8)
    with Journal.create("measure") as journal:
        print(f"put                      {best_ns(lambda: journal.put(1, key, value), 300, 200):6.0f} ns")
        for number in range(1000):
            journal.put(1, number.to_bytes(8, "big"), value)
        print(f"put, 1000 records known  {best_ns(lambda: journal.put(1, key, value), 20_000, 10):6.0f} ns")
        count = read_journal(journal).changes + 1000
        print(f"read, per record         {best_ns(lambda: read_journal(journal), 1) / count:6.0f} ns")
    mapped = RangeThing(1 << 32, 1 << 30, 3, 0, "vfu/file/1-2345-2")
    print(f"a range as a record      {best_ns(mapped.to_record, 10_000):6.0f} ns")
    with StreamMemory.create("measure") as page:

        def access() -> None:
            page.begin()
            page.consuming(40, 40, command=True)
            page.commit()
            page.consumed()

        print(f"register access          {best_ns(access, 10_000):6.0f} ns")
        print(f"one step                 {best_ns(page.begin, 10_000):6.0f} ns")
    print(f"an empty call            {best_ns(lambda: None, 10_000):6.0f} ns")


if __name__ == "__main__":
    main()
