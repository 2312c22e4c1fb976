"""What the NVMe controller model can be told."""

from __future__ import annotations

import os
from pathlib import Path

from vfiouser_oob.config.tables import key, section
from vfiouser_oob.config.values import FILE, SWITCH, Word, format_size, one_of, size_of

DEFAULT_SIZE = 64 << 20
LBA_SIZE = 512


class Doorbells(Word):
    """How the controller learns of a doorbell."""

    TRAPPED = "trapped", "each write is a message"
    POLLED = "polled", "the model polls mapped memory"


#: A namespace in memory takes only what was written to it, so it may be larger than the memory, but not beyond measure.
_RAM_FACTOR = 4


def memory_of_machine() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@section
class NvmeOptions:
    """An NVMe controller with one namespace."""

    size: int | None = key(
        size_of(LBA_SIZE, unit=LBA_SIZE, rule=f"a multiple of {LBA_SIZE} bytes and not 0"),
        "size of the namespace",
        default=None,
        unset="that of `image`, or 64M without one",
    )
    image: Path | None = key(FILE, "file that holds the namespace", default=None, unset="RAM")
    # Enough for a driver to use it.
    cmb: int = key(
        size_of(2 << 20, unit=4096, or_zero=True),
        "size of the controller memory buffer in a mapped BAR of its own",
        default=0,
    )
    doorbells: Doorbells = key(one_of(Doorbells), "how doorbells arrive", default=Doorbells.TRAPPED)
    shared: bool = key(
        SWITCH,
        "whether other simulators may open the image too, if all of them set this; see "
        "[simulate-soc](cli.md#simulate-soc) for who may write when",
        default=False,
    )

    def __post_init__(self) -> None:
        memory = memory_of_machine()
        if self.image is None and self.size is not None and self.size > _RAM_FACTOR * memory:
            have = f"{memory / (1 << 30):.0f}G"
            raise ValueError(
                f"a namespace of {format_size(self.size)} in RAM is too large for a machine with {have} of memory; "
                f"name a file with key 'image'"
            )
