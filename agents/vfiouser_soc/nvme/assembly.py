"""From a function's name and options to its model.

All identifiers are derived from the name, so a function is recognised again after every restart of the
simulator, and several functions in one guest differ.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from vfiouser_oob.config.errors import ConfigError
from vfiouser_soc.nvme.config import ControllerIdentity
from vfiouser_soc.nvme.function import NvmeFunction, NvmeSettings
from vfiouser_soc.nvme.namespace import Namespace, NamespaceIdentity
from vfiouser_soc.nvme.options import DEFAULT_SIZE, LBA_SIZE, Doorbells, NvmeOptions
from vfiouser_soc.nvme.stores import BackingStore, FileStore, MemoryStore, StoreError

LBA_SHIFT = LBA_SIZE.bit_length() - 1
#: Root of all names: version 5 UUIDs below it do not collide with those of real devices.
_NAMES = uuid.uuid5(uuid.NAMESPACE_DNS, "nvme.vfiouser-oob")
#: An IEEE identifier with the "locally administered" bit set, as the start of every EUI-64.
_LOCAL_OUI = bytes((0x02, 0x0B, 0x0B))
_SERIAL_SIZE = 20


def assemble(name: str, options: NvmeOptions) -> NvmeFunction:
    """Make an NVMe function with one namespace.

    Args:
        name: the function's name, from which its identifiers are made.
        options: its settings.

    Raises:
        ConfigError: the image cannot be used.
    """
    settings = NvmeSettings(
        controller_identity(name),
        polled_doorbells=options.doorbells is Doorbells.POLLED,
        cmb_size=options.cmb,
    )
    try:
        store = open_store(options.image, options.size, shared=options.shared)
    except StoreError as error:
        raise ConfigError(f"function {name!r}: {error}") from error
    try:
        if store.size < LBA_SIZE:
            raise ConfigError(f"function {name!r}: {store.summary} is smaller than one block of 512 bytes")
        return NvmeFunction(settings, [Namespace(1, store, namespace_identity(name, 1), LBA_SHIFT)])
    except BaseException:
        store.close()
        raise


def open_store(image: Path | None, size: int | None, *, shared: bool = False) -> BackingStore:
    """Open where the blocks are kept.

    Args:
        image: a file, or None for memory.
        size: bytes; None for the image's size, or the default without one.
        shared: others may have the image open too.

    Raises:
        StoreError: it cannot be used.
    """
    if image is not None:
        return FileStore(image, size, shared=shared)
    return MemoryStore(DEFAULT_SIZE if size is None else size)


def controller_identity(name: str) -> ControllerIdentity:
    """Make a controller's names.

    Args:
        name: the function's name.
    """
    unique = uuid.uuid5(_NAMES, name)
    fits = name.isascii() and len(name) <= _SERIAL_SIZE
    serial = name if fits else unique.hex[:_SERIAL_SIZE]
    return ControllerIdentity(serial, f"nqn.2014-08.org.nvmexpress:uuid:{unique}")


def namespace_identity(name: str, nsid: int) -> NamespaceIdentity:
    """Make a namespace's unique identifiers.

    Args:
        name: the function's name.
        nsid: the namespace's id.
    """
    unique = uuid.uuid5(uuid.uuid5(_NAMES, name), f"namespace {nsid}")
    eui64 = _LOCAL_OUI + unique.bytes[:5]
    return NamespaceIdentity(eui64=eui64, nguid=unique.bytes[8:] + eui64, uuid=unique)
