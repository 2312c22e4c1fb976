"""The functions of a simulated IPU/DPU: N NVMe controllers with names of their own, each on its own store.

Names are derived from the simulator's name and the function's number, so they are the same after every
restart and differ between functions, as a host that sees several of them needs.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from vfiouser_oob.simulator.nvme.config import ControllerIdentity, ControllerLimits
from vfiouser_oob.simulator.nvme.doorbells import PollTimes
from vfiouser_oob.simulator.nvme.function import NvmeFunction, NvmeOptions
from vfiouser_oob.simulator.nvme.namespace import Namespace, NamespaceIdentity
from vfiouser_oob.simulator.nvme.stores import BackingStore, FileStore, MemoryStore, StoreError

__all__ = ["DoorbellMode", "SocOptions", "StoreError", "build_functions", "image_paths"]

#: Root of all names: UUIDs of version 5 below it never collide with those of real devices.
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, "vfiouser-oob.simulator")
#: An IEEE identifier with the "locally administered" bit set, as the start of every EUI-64.
_LOCAL_OUI = bytes((0x02, 0x0B, 0x0B))
_LBA_SHIFTS = {512: 9, 4096: 12}
#: Most MSI-X vectors that every guest copes with; one belongs to the admin queue.
MAX_IO_QUEUES = 63
MAX_FUNCTIONS = 256


class DoorbellMode(enum.Enum):
    """How doorbell writes reach the controller."""

    #: Each is an access that the model handles.
    TRAPPED = "trapped"
    #: The page is shared memory, which the model polls.
    POLLED = "polled"


@dataclass(frozen=True, slots=True)
class SocOptions:
    """What a simulated SoC exposes.

    Args:
        functions: number of NVMe functions.
        size: bytes of each namespace; for existing images None leaves their size as it is.
        images: one file per function; empty for memory.
        lba_size: 512 or 4096 bytes.
        doorbells: how doorbells work.
        poll_times: how often polled doorbells are looked at.
        cmb_size: bytes of the controller memory buffer, 0 for none.
        io_queues: I/O queue pairs per function; there is one MSI-X vector more.
        name: the simulator's name, from which serial numbers and identifiers are made.
    """

    functions: int = 1
    size: int | None = 64 << 20
    images: tuple[Path, ...] = ()
    lba_size: int = 512
    doorbells: DoorbellMode = DoorbellMode.TRAPPED
    poll_times: PollTimes = field(default_factory=PollTimes)
    cmb_size: int = 0
    io_queues: int = 31
    name: str = "SOC"

    def __post_init__(self) -> None:
        problem = (
            (not 1 <= self.functions <= MAX_FUNCTIONS and f"{self.functions} functions; 1 to {MAX_FUNCTIONS}")
            or (self.lba_size not in _LBA_SHIFTS and f"blocks of {self.lba_size} bytes; 512 or 4096")
            or (not 1 <= self.io_queues <= MAX_IO_QUEUES and f"{self.io_queues} queues; 1 to {MAX_IO_QUEUES}")
            or (self.size is None and not self.images and "no size; without an image it is needed")
            or (
                self.size is not None
                and (self.size <= 0 or self.size % self.lba_size != 0)
                and f"namespaces of {self.size} bytes; a positive multiple of {self.lba_size}"
            )
            or (
                self.images
                and len(self.images) != self.functions
                and f"{len(self.images)} images for {self.functions} functions; one for each"
            )
            or (not self.name.isascii() and f"name {self.name!r}; ASCII only, since serial numbers are")
        )
        if problem:
            raise ValueError(f"{problem} is allowed" if "needed" not in problem else problem)


def image_paths(path: Path, functions: int) -> tuple[Path, ...]:
    """Name one image per function.

    Args:
        path: what the user gave.
        functions: how many are needed.

    Returns:
        The path itself for one function; for several, with the function's number before the suffix.
    """
    if functions == 1:
        return (path,)
    return tuple(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(functions))


def build_functions(options: SocOptions) -> list[NvmeFunction]:
    """Make the functions of a simulated SoC.

    Args:
        options: what to make.

    Returns:
        One model per function, in order; the caller closes them.

    Raises:
        StoreError: an image cannot be used; nothing stays open.
        ValueError: an option is out of range.
    """
    functions: list[NvmeFunction] = []
    try:
        # One by one, so that those made so far can be closed when the next one fails.
        functions.extend(_build_function(options, number) for number in range(options.functions))
    except BaseException:
        for function in functions:
            function.close()
        raise
    return functions


def _build_function(options: SocOptions, number: int) -> NvmeFunction:
    base = uuid.uuid5(_NAMES, f"{options.name}/{number}")
    identity = ControllerIdentity(
        serial=f"{options.name}{number:04d}"[-20:],
        subsystem_nqn=f"nqn.2014-08.org.nvmexpress:uuid:{base}",
    )
    nvme = NvmeOptions(
        identity,
        ControllerLimits(io_queues=options.io_queues, vectors=options.io_queues + 1),
        polled_doorbells=options.doorbells is DoorbellMode.POLLED,
        poll_times=options.poll_times,
        cmb_size=options.cmb_size,
    )
    store = _open_store(options, number)
    try:
        if store.size < options.lba_size:
            raise StoreError(f"{store.summary} has {store.size} bytes, not even one block")
        namespace = Namespace(1, store, _namespace_identity(base), _LBA_SHIFTS[options.lba_size])
        return NvmeFunction(nvme, [namespace])
    except BaseException:
        store.close()
        raise


def _namespace_identity(base: uuid.UUID) -> NamespaceIdentity:
    name = uuid.uuid5(base, "namespace 1")
    eui64 = _LOCAL_OUI + name.bytes[:5]
    # An NGUID is an EUI-64-based identifier of 16 bytes: vendor's part first, then the IEEE identifier and
    # extension.
    return NamespaceIdentity(eui64=eui64, nguid=name.bytes[8:] + eui64, uuid=name)


def _open_store(options: SocOptions, number: int) -> BackingStore:
    if options.images:
        return FileStore(options.images[number], options.size)
    assert options.size is not None
    return MemoryStore(options.size)
