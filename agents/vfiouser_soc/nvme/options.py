"""What the NVMe controller model can be told."""

from __future__ import annotations

from pathlib import Path

from vfiouser_oob.config.tables import key, section
from vfiouser_oob.config.values import FILE, SWITCH, Word, one_of, size_of

DEFAULT_SIZE = 64 << 20
LBA_SIZE = 512


class Doorbells(Word):
    """How the controller learns of a doorbell."""

    TRAPPED = "trapped", "each write is a message"
    POLLED = "polled", "in mapped memory that the model polls"


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
        "size of a controller memory buffer in a mapped BAR of its own",
        default=0,
    )
    doorbells: Doorbells = key(one_of(Doorbells), "how doorbells are written", default=Doorbells.TRAPPED)
    shared: bool = key(
        SWITCH,
        "whether other simulators may have the image open too, if they all say so; see "
        "[simulate-soc](cli.md#simulate-soc) for who may write when",
        default=False,
    )
